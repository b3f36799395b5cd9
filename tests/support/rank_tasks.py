"""What the tests run on several ranks; importable, so that it can be sent to them."""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from iic_dist import distributed
from iic_dist.config.build import load_data
from iic_dist.config.command_line import parse
from iic_dist.distributed import Place
from iic_dist.losses import iic_loss, nt_xent_loss, start_nt_xent_loss
from iic_dist.losses.self_label import self_label_loss
from iic_dist.models import SubHeads
from iic_dist.models.sync_norm import synchronise
from iic_dist.prediction.clusterer import load
from iic_dist.prediction.folder import FolderPrediction, predict_folder
from iic_dist.training import resume
from iic_dist.training.features import load_run_features
from iic_dist.training.stuck import StuckSubHeads
from iic_dist.training.trainer import Trainer

ENTROPY_WEIGHT = 1.5
PRIOR = (1.0, 2.0, 3.0, 4.0, 10.0)
TEMPERATURE = 0.2


def small_model(loss: str) -> nn.Module:
    """A norm-free network in float64 whose output is (B, 3, 5) logits or (B, 6) embeddings."""
    torch.manual_seed(0)
    layers = [nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 6 if loss == "nt_xent" else 15)]
    if loss != "nt_xent":
        layers.append(nn.Unflatten(1, (3, 5)))
    return nn.Sequential(*layers).double()


def value_and_gradient(
    rank: int, group: dist.ProcessGroup, loss: str, first: Tensor, second: Tensor, shards: list[int]
) -> tuple[Tensor, list[Tensor]]:
    """Return this rank's value of the global loss, and its parameter gradients after DDP's average.

    `first` is (G, 7) and `second` (R, G, 7); rank r takes shards[r] of the G samples.
    """
    start = sum(shards[:rank])
    own = slice(start, start + shards[rank])
    model = DistributedDataParallel(small_model(loss), process_group=group)
    repeats = second.shape[0]
    outputs = model(torch.cat([first[own], second[:, own].flatten(0, 1)]))
    a, b = outputs[: shards[rank]], outputs[shards[rank] :]
    if loss.startswith("self-labels above "):
        confidence = float(loss.rpartition(" ")[2])
        value = self_label_loss(a, b, confidence=confidence, group=group).sum()
    elif loss != "nt_xent":
        prior = torch.tensor(PRIOR, dtype=torch.float64) if loss == "iic with a prior" else None
        value = iic_loss(a, b, entropy_weight=ENTROPY_WEIGHT, prior=prior, group=group).loss.sum()
    else:
        assert repeats == 1
        value = nt_xent_loss(a, b, temperature=TEMPERATURE, group=group)
    value.backward()
    return value.detach(), [parameter.grad for parameter in model.parameters()]


def interleaved_losses(
    rank: int, group: dist.ProcessGroup, first: Tensor, second: Tensor, shards: list[int]
) -> tuple[Tensor, Tensor]:
    """Return both global losses of rows of 6, computed IIC while the embeddings are gathered."""
    start = sum(shards[:rank])
    a, b = (x[start : start + shards[rank]] for x in (first, second))
    finish = start_nt_xent_loss(a, b, temperature=TEMPERATURE, group=group)
    iic = iic_loss(a.reshape(-1, 2, 3), b.reshape(-1, 2, 3), group=group).loss.sum()
    return finish(), iic


class _Copies(TorchDispatchMode):
    """Counts the bytes that ops write into new memory, an allocation alone aside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        if any(name in str(function) for name in ("copy", "cat", "clone", "_to_")):
            self.bytes += result.nbytes
        return result


def bytes_copied_by_gather(rank: int, group: dist.ProcessGroup, sizes: list[int]) -> int:
    """Gather float32 rows of 8 and return what was copied beside the collective."""
    with _Copies() as copies:
        distributed.gather_rows(torch.ones(sizes[rank], 8), sizes, group)
    return copies.bytes


def gather(rank: int, group: dist.ProcessGroup, sizes: list[int]) -> tuple[list[int], Tensor]:
    """Gather rows that name their rank and place."""
    own = torch.tensor([[rank, i] for i in range(sizes[rank])], dtype=torch.int64).reshape(-1, 2)
    known = distributed.gather_sizes(len(own), group)
    return known, distributed.gather_rows(own, known, group)


def normalised(
    rank: int, group: dist.ProcessGroup, layer: nn.Module, rows: Tensor, weights: Tensor, shards: list[int]
) -> dict[str, Tensor]:
    """Run a layer of batch normalisation on this rank's rows of all; return output, gradients and statistics.

    The loss of all ranks together is (weights * output).sum(); the default group has a rank for each shard.
    """
    start = sum(shards[:rank])
    own = slice(start, start + shards[rank])
    # A copy: what is sent to several ranks is one piece of shared memory.
    whole = synchronise(nn.Sequential(copy.deepcopy(layer)), torch.device("cpu")).train()
    shard = rows[own].clone().requires_grad_()
    output = whole(shard)
    (output * weights[own]).sum().backward()
    parameters = {f"gradient of {name}": p.grad for name, p in whole.named_parameters() if p.grad is not None}
    assert shard.grad is not None
    return {"output": output.detach(), "gradient": shard.grad, **parameters, **dict(whole.named_buffers())}


def flight_recorder_of_a_wait(rank: int, group: dist.ProcessGroup) -> bytes:
    """Let rank 0 of two come to a collective before rank 1, and return what torch's flight recorder says then."""
    from torch._C._distributed_c10d import FlightRecorderHook, _dump_fr_trace

    world, there = dist.group.WORLD, torch.zeros(1)
    assert world is not None
    hook = FlightRecorderHook.attach(world)
    dist.all_reduce(there)
    work = dist.all_reduce(torch.ones(3, 4), async_op=True) if rank == 0 else None
    time.sleep(1.0)
    dump: bytes = _dump_fr_trace()
    if work is None:
        dist.all_reduce(torch.ones(3, 4))
    else:
        work.wait()
    hook.remove()
    return dump


def single_pair(rank: int, group: dist.ProcessGroup) -> float:
    """Return the contrastive loss of a global batch of one image."""
    return float(nt_xent_loss(torch.ones(1, 3), torch.ones(1, 3), group=group))


def after_the_local_main(rank: int, group: dist.ProcessGroup, folder: str) -> bool:
    """Local rank 0 takes its time to write a file; say whether it was there when this rank's turn came."""
    done = Path(folder) / "done"
    with distributed.local_main_first(Place(rank, 4, rank, 4)):
        if rank == 0:
            time.sleep(0.5)
            done.touch()
        return done.exists()


def training_losses(rank: int, group: dist.ProcessGroup | None, arguments: list[str], steps: int) -> dict[str, object]:
    """Train for some steps on all ranks of the default group; return losses, weights, evaluation."""
    trainer = small_trainer(rank, arguments)
    losses = []
    passes = trainer.course.schedule.passes(0)
    for step in range(steps):
        terms = trainer.train_step(passes[step % len(passes)], step // len(passes))
        losses += [float(t if isinstance(t, Tensor) else t.loss.mean()) for t in terms.values()]
    parameters = torch.cat([p.detach().flatten() for p in trainer.learner.model.parameters()])
    statistics = [b.flatten() for b in trainer.learner.model.buffers() if b.is_floating_point()]
    figures = trainer.evaluate()
    return {
        "losses": losses,
        "parameters": parameters,
        "statistics": torch.cat(statistics) if statistics else torch.empty(0),
        "accuracy": figures["accuracy"],
        "nmi": figures["nmi"],
        "choices": figures["choices"],
    }


def collectives_of_a_step(rank: int, group: dist.ProcessGroup, arguments: list[str]) -> list[tuple[str, int]]:
    """Take a training step on all ranks of the default group; return name and bytes of what its losses exchange.

    Gathered bytes are those of the whole. What DDP exchanges does not pass through Python.
    """
    config = parse(arguments)
    place = Place(rank, dist.get_world_size(), rank, dist.get_world_size())
    trainer = Trainer(config, load_data(config, place), place, torch.device("cpu"))
    seen: list[tuple[str, int]] = []
    reduce, gather = dist.all_reduce, distributed._all_gather

    def counted_reduce(tensor: Tensor, *more: object, **options: object) -> object:
        seen.append(("all_reduce", tensor.nbytes))
        return reduce(tensor, *more, **options)

    def counted_gather(whole: Tensor, *more: object, **options: object) -> object:
        seen.append(("all_gather", whole.nbytes))
        return gather(whole, *more, **options)

    dist.all_reduce, distributed._all_gather = counted_reduce, counted_gather
    try:
        trainer.train_step(trainer.course.schedule.passes(0)[0], 0)
    finally:
        dist.all_reduce, distributed._all_gather = reduce, gather
    return seen


def train_on(rank: int, group: dist.ProcessGroup | None, arguments: list[str], folder: str, steps: int) -> Tensor:
    """Go on with a run up to a step of its first epoch, save it, and return all weights and statistics."""
    trainer = small_trainer(rank, arguments)
    trainer.resume(Path(folder))
    for each, position in trainer.course.schedule.steps(0)[trainer.step : steps]:
        trainer.train_step(each, position)
    resume.save(Path(folder), trainer.state_dict())
    distributed.barrier()
    return torch.cat([value.detach().double().flatten() for value in trainer.learner.model.state_dict().values()])


def small_trainer(rank: int, arguments: list[str]) -> Trainer:
    """Make a trainer for this rank of the default group."""
    config = parse(arguments)
    world_size = distributed.world_size()
    place = Place(rank, world_size, rank, world_size)
    return Trainer(config, load_data(config, place), place, torch.device("cpu"))


def bad_step(rank: int, group: dist.ProcessGroup, arguments: list[str], place: str, value: float) -> dict[str, object]:
    """Take a step, one with `value` in some place of rank 1, and one more; say what the bad one did."""
    trainer = small_trainer(rank, arguments)
    (each, _), *_ = trainer.course.schedule.steps(0)

    def state() -> list[Tensor]:
        learned = trainer.state_dict()
        moments = [v for each in learned["optimizer"]["state"].values() for v in each.values()]
        return [v.clone() for v in (*learned["model"].values(), *moments) if v.is_floating_point()]

    def spoil(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output.clone().index_fill_(0, torch.tensor([3]), value)

    trainer.train_step(each, 0)
    before = state()
    remove = []
    if rank == 1 and place == "views":
        make = trainer.inputs._make
        trainer.inputs._make = lambda *what: spoil(nn.Identity(), None, make(*what))  # type: ignore[method-assign]
        remove.append(lambda: setattr(trainer.inputs, "_make", make))
    elif rank == 1 and place == "gradient":
        weight = next(trainer.learner.model.parameters())
        remove.append(weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), value)).remove)
    elif rank == 1:
        module = trainer.learner.model.backbone if place == "features" else trainer.learner.model.heads[place]
        remove.append(module.register_forward_hook(spoil).remove)
    trainer.train_step(each, 1)
    for undo in remove:
        undo()
    after = state()
    trainer.train_step(each, 2)
    trainer.learner.guard.heed(leave=0)
    return {
        "skipped": trainer.learner.guard.skipped,
        "unchanged": all(map(torch.equal, before, after)),
        "finite": all(bool(value.isfinite().all()) for value in state()),
        "moved_afterwards": not all(map(torch.equal, after, state())),
    }


def predicted(rank: int, group: dist.ProcessGroup | None, run: Path, images: Path) -> FolderPrediction:
    """Cluster a folder on all ranks of the default group."""
    return predict_folder(load(run, "cpu"), images)


def watched_sub_heads(patience: int, seed: int = 0) -> tuple[StuckSubHeads, SubHeads, torch.optim.Optimizer]:
    """Four sub-heads of four clusters after two steps of Adam, and what watches them."""
    torch.manual_seed(1)
    head = SubHeads(200, 4, 4)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        head(torch.randn(8, 200)).square().sum().backward()
        optimizer.step()
    return StuckSubHeads({"clustering": head}, optimizer, patience, seed), head, optimizer


def restarted_weights(rank: int, group: dist.ProcessGroup | None) -> tuple[Tensor, list[int]]:
    """Let the first rank see another stuck sub-head than the others of the default group; return weights, restarts."""
    watched, head, _ = watched_sub_heads(patience=1)
    losses = torch.full((4,), -2.0)
    losses[1 + min(rank, 2)] = -1.0
    watched.end_pass(["clustering"], {"clustering": losses}, 3)
    return head.linear.weight.detach(), watched.restarts["clustering"]


def frozen_features(rank: int, group: dist.ProcessGroup, config: str, folder: str, machines: int) -> tuple[Any, ...]:
    """Return what a rank gets of the features of a folder, and the file that they are mapped from.

    Each machine has a cache of its own under `folder`.
    """
    world_size = distributed.world_size()
    local = world_size // machines
    asked = Path(folder) / f"{rank}.yaml"
    asked.write_text(config)
    cache = Path(folder) / f"machine-{rank // local}"
    place = Place(rank, world_size, rank % local, local)
    found = load_run_features(parse(["--config", str(asked), "--data.cache", str(cache)]), place, torch.device("cpu"))
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = next((line.split()[-1] for line in maps if line.endswith(".features")), "")
    train = found.train
    return train.checksum, train.features.clone(), train.paths, found.unreadable, mapped


def all_stages(rank: int, group: dist.ProcessGroup | None, arguments: list[str]) -> dict[str, Any]:
    """Train through all stages on all ranks of the default group; return the weights and the figures of each stage."""
    trainer = small_trainer(rank, arguments)
    with tempfile.TemporaryDirectory() as folder:
        result = trainer.train(Path(folder))
    assert result is not None
    figures = {stage: {**of, "seconds": 0, "kmeans_accuracy": 0} for stage, of in result["stages"].items()}
    weights = torch.cat([value.detach().double().flatten() for value in trainer.model.parameters()])
    return {"weights": weights, "stages": figures}
