"""Runs on features as they are: of a file, and of photographs by a frozen network, from training to use."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score
from small_runs import write_digits

import iic_dist
from iic_dist.config.command_line import parse
from iic_dist.config.folder import choose
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.prediction.export import Probabilities
from iic_dist.prediction.folder import predict_folder, predict_rows
from iic_dist.train import train
from iic_dist.training import checkpoint
from iic_dist.training.evaluate import evaluate_run
from iic_dist.training.stop import StopSignals


def run(name: str, root: Path, *options: str) -> Path:
    """Train in this process as the command would; return the run's folder."""
    arguments = [
        *("--data.name", name, "--run.root", str(root), "--run.name", "run", "--run.threads", "1"),
        *("--run.device", "cpu", "--monitor.progress", "false", "--data.cache", str(root / "kept"), *options),
    ]
    train(parse(arguments, partial(choose, say=lambda line: None)), Place(), StopSignals())
    return root / "run"


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four well separated blobs of 12 features, with labels beside them."""
    file = tmp_path_factory.mktemp("blobs") / "blobs.npy"
    points, classes = make_blobs(400, 12, centers=4, cluster_std=1.0, random_state=0)
    np.save(file, points.astype(np.float32))
    np.save(file.with_suffix(".labels.npy"), classes)
    return file


@pytest.fixture(scope="module")
def of_file(blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on them."""
    return run(f"features:{blobs}", tmp_path_factory.mktemp("runs"), "--neighbours.steps", "200")


def test_blobs_are_found_and_all_is_written(of_file: Path, blobs: Path) -> None:
    result = json.loads((of_file / "result.json").read_text())
    assert result["accuracy"]["selected"] == 1.0
    assert result["epochs"] == 0
    assert result["images_per_second"] is None
    assert set(result["stages"]) == {"neighbours"}
    assert result["stages"]["neighbours"]["kmeans_accuracy"] == 1.0
    lines = [json.loads(line) for line in (of_file / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 200
    assert any("clustering/information_share_of_ln_k" in line for line in lines)


def test_the_run_clusters_other_features_and_refuses_others(of_file: Path, blobs: Path, tmp_path: Path) -> None:
    clusterer = iic_dist.load(of_file)
    found = predict_rows(clusterer, blobs)
    classes = np.load(blobs.with_suffix(".labels.npy"))
    assert adjusted_rand_score(classes, found.prediction.clusters.numpy()) == 1.0
    assert found.paths[:2] == ["0", "1"]
    np.testing.assert_array_equal(found.prediction.embeddings.numpy(), np.load(blobs))
    assert len(clusterer.predict_features(torch.empty(0, 12))) == 0
    with pytest.raises(UsageError, match=r"\(3, 11\), torch.float32: must be \(M, 12\) floats"):
        clusterer.predict_features(torch.zeros(3, 11))
    with pytest.raises(UsageError, match="give them to predict_features"):
        clusterer.predict(Image.new("RGB", (8, 8)))


def test_the_figures_come_again_from_the_checkpoint(of_file: Path) -> None:
    result = json.loads((of_file / "result.json").read_text())
    again = evaluate_run(of_file, Place())
    assert again["accuracy"] == result["accuracy"]
    assert again["stages"] == result["stages"]


@pytest.mark.parametrize("steps", [1, 7, 20])
def test_a_run_goes_on_bit_for_bit_from_any_step(
    steps: int, blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--neighbours.steps", "20", "--train.checkpoint_every_steps", "1"]
    monkeypatch.setattr(checkpoint, "KEEP", 30)
    whole = run(f"features:{blobs}", tmp_path / "whole", *options)
    part = run(f"features:{blobs}", tmp_path / "part", *options)
    for path in checkpoint.available(part / "checkpoints"):
        state = torch.load(path, weights_only=True)
        if state["step"] > steps or (state["step"] == steps and state["stage_done"]):
            path.unlink()
    (part / "result.json").unlink()
    run(f"features:{blobs}", tmp_path / "part", *options)
    states = [checkpoint.load_newest(folder / "checkpoints") for folder in (whole, part)]
    assert all(state is not None and state["stage_done"] for state in states)
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name


@pytest.fixture(scope="module")
def of_photographs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on 60 pictures of digits by a frozen network with random weights, and the pictures."""
    root = tmp_path_factory.mktemp("photographs")
    pictures = root / "pictures"
    pictures.mkdir()
    write_digits(pictures, 60)
    torch.manual_seed(5)
    save_file(timm.create_model("test_convnext").state_dict(), root / "weights.safetensors")
    options = ["--model.backbone", "timm/test_convnext", "--model.weights", str(root / "weights.safetensors")]
    options += ["--model.num_clusters", "3", "--data.folder_labels", "true", "--data.image_size", "32"]
    options += ["--data.workers", "0", "--neighbours.steps", "30", "--data.channels", "3"]
    return run(f"folder:{pictures}", root / "runs", *options), pictures


def test_a_frozen_run_is_used_without_the_file_of_weights(of_photographs: tuple[Path, Path]) -> None:
    folder, pictures = of_photographs
    (folder.parent.parent / "weights.safetensors").rename(folder.parent.parent / "elsewhere.safetensors")
    try:
        clusterer = iic_dist.load(folder)
        found = predict_folder(clusterer, pictures)
        assert len(found.paths) == 60
        classes = [path.split("/")[0] for path in found.paths]
        result = json.loads((folder / "result.json").read_text())
        assert adjusted_rand_score(classes, found.prediction.clusters.numpy()) == pytest.approx(result["ari"], abs=1e-9)
    finally:
        (folder.parent.parent / "elsewhere.safetensors").rename(folder.parent.parent / "weights.safetensors")


def test_what_is_exported_holds_backbone_space_and_heads(of_photographs: tuple[Path, Path]) -> None:
    folder, pictures = of_photographs
    clusterer = iic_dist.load(folder, "cpu")
    images = torch.stack([clusterer.read(path) for path in sorted(pictures.rglob("*.png"))[:7]])
    with torch.no_grad():
        made = Probabilities(clusterer).eval()(images)
    torch.testing.assert_close(made, clusterer.predict(images).probabilities, atol=1e-5, rtol=1e-4)
