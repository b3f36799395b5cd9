"""Random settings: a run either accepts them or says in one line what is wrong."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from iic_dist.config import Config
from iic_dist.config.build import RunData
from iic_dist.config.command_line import parse
from iic_dist.data.image_set import ImageSet
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.training.trainer import Trainer

ODD: list[Any] = [
    *(0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**64, -(2**63), 10**30),
    *(0.0, 0.5, -0.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        " ",
        "null",
        "auto",
        "none",
        "x" * 300,
        "é☃",
        "a\nb",
        "\x00",
        "{",
        "[",
        "}: :",
        "- -",
        "*",
        "&a",
        "!!python/x",
    ),
    *(None, True, False, [], [1], [0.1, 0.2], [-1, 2], ["clustering"], {}, {"a": 1}, [[[]]]),
    *("resnet18", "small_cnn", "iic", "simclr", "digits", "batch", "sgd", "alternate", "[0.2, 0.9]", "../x", "1e400"),
]
# What would take the machine's memory or start a download is not a mistake that a line of text can name.
LEFT_ALONE = {"data.root", "data.name", "model.pretrained", "train.compile"}
DEFAULTS = {
    f"{group}.{field}": value
    for group, fields in dataclasses.asdict(Config()).items()
    for field, value in fields.items()
    if f"{group}.{field}" not in LEFT_ALONE
}
FIELDS = list(DEFAULTS)
IMAGES = ImageSet("digits", torch.zeros(20, 1, 8, 8, dtype=torch.uint8), torch.arange(20) % 4, tuple("abcd"))
SMALL = ["--data.batch_size", "4"]


def arguments(draw: random.Random, folder: Path) -> list[str]:
    """A few odd settings, half of them of the right type, as options or in a file."""
    chosen = []
    for name in draw.choices(FIELDS, k=draw.choice([1, 1, 1, 2, 4])):
        fitting = [value for value in ODD if type(value) is type(DEFAULTS[name])]
        chosen.append((name, draw.choice(fitting if fitting and draw.random() < 0.7 else ODD)))
    if draw.random() < 0.1:
        chosen.append(("no.such", 1))
    if draw.random() < 0.5:
        return [*SMALL, *(part for name, value in chosen for part in (f"--{name}", str(value)))]
    groups: dict[str, Any] = {}
    for name, value in chosen:
        group, field = name.split(".")
        groups.setdefault(group, {})[field] = value
    text = yaml.safe_dump(draw.choice([groups, groups, groups, list(groups), "text", None, {"run": 3}]))
    if draw.random() < 0.1:
        text = text[: draw.randint(0, len(text))] + draw.choice(ODD[19:35])
    path = folder / "config.yaml"
    path.write_text(text)
    return ["--config", str(path), *SMALL]


def too_large(config: Config) -> bool:
    """Whether the network or the views would be larger than a test may be."""
    model, views = config.model, config.views
    clusters = model.num_clusters if isinstance(model.num_clusters, list) else [model.num_clusters]
    sizes = (*clusters, model.num_overclusters, model.sub_heads, model.projection_dim, model.projection_hidden)
    return max(size or 0 for size in (*sizes, views.repeats, views.size, *(views.crop_sides or []))) > 1000


def complaint(options: list[str]) -> str | None:
    try:
        config = parse(options)
        if not too_large(config):
            Trainer(config, RunData(IMAGES, IMAGES), Place(), torch.device("cpu"))
    except UsageError as error:
        return str(error)
    return None


@pytest.mark.parametrize("cases", [pytest.param(30, id="30"), pytest.param(500, marks=pytest.mark.slow, id="500")])
def test_odd_settings_are_taken_or_refused_in_one_line(cases: int, tmp_path: Path) -> None:
    refused = 0
    for seed in range(cases):
        options = arguments(random.Random(seed), tmp_path)
        try:
            said = complaint(options)
        except Exception as error:
            raise AssertionError(f"case {seed}: {options}: {type(error).__name__}: {error}") from error
        if said is not None:
            refused += 1
            assert said, options
            assert "\n" not in said, (options, said)
            assert len(said) < 1500, (options, said)
    assert cases / 2 < refused < cases * 0.95
