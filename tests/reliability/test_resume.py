"""A run that is gone on with is the run that never ended: bit for bit on as many ranks, the same images on others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_tasks
import torch
from ranks import Ranks
from runs import assert_equal, timeless
from torch import Tensor

from iic_dist.config.build import RunData
from iic_dist.config.command_line import parse
from iic_dist.data.image_set import ImageSet
from iic_dist.distributed import Place
from iic_dist.training import report, resume
from iic_dist.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

# Forty steps: ten epochs of one pass of four steps, or two of four passes of five.
JOINT = ["--data.batch_size", "12", "--train.epochs", "10", "--model.num_overclusters", "6"]
TURNS = [
    *("--data.batch_size", "10", "--train.epochs", "2", "--train.schedule", "alternate"),
    *("--train.order", "[overclustering, clustering, contrastive, clustering]", "--optim.name", "sgd"),
]
QUIET = ["--monitor.progress", "false", "--train.evaluate_every", "1", "--model.sub_heads", "2", "--views.size", "8"]


def images() -> ImageSet:
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (51, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet("digits", pixels, torch.arange(51) % 4, tuple("abcd"))


class Recorded(Trainer):
    """A trainer that remembers which images and which pixels went into each of its steps."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: list[tuple[int, str]] = []
        make = self.inputs._make

        def remember(batch: Any, first_view: int) -> Tensor:
            views = make(batch, first_view)
            digest = hashlib.sha256(views.numpy().tobytes() + batch.indices.numpy().tobytes())
            self.seen.append((self.step, digest.hexdigest()))
            return views

        self.inputs._make = remember  # type: ignore[method-assign]


def trainer(options: list[str]) -> Recorded:
    config = parse([*QUIET, *options])
    return Recorded(config, RunData(images(), images()), Place(), torch.device("cpu"))


@pytest.mark.parametrize("options", [JOINT, TURNS, [*JOINT, "--optim.name", "muon"]], ids=["joint", "in turns", "muon"])
@pytest.mark.parametrize("every", [pytest.param(9, id="some"), pytest.param(1, marks=pytest.mark.slow, id="all")])
def test_a_run_that_dies_after_any_of_forty_steps_ends_alike(
    options: list[str], every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for picture in ("show_views", "show_clusters"):
        monkeypatch.setattr(report, picture, lambda *arguments: None)
    saved: list[Path] = []

    def save_each(folder: Path, state: dict[str, Any], loss: float | None = None) -> bool:
        saved.append(tmp_path / f"{state['epoch']}-{state['step']}")
        return keep(saved[-1], state, loss)

    keep = resume.save
    monkeypatch.setattr(resume, "save", save_each)
    whole = trainer([*options, "--train.checkpoint_every_steps", "1", "--train.checkpoint_every", "1"])
    result = whole.train(tmp_path / "whole")
    monkeypatch.setattr(resume, "save", keep)
    assert whole.step == 40
    assert {int(path.name.split("-")[1]) for path in saved} == set(range(1, 41))
    for folder in saved[::every]:
        resumed = trainer(options)
        assert resumed.resume(folder)
        first = resumed.step
        again = resumed.train(folder)
        assert_equal(timeless(resumed.state_dict()), timeless(whole.state_dict()), f"after step {first}")
        assert resumed.seen == [entry for entry in whole.seen if entry[0] >= first]
        assert (again or {})["accuracy"] == (result or {})["accuracy"]


@pytest.fixture
def train_on(ranks: Ranks, pair: Ranks) -> Callable[..., list[Tensor]]:
    """`rank_tasks.train_on` on one, two or four ranks."""

    def run(world_size: int, *arguments: Any) -> list[Tensor]:
        if world_size == 1:
            return [rank_tasks.train_on(0, None, *arguments)]
        return {2: pair, 4: ranks}[world_size].run(world_size, rank_tasks.train_on, *arguments)

    return run


def test_a_run_can_go_on_with_other_numbers_of_ranks(train_on: Callable[..., list[Tensor]], tmp_path: Path) -> None:
    """One rank, then two, then four, against one all the way."""
    options = [
        *("--data.batch_size", "64", "--train.precision", "float64", "--model.norm", "none"),
        *("--model.sub_heads", "2", "--monitor.progress", "false"),
    ]
    [one] = train_on(1, options, str(tmp_path / "one"), 6)
    for world_size, steps in ((1, 2), (2, 4), (4, 6)):
        changing = train_on(world_size, options, str(tmp_path / "changing"), steps)
        assert all(torch.equal(other, changing[0]) for other in changing)
    assert float((changing[0] - one).abs().max()) <= 1e-10


@pytest.mark.parametrize(
    ("precision", "optimizer", "tolerance"),
    [("float64", "sgd", 1e-10), ("float64", "muon", 1e-10), ("float32", "sgd", 1e-5), ("float32", "muon", 2e-4)],
)
def test_one_two_and_four_ranks_train_alike(
    train_on: Callable[..., list[Tensor]], tmp_path: Path, precision: str, optimizer: str, tolerance: float
) -> None:
    options = [
        *("--data.batch_size", "64", "--train.precision", precision, "--model.norm", "none"),
        *("--model.sub_heads", "2", "--monitor.progress", "false", "--optim.name", optimizer, "--optim.lr", "0.01"),
    ]
    [one] = train_on(1, options, str(tmp_path / "1"), 6)
    for world_size in (2, 4):
        for weights in train_on(world_size, options, str(tmp_path / str(world_size)), 6):
            assert float((weights - one).abs().max()) <= tolerance


def test_a_run_on_two_ranks_goes_on_bit_for_bit(train_on: Callable[..., list[Tensor]], tmp_path: Path) -> None:
    """With batch normalisation, whose statistics each rank measures on its own images."""
    options = ["--data.batch_size", "64", "--model.sub_heads", "2", "--monitor.progress", "false"]
    whole = train_on(2, options, str(tmp_path / "whole"), 5)
    for steps in (1, 3, 5):
        parts = train_on(2, options, str(tmp_path / "parts"), steps)
    for mine, theirs in zip(whole, parts, strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(mine, whole[0])
