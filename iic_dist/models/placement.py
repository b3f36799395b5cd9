"""The network on its device, compiled, and shared among the ranks."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from iic_dist.distributed import Place
from iic_dist.models.cluster_net import ClusterNet
from iic_dist.models.sync_norm import synchronise


def on_device(
    model: ClusterNet, device: torch.device, dtype: torch.dtype, *, sync_batchnorm: bool, channels_last: bool
) -> ClusterNet:
    """Move a network to where it is trained."""
    if sync_batchnorm:
        synchronise(model, device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model.to(device, dtype)


def distribute(
    model: nn.Module, place: Place, device: torch.device, *, compiled: bool, heads_take_turns: bool
) -> nn.Module:
    """Compile a network if asked to, and average its gradients over the ranks, if there are several.

    DDP leaves the buffers alone after the start: the trainer sees to them.
    """
    if compiled:
        model = torch.compile(model)  # type: ignore[assignment]
    if place.world_size == 1:
        return model
    # torch 2.15 renamed the first of these.
    names = inspect.signature(DistributedDataParallel).parameters
    sync: Any = {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=heads_take_turns,
        **sync,
    )
