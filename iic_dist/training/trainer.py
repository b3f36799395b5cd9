"""The training of a run: its stages, steps and epochs, evaluation, checkpoints."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from iic_dist.config import Config
from iic_dist.config.build import RunData, build_model, build_views
from iic_dist.config.complete import complete
from iic_dist.data.source import ImageSource, place_images
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.evaluation import inference, metrics
from iic_dist.evaluation.evaluator import Evaluation, Evaluator
from iic_dist.evaluation.health import Recommendation, recommend
from iic_dist.evaluation.sub_heads import SubHeadRecord
from iic_dist.files import write_whole
from iic_dist.losses import IICTerms
from iic_dist.losses.step import Terms
from iic_dist.models import on_device
from iic_dist.models.feature_heads import adopt_heads, keep_selected, load_network
from iic_dist.training import report, resume, stages
from iic_dist.training.guard import Poll
from iic_dist.training.inputs import Inputs
from iic_dist.training.learner import Learner
from iic_dist.training.monitor import Monitor
from iic_dist.training.neighbour_stage import NeighbourStage
from iic_dist.training.schedule import Pass
from iic_dist.training.stop import Stopping, StopSignals

_logger = logging.getLogger(__name__)


class Trainer:
    """Trains the network of a config on the images of a run, stage by stage; every rank makes one.

    Args:
        config: What is asked for.
        data: The images.
        place: This rank.
        device: Where to compute.

    Attributes:
        stage: The stage that the run is in, or has just ended.
        course: Of the stage, where it is one of epochs.
        learner: Likewise.
        step: Steps of the run that are done, those of all stages.
        epoch: Epochs of the run that are done.

    Raises:
        UsageError: the config does not fit the images or the number of ranks.

    Collective: all ranks must construct it, and call its methods, together.
    """

    def __init__(self, config: Config, data: RunData, place: Place, device: torch.device) -> None:
        self.config = complete(config, data.train)
        self.data, self.place, self.device = data, place, device
        self.views = build_views(self.config)
        self.images = self._put_images()
        self.inputs = Inputs(self.config, self.views, self.images)
        self.stage = "representation"
        self.course = stages.representation(self.config, place, len(data.train.images), len(self.images))
        train = self.config.train
        self.model = on_device(
            build_model(self.config, self.views.channels(data.train.images.shape[1]), self.views.size),
            device,
            self.config.dtype,
            sync_batchnorm=train.sync_batchnorm,
            channels_last=train.channels_last,
        )
        self.learner = self._new_learner()
        self.sub_heads, self.restarts = self.learner.sub_heads, self.learner.stuck.restarts
        self.evaluator = self._build_evaluator()
        self.clustering_head = self.config.heads[0]  # until an evaluation recommends one of several
        self.poll, self.stop = Poll(device), StopSignals()
        self.step = self.epoch = 0
        self.train_seconds = 0.0
        self.stage_done = False
        self.stage_figures: dict[str, Any] = {}
        self._neighbour_state: Mapping[str, Any] | None = None

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
        return place_images(images, self.device, self.config.data.device_budget_gib)

    def _build_evaluator(self) -> Evaluator:
        data, budget = self.data, self.config.data.device_budget_gib
        same = data.evaluation is data.train and data.unlabelled is None
        return Evaluator(
            data.evaluation,
            self.images if same else place_images(data.evaluation.images, self.device, budget),
            self.views,
            batch_size=self.config.train.evaluate_batch_size,
            dtype=self.config.dtype,
        )

    def train(self, folder: Path, stop: StopSignals | None = None) -> dict[str, Any] | None:
        """Train to the end of the last stage, evaluating and saving on the way; return what result.json holds.

        Args:
            folder: Folder of the run; rank 0 writes there.
            stop: Signals to heed: soon after any rank has received one, all of them stop at the same step, save, leave
                a file PREEMPTED in the folder, and return None.

        Raises:
            RunError: too many steps in a row were not finite, or the last state could not be saved.
        """
        self.stop = stop or self.stop
        with Monitor(folder, self.place.is_main, self.step if self.step else None) as monitor:
            if self.step == 0:
                report.show_views(monitor, 0, self.views, self.data.train.images[:8], self.device)
            try:
                result = self._train_stages(folder, monitor)
            except Stopping:
                resume.leave_for_later(folder, self.state_dict(), self.stop.received)
                return None
        if self.place.is_main:
            write_whole(folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())
        return result

    def _train_stages(self, folder: Path, monitor: Monitor) -> dict[str, Any]:
        result = None
        asked = stages.stages_of(self.config)
        for stage in asked[asked.index(self.stage) if self.stage in asked else 0 :]:
            if stage != self.stage:
                self._begin(stage)
            elif self._is_complete():
                continue
            self._lap_started = time.perf_counter()
            if stage == "neighbours" and self.stage_done:  # stopped while its heads were evaluated
                with self._progress(0, 0, "step") as bar:
                    result = self._evaluate_and_show(monitor, bar, stage, True)
            elif stage == "neighbours":
                result = self._train_on_neighbours(folder, monitor)
            else:
                result = self._train_epochs(folder, monitor)
        return result or self.evaluate()

    def _is_complete(self) -> bool:
        """Whether the stage has ended, and nothing is missing: more epochs asked for, or its figures."""
        if self.stage == "neighbours":
            return self.stage_done and "seconds" in self.stage_figures.get(self.stage, {})
        return self.stage_done and not (self.stage == "representation" and self.epoch < self.course.last_epoch)

    def _begin(self, stage: str) -> None:
        """Make what a stage needs, from what the one before it has left."""
        self.stage, self.stage_done = stage, False
        if stage == "refine":
            keep_selected(self.model, {head: self.sub_heads.selected(head) for head in self.config.clustering_heads})
            self._open_refine(self.step)

    def _open_refine(self, first_step: int) -> None:
        self.course = stages.refine(self.config, self.place, len(self.data.train.images), first_step)
        for head in set(self.model.heads) - set(self.course.config.heads):
            del self.model.heads[head]
        self.learner = self._new_learner()
        self.sub_heads, self.restarts = self.learner.sub_heads, {}

    def _train_epochs(self, folder: Path, monitor: Monitor) -> dict[str, Any] | None:
        """Train the epochs of the course that are not done yet; return the last evaluation, if there was one."""
        train, result, last = self.config.train, None, self.course.last_epoch
        total, done = self.course.total_steps, self.step - self.course.first_step
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
                    first = self.stage == "representation"  # losses of other stages are other losses
                    loss = self.sub_heads.lowest_loss(self.config.clustering_heads) if first else None
                    save(folder, self.state_dict(), loss)
        return result

    def _clusters_are_trained(self) -> bool:
        """Whether a clustering head has been trained so far; a warm-up may take the whole first stage."""
        return all(self.sub_heads.losses[head].isfinite().any() for head in self.config.clustering_heads)

    def _progress(self, total: int, done: int, unit: str) -> tqdm[Any]:
        hidden = not (self.place.is_main and self.config.monitor.progress)
        return tqdm(total=total, initial=done, disable=hidden, unit=unit, dynamic_ncols=True)

    def _train_epoch(self, folder: Path, monitor: Monitor, bar: tqdm[Any]) -> None:
        """Take the steps of the epoch that are not done yet."""
        self.model.train()
        self._lap_started = started = time.perf_counter()
        every, before = self.config.train.checkpoint_every_steps, self.step
        try:
            for each, position in self.course.steps_left(self.epoch, before):
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
        values["optim/learning_rate"] = self.course.learning_rate(each.heads, self.step - 1)
        values["optim/skipped_steps"] = self.learner.guard.skipped
        values |= {f"{head}/collapsed_sub_heads": len(bad) for head, bad in self.learner.sub_heads.collapsed.items()}
        values["speed/images_per_second"] = steps_per_second * self.config.data.batch_size
        values["epoch"] = self.epoch + 1
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

    def _train_on_neighbours(self, folder: Path, monitor: Monitor) -> dict[str, Any]:
        """Give the network new clustering heads, trained on neighbours in its features."""
        asked = self.config.neighbours
        stage = self._open_neighbours()
        first_step, every = self.step - stage.training.step, self.config.train.checkpoint_every_steps
        with self._progress(asked.steps, stage.training.step, "step") as bar:

            def after_each(step: int, terms: Mapping[str, IICTerms]) -> None:
                self.step, self._neighbour_state = first_step + step, stage.state_dict()
                bar.update()
                if step % self.config.monitor.log_every == 0:
                    self._log_neighbours(monitor, bar, terms)
                if step == asked.steps:  # the checkpoint of this step is that of the finished heads
                    return
                self._heed()
                if every and step % every == 0:
                    self._lap()
                    resume.save(folder, self.state_dict())

            stage.run(after_each)
            heads, self.sub_heads = stage.finish()
            self._neighbour_state, self.restarts, self.stage_done = None, {}, True
            adopt_heads(self.model, heads)
            self._lap()
            share = self._kmeans(stage)
            self.stage_figures["neighbours"] = {} if share is None else {"kmeans_accuracy": share}
            result = self._evaluate_and_show(monitor, bar, "neighbours", True)
            if share is not None:
                bar.write(f"neighbours: accuracy {share:.4f} by k-means on the same features")
        resume.save_last(folder, self.state_dict())
        return result

    def _open_neighbours(self) -> NeighbourStage:
        """Find the features of all training images and their neighbours, and go on from what was saved."""
        count = len(self.data.train.images)
        with self._progress(count, 0, "image") as bar:
            bar.set_description("features", refresh=False)

            def after_each(images: int) -> None:
                bar.update(min(images * self.place.world_size, count - bar.n))
                self._heed()

            features = inference.all_features(
                self.model,
                self.views,
                self.images,
                count=count,
                batch_size=self.config.train.evaluate_batch_size,
                dtype=self.config.dtype,
                after_each=after_each,
            )
        stage = NeighbourStage(self.config, features, self.device, lambda images: self._heed())
        self.inputs.neighbours = stage.neighbours
        if self._neighbour_state is not None:
            stage.load_state_dict(self._neighbour_state)
        return stage

    def _log_neighbours(self, monitor: Monitor, bar: tqdm[Any], terms: Mapping[str, IICTerms]) -> None:
        numbers: dict[str, Tensor] = {}
        for head, value in terms.items():
            numbers |= {f"loss/{head}": value.loss.mean(), **report.head_numbers(head, value)}
        values = report.to_host(numbers)
        monitor.scalars(self.step, values)
        bar.set_description("neighbours", refresh=False)
        bar.set_postfix({head: f"{values[f'loss/{head}']:.3f}" for head in terms}, refresh=False)

    def _kmeans(self, stage: NeighbourStage) -> float | None:
        """Return the accuracy of k-means on the vectors of the stage; None without labels or on other ranks than 0."""
        labels = self.data.train.labels
        if labels is None or not self.place.is_main:
            return None
        k = self.config.clustering_heads[self.clustering_head]
        return metrics.kmeans_accuracy(stage.vectors.cpu(), labels, k)

    def _heed(self) -> None:
        """End the stage here where any rank was asked to stop."""
        if self.poll.stop(self.stop.received is not None):
            raise Stopping

    def _evaluate(self) -> tuple[dict[str, Evaluation], Recommendation]:
        """Evaluate the network head by head, and choose a clustering head."""
        evaluations = self.evaluator.evaluate(self.model, self.sub_heads, self.restarts, self._heed)
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
            "collapsed_sub_heads": self.sub_heads.collapsed,
            "choices": recommendation.as_json(),
            "stages": self.stage_figures,
        }

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the network as it is; return the contents of result.json.

        Collective: all ranks must call; the figures do not depend on their number.
        """
        return self._result(*self._evaluate(), self.epoch)

    def _evaluate_and_show(self, monitor: Monitor, bar: tqdm[Any], when: str, last: bool) -> dict[str, Any]:
        """Evaluate and show it.

        Args:
            when: For a person.
            last: Whether the stage ends here.
        """
        evaluations, recommendation = self._evaluate()
        figures = self.evaluator.figures(evaluations[recommendation.chosen.head])
        if last:
            more = {**figures, "seconds": round(self.train_seconds, 2)}
            self.stage_figures[self.stage] = self.stage_figures.get(self.stage, {}) | more
        epochs = self.epoch + (self.stage != "neighbours")
        result = self._result(evaluations, recommendation, epochs)
        health = [evaluation.health for evaluation in evaluations.values()]
        monitor.scalars(self.step, report.health_numbers(health) | report.result_numbers(result))
        for line in [each.line() for each in health] + report.result_lines(result, recommendation):
            if self.place.is_main:
                bar.write(f"{when}: {line}")
        every = self.config.monitor.pictures_every
        if last or (every and epochs % every == 0):
            shown = evaluations[self.clustering_head]
            report.show_evaluation(monitor, self.step, self.evaluator, shown, self.model)
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
        state: dict[str, Any] = {
            "step": self.step,
            "epoch": self.epoch,
            "train_seconds": self.train_seconds,
            "clustering_head": self.clustering_head,
            "stage": self.stage,
            "stage_done": self.stage_done,
            "stage_figures": self.stage_figures,
            "first_step": self.course.first_step,
            "neighbours": None if self.inputs.neighbours is None else self.inputs.neighbours.int(),
            "neighbour_state": self._neighbour_state,
            **self.learner.state_dict(),
        }
        if self.stage == "neighbours" and self.stage_done:  # the learner is that of the stage before
            state |= {"model": self.model.state_dict(), "optimizer": None, "sub_heads": self.sub_heads.state_dict()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken; states of runs without stages are those of the first one."""
        self.stage, self.stage_done = state.get("stage", "representation"), state.get("stage_done", False)
        self.step, self.epoch = state["step"], state["epoch"]
        self.train_seconds = state["train_seconds"]
        self.clustering_head = state["clustering_head"]
        self.stage_figures = state.get("stage_figures", {})
        neighbours = state.get("neighbours")
        self.inputs.neighbours = None if neighbours is None else neighbours.long()
        self._neighbour_state = state.get("neighbour_state")
        if self.stage == "refine":
            load_network(self.model, state["model"], self.config.clustering_heads)
            self._open_refine(state["first_step"])
        if self.stage == "neighbours" and self.stage_done:
            load_network(self.model, state["model"], self.config.clustering_heads)
            self.sub_heads = SubHeadRecord(self.model.shapes, {}, self.device, torch.float64)
            self.sub_heads.load_state_dict(state["sub_heads"])
            self.restarts = {}
        else:
            self.learner.load_state_dict(state)
