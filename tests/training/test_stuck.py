"""Sub-heads that stay stuck start again from the best one: by hand, on two ranks, and in a run that is resumed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import rank_tasks
import torch
from ranks import Ranks
from torch import Tensor

from iic_dist.config.build import load_data
from iic_dist.config.command_line import parse
from iic_dist.distributed import Place
from iic_dist.training import checkpoint, stuck
from iic_dist.training.stuck import MARGIN, NOISE
from iic_dist.training.trainer import Trainer

K = 4
LIMIT = MARGIN * math.log(K)


def losses(*values: float) -> dict[str, Tensor]:
    return {"clustering": torch.tensor(values)}


def test_only_what_stays_stuck_starts_again_from_the_best_one() -> None:
    watched, head, optimizer = rank_tasks.watched_sub_heads(patience=3)
    before = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    moments = {name: optimizer.state[parameter]["exp_avg"].clone() for name, parameter in head.named_parameters()}
    stays, recovers, good = -1.0, -1.0, -2.0
    close = good + 0.9 * LIMIT
    assert watched.end_pass(["clustering"], losses(stays, recovers, good, close), 0) == []
    assert watched.end_pass(["clustering"], losses(stays, close, good, close), 1) == []
    assert watched.passes == {"clustering": [2, 0, 0, 0]}
    assert watched.end_pass(["contrastive"], losses(stays, recovers, good, close), 1) == []  # not its pass
    (line,) = watched.end_pass(["clustering"], losses(stays, recovers, good, close), 2)
    assert "sub-head 0" in line
    assert "from sub-head 2" in line
    assert watched.restarts == {"clustering": [1, 0, 0, 0]}
    assert watched.passes == {"clustering": [0, 1, 0, 0]}

    for name, parameter in head.named_parameters():
        assert torch.equal(parameter[K:], before[name][K:])
        moment = optimizer.state[parameter]["exp_avg"]
        assert torch.equal(moment[:K], moments[name][2 * K : 3 * K])
        assert torch.equal(moment[K:], moments[name][K:])
    assert torch.equal(head.linear.bias[:K], before["linear.bias"][2 * K : 3 * K])
    source = before["linear.weight"][2 * K : 3 * K]
    noise = (head.linear.weight[:K] - source) / source.square().mean().sqrt()
    assert noise.std().item() == pytest.approx(NOISE, rel=0.1)
    assert abs(noise.mean().item()) < 0.02
    assert noise.abs().max() <= NOISE * math.sqrt(3) * 1.001


def test_the_noise_follows_from_seed_epoch_and_sub_head() -> None:
    def restarted(seed: int, epoch: int, sub_head: int) -> Tensor:
        watched, head, _ = rank_tasks.watched_sub_heads(patience=1, seed=seed)
        values = [-2.0] * 4
        values[sub_head] = -1.0
        watched.end_pass(["clustering"], losses(*values), epoch)
        best = 1 if sub_head == 0 else 0
        return (head.linear.weight.unflatten(0, (4, K))[[sub_head, best]]).diff(dim=0)

    assert torch.equal(restarted(0, 7, 2), restarted(0, 7, 2))
    for other in ((1, 7, 2), (0, 8, 2), (0, 7, 3)):
        assert not torch.allclose(restarted(0, 7, 2), restarted(*other), atol=1e-3)


@pytest.mark.parametrize("values", [(math.nan, -1.0, -2.0, -2.0), (math.inf,) * 4], ids=str)
def test_losses_that_say_nothing_start_nothing_again(values: tuple[float, ...]) -> None:
    watched, head, _ = rank_tasks.watched_sub_heads(patience=1)
    before = head.linear.weight.detach().clone()
    watched.end_pass(["clustering"], losses(*values), 0)
    changed = (head.linear.weight != before).any(1).view(4, K).any(1).tolist()
    assert changed == [False, not math.isinf(values[0]), False, False] or not any(changed)


def test_patience_zero_means_never() -> None:
    watched, head, _ = rank_tasks.watched_sub_heads(patience=0)
    before = head.linear.weight.detach().clone()
    for epoch in range(50):
        assert watched.end_pass(["clustering"], losses(-1, -2, -2, -2), epoch) == []
    assert torch.equal(head.linear.weight, before)


def test_all_ranks_do_what_the_first_one_decides(ranks: Ranks) -> None:
    """Losses that differ in the last bit would otherwise let ranks part."""
    alone, restarted = rank_tasks.restarted_weights(0, None)
    assert restarted == [0, 1, 0, 0]
    for weights, restarts in ranks.run(4, rank_tasks.restarted_weights):
        assert restarts == restarted
        assert torch.equal(weights, alone)


TINY = [
    *("--data.batch_size", "512", "--data.train_on", "train", "--model.sub_heads", "3", "--train.epochs", "5"),
    *("--train.evaluate_every", "0", "--monitor.progress", "false", "--train.restart_after", "2"),
    *("--train.checkpoint_every", "1"),
]


def trainer(*options: str) -> Trainer:
    config = parse([*TINY, *options])
    return Trainer(config, load_data(config, Place()), Place(), torch.device("cpu"))


@pytest.mark.parametrize("done", [3, 4])
def test_a_resumed_run_starts_the_same_sub_heads_again(
    done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stuck, "MARGIN", 0.0)  # all but the best one are stuck
    whole = trainer()
    whole.train(tmp_path)
    assert sum(whole.learner.stuck.restarts["clustering"]) >= 2
    for path in checkpoint.available(tmp_path / "checkpoints")[: 5 - done]:
        path.unlink()
    resumed = trainer()
    assert resumed.resume(tmp_path)
    assert resumed.epoch == done
    resumed.train(tmp_path)
    assert resumed.learner.stuck.state_dict() == whole.learner.stuck.state_dict()
    for old, new in zip(whole.learner.model.parameters(), resumed.learner.model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_copies_do_not_count_as_agreement_and_several_k_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer()
    one.learner.stuck.restarts["clustering"] = [0, 1, 0]
    (choice,) = one.evaluate()["choices"]
    assert (choice["compared"], choice["agreement_error"]) == (2, None)
    one.learner.stuck.restarts["clustering"] = [2, 1, 0]
    (choice,) = one.evaluate()["choices"]
    assert (choice["compared"], choice["agreement"]) == (1, None)
    assert trainer("--model.num_clusters", "5,10").learner.stuck.patience == 0
