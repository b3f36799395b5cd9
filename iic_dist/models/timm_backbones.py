"""timm's networks as backbones: `timm/NAME`, without classifier, pooled to one row of features an image."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from torch import nn

from iic_dist.errors import UsageError
from iic_dist.models.norm import Norm
from iic_dist.models.weights import Preprocessing, misfit, read_state, refuse, without

PREFIX = "timm/"


def timm_backbone(name: str, in_channels: int, image_size: int, norm: Norm, weights: Path | None = None) -> nn.Module:
    """Build timm's network without its classifier and without dropout and stochastic depth.

    A network made for one size (most vision transformers) is built for `image_size`; its position embeddings are
    resampled when weights are loaded, not at every image.

    Args:
        name: timm/NAME.
        in_channels: C of its images; 3 with weights.
        image_size: S of its images in pixels.
        norm: "batch", which stands for the network's own.
        weights: File of its weights; None leaves the initial ones.

    Raises:
        UsageError: there is no such network, it does not take such images, or the weights are not its own.
    """
    if norm != "batch":
        raise UsageError(f"backbone {name!r} has its own norm, not {norm!r}: set norm to batch")
    cfg = pretrained_cfg(name)
    size: dict[str, Any] = {"img_size": image_size} if cfg.fixed_input_size else {}
    if weights is None:
        net = _create(name, in_channels, size)
    else:
        state = without(read_state(weights), _classifiers(cfg))
        # Loading is strict only where the number of classes is as the weights say.
        overlay = {"state_dict": dict(state), "num_classes": 0, "classifier": None}
        try:
            net = _create(name, in_channels, size, pretrained=True, pretrained_cfg_overlay=overlay)
        except UsageError:
            raise
        except Exception as error:  # timm's filters of checkpoints raise nearly anything
            how = misfit(state, _create(name, in_channels, size)) or " ".join(str(error).split())[:200]
            raise refuse(weights, name, how) from error
    _switch_off_dropout(net)
    return net


def pretrained_cfg(name: str) -> Any:
    """Return timm's record of a network and its weights.

    Raises:
        UsageError: timm has no such network, or no such weights of it.
    """
    import timm

    bare = name.removeprefix(PREFIX)
    try:
        cfg = timm.models.get_pretrained_cfg(bare) if timm.models.is_model(bare) else None
    except RuntimeError as error:  # no such tag
        tags = timm.list_pretrained(f"{timm.models.get_arch_name(bare)}.*")
        raise UsageError(f"backbone {name!r}: timm has no such weights; it has {', '.join(tags) or 'none'}") from error
    if cfg is None:
        near = difflib.get_close_matches(bare, timm.list_models(), n=4, cutoff=0.4)
        hint = f"; near it: {', '.join(PREFIX + each for each in near)}" if near else ""
        raise UsageError(f"unknown backbone {name!r}: timm {timm.__version__} has no such network{hint}")
    return cfg


def timm_preprocessing(name: str) -> Preprocessing:
    """Return what the weights of timm/NAME want to see."""
    cfg = pretrained_cfg(name)
    return Preprocessing(
        mean=tuple(cfg.mean),
        std=tuple(cfg.std),
        resampling="bicubic" if cfg.interpolation == "bicubic" else "bilinear",
        input_size=int(cfg.input_size[-1]),
        crop_pct=float(cfg.crop_pct),
    )


def _create(name: str, in_channels: int, size: dict[str, Any], **weights: Any) -> nn.Module:
    import timm

    try:
        net: nn.Module = timm.create_model(
            name.removeprefix(PREFIX), num_classes=0, in_chans=in_channels, **size, **weights
        )
    except AssertionError as error:
        raise UsageError(f"backbone {name!r} does not take images of this size: {error}") from error
    return net


def _classifiers(cfg: Any) -> tuple[str, ...]:
    named = cfg.classifier or ()
    return (named,) if isinstance(named, str) else tuple(named)


def _switch_off_dropout(net: nn.Module) -> None:
    """Of layers, and of the rates that timm's networks hand to functions."""
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for rate in ("drop_prob", "drop_rate", "drop_path_rate", "attn_drop_rate", "attn_drop"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
