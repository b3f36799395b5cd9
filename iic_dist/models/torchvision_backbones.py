"""torchvision's classification networks as backbones: without classifier, with our norm and channel count."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision.models
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import StochasticDepth
from torchvision.transforms import InterpolationMode

from iic_dist.errors import UsageError
from iic_dist.models.norm import Norm, group_norm
from iic_dist.models.weights import Preprocessing, load_into

_CLASSIFIERS = ("fc", "classifier", "head", "heads")
_AUXILIARY_CLASSIFIERS = ("aux1", "aux2", "AuxLogits")  # of googlenet and inception_v3
_RESNETS = ("resnet", "resnext", "wide_resnet")
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@functools.cache
def torchvision_names() -> tuple[str, ...]:
    """Return the names of torchvision's classification networks."""
    return tuple(torchvision.models.list_models(module=torchvision.models))


def torchvision_backbone(
    name: str,
    in_channels: int,
    image_size: int,
    norm: Norm,
    pretrained: bool = False,
    weights: Path | None = None,
) -> nn.Module:
    """Build torchvision's `name` without its classifier, with whatever norm it has where `norm` is "batch".

    Args:
        name: of torchvision.
        in_channels: C of its images.
        image_size: S of its images in pixels.
        norm: "batch", "group" or "none".
        pretrained: build the network that its ImageNet weights belong to.
        weights: file of these weights; None leaves them out.

    Raises:
        UsageError: the network offers no such norm or does not take such images, or the weights are not its own.
    """
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True  # the default too, but then with a warning
        options["transform_input"] = pretrained  # what the weights are for
    if name.startswith("vit_"):
        options["image_size"] = min(_default_weights(name).meta["min_size"]) if pretrained else image_size
    net = _build(functools.partial(torchvision.models.get_model, name, **options), name, norm)
    _remove_classifiers(net, name)
    _switch_off_dropout(net)
    if in_channels != 3:
        _replace_first_convolution(net, name, in_channels)
    if weights is not None:
        load_into(net, weights, name, (*_CLASSIFIERS, *_AUXILIARY_CLASSIFIERS))
    return net


def torchvision_url(name: str) -> str:
    """Return where torchvision's ImageNet weights of a network are fetched from."""
    return str(_default_weights(name).url)


def torchvision_preprocessing(name: str) -> Preprocessing:
    """Return what torchvision's ImageNet weights of a network want to see."""
    wanted = _default_weights(name).transforms()
    return Preprocessing(
        mean=tuple(wanted.mean),
        std=tuple(wanted.std),
        resampling="bicubic" if wanted.interpolation == InterpolationMode.BICUBIC else "bilinear",
        input_size=wanted.crop_size[0],
        crop_pct=wanted.crop_size[0] / wanted.resize_size[0],
    )


def _default_weights(name: str) -> Any:
    try:
        return torchvision.models.get_model_weights(name).DEFAULT
    except AttributeError as error:  # an enumeration without members
        raise UsageError(
            f"backbone {name!r} has no pretrained weights in torchvision: set pretrained to false"
        ) from error


def resnet_variant(build: Callable[..., ResNet], norm: Norm) -> ResNet:
    """Build a torchvision ResNet with our norm and without its classifier."""
    net = build() if norm == "batch" else build(norm_layer=group_norm if norm == "group" else nn.Identity)
    net.fc = nn.Identity()
    return net


def initialise_without_norm(net: ResNet) -> None:
    """Initialise a ResNet that has no norm so that its features start near 1, as they do with one.

    Kaiming normal over the fan-in keeps the variance through a convolution. The last one in each of the L
    blocks is scaled by L^-0.5, or every block would double the variance. With torchvision's initialisation
    the features of iic_resnet34 started at 10.
    """
    blocks = [module for module in net.modules() if isinstance(module, BasicBlock | Bottleneck)]
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
    with torch.no_grad():
        for block in blocks:
            last = block.conv2 if isinstance(block, BasicBlock) else block.conv3
            last.weight.mul_(len(blocks) ** -0.5)


def _build(build: Callable[..., Any], name: str, norm: Norm) -> nn.Module:
    try:
        if name.startswith(_RESNETS):
            return resnet_variant(build, norm)
        return build() if norm == "batch" else _build_with_norm(build, name, norm)
    except AssertionError as error:
        raise UsageError(f"backbone {name!r} does not take images of this size: {error}") from error


def _build_with_norm(build: Callable[..., nn.Module], name: str, norm: Norm) -> nn.Module:
    # Not "none" through norm_layer=Identity: the features of mobilenet_v2 are then of size 1e-9 at the start.
    try:
        net = build(norm_layer=group_norm) if norm == "group" else build()
    except TypeError:  # it has no such argument
        net = build()
    found = {type(module) for module in net.modules() if isinstance(module, _NORMS)}
    if found != ({nn.GroupNorm} if norm == "group" else set()):
        raise UsageError(f"backbone {name!r} has no norm {norm!r}: set norm to batch, or take small_cnn or a ResNet")
    return net


def _remove_classifiers(net: nn.Module, name: str) -> None:
    """Cut the classifier off: of a sequence, what stands before its first linear layer stays."""
    for auxiliary in _AUXILIARY_CLASSIFIERS:
        if hasattr(net, auxiliary):
            setattr(net, auxiliary, None)
            net.aux_logits = False  # type: ignore[assignment]
    attribute = next((attribute for attribute in _CLASSIFIERS if hasattr(net, attribute)), "")
    if not attribute:
        raise UsageError(f"backbone {name!r} has no classifier that we know how to remove: use another one")
    classifier = getattr(net, attribute)
    layers = list(classifier) if isinstance(classifier, nn.Sequential) else [classifier]
    kept = []
    for layer in layers:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            break
        kept.append(layer)
    if isinstance(layer, nn.Conv2d):  # squeezenet averages after its classifier
        kept.append(nn.AdaptiveAvgPool2d(1))
    if isinstance(net, torchvision.models.VGG | torchvision.models.AlexNet):  # else 25088 and 9216 features
        net.avgpool = nn.AdaptiveAvgPool2d(1)
    setattr(net, attribute, nn.Sequential(*kept))


def _switch_off_dropout(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Dropout | StochasticDepth):
            module.p = 0.0


def _replace_first_convolution(net: nn.Module, name: str, in_channels: int) -> None:
    path, old = next(
        ((path, module) for path, module in net.named_modules() if isinstance(module, nn.Conv2d)), ("", None)
    )
    if old is None or old.in_channels != 3 or old.groups != 1:
        raise UsageError(f"backbone {name!r} cannot be adapted to {in_channels} channels: use views of 3 channels")
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        stride=old.stride,  # type: ignore[arg-type]
        padding=old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    parent, _, attribute = path.rpartition(".")
    setattr(net.get_submodule(parent), attribute, new)
