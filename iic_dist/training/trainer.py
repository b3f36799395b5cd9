"""The training of a run on images: epochs, steps, and the views that go into them."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from iic_dist.config import Config
from iic_dist.config.arithmetic import for_device
from iic_dist.config.build import RunData, build_model, build_views
from iic_dist.config.complete import complete
from iic_dist.data.source import ImageSource, place_images
from iic_dist.device import exact_device
from iic_dist.distributed import Place
from iic_dist.evaluation.evaluator import Evaluator
from iic_dist.losses.step import Terms
from iic_dist.models import Backbone, on_device
from iic_dist.models.feature_heads import keep_selected, load_network
from iic_dist.training import report, resume, stages
from iic_dist.training.extract import Embedder, Precision, extract_images
from iic_dist.training.forecast import Forecast, advice
from iic_dist.training.inputs import Inputs
from iic_dist.training.learner import Learner
from iic_dist.training.monitor import Monitor
from iic_dist.training.schedule import Pass
from iic_dist.training.staged import StagedRun

_logger = logging.getLogger(__name__)


class Trainer(StagedRun):
    """Trains the network of a config on the images of a run, stage by stage; every rank makes one.

    Args:
        config: What is asked for.
        data: The images.
        place: This rank.
        device: Where to compute.

    Attributes:
        course: Of the stage, where it is one of epochs, else of the one before it.
        learner: Likewise.

    Raises:
        UsageError: the config does not fit the images or the number of ranks.

    Collective: all ranks must construct it, and call its methods, together.
    """

    def __init__(self, config: Config, data: RunData, place: Place, device: torch.device) -> None:
        super().__init__(complete(for_device(config, device), data.train), data.train, data.evaluation, place, device)
        self.data = data
        self.views = build_views(self.config, device)
        self.images = self._put_images()
        self.inputs = Inputs(self.config, self.views, self.images)
        self.course = stages.representation(self.config, place, len(data.train.images), len(self.images))
        train = self.config.train
        self.model = on_device(
            build_model(self.config, self.views.channels(data.train.images.shape[1]), self.views.size),
            device,
            self.config.dtype,
            sync_batchnorm=train.sync_batchnorm,
            channels_last=bool(train.channels_last),
        )
        self.learner = self._new_learner()
        self.sub_heads, self.restarts = self.learner.sub_heads, self.learner.stuck.restarts
        self.evaluator = self._build_evaluator()

    def _new_learner(self) -> Learner:
        course = self.course
        return Learner(
            course.config,
            self.model,
            course.config.heads,
            self.place,
            self.device,
            heads_take_turns=course.schedule.heads_take_turns,
            confidence=course.confidence,
        )

    def _put_images(self) -> ImageSource:
        """Put the images where they fit, the unlabelled ones behind the others."""
        images = self.data.train.images
        if self.data.unlabelled is not None:
            images = torch.cat([images, self.data.unlabelled.images])
        return place_images(images, exact_device(self.device), self.config.data.device_budget_gib)

    def _build_evaluator(self) -> Evaluator:
        data, budget = self.data, self.config.data.device_budget_gib
        same = data.evaluation is data.train and data.unlabelled is None
        return Evaluator(
            data.evaluation,
            self.images if same else place_images(data.evaluation.images, exact_device(self.device), budget),
            self.views,
            batch_size=self.config.train.evaluate_batch_size,
            dtype=self.config.dtype,
        )

    def show_start(self, monitor: Monitor) -> None:
        """Show some images and their views."""
        report.show_views(monitor, 0, self.views, self.data.train.images[:8], self.device)

    def begin(self, stage: str) -> None:
        """Go on with the selected sub-heads of the new heads."""
        if stage == "refine":
            keep_selected(self.model, {head: self.sub_heads.selected(head) for head in self.config.clustering_heads})
            self._open_refine(self.step)

    def _open_refine(self, first_step: int) -> None:
        self.course = stages.refine(self.config, self.place, len(self.data.train.images), first_step)
        for head in set(self.model.heads) - set(self.course.config.heads):
            del self.model.heads[head]
        self.learner = self._new_learner()
        # With one second view, however many the first stage had.
        self.inputs = Inputs(self.course.config, build_views(self.course.config, self.device), self.images)
        self.inputs.neighbours = self.neighbours
        self.sub_heads, self.restarts = self.learner.sub_heads, {}

    def train_epochs(self, folder: Path, monitor: Monitor) -> dict[str, Any] | None:
        """Train the epochs of the course that are not done yet."""
        train, result, last = self.config.train, None, self.course.last_epoch
        total, done = self.course.total_steps, self.step - self.course.first_step
        option = "--train.epochs" if self.stage == "representation" else "--refine.epochs"
        self._forecast = Forecast(advice(option, self.config.model.backbone, self.device.type))
        with self._progress(total, done, "step") as bar:
            while self.epoch < last:
                self._train_epoch(folder, monitor, bar)
                done = self.epoch + 1
                due = done == last or (train.evaluate_every and done % train.evaluate_every == 0)
                if due and self._clusters_are_trained():
                    result = self._evaluate_and_show(monitor, bar, f"epoch {done}", done == last)
                self.epoch, self.stage_done = done, done == last
                if done == last or done % train.checkpoint_every == 0:
                    save = resume.save_last if done == last else resume.save
                    save(folder, self.state_dict(), self.sub_heads.lowest_loss(self.config.clustering_heads))
        return result

    def _clusters_are_trained(self) -> bool:
        """Whether a clustering head has been trained so far; a warm-up may take the whole first stage."""
        return all(self.sub_heads.losses[head].isfinite().any() for head in self.config.clustering_heads)

    def _train_epoch(self, folder: Path, monitor: Monitor, bar: tqdm[Any]) -> None:
        """Take the steps of the epoch that are not done yet."""
        self.model.train()
        self._lap_started = started = time.perf_counter()
        every, before = self.config.train.checkpoint_every_steps, self.step
        try:
            for each, position in self.course.steps_left(self.epoch, before):
                terms = self.train_step(each, position)
                self._took_a_step()
                bar.update()
                self._tell_how_long(bar)
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

    def _tell_how_long(self, bar: tqdm[Any]) -> None:
        """Say after the first steps how long the others take, those of the last stage too, where that is hours."""
        left = self.course.first_step + self.course.total_steps - self.step
        if self.stage == "representation":
            left += self.config.refine.epochs * (len(self.data.train.images) // self.config.data.batch_size)
        if (line := self._forecast.after_step(left)) is not None and self.place.is_main:
            bar.write(line)

    def _log(self, monitor: Monitor, bar: tqdm[Any], each: Pass, terms: Terms, steps_per_second: float) -> None:
        """Read the numbers of the last step, and so wait for the device."""
        numbers = {}
        for head, value in terms.items():
            numbers[f"loss/{head}"] = value if isinstance(value, Tensor) else value.loss.mean()
            numbers |= {} if isinstance(value, Tensor) else report.head_numbers(head, value)
        values = report.to_host(numbers)
        values["optim/learning_rate"] = self.course.learning_rate(each.heads, self.step - 1)
        values["optim/skipped_steps"] = self.learner.guard.skipped
        values |= {f"{head}/collapsed_sub_heads": len(bad) for head, bad in self.learner.sub_heads.collapsed.items()}
        values["speed/images_per_second"] = steps_per_second * self.config.data.batch_size
        values |= {"epoch": self.epoch + 1, "stage": stages.STAGES.index(self.stage) + 1}
        monitor.scalars(self.step, values)
        losses = {head: f"{values[f'loss/{head}']:.3f}" for head in terms}
        bar.set_description(f"epoch {self.epoch + 1}/{self.course.last_epoch}", refresh=False)
        bar.set_postfix(losses, refresh=False)

    def train_step(self, each: Pass, position: int) -> Terms:
        """Update the weights once; nothing here waits for the device but the end of a pass.

        Args:
            each: The pass of the current epoch.
            position: Place of the step in the pass, from 0.
        """
        if position == 0:
            self.learner.sub_heads.begin_pass(each.heads)
        schedule, epoch = self.course.schedule, self.epoch - self.course.first_epoch
        batches = schedule.batches(epoch, each.heads, position)
        if self.stage == "refine":
            views = [part for heads, batch in batches for part in self.inputs.of_refinement(heads, batch)]
        else:
            views = [part for heads, batch in batches for part in self.inputs.of_views(heads, batch, each.first_view)]
        if position + 1 < each.steps:
            for _, batch in schedule.batches(epoch, each.heads, position + 1):
                self.images.prefetch(batch.indices)
        learning_rate = self.course.learning_rate(each.heads, self.step)
        terms = self.learner.step(views, learning_rate, self.stop.received is not None)
        self.step += 1
        if position == each.steps - 1:
            self._end_pass(each)
        return terms

    def _end_pass(self, each: Pass) -> None:
        for line in self.learner.end_pass(each.heads, self.epoch):
            if self.place.is_main:
                _logger.warning("epoch %d: %s", self.epoch + 1, line)

    def features(self) -> Tensor:
        """Return the features of all training images, (N, F) on the CPU; all ranks share the work."""
        precision: Precision = "float64" if self.config.train.precision == "float64" else "float32"
        return extract_images(
            Embedder(cast(Backbone, self.model.backbone), self.views, self.device, precision),
            self.images,
            count=len(self.data.train.images),
            batch_size=self.config.train.evaluate_batch_size,
            progress=self.config.monitor.progress and self.place.is_main,
            after_each=self._heed,
        )

    @property
    def skipped_steps(self) -> int:
        """Steps that were not finite."""
        return self.learner.guard.skipped

    def state_dict(self) -> dict[str, Any]:
        """Return all that a later process needs to go on: tensors and plain values alone."""
        state = {**self.common_state(), "first_step": self.course.first_step, **self.learner.state_dict()}
        if self.stage == "neighbours" and self.stage_done:  # the learner is that of the stage before
            state |= {"model": self.model.state_dict(), "optimizer": None, "sub_heads": self.sub_heads.state_dict()}
        return state

    def take_new_images(self) -> None:
        """Go on with other images than those of the state: the epoch or the search for neighbours begins again.

        The epochs that are done count as if they had been of these images, so that the learning rate keeps its course.
        """
        super().take_new_images()
        before = self.course.schedule.total_steps(self.epoch)
        self.course = dataclasses.replace(self.course, first_step=self.step - before)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken; states of runs without stages are those of the first one."""
        self.load_common_state(state)
        if self.stage == "refine" or (self.stage == "neighbours" and self.stage_done):
            load_network(self.model, state["model"], self.config.clustering_heads)
        if self.stage == "refine":
            self._open_refine(state["first_step"])
        else:
            self.course = dataclasses.replace(self.course, first_step=state.get("first_step", 0))
        if self.stage == "neighbours" and self.stage_done:
            self.load_record(state)
        else:
            self.learner.load_state_dict(state)
