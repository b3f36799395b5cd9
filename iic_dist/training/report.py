"""What is said of a training while it runs: numbers of the heads, pictures, the line at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from iic_dist.data.image_set import ImageSet
from iic_dist.evaluation import charts, mosaics
from iic_dist.evaluation.evaluator import Evaluation, Evaluator
from iic_dist.evaluation.health import Health, Recommendation
from iic_dist.evaluation.sub_heads import used_clusters
from iic_dist.losses import IICTerms
from iic_dist.models import ClusterNet
from iic_dist.training.monitor import Monitor
from iic_dist.views.views import Views
from iic_dist.wording import counted, printable

PROJECTED = 1000
"""Images in TensorBoard's projector."""

PROJECTED_PIXELS = 32
"""Side at which it shows them, at most."""


def head_numbers(head: str, terms: IICTerms) -> dict[str, Tensor]:
    """Describe a clustering head: means over its sub-heads, and the loss of each.

    Returns:
        Scalars on the device, under the names that TensorBoard shows.
    """
    k, shares = terms.joint.shape[-1], terms.joint.sum(2)
    numbers = {
        f"{head}/information_share_of_ln_k": terms.mutual_information.mean() / math.log(k),
        f"{head}/entropy_nats": terms.entropy.mean(),
        f"{head}/conditional_entropy_nats": terms.conditional_entropy.mean(),
        f"{head}/used_clusters": used_clusters(shares).to(terms.loss.dtype).mean(),
        f"{head}/smallest_cluster_share": shares.amin(1).mean(),
        f"{head}/largest_cluster_share": shares.amax(1).mean(),
    }
    return numbers | {f"{head}_sub_head_loss_nats/{h}": loss for h, loss in enumerate(terms.loss)}


def to_host(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Bring scalars to the host together.

    Sync: waits for the device once.
    """
    return dict(zip(values, torch.stack([value.float() for value in values.values()]).tolist(), strict=True))


def result_numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """Pick the figures of result.json that are drawn over time; none without labels."""
    if result["accuracy"] is None:
        return {}
    accuracy = {f"accuracy/{name}": value for name, value in result["accuracy"].items()}
    return accuracy | {"evaluation/nmi": result["nmi"], "evaluation/ari": result["ari"]}


def health_numbers(health: Sequence[Health]) -> dict[str, float]:
    """Return what is drawn over time of the health of several heads."""
    return {name: value for each in health for name, value in each.numbers().items()}


def result_lines(result: Mapping[str, Any], recommendation: Recommendation) -> list[str]:
    """Say what an evaluation adds to the health of the heads: which K is recommended, and how right it is."""
    lines = []
    if recommendation.reason:
        lines.append(recommendation.line())
    if result["accuracy"] is not None:
        lines.append(f"accuracy {result['accuracy']['selected']:.4f} (selected sub-head)")
    return lines


def show_choices(monitor: Monitor, step: int, recommendation: Recommendation) -> None:
    """Show how the clustering heads of several K compare; nothing where there is one."""
    if monitor.enabled and len(recommendation.choices) > 1:
        monitor.figure("clusters/choices", charts.choices(recommendation), step)


def show_views(monitor: Monitor, step: int, views: Views, images: Tensor, device: torch.device) -> None:
    """Show the first view and a second view of some images.

    Args:
        images: (B, C, H, W) uint8 on the CPU; eight are plenty.
    """
    if not monitor.enabled:
        return
    indices = torch.arange(len(images), device=device)
    made = views.training(images.to(device), indices, indices, epoch=0).cpu()
    first, second = made[: len(images)], made[len(images) :]
    spec = views.first
    picture = mosaics.view_pairs(first, second, images, mean=spec.mean or None, std=spec.std or None)
    monitor.image("views/original_first_second", picture, step)


def show_clusters(
    monitor: Monitor,
    step: int,
    evaluated: ImageSet,
    clusters: Tensor,
    confidence: Tensor,
    k: int,
    counts: Tensor | None,
) -> None:
    """Show what is in every cluster of the selected sub-head.

    Args:
        clusters: (M,) of the images of `evaluated`.
        confidence: (M,).
        k: Number of clusters.
        counts: (K, C) against the classes, or None without labels.
    """
    if not monitor.enabled:
        return
    for tag, doubtful in (("most_confident", False), ("most_doubtful", True)):
        picture = mosaics.cluster_mosaic(evaluated.images, clusters, confidence, k, doubtful=doubtful)
        monitor.image(f"clusters/{tag}", picture, step)
    if counts is not None:
        show_confusion(monitor, step, counts, evaluated.class_names)


def show_evaluation(
    monitor: Monitor, step: int, evaluator: Evaluator, evaluation: Evaluation, model: ClusterNet
) -> None:
    """Show what is in every cluster of the selected sub-head, and some images by their features.

    Collective: all ranks must call; gathers an integer and a float of each image.
    """
    evaluated = evaluator.evaluated
    assert isinstance(evaluated, ImageSet)
    clusters, confidence = evaluation.assigned.gathered(evaluation.selected)
    counts = None if evaluation.counts is None else evaluation.counts[evaluation.selected]
    show_clusters(monitor, step, evaluated, clusters, confidence, evaluation.health.num_clusters, counts)
    if monitor.enabled:
        sample = projector_sample(len(evaluated.images))
        show_embedding(monitor, step, evaluated, sample, evaluator.features(model, sample), clusters)


def show_confusion(monitor: Monitor, step: int, counts: Tensor, class_names: Sequence[str]) -> None:
    """Show clusters against classes: (K, C) counts of the selected sub-head."""
    if monitor.enabled:
        monitor.figure("clusters/confusion", charts.confusion(counts, class_names), step)


def projector_sample(count: int) -> Tensor:
    """Choose the images that TensorBoard's projector shows: up to 1000 of `count`, evenly spread, (n,) int64."""
    shown = min(count, PROJECTED)
    return torch.arange(shown) * count // max(1, shown)


def show_embedding(
    monitor: Monitor, step: int, evaluated: ImageSet, sample: Tensor, features: Tensor, clusters: Tensor
) -> None:
    """Show some images by the features that the network sees in them, in TensorBoard's projector.

    Args:
        evaluated: The images.
        sample: (n,) int64, which of them.
        features: (n, F).
        clusters: (M,) of all of them.
    """
    pictures = evaluated.images[sample].float() / 255
    side = min(PROJECTED_PIXELS, pictures.shape[-1])
    pictures = F.interpolate(pictures, (side, side), mode="area").expand(-1, 3, -1, -1)
    columns = {"cluster": [str(cluster) for cluster in clusters[sample.to(clusters.device)].tolist()]}
    if evaluated.labels is not None:
        names = (*evaluated.class_names, "none")  # -1 is the last one
        columns["class"] = [names[label] for label in evaluated.labels[sample].tolist()]
    monitor.embedding("features", features, columns, pictures, step)


def summary(result: Mapping[str, Any]) -> str:
    """Put result.json into two lines."""
    lines = (
        f"{printable(result['data'])}: {counted(result['num_images'], 'image')}, {result['num_clusters']} clusters, "
        f"{counted(result['epochs'], 'epoch')}, {counted(result['world_size'], 'rank')}, seed {result['seed']}, "
        f"{result['train_seconds']} s of training"
    )
    if result["images_per_second"] is not None:
        lines += f", {result['images_per_second']} images/s"
    if (accuracy := result["accuracy"]) is not None:
        lines += (
            f"\naccuracy {accuracy['selected']:.4f} (selected sub-head; mean {accuracy['mean']:.4f} "
            f"± {accuracy['std']:.4f}, best {accuracy['best']:.4f}), NMI {result['nmi']:.4f}, ARI {result['ari']:.4f}"
        )
    return lines
