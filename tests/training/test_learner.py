"""The network of a run and what a step changes: what a checkpoint holds of it."""

from __future__ import annotations

from pathlib import Path

import torch

from iic_dist.config.build import load_data
from iic_dist.config.command_line import parse
from iic_dist.distributed import Place
from iic_dist.training.trainer import Trainer


def small_trainer() -> Trainer:
    config = parse(["--data.batch_size", "512", "--model.sub_heads", "2", "--monitor.progress", "false"])
    return Trainer(config, load_data(config, Place()), Place(), torch.device("cpu"))


def test_the_state_of_a_run_is_flat() -> None:
    """Checkpoints of before there was a learner, or were stages, have some of these keys, and load."""
    learned = {"model", "optimizer", "sub_heads", "stuck", "guard"}
    trainer = small_trainer()
    assert set(trainer.learner.state_dict()) == learned
    run = {"step", "epoch", "train_seconds", "clustering_head"}
    staged = {"stage", "stage_done", "stage_figures", "first_step", "neighbours", "neighbour_state", "images"}
    assert set(trainer.state_dict()) == learned | run | staged


def test_a_learner_goes_on_from_the_state_of_another(tmp_path: Path) -> None:
    first, second = small_trainer(), small_trainer()
    for position in range(2):
        first.train_step(first.course.schedule.passes(0)[0], position)
    torch.save(first.state_dict(), tmp_path / "state")
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for trainer in (first, second):
        trainer.train_step(trainer.course.schedule.passes(0)[0], 2)
    for one, other in zip(first.learner.model.parameters(), second.learner.model.parameters(), strict=True):
        assert torch.equal(one, other)
