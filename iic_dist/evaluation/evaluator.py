"""Cluster the evaluation images, see how the sub-heads do, count the clusters against the classes, and show both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iic_dist import distributed
from iic_dist.data.features import FeatureSet
from iic_dist.data.image_set import ImageSet
from iic_dist.data.source import ImageSource
from iic_dist.evaluation import inference, metrics
from iic_dist.evaluation.health import Health, mean_agreement
from iic_dist.evaluation.sub_heads import SubHeadRecord, used_clusters
from iic_dist.models import ClusterNet
from iic_dist.views.views import Views


@dataclass(frozen=True)
class Evaluation:
    """What a head with clusters makes of the evaluation images; but for `assigned`, over all ranks.

    Attributes:
        assigned: The clusters of this rank's share.
        selected: The sub-head that one would choose without labels.
        health: What can be said of it without labels.
        counts: Clusters against classes, (H, K, C); or None without labels.
    """

    assigned: inference.Assignments
    selected: int
    health: Health
    counts: Tensor | None


class Evaluator:
    """Evaluates a network on a set of images, each rank its share.

    Args:
        evaluated: The images and, if they have any, their classes.
        images: The same images, as batches on the device.
        views: `views.evaluation` makes the input.
        batch_size: Images of one forward pass of a rank.
        dtype: Of the network's input.
    """

    def __init__(
        self,
        evaluated: ImageSet | FeatureSet,
        images: ImageSource,
        views: Views,
        *,
        batch_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.evaluated, self.images, self.views = evaluated, images, views
        self.batch_size, self.dtype = batch_size, dtype

    def evaluate(
        self,
        model: ClusterNet,
        sub_heads: SubHeadRecord,
        restarts: Mapping[str, Sequence[int]],
        after_each: Callable[[], None] | None = None,
    ) -> dict[str, Evaluation]:
        """Cluster all images by every head; the figures do not depend on the number of ranks or the batch size.

        Args:
            model: Not wrapped in DDP.
            sub_heads: How the sub-heads did in the last pass of the training.
            restarts: How often each sub-head was started from another one, where some were: these are not compared.
            after_each: Called after every forward pass, equally often on all ranks; may raise to end it here.

        Collective: all ranks must call; reduces H*K*C + H*H/2*K*K integers of each head.
        """
        assigned = inference.assign(
            model,
            self.views,
            self.images,
            list(model.shapes),
            batch_size=self.batch_size,
            dtype=self.dtype,
            after_each=after_each,
        )
        evaluations = {}
        for head, (num_sub_heads, k) in model.shapes.items():
            counts = restarts.get(head, [0] * num_sub_heads)
            independent = [sub_head for sub_head, count in enumerate(counts) if count == 0]
            evaluations[head] = self._judge(head, k, assigned[head], sub_heads, independent)
        return evaluations

    def _judge(
        self,
        head: str,
        k: int,
        assigned: inference.Assignments,
        sub_heads: SubHeadRecord,
        independent: Sequence[int],
    ) -> Evaluation:
        selected = sub_heads.selected(head)
        sizes = torch.bincount(assigned.clusters[:, selected], minlength=k)
        # In whole units of 2^-24, float32's own near 1, so that the sum is the same whatever the number of ranks.
        confidence = (assigned.confidence[:, selected] * 2**24).round().long().sum()
        pairs = metrics.pair_counts(assigned.clusters[:, list(independent)], k)
        for sums in (sizes, confidence, pairs):
            distributed.all_reduce_sum(sums)
        mean, error = mean_agreement(metrics.sub_head_agreement(pairs, len(independent)))
        health = Health(
            head=head,
            num_clusters=k,
            information_share=float(sub_heads.information[head][selected]) / math.log(k),
            entropy_share=float(sub_heads.entropy[head][selected]) / math.log(k),
            used_clusters=int(used_clusters(sizes / sizes.sum())),
            sizes=sorted(sizes.tolist(), reverse=True),
            confidence=float(confidence) / 2**24 / len(self.images),
            agreement=mean,
            agreement_error=error,
            compared=len(independent),
        )
        return Evaluation(assigned, selected, health, self._counts(assigned, k))

    def _counts(self, assigned: inference.Assignments, num_clusters: int) -> Tensor | None:
        if self.evaluated.labels is None:
            return None
        labels = self.evaluated.labels[assigned.indices].to(assigned.clusters.device)
        counts = metrics.count_matrix(assigned.clusters, labels, num_clusters, self.evaluated.num_classes)
        return distributed.all_reduce_sum(counts).cpu()

    def figures(self, evaluation: Evaluation) -> dict[str, Any]:
        """Return accuracy, NMI and ARI as result.json has them; null without labels."""
        if evaluation.counts is None:
            return {"accuracy": None, "nmi": None, "ari": None}
        return metrics.summarize(evaluation.counts, evaluation.selected)

    def features(self, model: ClusterNet, sample: Tensor) -> Tensor:
        """Return what the network sees in some of the images, (n, F) on the device.

        Args:
            model: Not wrapped in DDP.
            sample: (n,) int64, which of them.
        """
        resident, rows, _ = self.images.gather(sample)
        return inference.embed(model, self.views, resident[rows], dtype=self.dtype)
