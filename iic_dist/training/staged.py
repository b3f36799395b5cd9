"""What every run shares, whatever its data: stages in order, the one of neighbours, evaluation, checkpoints."""

from __future__ import annotations

import abc
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from iic_dist import distributed
from iic_dist.config import Config
from iic_dist.data.features import FeatureSet, noun_of
from iic_dist.data.image_set import ImageSet
from iic_dist.device import exact_device
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.evaluation import metrics
from iic_dist.evaluation.evaluator import Evaluation, Evaluator
from iic_dist.evaluation.health import Recommendation, recommend
from iic_dist.evaluation.sub_heads import SubHeadRecord
from iic_dist.files import write_whole
from iic_dist.losses import IICTerms
from iic_dist.models import ClusterNet
from iic_dist.models.feature_heads import adopt_heads
from iic_dist.training import report, resume, stages
from iic_dist.training.guard import Poll
from iic_dist.training.monitor import Monitor
from iic_dist.training.neighbour_stage import NeighbourStage
from iic_dist.training.rank_record import FOLDER, RankLog
from iic_dist.training.stop import Stopping, StopSignals

_logger = logging.getLogger(__name__)


class StagedRun(abc.ABC):
    """A run that goes through its stages; every rank makes one.

    Args:
        config: Complete.
        train: What it trains on.
        evaluation: What it is judged on.
        place: This rank.
        device: Where to compute.

    Attributes:
        model: The network as it is, not wrapped in DDP.
        sub_heads: How its sub-heads did when they were last judged.
        restarts: How often each sub-head was started from another one, where some were.
        evaluator: Judges the network.
        stage: The stage that the run is in, or has just ended.
        stage_done: Whether it has ended.
        step: Steps of the run that are done, those of all stages.
        epoch: Epochs of the run that are done.
        images_seen: What its checkpoints say of the images, on rank 0: `trained_images.images_of`.

    Collective: all ranks must construct it, and call its methods, together.
    """

    model: ClusterNet
    evaluator: Evaluator
    sub_heads: SubHeadRecord
    restarts: Mapping[str, list[int]]

    def __init__(
        self,
        config: Config,
        train: ImageSet | FeatureSet,
        evaluation: ImageSet | FeatureSet,
        place: Place,
        device: torch.device,
    ) -> None:
        self.config, self.place, self.device = config, place, device
        self.trained_on, self.judged_on = train, evaluation
        self.clustering_head = config.heads[0]  # until an evaluation recommends one of several
        self.poll, self.stop = Poll(device), StopSignals()
        self.step = self.epoch = 0
        self.train_seconds = 0.0
        self.stage, self.stage_done = stages.STAGES[0], False
        self.stage_figures: dict[str, Any] = {}
        self.neighbours: Tensor | None = None
        self._neighbour_state: Mapping[str, Any] | None = None
        self._log_of_rank: RankLog | None = None
        self._has_begun = False
        self.images_seen: Mapping[str, Any] | None = None

    @abc.abstractmethod
    def show_start(self, monitor: Monitor) -> None:
        """Show what there is to see before the first step."""

    @abc.abstractmethod
    def begin(self, stage: str) -> None:
        """Make what a stage of epochs needs, from what the one before it has left."""

    @abc.abstractmethod
    def train_epochs(self, folder: Path, monitor: Monitor) -> dict[str, Any] | None:
        """Train the epochs of the stage that are not done yet; return the last evaluation, if there was one."""

    @abc.abstractmethod
    def features(self) -> Tensor:
        """Return the features (N, F) of all that is trained on, on the CPU, the same on all ranks."""

    @property
    @abc.abstractmethod
    def skipped_steps(self) -> int:
        """Steps that were not finite."""

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return all that a later process needs to go on: tensors and plain values alone."""

    @abc.abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken; states of runs without stages are those of the first one."""

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
        distributed.record_flights_in(folder / FOLDER)
        with (
            RankLog(folder, self.place) as self._log_of_rank,
            Monitor(folder, self.place.is_main, self.step if self.step else None) as monitor,
        ):
            self._log_of_rank.at(self.step, self.stage)
            if self.step == 0:
                self.show_start(monitor)
            try:
                result = self._train_stages(folder, monitor)
            except Stopping:
                resume.leave_for_later(folder, self.state_dict(), self.stop.received)
                self._log_of_rank.end("stopped")
                return None
        if self.place.is_main:
            write_whole(folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())
        return result

    def _train_stages(self, folder: Path, monitor: Monitor) -> dict[str, Any]:
        result = None
        asked = stages.stages_of(self.config)
        for stage in asked[asked.index(self.stage) if self.stage in asked else 0 :]:
            if stage != self.stage:
                self._start(stage)
            elif self._is_complete():
                continue
            self._lap_started = time.perf_counter()
            if stage == "neighbours" and self.stage_done:  # stopped while its heads were judged
                with self._progress(0, 0, "step") as bar:
                    result = self._judge_new_heads(monitor, bar)
            elif stage == "neighbours":
                result = self._train_on_neighbours(folder, monitor)
            else:
                result = self.train_epochs(folder, monitor)
        return result or self.evaluate()

    def _is_complete(self) -> bool:
        """Whether the stage has ended, and nothing is missing: more epochs asked for, or its figures."""
        if self.stage == "neighbours":
            figures = {"seconds"} if self.trained_on.labels is None else {"seconds", "kmeans_accuracy"}
            return self.stage_done and figures <= self.stage_figures.get(self.stage, {}).keys()
        return self.stage_done and not (self.stage == "representation" and self.epoch < self.config.train.epochs)

    def _start(self, stage: str) -> None:
        self.stage, self.stage_done = stage, False
        if stage != "neighbours":
            self.begin(stage)

    def _took_a_step(self) -> None:
        """Note that a step is done; from the first one on ranks wait less for each other.

        Collective: at the first step of this process all ranks must call.
        """
        if self._log_of_rank is not None:
            self._log_of_rank.at(self.step, self.stage)
        if not self._has_begun:
            self._has_begun = True
            distributed.set_timeout(self.config.run.timeout_minutes)

    def _progress(self, total: int, done: int, unit: str) -> tqdm[Any]:
        hidden = not (self.place.is_main and self.config.monitor.progress)
        return tqdm(total=total, initial=done, disable=hidden, unit=unit, dynamic_ncols=True)

    def _lap(self) -> None:
        """Add the time since the last lap to the seconds of training."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)  # so that the seconds are those of the work
        now = time.perf_counter()
        self.train_seconds += now - self._lap_started
        self._lap_started = now

    @property
    def neighbour_steps(self) -> int:
        """Steps of the run that were those of the stage of neighbours."""
        if self.stage == "representation":
            return 0
        running = self._neighbour_state
        return self.config.neighbours.steps if running is None else int(running["step"])

    def _train_on_neighbours(self, folder: Path, monitor: Monitor) -> dict[str, Any]:
        """Give the network new clustering heads, trained on neighbours in its features."""
        asked = self.config.neighbours
        stage = self._open_neighbours()
        first_step, every = self.step - stage.training.step, self.config.train.checkpoint_every_steps
        with self._progress(asked.steps, stage.training.step, "step") as bar:

            def after_each(step: int, terms: Mapping[str, IICTerms]) -> None:
                self.step, self._neighbour_state = first_step + step, stage.state_dict()
                self._took_a_step()
                bar.update()
                if step % self.config.monitor.log_every == 0:
                    self._log_neighbours(monitor, bar, terms)
                if step == asked.steps:  # the checkpoint of this step is that of the finished heads
                    return
                self._heed()
                if every and step % every == 0:
                    self._lap()
                    resume.save(folder, self.state_dict())

            try:
                stage.run(after_each)
            finally:
                self._lap()
            heads, self.sub_heads = stage.finish()
            self._neighbour_state, self.restarts, self.stage_done = None, {}, True
            adopt_heads(self.model, {name: head.to(self.device) for name, head in heads.items()})
            self._lap()
            result = self._judge_new_heads(monitor, bar, stage.features)
        resume.save_last(folder, self.state_dict(), self.sub_heads.lowest_loss(self.config.clustering_heads))
        return result

    def _open_neighbours(self) -> NeighbourStage:
        """Find the neighbours of all that is trained on, and go on from what was saved."""
        features, k = self.features(), self.config.neighbours.k
        others = len(features) - 1
        if others < k and self.place.is_main:
            noun = noun_of(self.config.data.name)
            _logger.warning("%d %ss: neighbours.k=%d is taken as %d, all others", len(features), noun, k, others)
        stage = NeighbourStage(self.config, features, exact_device(self.device), lambda images: self._heed())
        self.neighbours = stage.neighbours
        if self._neighbour_state is not None:
            stage.load_state_dict(self._neighbour_state)
        return stage

    def _log_neighbours(self, monitor: Monitor, bar: tqdm[Any], terms: Mapping[str, IICTerms]) -> None:
        numbers: dict[str, Tensor] = {}
        for head, value in terms.items():
            numbers |= {f"loss/{head}": value.loss.mean(), **report.head_numbers(head, value)}
        values = report.to_host(numbers)
        monitor.scalars(self.step, values | {"stage": stages.STAGES.index(self.stage) + 1})
        bar.set_description("neighbours", refresh=False)
        bar.set_postfix({head: f"{values[f'loss/{head}']:.3f}" for head in terms}, refresh=False)

    def _judge_new_heads(self, monitor: Monitor, bar: tqdm[Any], features: Tensor | None = None) -> dict[str, Any]:
        """Evaluate the heads that the stage of neighbours has made, and beside them k-means on the same features.

        Args:
            features: What `features` returns; None where it is still to be asked.
        """
        result = self._evaluate_and_show(monitor, bar, "neighbours", True)
        if (labels := self.trained_on.labels) is not None:
            features = self.features() if features is None else features
            k, share = self.config.clustering_heads[self.clustering_head], 0.0
            if self.place.is_main:
                share = metrics.kmeans_accuracy(features, labels, k)
                bar.write(f"neighbours: accuracy {share:.4f} by k-means on the same features")
            distributed.wait_patiently()
            share = distributed.broadcast(share)
            self.stage_figures["neighbours"]["kmeans_accuracy"] = share
            monitor.scalars(self.step, {"accuracy/kmeans_on_features": share})
        return result

    def _heed(self) -> None:
        """End the stage here where any rank was asked to stop."""
        self.poll.heed(self.stop.received)

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
        seen = self.config.data.batch_size * (self.step - self.neighbour_steps)
        return {
            "data": self.judged_on.name,
            "num_images": len(self.evaluator.images),
            "num_clusters": chosen.num_clusters,
            "epochs": epochs,
            "world_size": self.place.world_size,
            "seed": self.config.run.seed,
            **self.evaluator.figures(evaluations[chosen.head]),
            "images_per_second": round(seen / self.train_seconds, 1) if seen and self.train_seconds else None,
            "train_seconds": round(self.train_seconds, 2),
            "skipped_steps": self.skipped_steps,
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
            more = recommendation.chosen.as_json()
            seen = {name: more[name] for name in ("information_share", "used_clusters", "agreement")}
            self.stage_figures[self.stage] = {**figures, **seen, "seconds": round(self.train_seconds, 2)}
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
        self.go_on(folder, state)
        return True

    def go_on(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Args:
            folder: Of the run.
            state: What `resume.load` has read there.

        Raises:
            UsageError: it is not of this network.
        """
        try:
            self.load_state_dict(dict(state))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"{folder}: its checkpoint is not of this network: {reason}") from error

    def take_new_images(self) -> None:
        """Go on with other images than those of the state: the epoch or the search for neighbours begins again."""
        self.neighbours = self._neighbour_state = None

    def common_state(self) -> dict[str, Any]:
        """Return what the state of every run holds."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "train_seconds": self.train_seconds,
            "clustering_head": self.clustering_head,
            "stage": self.stage,
            "stage_done": self.stage_done,
            "stage_figures": self.stage_figures,
            "neighbours": None if self.neighbours is None else self.neighbours.int(),
            "neighbour_state": self._neighbour_state,
            "images": self.images_seen,
        }

    def load_common_state(self, state: Mapping[str, Any]) -> None:
        """Take what `common_state` has given."""
        self.step, self.epoch = state["step"], state["epoch"]
        self.train_seconds = state["train_seconds"]
        self.clustering_head = state["clustering_head"]
        self.stage, self.stage_done = state.get("stage", "representation"), state.get("stage_done", False)
        self.stage_figures = state.get("stage_figures", {})
        neighbours = state.get("neighbours")
        self.neighbours = None if neighbours is None else neighbours.long()
        self._neighbour_state = state.get("neighbour_state")

    def load_record(self, state: Mapping[str, Any]) -> None:
        """Take the record of new heads that are in the network already."""
        self.sub_heads = SubHeadRecord(self.model.shapes, {}, exact_device(self.device), torch.float64)
        self.sub_heads.load_state_dict(state["sub_heads"])
        self.restarts = {}
