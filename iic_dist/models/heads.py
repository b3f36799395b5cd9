"""Heads: features (B, F) -> cluster logits (B, H, K) or embeddings (B, D)."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from iic_dist.errors import UsageError
from iic_dist.models.norm import Norm, check_norm, norm_1d

T = TypeVar("T", bound="SubHeads")


class SubHeads(nn.Module):
    """H independent linear classifiers, computed as one Linear of H * K outputs.

    Equal to `torch.stack([linear_h(features) for linear_h in linears], dim=1)`; sub-head h owns rows
    [h * K, (h + 1) * K) of the weight.

    Args:
        in_features: F.
        num_sub_heads: H.
        num_clusters: K.
        std: deviation of the first weights, which are normal; the biases start at zero. None: 1 / sqrt(F), so that
            logits start at the size of the features. The code of Ji et al. (arXiv:1807.06653) has 0.01; from there
            an entropy weight above 1 can pull all logits to zero, where the gradient vanishes.
    """

    def __init__(self, in_features: int, num_sub_heads: int, num_clusters: int, std: float | None = None) -> None:
        super().__init__()
        if num_sub_heads < 1 or num_clusters < 2:
            raise UsageError(
                f"a clustering head of {num_sub_heads} sub-heads and {num_clusters} clusters: "
                "it needs at least 1 sub-head and 2 clusters"
            )
        self.shape = (num_sub_heads, num_clusters)
        self.linear = nn.Linear(in_features, num_sub_heads * num_clusters)
        nn.init.normal_(self.linear.weight, std=in_features**-0.5 if std is None else std)
        nn.init.zeros_(self.linear.bias)

    def alone(self, sub_head: int) -> SubHeads:
        """Return a head of one of the sub-heads, with a copy of its weights."""
        return self._with_weights_of(sub_head, SubHeads(self.linear.in_features, 1, self.shape[1]))

    def _with_weights_of(self, sub_head: int, head: T) -> T:
        """Give a head of one sub-head the weights of one here, their dtype and device."""
        k = self.shape[1]
        own = slice(sub_head * k, (sub_head + 1) * k)
        head.to(self.linear.weight)
        head.linear.load_state_dict({"weight": self.linear.weight[own], "bias": self.linear.bias[own]})
        return head

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits (B, H, K) of `features` (B, F)."""
        return self.linear(features).unflatten(-1, self.shape)


class ProjectionHead(nn.Module):
    """The embedding of the contrastive loss: one Linear, or Linear - norm - ReLU - Linear.

    Args:
        in_features: F.
        out_features: D.
        hidden: width of the hidden layer; None for the linear head.
        norm: normalisation of the hidden layer.

    Source: Chen et al., arXiv:2002.05709, section 2.1. NT-Xent normalises the embedding, this head does not.
    """

    def __init__(self, in_features: int, out_features: int, hidden: int | None = None, norm: Norm = "batch") -> None:
        super().__init__()
        check_norm(norm)
        if out_features < 1 or (hidden is not None and hidden < 1):
            raise UsageError(f"a projection head of width {out_features}, hidden {hidden}: both must be at least 1")
        self.layers: nn.Module
        if hidden is None:
            self.layers = nn.Linear(in_features, out_features)
        else:
            self.layers = nn.Sequential(
                nn.Linear(in_features, hidden, bias=norm == "none"),  # a norm has its own shift
                *([] if norm == "none" else [norm_1d(norm, hidden)]),
                nn.ReLU(inplace=True),
                nn.Linear(hidden, out_features),
            )

    def forward(self, features: Tensor) -> Tensor:
        """Return the embeddings (B, D) of `features` (B, F), not normalised."""
        return self.layers(features)
