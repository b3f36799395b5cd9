"""The parameters of views: how they are distributed, and the same bits by Python's floats, on any rank and split."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import draws
import pytest
import torch
from policy_cases import GENTLE, POLICIES, build
from scipy import stats
from torch import Tensor

from iic_dist.data.sampler import Sampler
from iic_dist.ops import augment as native
from iic_dist.ops.exact import cos_sin, power
from iic_dist.ops.philox import uniforms
from iic_dist.views.draw import draw
from iic_dist.views.spec import ViewSpec

SPECS = [GENTLE, replace(GENTLE, crop_area=None, crop_sides=(9, 13), centre_probability=0.3), ViewSpec(size=9)]
SPECS += [replace(GENTLE, crop_area=(0.01, 0.3), crop_ratio=(0.2, 7.0), rotation=180.0, shear=60.0)]
for policy in POLICIES:
    made = build(*policy.values)  # type: ignore[arg-type]
    SPECS += [made.first, made.second]


def drawn(spec: ViewSpec, height: int = 30, width: int = 40, count: int = 20_000) -> dict[str, Tensor]:
    parameters = draw(spec, uniforms(11, 0, torch.arange(count), 0, 21), height, width)
    return {field.name: getattr(parameters, field.name) for field in fields(parameters)}


def assert_uniform(values: Tensor, least: float, largest: float) -> None:
    assert stats.kstest(values.double().numpy(), "uniform", (least, largest - least)).pvalue > 1e-3


def assert_share(chosen: Tensor, probability: float) -> None:
    assert stats.binomtest(int(chosen.sum()), chosen.numel(), probability).pvalue > 1e-3


def table(spec: ViewSpec, numbers: Tensor, height: int, width: int) -> Tensor:
    return native.table(vars(draw(spec, numbers, height, width)), len(numbers), height, width, numbers.device)


def test_cosine_and_sine() -> None:
    degrees = torch.linspace(-180, 180, 10_001, dtype=torch.float64)
    cos, sin = cos_sin(degrees)
    torch.testing.assert_close(cos, torch.cos(torch.deg2rad(degrees)), rtol=0, atol=1e-14)
    torch.testing.assert_close(sin, torch.sin(torch.deg2rad(degrees)), rtol=0, atol=1e-14)
    cos, sin = cos_sin(torch.zeros(1, dtype=torch.float64))
    assert (cos.item(), sin.item()) == (1.0, 0.0)


def test_power() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.exp(20 * torch.rand(10_000, generator=generator, dtype=torch.float64) - 10)
    exponent = torch.randint(0, 2**24, (10_000,), generator=generator) * 2.0**-24
    exponent[:2] = torch.tensor([0.0, 1 - 2.0**-24])
    exact = [math.exp(e * math.log(b)) for b, e in zip(base.tolist(), exponent.tolist(), strict=True)]
    torch.testing.assert_close(
        power(base, exponent.double()), torch.tensor(exact, dtype=torch.float64), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.size}px")
@pytest.mark.parametrize(("height", "width"), [(96, 96), (97, 131)])
def test_the_same_bits_by_pythons_floats(spec: ViewSpec, height: int, width: int) -> None:
    indices = torch.arange(60) * 71_582_788
    by_torch = table(spec, uniforms(2**40 + 7, 3, indices, 2, 21), height, width).numpy()
    for row, index in zip(by_torch, indices.tolist(), strict=True):
        by_hand = draws.table(spec, draws.uniforms(2**40 + 7, 3, index, 2), height, width)
        assert row.tobytes() == by_hand.tobytes()


def digest() -> str:
    """Of the parameters of 1000 images by every spec."""
    numbers = uniforms(5, 1, torch.arange(1000), 0, 21)
    tables = [table(spec, numbers, 97, 131) for spec in SPECS]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tables)).hexdigest()


def test_the_same_bits_without_vector_instructions() -> None:
    program = "import test_draw; print(test_draw.digest())"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == digest()


@pytest.mark.parametrize("spec", SPECS[:4], ids=["area", "sides", "whole", "extreme"])
def test_ranks_and_splits_change_nothing(spec: ViewSpec) -> None:
    """What W ranks draw for their slices of an epoch is what one process draws."""
    whole = table(spec, uniforms(0, 2, torch.arange(96), 1, 21), 97, 131)
    for world_size in (1, 2, 3, 4):
        samplers = [Sampler(96, 24, 0, rank, world_size) for rank in range(world_size)]
        seen = []
        for sampler, step in itertools.product(samplers, range(samplers[0].steps_per_epoch)):
            indices = sampler.batch(2 * sampler.steps_per_epoch + step).indices
            assert torch.equal(table(spec, uniforms(0, 2, indices, 1, 21), 97, 131), whole[indices])
            seen += indices.tolist()
        assert sorted(seen) == list(range(96))


def test_parameters_are_independent() -> None:
    """Rank correlations between parameters, and of each with itself in the next image, view and epoch."""
    count = 20_000
    spec = replace(GENTLE, jitter_probability=1.0, affine_probability=1.0, blur=1.0, centre_probability=0.0)
    indices = torch.arange(count + 1)
    base = table(spec, uniforms(3, 0, indices, 0, 21), 40, 40).double()
    columns = [2, 5, 6, 8, 11, 12, 13, 14, 16]  # shifts, top, height, factors, hue, sigma: continuous ones
    others = {
        "image": base[1:],
        "view": table(spec, uniforms(3, 0, indices, 1, 21), 40, 40)[:-1].double(),
        "epoch": table(spec, uniforms(3, 1, indices, 0, 21), 40, 40)[:-1].double(),
    }
    base = base[:-1]
    pvalues = {
        (name, column): stats.spearmanr(base[:, column], other[:, column]).pvalue
        for name, other in others.items()
        for column in columns
    }
    free = [column for column in columns if column != 8]  # where a crop may lie depends on its height
    for one, two in itertools.combinations(free, 2):
        pvalues["parameters", one, two] = stats.spearmanr(base[:, one], base[:, two]).pvalue
    worst = min(pvalues, key=lambda key: pvalues[key])
    assert pvalues[worst] * len(pvalues) > 1e-3, worst


def test_off_by_default() -> None:
    assert all(value is None for value in drawn(ViewSpec(size=30), 30, 30).values())


def test_jitter_parameters() -> None:
    parameters = drawn(GENTLE)
    for name, neutral, least, largest in (
        ("brightness", 1.0, 0.6, 1.4),
        ("contrast", 1.0, 0.6, 1.4),
        ("saturation", 1.0, 0.6, 1.4),
        ("hue", 0.0, -0.1, 0.1),
    ):
        values = parameters[name]
        assert values.dtype == torch.float32
        applied = values != neutral
        assert_share(applied, 0.8)
        assert_uniform(values[applied], least, largest)
    assert torch.equal(parameters["hue"] != 0, parameters["brightness"] != 1)  # all four of an image or none
    assert drawn(replace(GENTLE, brightness=1.5))["brightness"].min() >= 0


def test_probabilities() -> None:
    parameters = drawn(GENTLE)
    assert_share(parameters["flip"], 0.5)
    assert_share(parameters["gray"], 0.2)
    assert_share(parameters["sigma"] > 0, 0.5)
    assert_uniform(parameters["sigma"][parameters["sigma"] > 0], 0.1, 2.0)


def test_affine_parameters() -> None:
    a, b, c, d, e, f = drawn(GENTLE)["affine"].double().unbind(1)
    applied = a != 1
    assert_share(applied, 0.7)
    for values, neutral in ((a, 1), (b, 0), (c, 0), (d, 0), (e, 1), (f, 0)):
        assert (values[~applied] == neutral).all()
    # Back from the inverse map to the drawn numbers: shears change no area and d, e hold no shear along x.
    a, b, c, d, e, f = (values[applied] for values in (a, b, c, d, e, f))
    area = a * e - b * d
    zoom, move_x, move_y = area.rsqrt(), (b * f - c * e) / area, (c * d - a * f) / area
    assert_uniform(zoom, 0.9, 1.1)
    assert_uniform(move_x, -4, 4)
    assert_uniform(move_y, -3, 3)
    for spec, column, largest in (({"rotation": 20.0}, 1, 20), ({"shear": 5.0}, 3, 5)):
        alone = drawn(ViewSpec(size=30, **spec), 30, 40)["affine"].double()
        degrees = torch.rad2deg(torch.atan2(alone[:, column], alone[:, 4 if column == 3 else 0]))
        assert_uniform(degrees, -largest, largest)
    assert (torch.corrcoef(torch.stack((zoom, move_x, move_y, d / e))) - torch.eye(4)).abs().max() < 0.05


@pytest.mark.parametrize(("height", "width"), [(32, 32), (30, 40), (10, 40)])
def test_area_crop(height: int, width: int) -> None:
    top, left, box_height, box_width = drawn(GENTLE, height, width)["box"].double().unbind(1)
    for start, length, side in ((top, box_height, height), (left, box_width, width)):
        assert start.min() >= 0
        assert length.min() >= 1
        assert (start + length).max() <= side + 1e-4
    area, ratio = box_height * box_width / (height * width), box_width / box_height
    assert_uniform(area, 0.3, 1.0)
    if height == width:
        assert ratio.min() >= 3 / 4 - 1e-6
        assert ratio.max() <= 4 / 3 + 1e-6
        small = area < 0.5  # where the whole range of ratios fits
        assert_uniform(ratio[small].log(), math.log(3 / 4), math.log(4 / 3))
        assert_uniform((left / (width - box_width))[small], 0.0, 1.0)


def test_square_crops() -> None:
    spec = ViewSpec(size=24, crop_sides=(24, 16, 20), centre_probability=0.25)
    top, left, height, width = drawn(spec, 28, 29)["box"].unbind(1)
    assert torch.equal(height, width)
    for side in (16, 20, 24):
        chosen = height == side
        assert_share(chosen, 1 / 3)
        centred = (top == (28 - side) // 2) & (left == round((29 - side) / 2))
        by_chance = 1 / ((28 - side + 1) * (29 - side + 1))
        assert_share(centred[chosen], 0.25 + 0.75 * by_chance)
        assert (top == top.round()).all()
        assert set(left[chosen].tolist()) == set(range(29 - side + 1))
        assert set(top[chosen].tolist()) == set(range(28 - side + 1))


def test_switching_one_thing_off_leaves_the_others() -> None:
    less = drawn(replace(GENTLE, flip=0.0, hue=0.0, crop_area=None, translation=0.0))
    for name, values in drawn(GENTLE).items():
        if name not in ("flip", "hue", "box", "affine"):
            assert torch.equal(less[name], values), name
