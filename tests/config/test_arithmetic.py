"""What `auto` chooses for a device, that a run keeps it, and that the choice changes the numbers by rounding alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from iic_dist.config import arithmetic
from iic_dist.config.arithmetic import for_device
from iic_dist.config.command_line import parse
from iic_dist.distributed import Place
from iic_dist.train import train
from iic_dist.training.open import open_trainer
from iic_dist.training.run_folder import settings_of
from iic_dist.training.stop import StopSignals

CPU = torch.device("cpu")
SMALL = ("--train.epochs", "1", "--data.batch_size", "64", "--model.sub_heads", "2", "--monitor.progress", "false")


@pytest.fixture(params=[False, True], ids=["no-amx", "amx"])
def amx(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(arithmetic, "has_amx", lambda: request.param)
    return bool(request.param)


def test_auto_takes_what_the_device_is_fast_with(amx: bool) -> None:
    chosen = for_device(parse([]), CPU).train
    assert (chosen.precision, chosen.channels_last) == ("bfloat16" if amx else "float32", True)
    on_gpu = for_device(parse([]), torch.device("cuda")).train
    assert (on_gpu.precision, on_gpu.channels_last) == ("float32", False)


def test_what_is_asked_for_stays(amx: bool) -> None:
    asked = parse(["--train.precision", "float64", "--train.channels_last", "false"])
    assert for_device(asked, CPU).train == asked.train
    half = for_device(parse(["--train.precision", "bfloat16"]), CPU).train
    assert (half.precision, half.channels_last) == ("bfloat16", True)


def test_a_run_goes_on_in_the_numbers_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with AMX must not go on in bfloat16 with what one without has begun."""
    options = [*SMALL, "--run.root", str(tmp_path), "--run.name", "mine", "--run.device", "cpu"]
    monkeypatch.setattr(arithmetic, "has_amx", lambda: False)
    train(parse([*options, "--train.channels_last", "false"]), Place(), StopSignals())
    assert settings_of(tmp_path / "mine").train.precision == "float32"
    monkeypatch.setattr(arithmetic, "has_amx", lambda: True)
    train(parse([*options, "--train.epochs", "2"]), Place(), StopSignals())
    kept = settings_of(tmp_path / "mine").train
    assert (kept.epochs, kept.precision, kept.channels_last) == (2, "float32", False)


@pytest.mark.parametrize(
    ("precision", "channels_last", "tolerance"),
    [("float32", "true", 1e-4), ("bfloat16", "true", 0.05)],
)
def test_the_choice_changes_a_step_by_rounding_alone(precision: str, channels_last: str, tolerance: float) -> None:
    """Losses, and the gradient of the first kernel, against float64; a ReLU that tips over moves the latter more."""

    def first_step(precision: str, channels_last: str) -> tuple[torch.Tensor, torch.Tensor]:
        options = ["--model.projection_dim", "16", "--run.device", "cpu"]
        options += ["--train.precision", precision, "--train.channels_last", channels_last]
        trainer = open_trainer(parse([*SMALL, *options]), Place(), CPU)
        terms = trainer.train_step(trainer.course.schedule.passes(0)[0], 0)
        losses = [value if isinstance(value, torch.Tensor) else value.loss.mean() for value in terms.values()]
        [kernel, *_] = (p for p in trainer.model.parameters() if p.dim() == 4)
        assert kernel.grad is not None
        return torch.stack(losses).double(), kernel.grad.double()

    exact, wanted = first_step("float64", "false")
    losses, gradient = first_step(precision, channels_last)
    torch.testing.assert_close(losses, exact, rtol=tolerance, atol=tolerance)
    assert (gradient - wanted).norm() <= min(100 * tolerance, 0.5) * wanted.norm()
