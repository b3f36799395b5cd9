"""Backbones: shapes, gradients, norms, sizes against hand counts, errors."""

from __future__ import annotations

import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision.models
from torch import nn

from iic_dist.errors import UsageError
from iic_dist.models import build_backbone

NORM_MODULES = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def _images(batch: int, channels: int, size: int) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "channels", "size", "num_features"),
    [
        ("small_cnn", 1, 8, 128),
        ("small_cnn", 2, 28, 128),
        ("small_cnn", 3, 32, 128),
        ("medium_cnn", 1, 8, 192),
        ("medium_cnn", 3, 32, 192),
        ("iic_vgg4", 1, 24, 512 * 3 * 3),
        ("iic_vgg4", 2, 16, 512 * 2 * 2),
        ("iic_resnet34", 2, 32, 512),
        ("iic_resnet34", 1, 64, 512),
        ("resnet18", 1, 32, 512),
        ("resnet18", 2, 96, 512),
        ("resnet34", 3, 32, 512),
        ("mobilenet_v2", 3, 64, 1280),
        ("mobilenet_v2", 1, 32, 1280),
        ("resnet50", 3, 64, 2048),
        ("alexnet", 1, 64, 256),
        ("squeezenet1_1", 3, 64, 512),
        ("mnasnet0_5", 2, 32, 1280),
        ("googlenet", 3, 64, 1024),
        ("vit_b_32", 3, 64, 768),
        ("convnext_tiny", 1, 32, 768),
    ],
)
def test_shapes_and_gradients(name: str, channels: int, size: int, num_features: int) -> None:
    backbone = build_backbone(name, in_channels=channels, image_size=size)
    features = backbone(_images(2, channels, size))
    assert features.shape == (2, num_features)
    assert backbone.num_features == num_features
    assert backbone.training
    features.square().mean().backward()
    # DDP waits for a gradient of every parameter; one without would hang or raise there.
    assert [path for path, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize(
    ("name", "size"), [("small_cnn", 8), ("medium_cnn", 16), ("iic_vgg4", 24), ("iic_resnet34", 32)]
)
def test_every_parameter_learns_with_every_norm(name: str, size: int, norm: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(name, in_channels=1, image_size=size, norm=norm)
    features = backbone(_images(4, 1, size))
    assert 0.2 < features.square().mean().sqrt() < 3  # neither dies out nor explodes with depth
    (features * _images(4, 1, 1).flatten(1)).sum().backward()
    silent = [path for path, p in backbone.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("name", ["small_cnn", "medium_cnn", "iic_vgg4", "iic_resnet34", "resnet18"])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_rows_depend_on_each_other_through_batch_norm_only(name: str, norm: str) -> None:
    backbone = build_backbone(name, in_channels=1, image_size=16, norm=norm)
    images = _images(4, 1, 16)
    others_changed = torch.cat([images[:1], 3 * images[1:] + 1])
    with torch.no_grad():
        before, after = backbone(images)[0], backbone(others_changed)[0]
    if norm == "batch":
        assert (before - after).abs().max() > 1e-3
    else:
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["small_cnn", "medium_cnn", "iic_vgg4", "iic_resnet34", "resnet18"])
def test_norm_chooses_the_norm_modules(name: str) -> None:
    def kinds(norm: str) -> set[type]:
        modules = build_backbone(name, in_channels=1, image_size=16, norm=norm).modules()
        return {type(module) for module in modules if isinstance(module, NORM_MODULES)}

    assert kinds("batch") == {nn.BatchNorm2d}
    assert kinds("group") == {nn.GroupNorm}
    assert kinds("none") == set()


def test_iic_vgg4_has_the_papers_parameters() -> None:
    backbone = build_backbone("iic_vgg4", in_channels=1, image_size=24)
    convolutions = 25 * (1 * 64 + 64 * 128 + 128 * 256 + 256 * 512)
    norms = 2 * (64 + 128 + 256 + 512)
    assert sum(p.numel() for p in backbone.parameters()) == convolutions + norms


def test_iic_resnet34_has_the_papers_parameters() -> None:
    backbone = build_backbone("iic_resnet34", in_channels=2, image_size=32)
    stem = 9 * 2 * 64 + 2 * 64
    stages = 0
    for blocks, before, width in [(3, 64, 64), (4, 64, 128), (6, 128, 256), (3, 256, 512)]:
        stages += 9 * before * width + (2 * blocks - 1) * 9 * width * width + 2 * blocks * 2 * width
        stages += before * width + 2 * width if before != width else 0  # the projection of the shortcut
    assert sum(p.numel() for p in backbone.parameters()) == stem + stages


@pytest.mark.parametrize(("size", "side"), [(96, 7), (64, 5), (32, 3)])
def test_iic_resnet34_averages_the_papers_map(size: int, side: int) -> None:
    backbone = build_backbone("iic_resnet34", in_channels=2, image_size=size)
    shapes = []
    backbone.net.layer4.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    backbone(_images(2, 2, size))
    assert shapes == [(2, 512, side, side)]


def test_resnet_stem_follows_the_image_size() -> None:
    small = build_backbone("resnet18", in_channels=3, image_size=64).net
    large = build_backbone("resnet18", in_channels=3, image_size=65).net
    assert (small.conv1.kernel_size, small.conv1.stride) == ((3, 3), (1, 1))
    assert isinstance(small.maxpool, nn.Identity)
    assert (large.conv1.kernel_size, large.conv1.stride) == ((7, 7), (2, 2))
    assert isinstance(large.maxpool, nn.MaxPool2d)


@pytest.mark.parametrize(("size", "pools"), [(8, 1), (15, 1), (16, 2), (32, 2)])
def test_small_cnn_pools_as_the_size_allows(size: int, pools: int) -> None:
    backbone = build_backbone("small_cnn", in_channels=1, image_size=size)
    assert sum(isinstance(module, nn.MaxPool2d) for module in backbone.modules()) == pools


@pytest.mark.parametrize(("size", "maps"), [(8, [8, 4, 4, 4, 4]), (21, [21, 10, 10, 5, 5]), (32, [32, 16, 16, 8, 8])])
def test_medium_cnn_works_on_small_maps(size: int, maps: list[int]) -> None:
    backbone = build_backbone("medium_cnn", in_channels=1, image_size=size)
    seen: list[tuple[int, int]] = []
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, __, out: seen.append((out.shape[1], out.shape[2])))
    backbone(_images(2, 1, size))
    assert seen == list(zip([48, 96, 96, 192, 192], maps, strict=True))


def test_small_cnn_takes_a_width() -> None:
    backbone = build_backbone("small_cnn", in_channels=1, image_size=8, width=6)
    assert backbone(_images(2, 1, 8)).shape == (2, 24)


def test_building_leaves_running_statistics_alone() -> None:
    for module in build_backbone("small_cnn", in_channels=1, image_size=8).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_batches_tracked == 0
            assert not module.running_mean.any()


def test_dropout_and_stochastic_depth_are_off() -> None:
    backbone = build_backbone("efficientnet_b0", in_channels=3, image_size=32)  # it has both
    images = _images(4, 3, 32)
    with torch.no_grad():
        assert torch.equal(backbone(images), backbone(images))


def test_pretrained_weights_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source = torchvision.models.mobilenet_v2()
    file = tmp_path / "hub" / "checkpoints" / Path(torchvision.models.MobileNet_V2_Weights.DEFAULT.url).name
    file.parent.mkdir(parents=True)
    torch.save(source.state_dict(), file)
    backbone = build_backbone("mobilenet_v2", in_channels=3, image_size=32, pretrained=True)
    images = _images(2, 3, 32)
    with torch.no_grad():
        expected = source.eval().features(images).mean(dim=(2, 3))
        torch.testing.assert_close(backbone.eval()(images), expected)


def test_weights_that_cannot_be_fetched_are_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(UsageError, match=r"weights of mobilenet_v2 .*could not be fetched .*no route to host") as error:
        build_backbone("mobilenet_v2", in_channels=3, image_size=32, pretrained=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnt18"}, r"unknown backbone 'resnt18': use small_cnn, .*timm/NAME; near it: resnet18"),
        ({"name": "fasterrcnn_resnet50_fpn"}, "unknown backbone"),  # torchvision's, but no classifier
        ({"name": "small_cnn", "norm": "layer"}, "norm is 'layer': use one of batch, group, none"),
        ({"name": "small_cnn", "pretrained": True}, "'small_cnn' has no pretrained weights"),
        ({"name": "small_cnn", "width": 0}, "width is 0"),
        ({"name": "resnet18", "width": 8}, "width is 8 for backbone 'resnet18'"),
        ({"name": "densenet121", "norm": "group"}, "'densenet121' has no norm 'group'"),
        ({"name": "mobilenet_v2", "norm": "none"}, "'mobilenet_v2' has no norm 'none'"),
        ({"name": "resnet18", "pretrained": True, "in_channels": 2}, "need norm batch and 3 channels"),
        ({"name": "vit_b_16", "image_size": 60}, "'vit_b_16' does not take images of this size"),
        ({"name": "iic_vgg4", "image_size": 7}, "'iic_vgg4' cannot take 3x7x7 images"),
        ({"name": "inception_v3", "image_size": 32}, "'inception_v3' cannot take 3x32x32 images"),
        ({"name": "small_cnn", "in_channels": 0}, "in_channels is 0"),
    ],
)
def test_misuse_is_one_line(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        build_backbone(**{"in_channels": 3, "image_size": 32} | options)
    assert "\n" not in str(error.value)
