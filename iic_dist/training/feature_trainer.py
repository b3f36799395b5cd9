"""A run on features that stay as they are: of a file, or of images by a frozen pretrained network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from iic_dist.config import Config
from iic_dist.config.arithmetic import for_device
from iic_dist.config.build import build_model
from iic_dist.config.complete import complete
from iic_dist.distributed import Place
from iic_dist.evaluation.evaluator import Evaluator
from iic_dist.evaluation.sub_heads import SubHeadRecord
from iic_dist.models import ClusterNet, SubHeads
from iic_dist.models.feature_heads import FeatureSubHeads, adopt_heads, heads_of_state
from iic_dist.models.given_features import GivenFeatures
from iic_dist.training.features import RunFeatures
from iic_dist.training.monitor import Monitor
from iic_dist.training.staged import StagedRun
from iic_dist.views.views import Views


class _Rows:
    """Features, handed out as images are; see `data.source.ImageSource`."""

    def __init__(self, features: Tensor, device: torch.device) -> None:
        self.features, self.device = features, device

    def __len__(self) -> int:
        return len(self.features)

    def prefetch(self, indices: Tensor) -> None:
        """Do nothing: rows are small."""

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bring rows to the device."""
        rows = torch.arange(len(indices), device=self.device)
        return self.features[indices].to(self.device), rows, indices.to(self.device)


class _AsTheyAre:
    """The view of features that is evaluated: they themselves."""

    def evaluation(self, features: Tensor, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return rows of the features."""
        return features[rows].to(dtype)


class FeatureTrainer(StagedRun):
    """Trains clustering heads on the neighbours in given features; every rank makes one.

    Args:
        config: What is asked for; see `Config.of_features`.
        data: The features.
        place: This rank.
        device: Where to compute.

    Raises:
        UsageError: the config does not fit the features.

    Collective: all ranks must construct it, and call its methods, together.
    """

    def __init__(self, config: Config, data: RunFeatures, place: Place, device: torch.device) -> None:
        super().__init__(complete(for_device(config, device), data.train), data.train, data.evaluation, place, device)
        self.data = data
        # The heads alone; the network that made the features comes in when the run is saved.
        width = data.train.features.shape[1]
        heads = {
            name: SubHeads(width, config.neighbours.sub_heads, k) for name, k in self.config.clustering_heads.items()
        }
        self.model = ClusterNet(GivenFeatures(width), heads, freeze_backbone=True).to(device, self.config.dtype)
        self.sub_heads, self.restarts = SubHeadRecord(self.model.shapes, {}, device, torch.float64), {}
        self.evaluator = Evaluator(
            data.evaluation,
            _Rows(data.evaluation.features, device),
            cast(Views, _AsTheyAre()),
            batch_size=8192,
            dtype=self.config.dtype,
        )

    def show_start(self, monitor: Monitor) -> None:
        """Show nothing: there are no views."""

    def begin(self, stage: str) -> None:
        """Nothing comes before the neighbours, and nothing behind them."""
        raise AssertionError(f"a run on features has no stage {stage}")

    def train_epochs(self, folder: Path, monitor: Monitor) -> dict[str, Any] | None:
        """There are no epochs."""
        raise AssertionError("a run on features has no epochs")

    def features(self) -> Tensor:
        """Return the features of the run."""
        return self.data.train.features

    @property
    def skipped_steps(self) -> int:
        """None: the loss of given features is finite."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """Return all that a later process needs to go on, and to use the run without the weights' file."""
        state = self.common_state()
        if self.stage_done:
            state |= {"model": self._whole().state_dict(), "sub_heads": self.sub_heads.state_dict()}
        return state

    def _whole(self) -> ClusterNet:
        """The network from images to clusters, or of features of a file the heads alone."""
        if not self.config.pretrained:
            return self.model
        channels, size = self.config.image_shape
        whole = build_model(self.config, channels, self.config.views.size or size).to(self.device, self.config.dtype)
        heads = {name: head for name, head in self.model.heads.items() if isinstance(head, FeatureSubHeads)}
        adopt_heads(whole, heads)
        for name in set(whole.heads) - set(heads):
            del whole.heads[name]
        return whole

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.load_common_state(state)
        if self.stage_done:
            heads = heads_of_state(state["model"], self.config.clustering_heads)
            if missing := set(self.config.clustering_heads) - set(heads):
                raise ValueError(f"it holds no heads on features for {', '.join(sorted(missing))}")
            for name, head in heads.items():
                prefix = f"heads.{name}."
                own = {
                    key.removeprefix(prefix): value for key, value in state["model"].items() if key.startswith(prefix)
                }
                head.load_state_dict(own)
            adopt_heads(self.model, {name: head.to(self.device, self.config.dtype) for name, head in heads.items()})
            self.load_record(state)
