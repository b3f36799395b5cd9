"""Batch normalisation whose statistics are those of the images of all ranks, also where torch has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from iic_dist import distributed


def synchronise(model: nn.Module, device: torch.device) -> nn.Module:
    """Let all batch normalisation of a network measure its statistics on the batch of all ranks.

    Names and values in the state of the network stay. On CUDA it is torch's own, by way of timm, which knows that
    its layers end with an activation; torch has none elsewhere, and `SyncBatchNorm` takes its place.

    Args:
        model: Changed, or wrapped where it is itself such a layer.
        device: Where it is going to be trained.
    """
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        converted: nn.Module = convert_sync_batchnorm(model)
        return converted
    if isinstance(model, _BatchNorm):
        return SyncBatchNorm(model)
    for name, child in model.named_children():
        setattr(model, name, synchronise(child, device))
    return model


class SyncBatchNorm(_BatchNorm):
    """Takes the place of a layer of batch normalisation, with its weights, statistics and activation.

    Args:
        layer: (B, C, ...) -> the same; what timm's layers call `drop` and `act` comes behind it.

    Collective: in training all ranks must call it, in the same order, forward and backward.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        self.weight, self.bias = layer.weight, layer.bias
        self.running_mean, self.running_var = layer.running_mean, layer.running_var
        self.num_batches_tracked = layer.num_batches_tracked
        self.training = layer.training
        for name, child in layer.named_children():
            self.add_module(name, child)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch normalisation of {tuple(input.shape)}: must be (B, C, ...)")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise by the mean and the biased variance of each channel over all ranks, and remember both."""
        output = self._over_ranks(input) if self.training and distributed.world_size() > 1 else super().forward(input)
        for child in self.children():
            output = child(output)
        return output

    @torch.compiler.disable  # a compiled graph ends here: the collective stands in the open
    def _over_ranks(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        output, mean, squares, count = _Normalise.apply(input, self.weight, self.bias, self.eps)
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            assert self.running_mean is not None, "it has them where it counts"
            assert self.running_var is not None, "it has them where it counts"
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
            self.running_var.lerp_((squares / (count - 1)).to(self.running_var.dtype), share)
        assert isinstance(output, Tensor)
        return output


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, with mean and var over the rows of all ranks.

    The gradient of the weight and of the bias is that of this rank's rows: DDP averages it, as that of all other
    parameters. The gradient of x needs two sums over all ranks, because each row moves the mean and the deviation
    of all:

        dx = weight / sqrt(var + eps) * (dy - mean(dy) - x^ mean(dy x^)),   x^ = (x - mean) / sqrt(var + eps)

    Source: Ioffe & Szegedy, arXiv:1502.03167, with the means over the global batch.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return y, the mean (C,), the sum of squares about it (C,), and the number of values of a channel ().

        Collective: gathers 2C + 1 numbers of each rank.
        """
        rows = x.to(torch.promote_types(x.dtype, torch.float32))
        over = [0, *range(2, x.dim())]
        variance, mean = torch.var_mean(rows, over, correction=0)
        own = mean.new_full((1,), x.numel() // x.shape[1])
        # Of each rank, and put together as Chan et al. do: a sum of squares about 0 would lose digits.
        shards = distributed.gather_rows(torch.cat([own, mean, variance * own])[None], [1] * distributed.world_size())
        counts, means, squares = shards.split([1, x.shape[1], x.shape[1]], dim=1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        total = (squares + counts * (means - mean).square()).sum(0)
        inverse = torch.rsqrt(total / count + eps)
        scale = inverse if weight is None else weight.to(rows.dtype) * inverse
        y = (rows - _channels(mean, x)) * _channels(scale, x)
        if bias is not None:
            y = y + _channels(bias.to(rows.dtype), x)
        ctx.save_for_backward(x, weight, mean, inverse, count)
        ctx.mark_non_differentiable(mean, total, count)
        return y.to(x.dtype), mean, total, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        """Return the gradients of x, weight and bias.

        Collective: reduces 2C numbers.
        """
        x, weight, mean, inverse, count = ctx.saved_tensors
        over = [0, *range(2, x.dim())]
        dy = gradients[0].to(mean.dtype)
        normal = (x.to(mean.dtype) - _channels(mean, x)) * _channels(inverse, x)
        of_bias, of_weight = dy.sum(over), (dy * normal).sum(over)
        sums = distributed.all_reduce_sum(torch.cat([of_bias, of_weight]))
        along_mean, along_deviation = (sums / count).split(x.shape[1])
        scale = inverse if weight is None else weight.to(mean.dtype) * inverse
        dx = (dy - _channels(along_mean, x) - normal * _channels(along_deviation, x)) * _channels(scale, x)
        _, wants_weight, wants_bias, _ = ctx.needs_input_grad
        return (
            dx.to(x.dtype),
            of_weight.to(weight.dtype) if wants_weight else None,
            of_bias.to(weight.dtype) if wants_bias else None,
            None,
        )


def _channels(values: Tensor, like: Tensor) -> Tensor:
    """Return (C,) as (1, C, 1, ...), to go with (B, C, ...)."""
    return values.view(1, -1, *[1] * (like.dim() - 2))
