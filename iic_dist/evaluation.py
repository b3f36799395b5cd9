"""Cluster the evaluation images, count the clusters against the classes, and show both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iic_dist import distributed, inference, metrics, report
from iic_dist.augment import Views
from iic_dist.data import DeviceImages, ImageSet
from iic_dist.models import ClusterNet
from iic_dist.monitor import Monitor


@dataclass(frozen=True)
class Evaluation:
    """What the network makes of the evaluation images.

    Attributes:
        assigned: The clusters of this rank's share.
        counts: Clusters against classes over all ranks: (H, K, C) on the CPU, or None without labels.
        selected: The sub-head that one would choose without labels.
    """

    assigned: inference.Assignments
    counts: Tensor | None
    selected: int


class Evaluator:
    """Evaluates a network on a set of images, each rank its share.

    Args:
        evaluated: The images and, if they have any, their classes.
        images: The same images on the device.
        views: `views.evaluation` makes the input.
        num_clusters: K.
        batch_size: Images of one forward pass of a rank.
        dtype: Of the network's input.
    """

    def __init__(
        self,
        evaluated: ImageSet,
        images: DeviceImages,
        views: Views,
        num_clusters: int,
        *,
        batch_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.evaluated, self.images, self.views, self.num_clusters = evaluated, images, views, num_clusters
        self.batch_size, self.dtype = batch_size, dtype

    def evaluate(self, model: ClusterNet, selected: int, after_each: Callable[[], None] | None = None) -> Evaluation:
        """Cluster all images; the figures do not depend on the number of ranks or the batch size.

        Args:
            model: Not wrapped in DDP.
            selected: The sub-head that one would choose without labels.
            after_each: Called after every forward pass, equally often on all ranks; may raise to end it here.

        Collective: all ranks must call; reduces H*K*C integers.
        """
        assigned = inference.assign(
            model, self.views, self.images, batch_size=self.batch_size, dtype=self.dtype, after_each=after_each
        )
        return Evaluation(assigned, self._counts(assigned), selected)

    def _counts(self, assigned: inference.Assignments) -> Tensor | None:
        if self.evaluated.labels is None:
            return None
        labels = self.evaluated.labels[assigned.indices].to(assigned.clusters.device)
        counts = metrics.count_matrix(assigned.clusters, labels, self.num_clusters, self.evaluated.num_classes)
        return distributed.all_reduce_sum(counts).cpu()

    def figures(self, evaluation: Evaluation) -> dict[str, Any]:
        """Return accuracy, NMI and ARI as result.json has them; null without labels."""
        if evaluation.counts is None:
            return {"accuracy": None, "nmi": None, "ari": None}
        return metrics.summarize(evaluation.counts, evaluation.selected)

    def show(self, monitor: Monitor, step: int, evaluation: Evaluation, model: ClusterNet) -> None:
        """Show what is in every cluster of the selected sub-head, and some images by their features.

        Collective: all ranks must call; gathers an integer and a float of each image.
        """
        clusters, confidence = evaluation.assigned.gathered(evaluation.selected)
        counts = None if evaluation.counts is None else evaluation.counts[evaluation.selected]
        report.show_clusters(monitor, step, self.evaluated, clusters, confidence, self.num_clusters, counts)
        if monitor.enabled:
            sample = report.projector_sample(len(self.evaluated.images))
            resident, rows, _ = self.images.gather(sample)
            features = inference.embed(model, self.views, resident[rows], dtype=self.dtype)
            report.show_embedding(monitor, step, self.evaluated, sample, features, clusters)
