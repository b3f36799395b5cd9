"""The policies: what was published, what a choice replaces, and what users get wrong."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from policy_cases import build

from iic_dist.config.settings import ViewsConfig
from iic_dist.errors import UsageError
from iic_dist.views.policies import policy
from iic_dist.views.spec import ViewSpec


def test_iic_policies_are_the_published_ones() -> None:
    cifar, stl10, mnist = build("iic", 3, 32, {}), build("iic", 3, 96, {}), build("iic", 1, 28, {})
    assert cifar.first == ViewSpec(size=32, crop_sides=(20,), sobel=True)
    strong = {"flip": 0.5, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.125}
    assert cifar.second == replace(cifar.first, **strong)
    assert stl10.first == ViewSpec(size=64, crop_sides=(64,), sobel=True)
    assert stl10.second == replace(stl10.first, **strong)
    assert mnist.first == ViewSpec(size=24, crop_sides=(20,), centre_probability=0.5)
    assert mnist.second == ViewSpec(
        size=24,
        crop_sides=(16, 20, 24),
        rotation=25.0,
        affine_probability=0.5,
        brightness=0.4,
        contrast=0.4,
    )
    assert [views.channels(c) for views, c in ((cifar, 3), (stl10, 3), (mnist, 1))] == [2, 2, 1]


def test_choices_replace_the_policy() -> None:
    views = build("iic", 3, 32, {"crop_sides": [12, 28, 16], "flip": 0.1, "jitter": 0.5, "gray": 0.3})
    assert views.first == ViewSpec(size=32, crop_sides=(16,), sobel=True)
    assert views.second.crop_sides == (12, 28, 16)
    assert (views.second.flip, views.second.gray) == (0.1, 0.3)
    assert (views.second.brightness, views.second.hue) == (0.2, 0.0625)
    area = build("iic", 3, 32, {"crop_area": (0.5, 1), "mean": [0, 0], "std": [1, 2], "rotation": 5})
    assert area.first == ViewSpec(size=32, crop_area=(0.5, 1), sobel=True, mean=(0, 0), std=(1, 2))
    assert (area.second.crop_area, area.second.rotation) == ((0.5, 1), 5)
    plain = build("simclr", 3, 32, {"jitter": 0, "gray": 0, "flip": 0, "blur": 0.5, "sobel": True})
    assert plain.first == plain.second
    assert plain.second == ViewSpec(size=32, crop_area=(0.2, 1.0), blur=0.5, jitter_probability=0.8, sobel=True)


@pytest.mark.parametrize(
    ("channels", "options", "quoted"),
    [
        (3, {"name": "byol"}, "'byol'.*iic, simclr, digits"),
        (1, {"gray": 0.2}, "gray=0.2.*1 channel"),
        (3, {"crop_sides": (20, 40)}, "40 pixels.*32 x 32"),
        (3, {"crop_sides": (0,)}, r"crop_sides.*\(0,\)"),
        (3, {"crop_sides": (20,), "crop_area": (0.5, 1)}, r"\(0.5, 1\).*\(20,\).*exclude"),
        (3, {"crop_area": (0.0, 1)}, r"crop_area.*\(0.0, 1\)"),
        (3, {"crop_area": (0.9, 0.5)}, r"crop_area.*\(0.9, 0.5\)"),
        (3, {"crop_area": (0.5,)}, r"crop_area.*\(0.5,\)"),
        (3, {"flip": 1.5}, "flip.*1.5"),
        (3, {"blur": -0.1}, "blur.*-0.1"),
        (3, {"jitter": -1}, "jitter.*-1"),
        (3, {"jitter": 10}, "hue.*1.0"),
        (3, {"rotation": 200}, "rotation.*200"),
        (3, {"size": 1}, "size.*1"),
        (3, {"repeats": 0}, "repeats.*0"),
        (3, {"mean": (0.5,) * 3}, "mean.*std"),
        (3, {"mean": (0.5,) * 3, "std": (1.0, 0.0, 1.0)}, "std.*0.0"),
        (3, {"mean": (0.5,) * 2, "std": (1.0,) * 2}, "1 number or 3"),
        (3, {"mean": (0.5,) * 3, "std": (1.0,) * 3, "sobel": True}, "1 number or 2.*Sobel"),
        (4, {}, "1 or 3 channels, not 4"),
    ],
)
def test_what_users_get_wrong(channels: int, options: dict[str, Any], quoted: str) -> None:
    with pytest.raises(UsageError, match=quoted) as error:
        policy(**({"name": "simclr", "image_size": 32, "channels": channels, "seed": 0} | options))
    assert "\n" not in str(error.value)


def test_every_view_setting_is_a_choice_of_the_policy() -> None:
    """`build_views` hands the settings on by their names: one without its keyword would end every run at its start."""
    settings = {field.name for field in fields(ViewsConfig)} - {"policy"}
    parameters = inspect.signature(policy).parameters.values()
    keywords = {parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
    assert keywords == settings | {"image_size", "channels", "seed"}  # of the images, and of the run


def test_an_evaluation_may_see_another_size_than_the_training() -> None:
    """A network that learned from crops at 16 px is to see whole images at 24."""
    images = torch.randint(0, 256, (3, 1, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views = policy("simclr", image_size=24, channels=1, seed=0, size=16, evaluate_size=24)
    rows = torch.arange(3)
    assert views.training(images, rows, rows, 0).shape == (6, 1, 16, 16)
    seen = views.evaluation(images, rows)
    torch.testing.assert_close(seen, (images / 255 - 0.5) / 0.25)
    assert views.evaluation(images, rows, size=views.size).shape == (3, 1, 16, 16)
