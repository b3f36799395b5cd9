"""The training of a run: steps, epochs, evaluation, checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from iic_dist import checkpoint, distributed, report
from iic_dist.build import RunData, build_model, build_schedule, build_views, complete
from iic_dist.config import Config
from iic_dist.data import Batch, place_images
from iic_dist.distributed import Place
from iic_dist.evaluation import Evaluation, Evaluator
from iic_dist.losses import IICTerms, iic_loss, nt_xent_loss
from iic_dist.models import SubHeads, distribute, on_device
from iic_dist.monitor import Monitor
from iic_dist.optim import build_optimizer, learning_rate
from iic_dist.schedule import Pass
from iic_dist.selection import SubHeadLosses

Terms = dict[str, IICTerms | Tensor]
"""Of each head that took part in a step: its IIC terms, or its contrastive loss; on the device, no gradient."""


class Trainer:
    """Trains the network of a config on the images of a run; every rank makes one.

    Args:
        config: What is asked for.
        data: The images.
        place: This rank.
        device: Where to compute.

    Raises:
        UsageError: the config does not fit the images or the number of ranks.

    Collective: all ranks must construct it, and call its methods, together.
    """

    def __init__(self, config: Config, data: RunData, place: Place, device: torch.device) -> None:
        self.config = complete(config, data.train)
        self.data, self.place, self.device = data, place, device
        self.dtype = torch.float64 if config.train.precision == "float64" else torch.float32
        self.views = build_views(self.config, data.train)
        train, optim = config.train, config.optim
        self.model = on_device(
            build_model(self.config, self.views.channels(data.train.images.shape[1]), self.views.size),
            device,
            self.dtype,
            sync_batchnorm=train.sync_batchnorm,
            channels_last=train.channels_last,
        )
        assert self.config.model.num_clusters is not None, "complete() has seen to it"
        self.num_clusters = self.config.model.num_clusters
        self._put_images()
        self.schedule = build_schedule(config, place, len(data.train.images), len(self.images))
        self.total_steps = self.schedule.total_steps(train.epochs)
        self.network = distribute(
            self.model, place, device, compiled=train.compile, heads_take_turns=self.schedule.heads_take_turns
        )
        self.optimizer = build_optimizer(
            self.model, optim.name, lr=optim.lr, weight_decay=optim.weight_decay, momentum=optim.momentum
        )
        shapes = {name: head.shape for name, head in self.model.heads.items() if isinstance(head, SubHeads)}
        self.sub_heads = SubHeadLosses(shapes, config.loss.entropy_weight, device, self.dtype)
        self.step = self.epoch = 0
        self.train_seconds = 0.0

    def _put_images(self) -> None:
        """Put the images where they fit, the unlabelled ones behind the others."""
        data, budget = self.data, self.config.data.device_budget_gib
        images = data.train.images
        if data.unlabelled is not None:
            images = torch.cat([images, data.unlabelled.images])
        self.images = place_images(images, self.device, budget)
        same = data.evaluation is data.train and data.unlabelled is None
        self.evaluator = Evaluator(
            data.evaluation,
            self.images if same else place_images(data.evaluation.images, self.device, budget),
            self.views,
            self.num_clusters,
            batch_size=self.config.train.evaluate_batch_size,
            dtype=self.dtype,
        )

    def train(self, folder: Path) -> dict[str, Any]:
        """Train to the last epoch, evaluating and saving on the way; return what result.json holds.

        Args:
            folder: Folder of the run; rank 0 writes there.
        """
        train, result = self.config.train, None
        monitor = Monitor(folder, self.place.is_main, self.step if self.step else None)
        with monitor, self._progress() as bar:
            if self.step == 0:
                report.show_views(monitor, 0, self.views, self.data.train.images[:8], self.device)
            while self.epoch < train.epochs:
                self._train_epoch(monitor, bar)
                last = self.epoch == train.epochs
                if last or (train.evaluate_every and self.epoch % train.evaluate_every == 0):
                    result = self._evaluate_and_show(monitor, bar)
                if last or self.epoch % train.checkpoint_every == 0:
                    self.save(folder)
        result = result or self.evaluate()
        if self.place.is_main:
            (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        return result

    def _progress(self) -> tqdm[Any]:
        hidden = not (self.place.is_main and self.config.monitor.progress)
        return tqdm(total=self.total_steps, initial=self.step, disable=hidden, unit="step", dynamic_ncols=True)

    def _train_epoch(self, monitor: Monitor, bar: tqdm[Any]) -> None:
        started, steps_before = time.perf_counter(), self.step
        self.model.train()
        for each in self.schedule.passes(self.epoch):
            self.sub_heads.begin_pass(each.heads)
            for position in range(each.steps):
                terms = self.train_step(each, position)
                bar.update()
                if self.step % self.config.monitor.log_every == 0:
                    rate = (self.step - steps_before) / (time.perf_counter() - started)
                    self._log(monitor, bar, each, terms, rate)
            self.sub_heads.end_pass(each.heads, each.steps)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # so that the seconds are those of the work
        self.epoch += 1
        self.train_seconds += time.perf_counter() - started

    def _log(self, monitor: Monitor, bar: tqdm[Any], each: Pass, terms: Terms, steps_per_second: float) -> None:
        """Read the numbers of the last step: the one place where training waits for the device."""
        numbers = {}
        for head, value in terms.items():
            numbers[f"loss/{head}"] = value if isinstance(value, Tensor) else value.loss.mean()
            numbers |= {} if isinstance(value, Tensor) else report.head_numbers(head, value)
        values = report.read(numbers)
        values["optim/learning_rate"] = self.learning_rate(each.heads, self.step - 1)
        values["speed/images_per_second"] = steps_per_second * self.config.data.batch_size
        values["epoch"] = self.epoch + 1
        monitor.scalars(self.step, values)
        losses = {head: f"{values[f'loss/{head}']:.3f}" for head in terms}
        bar.set_description(f"epoch {self.epoch + 1}/{self.config.train.epochs}", refresh=False)
        bar.set_postfix(losses, refresh=False)

    def learning_rate(self, heads: Sequence[str], step: int) -> float:
        """Return the learning rate of a step that trains `heads`."""
        optim = self.config.optim
        alone = tuple(heads) == ("contrastive",) and optim.contrastive_lr is not None
        return learning_rate(
            step,
            total_steps=self.total_steps,
            base=optim.contrastive_lr if alone and optim.contrastive_lr is not None else optim.lr,
            schedule=optim.schedule,
            warmup_steps=round(optim.warmup_epochs * self.total_steps / self.config.train.epochs),
        )

    def train_step(self, each: Pass, position: int) -> Terms:
        """Update the weights once; nothing here waits for the device.

        Args:
            each: The pass of the current epoch.
            position: Place of the step in the pass, from 0.
        """
        batches = self.schedule.batches(self.epoch, each.heads, position)
        inputs = [self._make_views(batch, each.first_view) for _, batch in batches]
        if position + 1 < each.steps:
            for _, batch in self.schedule.batches(self.epoch, each.heads, position + 1):
                self.images.prefetch(batch.indices)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(each.heads, self.step)
        with self._autocast():
            outputs = self.network(torch.cat(inputs) if len(inputs) > 1 else inputs[0], each.heads)
        rows = [len(part) for part in inputs]
        total = torch.zeros((), device=self.device, dtype=self.dtype)
        terms: Terms = {}
        for place, (heads, _) in enumerate(batches):
            for head in heads:
                loss, terms[head] = self._head_loss(head, outputs[head].split(rows)[place])
                total = total + getattr(self.config.loss, head) * loss
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        if self.config.optim.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm)
        self.optimizer.step()
        self.step += 1
        return terms

    def _make_views(self, batch: Batch, first_view: int) -> Tensor:
        images, rows, indices = self.images.gather(batch.indices)
        views = self.views.training(images, rows, indices, batch.epoch, first_view, dtype=self.dtype)
        if self.config.train.channels_last:
            return views.contiguous(memory_format=torch.channels_last)
        return views

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.train.precision != "bfloat16":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _head_loss(self, head: str, outputs: Tensor) -> tuple[Tensor, IICTerms | Tensor]:
        """Return the loss to differentiate, and what to log of it."""
        loss = self.config.loss
        n = len(outputs) // (1 + self.config.views.repeats)
        first, second = outputs[:n], outputs[n:]
        if head == "contrastive":
            shard_sizes = [n] * self.place.world_size
            value = nt_xent_loss(
                first, second[:n], temperature=loss.temperature, impl=loss.impl, shard_sizes=shard_sizes
            )
            return value, value.detach()
        terms = iic_loss(first, second, entropy_weight=loss.entropy_weight, impl=loss.impl)
        self.sub_heads.add(head, terms.joint)
        return terms.loss.mean(), terms._replace(loss=terms.loss.detach())

    def _evaluate(self) -> Evaluation:
        """Evaluate the network that the ranks have in common."""
        distributed.all_reduce_mean([b for b in self.model.buffers() if b.is_floating_point()])
        return self.evaluator.evaluate(self.model, self.sub_heads.selected())

    def _result(self, evaluation: Evaluation) -> dict[str, Any]:
        seen = self.config.data.batch_size * self.step
        return {
            "data": self.data.evaluation.name,
            "num_images": len(self.data.evaluation.images),
            "num_clusters": self.num_clusters,
            "epochs": self.epoch,
            "world_size": self.place.world_size,
            "seed": self.config.run.seed,
            **self.evaluator.figures(evaluation),
            "images_per_second": round(seen / self.train_seconds, 1) if self.train_seconds else None,
            "train_seconds": round(self.train_seconds, 2),
        }

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the network as it is; return the contents of result.json.

        Collective: all ranks must call; the figures do not depend on their number.
        """
        return self._result(self._evaluate())

    def _evaluate_and_show(self, monitor: Monitor, bar: tqdm[Any]) -> dict[str, Any]:
        evaluation = self._evaluate()
        result = self._result(evaluation)
        if numbers := report.result_numbers(result):
            monitor.scalars(self.step, numbers)
            if self.place.is_main:
                bar.write(f"epoch {self.epoch}: accuracy {result['accuracy']['selected']:.4f} (selected sub-head)")
        every = self.config.monitor.pictures_every
        if self.epoch == self.config.train.epochs or (every and self.epoch % every == 0):
            self.evaluator.show(monitor, self.step, evaluation)
        return result

    def save(self, folder: Path) -> None:
        """Write a checkpoint from rank 0."""
        distributed.all_reduce_mean([b for b in self.model.buffers() if b.is_floating_point()])
        if self.place.is_main:
            checkpoint.save(folder / "checkpoints", self.step, self.state_dict())

    def resume(self, folder: Path) -> bool:
        """Go on from the newest checkpoint that verifies, read by rank 0 for all; return whether there was one."""
        state = checkpoint.load_newest(folder / "checkpoints") if self.place.is_main else None
        state = distributed.broadcast(state)
        if state is not None:
            self.load_state_dict(state)
        return state is not None

    def state_dict(self) -> dict[str, Any]:
        """Return all that a later process needs to go on: tensors and plain values alone."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "train_seconds": self.train_seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sub_head_loss": self.sub_heads.losses,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.epoch = state["step"], state["epoch"]
        self.train_seconds = state["train_seconds"]
        self.sub_heads.losses = {head: loss.to(self.device) for head, loss in state["sub_head_loss"].items()}
