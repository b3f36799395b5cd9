"""When the features of a frozen pretrained backbone are clustered: what is chosen, insisted on, refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from iic_dist.config import Config, folder
from iic_dist.config.command_line import PRESETS, parse
from iic_dist.config.weights import with_weights
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.models.weights import digest
from iic_dist.train import read


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Three pictures in colour of 80 px and more."""
    images = tmp_path / "photographs"
    images.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (80, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    return images


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Weights that were asked for over the network; they can be had."""
    names: list[str] = []

    def what_is_missing(name: str) -> str | None:
        names.append(name)
        return None

    monkeypatch.setattr(folder, "what_is_missing", what_is_missing)
    return names


def asked(images: Path, *options: str) -> tuple[Config, str]:
    """Parse as the training command does; return the config and what was printed."""
    lines: list[str] = []
    arguments = ["--data.name", f"folder:{images}", "--model.num_clusters", "3", *options]
    return parse(arguments, partial(folder.choose, say=lines.append)), "\n".join(lines)


def is_frozen(config: Config) -> bool:
    asked_for = (config.pretrained, config.model.freeze_backbone, config.train.epochs, config.neighbours.steps)
    return asked_for == (True, True, 0, 1000)


def test_photographs_get_pretrained_features_where_they_can_be_had(photographs: Path, asked_for: list[str]) -> None:
    config, said = asked(photographs)
    assert is_frozen(config)
    assert config.model.backbone == "timm/vit_small_patch14_dinov2.lvd142m" == asked_for[0]
    assert config.data.image_size == 224
    assert "--model.backbone timm/vit_small_patch14_dinov2.lvd142m pretrained: it has seen more" in said
    assert "--train.epochs 0" in said


def test_else_one_line_says_what_is_missing(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "what_is_missing", lambda name: f"weights of {name} are not here: fetch them")
    config, said = asked(photographs)
    assert not config.pretrained
    assert config.model.backbone == ("resnet18" if torch.cuda.is_available() else "medium_cnn")
    assert config.train.epochs > 0
    (line,) = [line for line in said.splitlines() if "pretrained features" in line]
    assert (
        "weights of timm/vit_small_patch14_dinov2.lvd142m are not here: fetch them. Training from scratch instead)"
        in line
    )


def test_one_rank_asks_the_network(photographs: Path, asked_for: list[str]) -> None:
    """Its config is sent to the others, whatever they would find."""
    arguments = ["--data.name", f"folder:{photographs}", "--model.num_clusters", "3", "--train.epochs", "0"]
    config, chosen = read(arguments, Place(rank=1, world_size=2))  # which does not know yet what is clustered
    assert asked_for == []
    assert not config.pretrained
    assert "model.backbone" in chosen
    assert "train.epochs" not in chosen


@pytest.mark.parametrize(
    ("options", "backbone"),
    [
        (["--model.backbone", "timm/test_resnet"], "timm/test_resnet"),
        (["--model.backbone=resnet50", "--model.pretrained=true", "--model.freeze_backbone=true"], "resnet50"),
        (["--model.backbone", "resnet50", "--model.pretrained", "true"], None),  # trained on, as ever
        (["--model.backbone", "resnet18"], None),
        (["--model.pretrained", "false"], None),
        (["--model.freeze_backbone", "false"], None),
        (["--train.epochs", "5"], None),
        (["--data.channels", "1"], None),
        (["--views.sobel", "true"], None),
    ],
)
def test_what_is_asked_for_decides(
    options: list[str], backbone: str | None, photographs: Path, asked_for: list[str]
) -> None:
    config, _ = asked(photographs, *options)
    assert is_frozen(config) == (backbone is not None)
    assert backbone in (None, config.model.backbone)
    assert asked_for == []  # whoever names weights gets them, or an error when they are fetched


def test_gray_and_small_images_are_trained_on(tmp_path: Path, asked_for: list[str]) -> None:
    for name, size, colour in (("gray", 100, False), ("small", 64, True)):
        (tmp_path / name).mkdir()
        picture = Image.effect_noise((size, size), 60).convert("RGB")
        if colour:
            picture.putpixel((0, 0), (255, 0, 0))
        picture.save(tmp_path / name / "0.png")
        assert not asked(tmp_path / name)[0].pretrained
    assert asked_for == []


def test_a_file_of_weights_needs_no_network(photographs: Path, asked_for: list[str], tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_convnext").state_dict(), file)
    config, _ = asked(photographs, "--model.backbone", "timm/test_convnext", "--model.weights", str(file))
    assert is_frozen(config)
    assert config.data.image_size == 160  # what these weights want
    found = with_weights(config, Place(), pytest.fail)
    assert found.model.pretrained
    assert found.model.weights_digest == digest(file)
    assert (found.data.channels, found.data.resampling) == (3, "bicubic")
    assert (found.views.mean, found.views.std) == ([0.5] * 3, [0.5] * 3)
    assert config.model.weights_digest is None  # the config that was given is as it was


def test_what_is_said_of_images_wins_over_the_weights(photographs: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_convnext").state_dict(), file)
    options = (
        "--data.image_size",
        "96",
        "--data.resampling",
        "bilinear",
        "--views.mean",
        "[0.1]",
        "--views.std",
        "[1]",
    )
    config, _ = asked(photographs, "--model.backbone", "timm/test_convnext", "--model.weights", str(file), *options)
    found = with_weights(config, Place(), pytest.fail)
    assert (found.data.image_size, found.data.resampling, found.views.mean) == (96, "bilinear", [0.1])


def test_other_weights_than_the_digest_says_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_convnext").state_dict(), file)
    options = ["--model.backbone", "timm/test_convnext", "--model.weights", str(file)]
    good = with_weights(parse(options), Place(), pytest.fail).model.weights_digest
    assert good is not None
    with_weights(parse([*options, "--model.weights_digest", good]), Place(), pytest.fail)
    with pytest.raises(UsageError, match=f"model.weights_digest=abcd: but .* has {good}; name the file") as error:
        with_weights(parse([*options, "--model.weights_digest", "abcd"]), Place(), pytest.fail)
    assert "\n" not in str(error.value)


def test_without_pretrained_weights_nothing_changes() -> None:
    config = parse([])
    assert with_weights(config, Place(), pytest.fail) is config


def test_the_preset_for_photographs_insists(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(photographs / "no-cache"))
    config, _ = asked(photographs, "--config", "photos")
    assert is_frozen(config)
    with pytest.raises(UsageError, match=r"HF_HUB_OFFLINE is set.*`hf download timm/vit_small_patch14_dinov2") as error:
        with_weights(config, Place(), pytest.fail)
    assert "\n" not in str(error.value)


def test_images_in_memory_are_shown_at_the_size_of_the_weights(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_convnext").state_dict(), file)
    options = [
        "--model.backbone",
        "timm/test_convnext",
        "--model.weights",
        str(file),
        "--model.freeze_backbone",
        "true",
    ]
    config = parse([*options, "--train.epochs", "0", "--neighbours.steps", "3"])
    assert with_weights(config, Place(), pytest.fail).views.size == 160
    assert with_weights(parse(options), Place(), pytest.fail).views.size is None  # trained on at their own


def test_features_of_a_file_need_no_option(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.eye(3))
    config = parse(["--data.name", f"features:{tmp_path}/x.npy"], partial(folder.choose, say=pytest.fail))
    assert (config.train.epochs, config.neighbours.steps, config.of_features) == (0, 1000, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train.epochs", "0", "--neighbours.steps", "9"], "leaves an untrained network"),
        (["--train.epochs", "0", "--model.pretrained", "true"], "leaves an untrained network"),
        (["--data.name", "features:x.npy"], "train.epochs=60: features:x.npy are features as they are"),
        (["--data.name", "features:x.npy", "--train.epochs", "0"], "train.epochs=0 and neighbours.steps=0"),
        (["--data.labels", "x.npy"], "data.labels='x.npy': is for features:FILE.npy"),
        (["--train.epochs", "-1"], "train.epochs=-1: must be 0 or more"),
        (
            ["--data.name", "features:x.npy", "--train.epochs", "0", "--neighbours.steps", "9", "--model.weights", "w"],
            "features need no model.pretrained",
        ),
    ],
)
def test_nothing_to_train_or_to_cluster_is_one_line(options: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        parse(options)
    assert "\n" not in str(error.value)


def test_the_recipe_of_the_beginning() -> None:
    written = yaml.safe_load((PRESETS / "stl10-mobilenet.yaml").read_text())
    config = parse(["--config", "stl10-mobilenet"])
    assert written["model"] == {
        "backbone": "mobilenet_v2",
        "pretrained": True,
        "freeze_backbone": True,
        "sub_heads": 1,
    }
    assert (config.optim.name, config.optim.lr, config.data.batch_size) == ("adam", 1e-4, 256)
    assert config.heads == ("clustering",)
    assert config.train.epochs > 0
