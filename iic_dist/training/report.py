"""What is said of a training while it runs: numbers of the heads, pictures, the line at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from iic_dist.data.features import FeatureSet, noun_of
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
    monitor: Monitor, step: int, evaluated: ImageSet, clusters: Tensor, confidence: Tensor, k: int
) -> None:
    """Show the surest and the most doubtful images of every cluster of the selected sub-head.

    Args:
        clusters: (M,) of the images of `evaluated`.
        confidence: (M,).
        k: Number of clusters.
    """
    if not monitor.enabled:
        return
    for tag, doubtful in (("most_confident", False), ("most_doubtful", True)):
        picture = mosaics.cluster_mosaic(evaluated.images, clusters, confidence, k, doubtful=doubtful)
        monitor.image(f"clusters/{tag}", picture, step)


def show_evaluation(
    monitor: Monitor, step: int, evaluator: Evaluator, evaluation: Evaluation, model: ClusterNet
) -> None:
    """Show what is in every cluster of the selected sub-head, and some images, or rows, by their features.

    Collective: all ranks must call; gathers an integer and a float of each image.
    """
    evaluated = evaluator.evaluated
    clusters, confidence = evaluation.assigned.gathered(evaluation.selected)
    if isinstance(evaluated, ImageSet):
        show_clusters(monitor, step, evaluated, clusters, confidence, evaluation.health.num_clusters)
    if evaluation.counts is not None:
        show_confusion(monitor, step, evaluation.counts[evaluation.selected], evaluated.class_names)
    if monitor.enabled:
        sample = projector_sample(len(evaluator.images))
        show_embedding(monitor, step, evaluated, sample, evaluator.features(model, sample), clusters)


def show_confusion(monitor: Monitor, step: int, counts: Tensor, class_names: Sequence[str]) -> None:
    """Show clusters against classes: (K, C) counts of the selected sub-head."""
    if monitor.enabled:
        monitor.figure("clusters/confusion", charts.confusion(counts, class_names), step)


def projector_sample(count: int) -> Tensor:
    """Choose what TensorBoard's projector shows: up to 1000 images of `count`, evenly spread, (n,) int64."""
    shown = min(count, PROJECTED)
    return torch.arange(shown) * count // max(1, shown)


def show_embedding(
    monitor: Monitor, step: int, evaluated: ImageSet | FeatureSet, sample: Tensor, features: Tensor, clusters: Tensor
) -> None:
    """Show some images by the features that the network sees in them, in TensorBoard's projector.

    Where nothing is known but the features, a point has no picture; the image of a folder has its path instead.

    Args:
        evaluated: The images, or the features.
        sample: (n,) int64, which of them.
        features: (n, F).
        clusters: (M,) of all of them.
    """
    columns = {"cluster": [str(cluster) for cluster in clusters[sample.to(clusters.device)].tolist()]}
    pictures = None
    if isinstance(evaluated, ImageSet):
        pictures = evaluated.images[sample].float() / 255
        side = min(PROJECTED_PIXELS, pictures.shape[-1])
        pictures = F.interpolate(pictures, (side, side), mode="area").expand(-1, 3, -1, -1)
    elif evaluated.paths:
        columns["path"] = [printable(evaluated.paths[place]) for place in sample.tolist()]
    if evaluated.labels is not None:
        names = (*evaluated.class_names, "none")  # -1 is the last one
        columns["class"] = [names[label] for label in evaluated.labels[sample].tolist()]
    monitor.embedding("features", features, columns, pictures, step)


def summary(result: Mapping[str, Any]) -> str:
    """Put result.json into two lines, or three where later stages have changed the figures."""
    lines = (
        f"{printable(result['data'])}: {counted(result['num_images'], noun_of(result['data']))}, "
        f"{result['num_clusters']} clusters, "
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
    return lines + _by_stage(result["stages"])


def _by_stage(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Say how right each stage was, k-means beside the one of neighbours; nothing where there is but the first one."""
    known = {stage: each for stage, each in figures.items() if each.get("accuracy") is not None}
    if known.keys() <= {"representation"}:
        return ""
    said = []
    for stage, each in known.items():
        beside = each.get("kmeans_accuracy")
        kmeans = "" if beside is None else f" (k-means on the same features {beside:.4f})"
        said.append(f"{stage} {each['accuracy']['selected']:.4f}{kmeans}")
    return f"\naccuracy by stage: {', '.join(said)}"
