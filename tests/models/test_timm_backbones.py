"""timm's networks as backbones: the numbers that timm itself gives, and weights of another network refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision.models
from data_files import data_file
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

from iic_dist.errors import UsageError
from iic_dist.models import build_backbone
from iic_dist.models.pretrained import preprocessing
from iic_dist.models.weights import Preprocessing, digest


def images(size: int, channels: int = 3, count: int = 2) -> torch.Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def network(name: str, **options) -> torch.nn.Module:
    """timm's network with its classifier; weights that nobody else has, statistics too."""
    torch.manual_seed(7)
    net = timm.create_model(name, **options)
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value += 0.02 * torch.rand_like(value)
    return net.eval()


def line_of(error: pytest.ExceptionInfo[UsageError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "name", ["test_efficientnet", "test_resnet", "test_convnext", "test_vit", "test_byobnet", "test_nfnet"]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_features_are_those_of_timm(name: str, suffix: str, tmp_path: Path) -> None:
    source = network(name)
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}, "epoch": 3}, file)
    else:
        save_file(source.state_dict(), file)
    backbone = build_backbone(f"timm/{name}", in_channels=3, image_size=160, weights=file).eval()
    with torch.inference_mode():
        expected = source.forward_head(source.forward_features(images(160)), pre_logits=True)
        assert torch.equal(backbone(images(160)), expected)
    assert backbone.num_features == source.num_features


def test_real_weights_give_the_numbers_of_timm() -> None:
    file = data_file("tf_efficientnet_lite0.safetensors")
    backbone = build_backbone("timm/tf_efficientnet_lite0", in_channels=3, image_size=96, weights=file).eval()
    direct = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    direct.load_state_dict(load_file(file))
    with torch.inference_mode():
        features = backbone(images(96))
        assert torch.equal(features, direct.eval()(images(96)))
    assert features.shape == (2, 1280)
    assert 0.1 < features.std() < 2


def test_position_embeddings_are_resampled_when_weights_are_loaded(tmp_path: Path) -> None:
    """A vision transformer of 518 px must take 224: by its embeddings, resampled once."""
    source = network("test_vit")  # 160 px, patches of 16
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    backbone = build_backbone("timm/test_vit", in_channels=3, image_size=96, weights=tmp_path / "vit.safetensors")
    expected = resample_abs_pos_embed(source.pos_embed, [6, 6], num_prefix_tokens=1)
    assert torch.equal(backbone.net.pos_embed, expected)
    assert backbone.eval()(images(96)).shape == (2, source.num_features)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_nothing_is_random_in_training(name: str) -> None:
    backbone = build_backbone(f"timm/{name}", in_channels=3, image_size=160)
    for module in backbone.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()  # batch statistics are not chance
    with torch.no_grad():
        assert torch.equal(backbone(images(160)), backbone(images(160)))


def test_dropout_that_a_network_comes_with_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: real(*a, drop_rate=0.5, drop_path_rate=0.5, **k))
    for name in ("test_efficientnet_gn", "test_vit"):
        backbone = build_backbone(f"timm/{name}", in_channels=3, image_size=160)
        with torch.no_grad():
            assert torch.equal(backbone(images(160)), backbone(images(160)))


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_channels_without_weights(channels: int) -> None:
    backbone = build_backbone("timm/test_resnet", in_channels=channels, image_size=64)
    assert backbone(images(64, channels)).shape == (2, backbone.num_features)


def test_what_weights_want_to_see() -> None:
    assert preprocessing("timm/tf_efficientnet_lite0") == Preprocessing((0.5,) * 3, (0.5,) * 3, "bicubic", 224, 0.875)
    dino = preprocessing("timm/vit_small_patch14_dinov2.lvd142m")
    assert (dino.input_size, dino.resampling, dino.crop_pct) == (518, "bicubic", 1.0)
    assert dino.mean == (0.485, 0.456, 0.406)
    resnet = preprocessing("resnet18")
    assert (resnet.resampling, resnet.input_size, resnet.std) == ("bilinear", 224, (0.229, 0.224, 0.225))
    assert resnet.crop_pct == 224 / 256
    with pytest.raises(UsageError, match="'small_cnn' has no pretrained weights"):
        preprocessing("small_cnn")


def test_weights_of_another_network_are_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(network("test_convnext").state_dict(), file)
    with pytest.raises(UsageError) as error:
        build_backbone("timm/test_resnet", in_channels=3, image_size=64, weights=file)
    line = line_of(error)
    assert "not of backbone 'timm/test_resnet'" in line
    assert "tensors are missing, as conv1.0.weight (" in line
    assert "are not of this network, as head.fc.bias (1000,)" in line


def test_a_larger_network_with_all_the_names_of_a_smaller_one_is_refused(tmp_path: Path) -> None:
    """resnet34 holds every tensor of resnet18, and three more blocks in the middle of it."""
    file = tmp_path / "weights.pth"
    torch.save(timm.create_model("resnet34").state_dict(), file)
    with pytest.raises(UsageError, match="are not of this network, as layer1.2.conv1.weight") as error:
        build_backbone("timm/resnet18", in_channels=3, image_size=64, weights=file)
    line_of(error)


def test_other_shapes_are_named(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    state = network("test_resnet").state_dict()
    torch.save({name: value[:1] if name == "conv1.0.weight" else value for name, value in state.items()}, file)
    with pytest.raises(UsageError, match=r"1 have other shapes, as conv1.0.weight \(16, 3, 3, 3\), which is \(1, 3,"):
        build_backbone("timm/test_resnet", in_channels=3, image_size=64, weights=file)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_truncated_file_is_one_line(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    state = network("test_resnet").state_dict()
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    for length in (0, 7, 100, file.stat().st_size // 2, file.stat().st_size - 1):
        short = tmp_path / f"short-{length}{suffix}"
        short.write_bytes(file.read_bytes()[:length])
        with pytest.raises(UsageError, match="cannot be read: cut short") as error:
            build_backbone("timm/test_resnet", in_channels=3, image_size=64, weights=short)
        line_of(error)


class _Code:
    """Would run code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return (Path("ran").write_text, ("ran",))


def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.0.weight": _Code()}, tmp_path / "weights.pth")
    with pytest.raises(UsageError, match="not the weights alone") as error:
        build_backbone("timm/test_resnet", in_channels=3, image_size=64, weights=tmp_path / "weights.pth")
    line_of(error)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not tensors by name"),
        ({}, "holds a dict, not tensors by name"),
        ({"epoch": 3}, "'epoch' is a int, not a tensor"),
        ({"fc.weight": torch.tensor([1.0, float("nan")])}, "'fc.weight' holds NaN or Inf"),
        ({"state_dict": {"a": torch.ones(1)}}, "tensors are missing"),
    ],
)
def test_other_things_in_a_file_are_named(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(UsageError, match=message) as error:
        build_backbone("timm/test_resnet", in_channels=3, image_size=64, weights=tmp_path / "weights.pth")
    line_of(error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "timm/tst_resnet"}, r"timm [\d.]+ has no such network; near it: timm/test_resnet"),
        ({"name": "timm/resnet50.nonsense"}, "timm has no such weights; it has .*resnet50.a1_in1k"),
        ({"name": "timm/test_resnet", "norm": "group"}, "has its own norm, not 'group'"),
        ({"name": "timm/test_resnet", "weights": "no/such.pth"}, "model.weights='no/such.pth': there is no such file"),
        ({"name": "timm/test_resnet", "weights": __file__}, "a name must end in .safetensors .pth"),
        ({"name": "timm/test_vit", "image_size": 90}, "cannot take 3x90x90 images"),
        ({"name": "timm/test_vit4", "pretrained": True}, "not on the Hugging Face hub"),
        ({"name": "small_cnn", "weights": "x.pth"}, "'small_cnn' has no pretrained weights"),
    ],
)
def test_misuse_is_one_line(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        build_backbone(**{"in_channels": 3, "image_size": 160} | options)
    line_of(error)


def test_weights_need_three_channels(tmp_path: Path) -> None:
    save_file(network("test_resnet").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="need norm batch and 3 channels, not batch and 1"):
        build_backbone("timm/test_resnet", in_channels=1, image_size=64, weights=tmp_path / "w.safetensors")


def test_other_weights_than_those_of_the_run_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file(network("test_resnet").state_dict(), file)
    build_backbone("timm/test_resnet", in_channels=3, image_size=64, weights=file, weights_digest=digest(file))
    with pytest.raises(UsageError, match=f"digest 0123 are wanted .* has {digest(file)}") as error:
        build_backbone("timm/test_resnet", in_channels=3, image_size=64, weights=file, weights_digest="0123")
    line_of(error)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "convnext_tiny", "googlenet", "vit_b_32"])
def test_torchvision_takes_a_file(name: str, tmp_path: Path) -> None:
    """With the classifier in the file or without; auxiliary ones are passed over."""
    torch.manual_seed(3)
    source = torchvision.models.get_model(name, **({"init_weights": True} if name == "googlenet" else {}))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    backbone = build_backbone(name, in_channels=3, image_size=224, weights=tmp_path / "w.pth")
    kept = backbone.net.state_dict()
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in kept.items())
    torch.save(kept, tmp_path / "bare.pth")
    again = build_backbone(name, in_channels=3, image_size=224, weights=tmp_path / "bare.pth")
    with torch.inference_mode():
        assert torch.equal(again.eval()(images(224, count=1)), backbone.eval()(images(224, count=1)))


def test_torchvision_refuses_another_network(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "w.pth")
    with pytest.raises(UsageError, match="not of backbone 'resnet18'") as error:
        build_backbone("resnet18", in_channels=3, image_size=64, weights=tmp_path / "w.pth")
    line_of(error)
