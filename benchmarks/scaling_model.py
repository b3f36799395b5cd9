"""How long a training step takes on W ranks: a model of few pieces, each of them measured or assumed by the caller.

    step = compute(images of a rank) + contrast(G) - contrast(images of a rank)
         + joints + embeddings + log-sum-exps + statistics         collectives that the step waits for
         + max(0, gradients - overlap * backward)                  what DDP cannot hide behind the backward pass

Collectives follow the usual alpha-beta model of a ring: hops that cost a latency each, and bytes over a bandwidth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """What lies between the ranks.

    Attributes:
        latency: Seconds of a hop inside a node.
        latency_between: Seconds of a hop from node to node.
        bandwidth: Bytes per second that pass each point of the ring: the slowest of them counts.
        ranks_per_node: How many ranks share a node.
        tree: Small all-reduces may go up and down a tree instead of round the ring, as NCCL's do.
    """

    latency: float
    latency_between: float
    bandwidth: float
    ranks_per_node: int
    tree: bool

    def _lap(self, ranks: int) -> float:
        """Seconds of W - 1 hops round the ring."""
        nodes = math.ceil(ranks / self.ranks_per_node)
        between = nodes if nodes > 1 else 0
        return max(0, ranks - 1 - between) * self.latency + between * self.latency_between

    def all_gather(self, size: float, ranks: int) -> float:
        """Seconds until every rank has all `size` bytes, of which it had 1 / W."""
        return self._lap(ranks) + size * (ranks - 1) / ranks / self.bandwidth

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds until every rank has the sum of `size` bytes."""
        ring = 2 * self.all_gather(size, ranks)
        if not self.tree or ranks == 1:
            return ring
        nodes = math.ceil(ranks / self.ranks_per_node)
        levels = math.log2(ranks / nodes) * self.latency + math.log2(nodes) * self.latency_between
        return min(ring, 2 * levels + 2 * size / self.bandwidth)


@dataclass(frozen=True)
class Traffic:
    """Bytes of the collectives of a joint step, float32.

    Attributes:
        joints: Of each IIC head, all-reduced.
        embeddings: Of the global batch, gathered.
        log_sum_exps: And similarities of the positive pairs, gathered.
        statistics: Of batch normalisation, and two flags (stop, not finite) in the same all-reduce.
        gradients: All-reduced by DDP.
    """

    joints: tuple[int, ...]
    embeddings: int
    log_sum_exps: int
    statistics: int
    gradients: int

    @classmethod
    def of_step(
        cls, *, images: int, parameters: int, statistics: int, clusters: Sequence[int], sub_heads: int, embedding: int
    ) -> Traffic:
        """Count the bytes of a step on `images` images over all ranks, with one second view each.

        Args:
            images: G.
            parameters: Of the network.
            statistics: Numbers that batch normalisation keeps.
            clusters: K of each IIC head.
            sub_heads: H.
            embedding: D.
        """
        return cls(
            joints=tuple(4 * (sub_heads * k * k + 1) for k in clusters),
            embeddings=4 * 2 * images * embedding,
            log_sum_exps=4 * 2 * images * 2,
            statistics=4 * (statistics + 2),
            gradients=4 * parameters,
        )


def contrast_flops(own_images: int, all_images: int, embedding: int) -> float:
    """Operations of the NT-Xent loss of one rank, forward and backward: three products of its rows with all rows."""
    return 3 * 2 * (2 * own_images) * (2 * all_images) * embedding


@dataclass(frozen=True)
class Step:
    """Seconds of a step and of its pieces."""

    compute: float
    contrast: float
    losses: float
    gradients: float
    exposed: float

    @property
    def total(self) -> float:
        return self.compute + self.contrast + self.losses + self.exposed


def predict(
    *,
    ranks: int,
    own_images: int,
    compute: float,
    contrast_rate: float,
    embedding: int,
    traffic: Traffic,
    network: Network,
    backward_share: float,
    overlap: float,
) -> Step:
    """Predict a step on `ranks` ranks.

    Args:
        ranks: W.
        own_images: Images of one rank in a step.
        compute: Seconds of a step on `own_images` images by one rank alone.
        contrast_rate: Operations per second of the NT-Xent loss.
        embedding: D.
        traffic: Bytes of this step.
        network: What carries them.
        backward_share: Share of `compute` that is the backward pass.
        overlap: Share of the backward pass behind which gradients can be reduced.
    """
    more = contrast_flops(own_images, own_images * ranks, embedding) - contrast_flops(own_images, own_images, embedding)
    if ranks == 1:
        return Step(compute, 0.0, 0.0, 0.0, 0.0)
    losses = sum(network.all_reduce(size, ranks) for size in (*traffic.joints, traffic.statistics))
    losses += network.all_gather(traffic.embeddings, ranks) + network.all_gather(traffic.log_sum_exps, ranks)
    gradients = network.all_reduce(traffic.gradients, ranks)
    exposed = max(0.0, gradients - overlap * backward_share * compute)
    return Step(compute, more / contrast_rate, losses, gradients, exposed)
