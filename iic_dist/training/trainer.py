"""The training of a run: steps, epochs, evaluation, checkpoints."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from iic_dist.config import Config
from iic_dist.config.build import RunData, build_views
from iic_dist.config.complete import complete
from iic_dist.data.sampler import Batch
from iic_dist.data.source import ImageSource, place_images
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.evaluation.evaluator import Evaluation, Evaluator
from iic_dist.evaluation.health import Recommendation, recommend
from iic_dist.files import write_whole
from iic_dist.losses.step import Terms
from iic_dist.training import report, resume
from iic_dist.training.guard import Poll
from iic_dist.training.learner import Learner
from iic_dist.training.monitor import Monitor
from iic_dist.training.optim import learning_rate
from iic_dist.training.schedule import Pass, build_schedule
from iic_dist.training.stop import Stopping, StopSignals

_logger = logging.getLogger(__name__)


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
        self.views = build_views(self.config)
        self.images = self._put_images()
        self.schedule = build_schedule(self.config, place, len(data.train.images), len(self.images))
        self.total_steps = self.schedule.total_steps(config.train.epochs)
        self.learner = Learner(
            self.config,
            self.views.channels(data.train.images.shape[1]),
            self.views.size,
            place,
            device,
            heads_take_turns=self.schedule.heads_take_turns,
        )
        self.evaluator = self._build_evaluator()
        self.clustering_head = self.config.heads[0]  # until an evaluation recommends one of several
        self.poll, self.stop = Poll(device), StopSignals()
        self.step = self.epoch = 0
        self.train_seconds = 0.0

    def _put_images(self) -> ImageSource:
        """Put the images where they fit, the unlabelled ones behind the others."""
        images = self.data.train.images
        if self.data.unlabelled is not None:
            images = torch.cat([images, self.data.unlabelled.images])
        return place_images(images, self.device, self.config.data.device_budget_gib)

    def _build_evaluator(self) -> Evaluator:
        data, budget = self.data, self.config.data.device_budget_gib
        same = data.evaluation is data.train and data.unlabelled is None
        return Evaluator(
            data.evaluation,
            self.images if same else place_images(data.evaluation.images, self.device, budget),
            self.views,
            self.learner.shapes,
            batch_size=self.config.train.evaluate_batch_size,
            dtype=self.learner.dtype,
        )

    def train(self, folder: Path, stop: StopSignals | None = None) -> dict[str, Any] | None:
        """Train to the last epoch, evaluating and saving on the way; return what result.json holds.

        Args:
            folder: Folder of the run; rank 0 writes there.
            stop: Signals to heed: soon after any rank has received one, all of them stop at the same step, save, leave
                a file PREEMPTED in the folder, and return None.

        Raises:
            RunError: too many steps in a row were not finite, or the last state could not be saved.
        """
        self.stop = stop or self.stop
        monitor = Monitor(folder, self.place.is_main, self.step if self.step else None)
        with monitor, self._progress() as bar:
            if self.step == 0:
                report.show_views(monitor, 0, self.views, self.data.train.images[:8], self.device)
            try:
                result = self._train_epochs(folder, monitor, bar)
            except Stopping:
                resume.leave_for_later(folder, self.state_dict(), self.stop.received)
                return None
        if self.place.is_main:
            write_whole(folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())
        return result

    def _train_epochs(self, folder: Path, monitor: Monitor, bar: tqdm[Any]) -> dict[str, Any]:
        train, result = self.config.train, None
        while self.epoch < train.epochs:
            self._train_epoch(folder, monitor, bar)
            done = self.epoch + 1
            if done == train.epochs or (train.evaluate_every and done % train.evaluate_every == 0):
                result = self._evaluate_and_show(monitor, bar)
            self.epoch = done
            if done == train.epochs or done % train.checkpoint_every == 0:
                save = resume.save_last if done == train.epochs else resume.save
                save(folder, self.state_dict(), self.learner.sub_heads.lowest_loss(self.config.clustering_heads))
        return result or self.evaluate()

    def _progress(self) -> tqdm[Any]:
        hidden = not (self.place.is_main and self.config.monitor.progress)
        return tqdm(total=self.total_steps, initial=self.step, disable=hidden, unit="step", dynamic_ncols=True)

    def _train_epoch(self, folder: Path, monitor: Monitor, bar: tqdm[Any]) -> None:
        """Take the steps of the epoch that are not done yet."""
        self.learner.model.train()
        self._lap_started = started = time.perf_counter()
        every, before, first = (
            self.config.train.checkpoint_every_steps,
            self.step,
            self.schedule.total_steps(self.epoch),
        )
        try:
            for each, position in self.schedule.steps(self.epoch)[before - first :]:
                terms = self.train_step(each, position)
                bar.update()
                if self.step % self.config.monitor.log_every == 0:
                    self._log(monitor, bar, each, terms, (self.step - before) / (time.perf_counter() - started))
                self.learner.guard.heed(leave=1)
                if every and self.step % every == 0:
                    self.learner.guard.heed(leave=0)
                    self._lap()
                    resume.save(folder, self.state_dict())
            self.learner.guard.heed(leave=0)
        finally:
            self._lap()

    def _lap(self) -> None:
        """Add the time since the last lap to the seconds of training."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # so that the seconds are those of the work
        now = time.perf_counter()
        self.train_seconds += now - self._lap_started
        self._lap_started = now

    def _log(self, monitor: Monitor, bar: tqdm[Any], each: Pass, terms: Terms, steps_per_second: float) -> None:
        """Read the numbers of the last step, and so wait for the device."""
        numbers = {}
        for head, value in terms.items():
            numbers[f"loss/{head}"] = value if isinstance(value, Tensor) else value.loss.mean()
            numbers |= {} if isinstance(value, Tensor) else report.head_numbers(head, value)
        values = report.to_host(numbers)
        values["optim/learning_rate"] = self.learning_rate(each.heads, self.step - 1)
        values["optim/skipped_steps"] = self.learner.guard.skipped
        values |= {f"{head}/collapsed_sub_heads": len(bad) for head, bad in self.learner.sub_heads.collapsed.items()}
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
        """Update the weights once; nothing here waits for the device but the end of a pass.

        Args:
            each: The pass of the current epoch.
            position: Place of the step in the pass, from 0.
        """
        if position == 0:
            self.learner.sub_heads.begin_pass(each.heads)
        batches = self.schedule.batches(self.epoch, each.heads, position)
        views = [(heads, self._make_views(batch, each.first_view)) for heads, batch in batches]
        if position + 1 < each.steps:
            for _, batch in self.schedule.batches(self.epoch, each.heads, position + 1):
                self.images.prefetch(batch.indices)
        terms = self.learner.step(views, self.learning_rate(each.heads, self.step), self.stop.received is not None)
        self.step += 1
        if position == each.steps - 1:
            self._end_pass(each)
        return terms

    def _end_pass(self, each: Pass) -> None:
        for line in self.learner.end_pass(each.heads, self.epoch):
            if self.place.is_main:
                _logger.warning("epoch %d: %s", self.epoch + 1, line)

    def _make_views(self, batch: Batch, first_view: int) -> Tensor:
        images, rows, indices = self.images.gather(batch.indices)
        layout = self.config.train.channels_last
        return self.views.training(
            images, rows, indices, batch.epoch, first_view, dtype=self.learner.dtype, channels_last=layout
        )

    def _evaluate(self) -> tuple[dict[str, Evaluation], Recommendation]:
        """Evaluate the network head by head, and choose a clustering head."""

        def heed() -> None:
            if self.poll.stop(self.stop.received is not None):
                raise Stopping

        evaluations = self.evaluator.evaluate(
            self.learner.model, self.learner.sub_heads, self.learner.stuck.restarts, heed
        )
        recommendation = recommend([evaluations[head].health for head in self.config.clustering_heads])
        self.clustering_head = recommendation.chosen.head
        return evaluations, recommendation

    def _result(
        self, evaluations: Mapping[str, Evaluation], recommendation: Recommendation, epochs: int
    ) -> dict[str, Any]:
        chosen = recommendation.chosen
        seen = self.config.data.batch_size * self.step
        return {
            "data": self.data.evaluation.name,
            "num_images": len(self.data.evaluation.images),
            "num_clusters": chosen.num_clusters,
            "epochs": epochs,
            "world_size": self.place.world_size,
            "seed": self.config.run.seed,
            **self.evaluator.figures(evaluations[chosen.head]),
            "images_per_second": round(seen / self.train_seconds, 1) if self.train_seconds else None,
            "train_seconds": round(self.train_seconds, 2),
            "skipped_steps": self.learner.guard.skipped,
            "collapsed_sub_heads": self.learner.sub_heads.collapsed,
            "choices": recommendation.as_json(),
        }

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the network as it is; return the contents of result.json.

        Collective: all ranks must call; the figures do not depend on their number.
        """
        return self._result(*self._evaluate(), self.epoch)

    def _evaluate_and_show(self, monitor: Monitor, bar: tqdm[Any]) -> dict[str, Any]:
        (evaluations, recommendation), epochs = self._evaluate(), self.epoch + 1
        result = self._result(evaluations, recommendation, epochs)
        health = [evaluation.health for evaluation in evaluations.values()]
        monitor.scalars(self.step, report.health_numbers(health) | report.result_numbers(result))
        for line in [each.line() for each in health] + report.result_lines(result, recommendation):
            if self.place.is_main:
                bar.write(f"epoch {epochs}: {line}")
        every = self.config.monitor.pictures_every
        if epochs == self.config.train.epochs or (every and epochs % every == 0):
            report.show_evaluation(
                monitor, self.step, self.evaluator, evaluations[self.clustering_head], self.learner.model
            )
            report.show_choices(monitor, self.step, recommendation)
        return result

    def resume(self, folder: Path, *, best: bool = False) -> bool:
        """Go on from the newest checkpoint that verifies; return whether there was one.

        Args:
            folder: Of the run.
            best: Take the one of lowest loss instead.

        Raises:
            UsageError: it is not of this network.

        Collective: all ranks must call; rank 0 reads for all.
        """
        state = resume.load(folder, best=best)
        if state is None:
            return False
        try:
            self.load_state_dict(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"{folder}: its checkpoint is not of this network: {reason}") from error
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return all that a later process needs to go on: tensors and plain values alone."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "train_seconds": self.train_seconds,
            "clustering_head": self.clustering_head,
            **self.learner.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.learner.load_state_dict(state)
        self.step, self.epoch = state["step"], state["epoch"]
        self.train_seconds = state["train_seconds"]
        self.clustering_head = state["clustering_head"]
