"""Which implementation of an op runs: the compiled extension or its PyTorch twin."""

from __future__ import annotations

import importlib

IMPLEMENTATIONS = ("auto", "fused", "torch")


def _load() -> str | None:
    try:
        importlib.import_module("iic_dist._C")
    except ImportError as error:
        return f"the extension iic_dist._C could not be loaded ({error})"
    return None


WHY_NOT_FUSED = _load()
"""None where the extension is loaded, else the reason why not; settled for the life of the process."""


def choose(impl: str) -> str:
    """Resolve `impl` to "fused" or "torch".

    Args:
        impl: "auto" takes the extension where it is loaded, else PyTorch; the other two insist.

    Raises:
        ValueError: `impl` is none of the three.
        RuntimeError: "fused" was asked for and the extension is not there; says why.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: must be one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "fused" and WHY_NOT_FUSED is not None:
        raise RuntimeError(f"impl='fused': {WHY_NOT_FUSED}; use impl='auto' or 'torch'")
    if impl == "auto":
        return "torch" if WHY_NOT_FUSED else "fused"
    return impl
