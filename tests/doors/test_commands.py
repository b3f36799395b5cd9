"""The commands as a user calls them: real processes, real files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from iic_dist import train
from iic_dist.data.named import DEBIAN_FASHION_MNIST
from iic_dist.ops import backend

TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
SMALL = ["--data.batch_size", "448", "--train.epochs", "2", "--model.sub_heads", "2", "--monitor.progress", "false"]


def run(*arguments: str, cwd: Path, ranks: int = 0, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run `python -m ARGUMENTS`, under torchrun where `ranks` is given."""
    launcher = [*TORCHRUN, f"--nproc_per_node={ranks}"] if ranks else []
    return subprocess.run(
        [sys.executable, *launcher, "-m", *arguments],
        cwd=cwd,
        timeout=timeout,
        capture_output=True,
        text=True,
    )


def losses(folder: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line[f"loss/{head}"] for head in ("clustering", "overclustering", "contrastive")]
            for line in lines if "loss/clustering" in line]  # fmt: skip


def test_a_run_on_two_ranks_is_the_run_on_one_and_can_be_evaluated_again(tmp_path: Path) -> None:
    options = [*SMALL, "--train.precision", "float64", "--model.norm", "none", "--monitor.log_every", "1"]
    one = run("iic_dist.train", *options, "--run.name", "one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    two = run("iic_dist.train", *options, "--run.name", "two", cwd=tmp_path, ranks=2)
    assert two.returncode == 0, two.stderr
    folders = [tmp_path / "runs" / name for name in ("one", "two")]
    assert len(losses(folders[0])) == 8
    for alone, shared in zip(*map(losses, folders), strict=True):
        assert shared == pytest.approx(alone, rel=0, abs=1e-8)
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    assert [result["world_size"] for result in results] == [1, 2]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    assert f"accuracy {results[1]['accuracy']['selected']:.4f}" in two.stdout
    assert "tensorboard --logdir runs" in two.stdout
    assert two.stdout.count("runs/two: 2 ranks on cpu") == 1

    again = run("iic_dist.evaluate", "--run", "runs/two", "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    on_two_ranks = run("iic_dist.evaluate", "--folder", "runs/two", "--json", cwd=tmp_path, ranks=2)
    repeated = json.loads(again.stdout)
    assert json.loads(on_two_ranks.stdout) == {**repeated, "world_size": 2}, on_two_ranks.stderr
    assert {key: repeated[key] for key in ("accuracy", "nmi", "ari", "epochs")} == {
        key: results[1][key] for key in ("accuracy", "nmi", "ari", "epochs")
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data.batch_size", "lots"], "data.batch_size"),
        (["--no.such", "1"], "--no.such"),
        (["--data.name", "imagenet"], "imagenet"),
        (["--data.name", "cifar10", "--data.download", "false"], "cifar10"),
        (["--data.name", "folder:nowhere"], "nowhere"),
        (["--data.name", "folder:empty"], "empty"),
        (["--run.name", "../up"], "run.name='../up'"),
        (["--data.batch_size", "5000"], "5000"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["train", *arguments, "--monitor.progress", "false", "--run.threads", "1"])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert said.startswith("error: ")
    assert says in said
    assert not (tmp_path / "runs").exists()


def test_compiled_losses_that_are_not_there_are_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backend, "WHY_NOT_FUSED", "it was never built")
    monkeypatch.setattr(sys, "argv", ["train", "--loss.impl", "fused", "--run.threads", "1"])
    with pytest.raises(SystemExit):
        train.main()
    assert capsys.readouterr().err.startswith("error: loss.impl='fused': it was never built")


def test_an_indivisible_batch_size_is_said_once_on_two_ranks(tmp_path: Path) -> None:
    done = run("iic_dist.train", "--data.batch_size", "101", cwd=tmp_path, ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("error: the batch size 101 does not divide by 2 ranks: use 100 or 102") == 1


def test_a_run_goes_on_but_is_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def again(*options: str) -> str:
        command = ["train", *SMALL, "--run.name", "kept", "--run.threads", "1", "--train.epochs", "1", *options]
        monkeypatch.setattr(sys, "argv", command)
        try:
            train.main()
        except SystemExit:
            return capsys.readouterr().err
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    assert "going on" not in again()
    assert "runs/kept was trained with optim.lr=0.002, not 0.5" in again("--optim.lr", "0.5")
    assert "runs/kept is there" in again("--run.resume", "never")
    assert "going on after epoch 1" in again("--train.epochs", "2")
    assert json.loads((tmp_path / "runs" / "kept" / "result.json").read_text())["epochs"] == 2


def test_a_folder_of_images_with_a_bad_file_trains(tmp_path: Path) -> None:
    for i in range(24):
        picture = Image.effect_noise((20 + i, 30), 40 + i)
        (tmp_path / "pictures" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "pictures" / f"{i % 2}" / f"{i}.png")
    (tmp_path / "pictures" / "bad.png").write_bytes(b"not a picture")
    options = ["--data.name", "folder:pictures", "--data.image_size", "16", "--data.batch_size", "12"]
    done = run("iic_dist.train", *SMALL, *options, "--model.num_clusters", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "bad.png" in (tmp_path / "runs" / "pictures-1" / "unreadable.txt").read_text()
    result = json.loads((tmp_path / "runs" / "pictures-1" / "result.json").read_text())
    assert (result["num_images"], result["num_clusters"], result["accuracy"]) == (24, 3, None)


@pytest.mark.slow
def test_a_folder_needs_nothing_else(gray_images: Path, tmp_path: Path) -> None:
    options = ["--data.name", f"folder:{gray_images}", "--model.num_clusters", "3", "--run.name", "own"]
    done = run("iic_dist.train", *options, "--train.epochs", "20", cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--model.backbone small_cnn") == 1  # said by one rank
    clusters = ["--run", "runs/own", "--images", str(gray_images), "--output", "clusters.csv"]
    done = run("iic_dist.predict", *clusters, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "90 images in " in done.stdout
    assert len((tmp_path / "clusters.csv").read_text().splitlines()) == 91


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 8])
def test_no_argument_clusters_the_digits(ranks: int, tmp_path: Path) -> None:
    done = run("iic_dist.train", cwd=tmp_path, ranks=ranks, timeout=1200)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "runs" / "digits-1" / "result.json").read_text())
    assert result["accuracy"]["selected"] >= 0.94
    assert result["world_size"] == ranks


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_trains_for_an_epoch(tmp_path: Path) -> None:
    options = ["--config", "fashion-mnist", "--train.epochs", "1", "--monitor.progress", "false"]
    done = run("iic_dist.train", *options, cwd=tmp_path, timeout=3000)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "runs" / "fashion-mnist-1" / "result.json").read_text())
    assert result["num_images"] == 70_000
    assert result["accuracy"]["selected"] > 0.3  # of 10 classes, after one epoch
