"""Which implementation of an op runs: the compiled extension or its PyTorch twin."""

from __future__ import annotations

import importlib
import logging
import os

import torch

IMPLEMENTATIONS = ("auto", "fused", "torch")

_logger = logging.getLogger(__name__)


def _load() -> tuple[str | None, frozenset[str]]:
    """Load the extension: why not, if not, and the device types that it has kernels for; warn once a machine."""
    try:
        info = importlib.import_module("iic_dist._C").build_info()
    except (ImportError, OSError) as error:
        why = f"the extension iic_dist._C could not be loaded ({error})"
    else:
        running = torch.__version__.split("+")[0]
        if info["torch"] == running:
            return None, frozenset({"cpu", "cuda"} if info["cuda"] else {"cpu"})
        why = f"the extension iic_dist._C was built for torch {info['torch']}, not {running}; build it again"
    if os.environ.get("LOCAL_RANK", "0") == "0":  # set by torchrun
        _logger.warning("losses and views run in PyTorch: %s", why)
    return why, frozenset()


WHY_NOT_FUSED, FUSED_DEVICES = _load()
"""None where the extension is loaded, else the reason why not; and the device types it serves. Settled for
the life of the process."""


def devices_of(*ops: str) -> frozenset[str]:
    """The device types that the extension has kernels for, of each of these ops."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    known = all(torch._C._dispatch_has_kernel(f"iic_dist::{op}") for op in ops)
    return frozenset(
        device for device in FUSED_DEVICES if known and all(has_kernel(f"iic_dist::{op}", device.upper()) for op in ops)
    )


def choose(impl: str, device_type: str = "cpu", devices: frozenset[str] | None = None, loss: str = "") -> str:
    """Resolve `impl` to "fused" or "torch".

    Args:
        impl: "auto" takes the extension where it is loaded and serves the device; the others insist.
        device_type: of the tensors, as in `tensor.device.type`.
        devices: that the ops of a loss have kernels for, as `devices_of` gives them; None for all that the
            extension was built for.
        loss: their name in the message.

    Raises:
        ValueError: `impl` is none of the three.
        RuntimeError: "fused" was asked for and the extension or its kernels are not there; says why.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: must be one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "fused" and WHY_NOT_FUSED is not None:
        raise RuntimeError(f"impl='fused': {WHY_NOT_FUSED}; use impl='auto' or 'torch'")
    if impl == "fused" and device_type not in FUSED_DEVICES:
        served = ", ".join(sorted(FUSED_DEVICES))
        raise RuntimeError(f"impl='fused': the extension was built for {served}, not {device_type}")
    if devices is None:
        devices = FUSED_DEVICES
    if impl == "fused" and device_type not in devices:
        served = ", ".join(sorted(devices)) or "no device"
        raise RuntimeError(
            f"impl='fused': the extension has kernels of {loss} for {served}, not {device_type}; use impl='auto'"
        )
    if impl == "auto":
        return "fused" if device_type in devices else "torch"
    return impl
