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
from iic_dist import export
from iic_dist.choose import choose as choose_k
from iic_dist.config.command_line import parse
from iic_dist.config.folder import choose
from iic_dist.data import decode
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.models.weights import digest
from iic_dist.prediction.export import Probabilities
from iic_dist.prediction.folder import predict_folder, predict_rows
from iic_dist.train import train
from iic_dist.training import checkpoint
from iic_dist.training.evaluate import evaluate_run
from iic_dist.training.extract import _BATCH, Embedder
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
    one, other = tmp_path / "one.npy", tmp_path / "other.npy"
    np.save(one, np.load(blobs)[:1])
    assert predict_rows(clusterer, one).prediction.clusters.tolist() == found.prediction.clusters[:1].tolist()
    np.save(other, np.zeros((3, 11), dtype=np.float32))
    with pytest.raises(UsageError, match=r"other.npy': 11 columns, and the run was trained on 12: were they made by"):
        predict_rows(clusterer, other)
    with pytest.raises(UsageError, match=r"\(3, 11\), torch.float32: must be \(M, 12\) floats"):
        clusterer.predict_features(torch.zeros(3, 11))
    with pytest.raises(UsageError, match="give them to predict_features"):
        clusterer.predict(Image.new("RGB", (8, 8)))


@pytest.mark.parametrize("best", [False, True])
def test_the_figures_come_again_from_the_checkpoint(of_file: Path, best: bool) -> None:
    """There once was no best one: the stage had saved its heads without their loss."""
    result = json.loads((of_file / "result.json").read_text())
    again = evaluate_run(of_file, Place(), best=best)
    assert again["accuracy"] == result["accuracy"]
    assert again["stages"] == result["stages"]


def test_the_projector_shows_the_features(of_file: Path, blobs: Path) -> None:
    """Runs on features once had nothing there: it wanted a picture of each point."""
    [folder] = of_file.glob("*/features")
    np.testing.assert_allclose(np.loadtxt(folder / "tensors.tsv"), np.load(blobs), rtol=1e-5, atol=1e-5)
    header, *rows = (folder / "metadata.tsv").read_text().splitlines()
    clusters = iic_dist.load(of_file).predict_features(np.load(blobs)).clusters.tolist()
    classes = np.load(blobs.with_suffix(".labels.npy")).tolist()
    assert header == "cluster\tclass"
    assert rows == [f"{cluster}\t{klass}" for cluster, klass in zip(clusters, classes, strict=True)]
    assert "sprite" not in (of_file / "projector_config.pbtxt").read_text()


def test_stage_2_is_shown_as_stage_1_is(of_file: Path) -> None:
    lines = [json.loads(line) for line in (of_file / "metrics.jsonl").read_text().splitlines()]
    during = [line for line in lines if "loss/clustering" in line]
    assert [line["step"] for line in during] == list(range(10, 201, 10))
    for line in during:
        assert line["stage"] == 2
        assert {f"clustering_sub_head_loss_nats/{sub_head}" for sub_head in range(8)} <= line.keys()
        assert {"clustering/information_share_of_ln_k", "clustering/entropy_nats"} <= line.keys()
        assert {"clustering/used_clusters", "clustering/conditional_entropy_nats"} <= line.keys()
    at_the_end = {name: value for line in lines if line["step"] == 200 for name, value in line.items()}
    assert at_the_end["accuracy/selected"] == at_the_end["accuracy/kmeans_on_features"] == 1.0
    assert at_the_end["evaluation_clustering/used_clusters"] == 4


def test_several_k_and_k_means_with_the_recommended_one(
    blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """k-means once got the first of several K."""
    folder = run(f"features:{blobs}", tmp_path, "--neighbours.steps", "100", "--model.num_clusters", "2,4")
    result = json.loads((folder / "result.json").read_text())
    assert result["num_clusters"] == 4
    assert result["stages"]["neighbours"]["kmeans_accuracy"] == 1.0
    said = capsys.readouterr().out
    assert f"features:{blobs}: {len(np.load(blobs))} rows, 4 clusters" in said  # they were once called images
    assert "accuracy by stage: neighbours 1.0000 (k-means on the same features 1.0000)" in said
    assert iic_dist.load(folder).num_clusters == choose_k(folder, Place()).chosen.num_clusters == 4


def test_onnx_of_a_run_on_rows(of_file: Path, blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It once ended in a traceback: such a run has no views."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    path = tmp_path / "m.onnx"
    monkeypatch.setattr("sys.argv", ["export", "--run", str(of_file), "--format", "onnx", "--output", str(path)])
    export.main()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(each.name, each.type) for each in session.get_inputs()] == [("features", "tensor(float)")]
    for count in (1, 400):
        rows = np.load(blobs)[:count]
        [probabilities] = session.run(["probabilities"], {"features": rows})
        expected = iic_dist.load(of_file).predict_features(rows).probabilities
        np.testing.assert_allclose(probabilities, expected, atol=1e-5)


def test_features_of_another_run_are_one_line(blobs: Path, tmp_path: Path) -> None:
    """A run that was stopped goes on with the rows that it began with, unless it is told otherwise."""
    file = tmp_path / "rows.npy"
    np.save(file, np.load(blobs))
    options = ["--neighbours.steps", "20", "--train.checkpoint_every_steps", "10", "--model.num_clusters", "4"]
    folder = run(f"features:{file}", tmp_path, *options)
    newest = checkpoint.available(folder / "checkpoints")[0]
    newest.unlink()
    np.save(file, np.load(blobs)[::-1])
    with pytest.raises(UsageError, match=r"other rows than features:.*rows.npy holds now: 0 added, 0 gone"):
        run(f"features:{file}", tmp_path, *options)


def test_fewer_rows_than_clusters_or_neighbours_are_one_line_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """k-means beside the labels once ended such a run in a traceback."""
    np.save(tmp_path / "rows.npy", np.eye(5, 8, dtype=np.float32))
    np.save(tmp_path / "rows.labels.npy", np.array([0, 1, 2, 0, 1]))
    folder = run(f"features:{tmp_path / 'rows.npy'}", tmp_path, "--neighbours.steps", "2", "--model.num_clusters", "6")
    assert (folder / "result.json").is_file()
    assert "5 rows: neighbours.k=15 is taken as 4, all others" in caplog.messages
    assert "warning: model.num_clusters=6 of 5 rows: 1 or more will stay empty" in caplog.messages


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


def test_the_projector_names_the_files(of_photographs: tuple[Path, Path]) -> None:
    folder, pictures = of_photographs
    [shown] = folder.glob("*/features")
    header, *rows = (shown / "metadata.tsv").read_text().splitlines()
    assert header == "cluster\tpath\tclass"
    paths = sorted(str(path.relative_to(pictures)) for path in pictures.rglob("*.png"))
    assert [row.split("\t")[1:] for row in rows] == [[path, path.split("/")[0]] for path in paths]
    assert len((shown / "tensors.tsv").read_text().splitlines()) == 60


def test_a_run_is_repeated_from_its_config(
    of_photographs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Name and digest of the weights stand there, so that it is the same bit for bit or refused."""
    folder, _ = of_photographs
    before = folder.parent.parent / "weights.safetensors"
    again = ["--config", str(folder / "config.yaml"), "--run.root", str(tmp_path), "--data.cache", str(tmp_path / "k")]
    config = parse(again)
    assert (config.model.backbone, config.model.weights) == ("timm/test_convnext", str(before))
    assert config.model.weights_digest == digest(before)
    train(config, Place(), StopSignals())
    assert f"weights of timm/test_convnext: {before}, {digest(before)}\n" in capsys.readouterr().out
    states = [checkpoint.load_newest(each / "checkpoints") for each in (folder, tmp_path / "run")]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    torch.manual_seed(6)
    save_file(timm.create_model("test_convnext").state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=r"model.weights_digest=sha256:\w+: but .*other.safetensors' has sha256:"):
        train(parse([*again, "--model.weights", str(tmp_path / "other.safetensors")]), Place(), StopSignals())
    with pytest.raises(UsageError, match=r"gone.pth.: there is no such file \(wanted: digest sha256:\w+"):
        train(parse([*again, "--model.weights", "gone.pth"]), Place(), StopSignals())


def test_several_k_of_a_frozen_network(of_photographs: tuple[Path, Path], tmp_path: Path) -> None:
    """From training to choose, predict and export."""
    before, pictures = of_photographs
    options = ["--run.root", str(tmp_path), "--run.name", "several", "--model.num_clusters", "2,3"]
    train(parse(["--config", str(before / "config.yaml"), *options]), Place(), StopSignals())
    clusterer = iic_dist.load(tmp_path / "several", "cpu")
    chosen = choose_k(tmp_path / "several", Place()).chosen
    assert (clusterer.head, clusterer.num_clusters) == (chosen.head, chosen.num_clusters)
    found = predict_folder(clusterer, pictures).prediction
    sizes = sorted(torch.bincount(found.clusters, minlength=chosen.num_clusters).tolist(), reverse=True)
    assert sizes == chosen.sizes
    images = torch.stack([clusterer.read(path) for path in sorted(pictures.rglob("*.png"))])
    with torch.no_grad():
        made = Probabilities(clusterer).eval()(images)
    torch.testing.assert_close(made, found.probabilities, atol=1e-5, rtol=1e-4)


class _FourthLook(StopSignals):
    """Has received a signal when it is looked at for the fourth time."""

    looks = 0

    @property
    def received(self) -> str | None:
        self.looks += 1
        return "SIGTERM" if self.looks > 3 else None

    @received.setter
    def received(self, value: object) -> None:
        pass


def test_a_signal_while_features_are_made_is_heeded_within_a_batch(
    of_photographs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It was once heeded after all of them, hours later for a large set."""
    folder, _ = of_photographs
    monkeypatch.setattr(decode, "_CHUNK_IMAGES", 8)
    monkeypatch.setitem(_BATCH, "cpu", 8)
    batches: list[int] = []
    embed = Embedder.__call__

    def counted(self: Embedder, images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        batches.append(len(rows))
        return embed(self, images, rows)

    monkeypatch.setattr(Embedder, "__call__", counted)
    options = [
        "--config",
        str(folder / "config.yaml"),
        "--run.root",
        str(tmp_path),
        "--data.cache",
        str(tmp_path / "k"),
    ]
    train(parse(options), Place(), _FourthLook())
    assert batches == [8] * 5  # a signal is always heeded one step late
    assert "stopped while a frozen network made features" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "PREEMPTED").read_text()) == {"step": 0, "epoch": 0, "signal": "SIGTERM"}
    assert not [path for path in (tmp_path / "k").iterdir() if "features" in path.name]
    train(parse(options), Place(), StopSignals())
    assert not (tmp_path / "run" / "PREEMPTED").exists()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["num_images"] == 60


def test_what_is_exported_holds_backbone_space_and_heads(of_photographs: tuple[Path, Path]) -> None:
    folder, pictures = of_photographs
    clusterer = iic_dist.load(folder, "cpu")
    images = torch.stack([clusterer.read(path) for path in sorted(pictures.rglob("*.png"))[:7]])
    with torch.no_grad():
        made = Probabilities(clusterer).eval()(images)
    torch.testing.assert_close(made, clusterer.predict(images).probabilities, atol=1e-5, rtol=1e-4)
