"""A training step on a device that has neither kernels of ours nor float64, as a Mac's GPU; torch's `meta` plays it.

Nothing there has numbers, and the mode below refuses float64 and operands on different devices. That the numbers are
right on MPS, that each op exists there, and the fused optimizer, was not tried.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iic_dist.config.build import build_model, build_objectives, load_data
from iic_dist.config.command_line import parse
from iic_dist.device import exact_device
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.models import on_device
from iic_dist.training import guard, learner
from iic_dist.training.open import open_trainer
from iic_dist.training.trainer import Trainer

MPS, META = torch.device("mps", 0), torch.device("meta")
OPTIONS = ["--data.batch_size", "64", "--train.epochs", "2", "--model.sub_heads", "2"]


class LikeMPS(TorchDispatchMode):
    """Fails where an op mixes devices or makes a float64 tensor on the device; counts what it lets through there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        operands = [each for each in tree_leaves((arguments, options)) if isinstance(each, Tensor)]
        mixed = {each.device for each in operands if each.dim()} > {META}
        assert not mixed or "copy" in str(function), f"{function} mixes devices"
        result = function(*arguments, **(options or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.device == META:
                self.seen += 1
                assert made.dtype != torch.float64, f"{function} makes float64 on the device"
        return result


class NoOptimizer(torch.optim.SGD):
    """In the place of a fused one, which `meta` has not."""

    def __init__(self, model: nn.Module, name: str, lr: float, **more: float) -> None:
        super().__init__(model.parameters(), lr)

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        pass


@pytest.mark.parametrize("options", [[], ["--loss.prior", "[1,2,3,4,5,6,7,8,9,10]"]])
def test_a_step_stays_on_the_device_and_needs_no_float64(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Views come from the host; the flags of a step, which the host would read, go nowhere here."""
    monkeypatch.setattr(torch, "autocast", lambda *where, **how: contextlib.nullcontext())  # `meta` has none
    monkeypatch.setattr(guard.Verdicts, "post", lambda self, flags: None)
    monkeypatch.setattr(learner, "build_optimizer", NoOptimizer)
    monkeypatch.setattr(learner, "build_objectives", lambda config, device: build_objectives(config, MPS))
    config = parse([*OPTIONS, *options])
    trainer = Trainer(config, load_data(config, Place()), Place(), torch.device("cpu"))
    [(heads, batch)] = trainer.course.schedule.batches(0, trainer.config.heads, 0)
    model = build_model(trainer.config, 1, trainer.views.size)
    model = on_device(model, META, torch.float32, sync_batchnorm=True, channels_last=False)
    with LikeMPS() as mode:
        learns = learner.Learner(trainer.config, model, trainer.config.heads, Place(), META, heads_take_turns=False)
        trainer.views.destination = META
        views = trainer.inputs.of_views(heads, batch, 0)
        assert views[0][1].device == META
        terms = learns.step(views, 0.001, stop=False)
    assert mode.seen > 300
    assert set(terms) == set(heads)
    assert all(parameter.grad is not None and parameter.grad.device == META for parameter in model.parameters())


def test_the_mode_sees_what_it_is_to_see() -> None:
    with LikeMPS():
        with pytest.raises(AssertionError, match="float64 on the device"):
            torch.ones(3, device=META).double()
        with pytest.raises(AssertionError, match="mixes devices"):
            nn.functional.linear(torch.ones(2, 3, device=META), torch.ones(4, 3))


def test_what_is_computed_in_float64_is_computed_beside_mps() -> None:
    assert exact_device(MPS) == torch.device("cpu")
    assert exact_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_a_training_in_float64_is_refused_there() -> None:
    with pytest.raises(UsageError, match="MPS has no float64; use --run.device cpu"):
        open_trainer(parse(["--train.precision", "float64"]), Place(), MPS)
