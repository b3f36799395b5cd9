"""Backbones: images (B, C, S, S) -> features (B, F), chosen by name."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from iic_dist.errors import UsageError
from iic_dist.models.norm import Norm, check_norm, norm_2d
from iic_dist.models.pretrained import find_weights
from iic_dist.models.timm_backbones import PREFIX, timm_backbone
from iic_dist.models.torchvision_backbones import (
    initialise_without_norm,
    resnet_variant,
    torchvision_backbone,
    torchvision_names,
)
from iic_dist.models.weights import check_digest

SMALL_IMAGE = 64
"""Up to this side in pixels resnet18 and resnet34 get the small-image stem (3x3, stride 1, no max-pool).

With ImageNet weights they keep the 7x7 stem that these belong to.
"""

SMALL_CNN_WIDTH = 32
"""Channels of the first stage of small_cnn; its features have four times as many."""

_OWN = ("small_cnn", "medium_cnn", "iic_vgg4", "iic_resnet34")

BACKBONE_NAMES = (*_OWN, "resnet18", "resnet34", "mobilenet_v2")
"""The names that the presets use and the documentation describes."""


class Backbone(nn.Module):
    """A network without its classifier.

    Args:
        net: maps (B, C, S, S) to (B, F), or to a map that is flattened to (B, F).
        example: (1, C, S, S), one image of the size that will come, to find F.
        name: what to call it in an error.

    Attributes:
        num_features: F.

    Raises:
        UsageError: `net` cannot take images of this size.
    """

    def __init__(self, net: nn.Module, example: Tensor, name: str) -> None:
        super().__init__()
        self.net = net
        net.eval()  # the dry run must not touch the running statistics
        try:
            with torch.no_grad():
                self.num_features = net(example).flatten(1).shape[1]
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            shape = "x".join(str(length) for length in example.shape[1:])
            raise UsageError(f"backbone {name!r} cannot take {shape} images: {reason[0]}") from error
        net.train()

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, F) of `images` (B, C, S, S)."""
        return self.net(images).flatten(1)


def build_backbone(
    name: str,
    *,
    in_channels: int,
    image_size: int,
    norm: Norm = "batch",
    pretrained: bool = False,
    fetch_weights: bool = True,
    weights: Path | str | None = None,
    weights_digest: str | None = None,
    width: int | None = None,
) -> Backbone:
    """Build a backbone by name.

    Dropout and stochastic depth of torchvision's and timm's networks are switched off: what is random in a run is a
    function of the seed and of the image, and torch's own generator knows neither.

    Args:
        name: one of BACKBONE_NAMES, a classification network of torchvision.models, or timm/NAME.
        in_channels: C of the views (2 with Sobel).
        image_size: S of the views in pixels; decides on pooling and stem.
        norm: "batch", "group" or "none". Batch statistics depend on who shares the rank, the other two not.
            torchvision's networks mean their own norm by "batch", and not all have the others; timm's have no others.
        pretrained: start from pretrained weights: those of `weights`, or else torchvision's or timm's own, fetched
            where they are not there yet.
        fetch_weights: False builds the network that belongs to `pretrained` without these weights.
        weights: a file of weights (.safetensors, .pth, .pt, .bin).
        weights_digest: what the weights' file must have (see `weights.digest`); None: any.
        width: channels of the first stage of small_cnn (default 32); of no other.

    Returns:
        A Backbone, float32 on the CPU, in training mode.

    Raises:
        UsageError: unknown name, a combination that the network does not offer, or weights that are not there or not
            its own.
    """
    check_norm(norm)
    if in_channels < 1 or image_size < 1:
        raise UsageError(f"a backbone needs images: in_channels is {in_channels}, image_size is {image_size}")
    if width is not None and (name != "small_cnn" or width < 1):
        raise UsageError(f"width is {width} for backbone {name!r}: only small_cnn takes one, at least 1")
    if name not in _OWN and name not in torchvision_names() and not name.startswith(PREFIX):
        raise UsageError(_unknown(name))
    pretrained = pretrained or weights is not None
    if name in _OWN and pretrained:
        raise UsageError(f"backbone {name!r} has no pretrained weights: set pretrained to false")
    if pretrained and (norm != "batch" or in_channels != 3):
        raise UsageError(
            f"pretrained weights of {name!r} need norm batch and 3 channels, not {norm} and {in_channels}: "
            "change these or set pretrained to false"
        )
    file = None
    if pretrained and fetch_weights:
        file = find_weights(name, None if weights is None else str(weights))
        check_digest(file, weights_digest, name)
    if name == "small_cnn":
        net = _small_cnn(in_channels, image_size, norm, width or SMALL_CNN_WIDTH)
    elif name == "medium_cnn":
        net = _medium_cnn(in_channels, image_size, norm)
    elif name == "iic_vgg4":
        net = _iic_vgg4(in_channels, norm)
    elif name == "iic_resnet34":
        net = _iic_resnet34(in_channels, norm)
    elif name in ("resnet18", "resnet34") and image_size <= SMALL_IMAGE and not pretrained:
        net = _small_image_stem(torchvision_backbone(name, 3, image_size, norm), in_channels)
    elif name.startswith(PREFIX):
        net = timm_backbone(name, in_channels, image_size, norm, file)
    else:
        net = torchvision_backbone(name, in_channels, image_size, norm, pretrained, file)
    if norm == "none" and isinstance(net, ResNet):
        initialise_without_norm(net)
    return Backbone(net, torch.zeros(1, in_channels, image_size, image_size), name)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, sorted({*_OWN, *torchvision_names()}), n=4, cutoff=0.4)
    hint = f"; near it: {', '.join(near)}" if near else ""
    return f"unknown backbone {name!r}: use {', '.join(BACKBONE_NAMES)}, a torchvision.models name or timm/NAME{hint}"


def _conv_norm_relu(channels_in: int, channels_out: int, kernel: int, norm: Norm) -> list[nn.Module]:
    # A norm has its own shift, so the convolution before it needs no bias.
    conv = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=norm == "none")
    nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    normalise = [] if norm == "none" else [norm_2d(norm, channels_out)]
    return [conv, *normalise, nn.ReLU(inplace=True)]


def _small_cnn(in_channels: int, image_size: int, norm: Norm, width: int) -> nn.Module:
    """Five 3x3 convolutions of 1, 1, 2, 2, 4 times `width` channels, then the global average.

    A 2x2 max-pool follows each width unless it would leave less than 4 px: 8 px are pooled once, from 16
    px on twice.
    """
    return _plain_cnn(in_channels, image_size, norm, [factor * width for factor in (1, 1, 2, 2, 4)], (1, 3))


def _medium_cnn(in_channels: int, image_size: int, norm: Norm) -> nn.Module:
    """Five 3x3 convolutions of 48, 96, 96, 192, 192 channels, then the global average.

    A 2x2 max-pool follows the first and the third unless it would leave less than 4 px, so that most of the work is
    done on small maps with many channels.
    """
    return _plain_cnn(in_channels, image_size, norm, (48, 96, 96, 192, 192), (0, 2))


def _plain_cnn(
    in_channels: int, image_size: int, norm: Norm, channels: Sequence[int], pooled: Sequence[int]
) -> nn.Module:
    layers: list[nn.Module] = []
    before, size = in_channels, image_size
    for place, after in enumerate(channels):
        layers += _conv_norm_relu(before, after, 3, norm)
        before = after
        if place in pooled and size // 2 >= 4:
            layers.append(nn.MaxPool2d(2))
            size //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _iic_vgg4(in_channels: int, norm: Norm) -> nn.Module:
    """The paper's network for gray digits: 5x5 convolutions of 64, 128, 256, 512 channels, max-pools between.

    The features are the flattened last map, 512 x 3 x 3 for the 24 px images of the paper.

    Source: Ji et al., arXiv:1807.06653; the authors' ClusterNet6c trunk with its initialisation (Kaiming
    normal over the fan-in). norm other than "batch" is ours.
    """
    layers: list[nn.Module] = []
    channels = in_channels
    for stage, channels_out in enumerate((64, 128, 256, 512)):
        layers += [nn.MaxPool2d(2)] if stage > 0 else []
        layers += _conv_norm_relu(channels, channels_out, 5, norm)
        channels = channels_out
    return nn.Sequential(*layers, nn.Flatten())


def _iic_resnet34(in_channels: int, norm: Norm) -> nn.Module:
    """The paper's network for colour images: ResNet-34 with a 3x3 stem and a 2x2 max-pool, padded by 1.

    The last map is 7, 5, 3 px wide for images of 96, 64, 32 px and is averaged to 512 features.

    Source: Ji et al., arXiv:1807.06653; the authors' ClusterNet5g trunk with its initialisation (Kaiming
    normal over the fan-out). norm other than "batch" is ours.
    """
    net = resnet_variant(functools.partial(ResNet, BasicBlock, [3, 4, 6, 3]), norm)
    return _small_image_stem(net, in_channels, pool=nn.MaxPool2d(2, stride=2, padding=1))


def _small_image_stem(net: ResNet, in_channels: int, pool: nn.Module | None = None) -> ResNet:
    """Replace the 7x7 stride 2 stem, made for 224 px, by 3x3 stride 1 and `pool` (none: no pooling)."""
    net.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = pool or nn.Identity()
    return net
