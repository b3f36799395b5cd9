"""The training of a run: steps, epochs, evaluation, checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from iic_dist import checkpoint, distributed, report
from iic_dist.build import RunData, build_model, build_objectives, build_schedule, build_views, complete
from iic_dist.config import Config
from iic_dist.data import Batch, DeviceImages
from iic_dist.distributed import Place
from iic_dist.evaluation import Evaluation, Evaluator
from iic_dist.health import Recommendation, recommend
from iic_dist.losses import IICTerms, iic_loss, nt_xent_loss
from iic_dist.models import SubHeads, distribute, on_device
from iic_dist.monitor import Monitor
from iic_dist.optim import build_optimizer, learning_rate
from iic_dist.schedule import Pass, kind
from iic_dist.selection import SubHeadLosses
from iic_dist.stuck import StuckSubHeads

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
        heads = {name: head for name, head in self.model.heads.items() if isinstance(head, SubHeads)}
        self.shapes = {name: head.shape for name, head in heads.items()}
        self._put_images()
        self.schedule = build_schedule(config, place, len(data.train.images), len(self.images))
        self.total_steps = self.schedule.total_steps(train.epochs)
        self.network = distribute(
            self.model, place, device, compiled=train.compile, heads_take_turns=self.schedule.heads_take_turns
        )
        self.optimizer = build_optimizer(
            self.model, optim.name, lr=optim.lr, weight_decay=optim.weight_decay, momentum=optim.momentum
        )
        self.objectives = build_objectives(self.config, device)
        self.sub_heads = SubHeadLosses(self.shapes, self.objectives, device, self.dtype)
        clustering = self.config.clustering_heads
        self.stuck = StuckSubHeads(
            {name: heads[name] for name in clustering},
            self.optimizer,
            # Where several K are compared by the agreement of their sub-heads, copies would spoil it.
            patience=train.restart_after if len(clustering) == 1 else 0,
            seed=config.run.seed,
        )
        self.weights = {
            head: getattr(config.loss, kind(head)) / (len(clustering) if head in clustering else 1)
            for head in self.model.heads
        }
        self.clustering_head = self.config.heads[0]  # until an evaluation recommends one of several
        self.step = self.epoch = 0
        self.train_seconds = 0.0

    def _put_images(self) -> None:
        """Put the images on the device, the unlabelled ones behind the others."""
        data = self.data
        images = data.train.images
        if data.unlabelled is not None:
            images = torch.cat([images, data.unlabelled.images])
        self.images = DeviceImages(images, self.device)
        same = data.evaluation is data.train and data.unlabelled is None
        self.evaluator = Evaluator(
            data.evaluation,
            self.images if same else DeviceImages(data.evaluation.images, self.device),
            self.views,
            self.shapes,
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
        for line in self.stuck.end_epoch(self.sub_heads.losses, self.epoch):
            self._say(bar, f"epoch {self.epoch + 1}: {line}")
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
                total = total + self.weights[head] * loss
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
        towards = self.objectives[head]
        terms = iic_loss(first, second, entropy_weight=towards.entropy_weight, prior=towards.prior, impl=loss.impl)
        self.sub_heads.add(head, terms.joint)
        return terms.loss.mean(), terms._replace(loss=terms.loss.detach())

    def _evaluate(self) -> tuple[dict[str, Evaluation], Recommendation]:
        """Evaluate the network that the ranks have in common, head by head, and choose a clustering head."""
        distributed.all_reduce_mean([b for b in self.model.buffers() if b.is_floating_point()])
        evaluations = self.evaluator.evaluate(self.model, self.sub_heads, self.stuck.restarts)
        recommendation = recommend([evaluations[head].health for head in self.config.clustering_heads])
        self.clustering_head = recommendation.chosen.head
        return evaluations, recommendation

    def _result(self, evaluations: Mapping[str, Evaluation], recommendation: Recommendation) -> dict[str, Any]:
        seen = self.config.data.batch_size * self.step
        return {
            "data": self.data.evaluation.name,
            "num_images": len(self.data.evaluation.images),
            "num_clusters": recommendation.chosen.num_clusters,
            "epochs": self.epoch,
            "world_size": self.place.world_size,
            "seed": self.config.run.seed,
            **self.evaluator.figures(evaluations[recommendation.chosen.head]),
            "images_per_second": round(seen / self.train_seconds, 1) if self.train_seconds else None,
            "train_seconds": round(self.train_seconds, 2),
            "choices": recommendation.as_json(),
        }

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the network as it is; return the contents of result.json.

        Collective: all ranks must call; the figures do not depend on their number.
        """
        return self._result(*self._evaluate())

    def _evaluate_and_show(self, monitor: Monitor, bar: tqdm[Any]) -> dict[str, Any]:
        evaluations, recommendation = self._evaluate()
        result = self._result(evaluations, recommendation)
        health = [evaluation.health for evaluation in evaluations.values()]
        monitor.scalars(self.step, report.health_numbers(health) | report.result_numbers(result))
        for line in [each.line() for each in health] + report.result_lines(result, recommendation):
            self._say(bar, f"epoch {self.epoch}: {line}")
        every = self.config.monitor.pictures_every
        if self.epoch == self.config.train.epochs or (every and self.epoch % every == 0):
            self.evaluator.show(monitor, self.step, evaluations[self.clustering_head])
            report.show_choices(monitor, self.step, recommendation)
        return result

    def _say(self, bar: tqdm[Any], line: str) -> None:
        if self.place.is_main:
            bar.write(line)

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
            "sub_heads": self.sub_heads.state_dict(),
            "stuck": self.stuck.state_dict(),
            "clustering_head": self.clustering_head,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.epoch = state["step"], state["epoch"]
        self.train_seconds = state["train_seconds"]
        self.sub_heads.load_state_dict(state["sub_heads"])
        self.stuck.load_state_dict(state["stuck"])
        self.clustering_head = state["clustering_head"]
