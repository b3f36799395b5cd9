"""The command that clusters a folder: its table, folders and embeddings, on any number of ranks."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rank_tasks
import torch
from ranks import Ranks
from small_runs import ODD_NAMES, write_odd_names

from iic_dist import load, predict
from iic_dist.prediction.folder import predict_folder


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run the command in this process."""
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments), "--device", "cpu", "--no-progress"])
    predict.main()


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_the_table_is_what_python_says(
    gray_run: Path, gray_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    call(
        monkeypatch,
        *("--run", gray_run, "--images", gray_images),
        *("--output", tmp_path / "c.csv", "--embeddings", tmp_path / "e.npy"),
    )
    paths = sorted(path.relative_to(gray_images).as_posix() for path in gray_images.rglob("*.png"))
    prediction = load(gray_run, "cpu").predict([gray_images / path for path in paths])
    rows = table(tmp_path / "c.csv")
    assert list(rows[0]) == ["path", "cluster", "confidence", "agreement"]
    assert [row["path"] for row in rows] == paths
    assert [int(row["cluster"]) for row in rows] == prediction.clusters.tolist()
    confidence = np.array([float(row["confidence"]) for row in rows])
    assert np.allclose(confidence, prediction.confidence, atol=2e-6)
    agreement = np.array([float(row["agreement"]) for row in rows])
    assert np.allclose(agreement, prediction.agreement(), atol=1e-6)
    embeddings = np.load(tmp_path / "e.npy")
    assert embeddings.dtype == np.float32
    assert np.allclose(embeddings, prediction.embeddings, atol=1e-5)
    said = capsys.readouterr().out
    assert "90 images in" in said
    assert f"written: {tmp_path / 'c.csv'}, {tmp_path / 'e.npy'}" in said


def test_table_and_page_of_a_run_of_later_stages(
    neighbour_run: Path, gray_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = ("--output", tmp_path / "c.csv", "--embeddings", tmp_path / "e.npy", "--gallery", tmp_path / "g.html")
    call(monkeypatch, "--run", neighbour_run, "--images", gray_images, *outputs)
    rows = table(tmp_path / "c.csv")
    prediction = load(neighbour_run, "cpu").predict([gray_images / row["path"] for row in rows])
    assert [int(row["cluster"]) for row in rows] == prediction.clusters.tolist()
    assert np.allclose([float(row["agreement"]) for row in rows], prediction.agreement(), atol=1e-6)
    assert np.allclose(np.load(tmp_path / "e.npy"), prediction.embeddings, atol=1e-5)
    assert "cluster" in (tmp_path / "g.html").read_text()


def test_the_agreement_of_one_sub_head_is_unknown(
    refined_run: Path,
    gray_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It was printed as 1.000, in the table and on the page too; a refined run keeps one sub-head."""
    for ending in ("csv", "jsonl"):
        outputs = ("--output", tmp_path / f"c.{ending}", "--gallery", tmp_path / "g.html")
        call(monkeypatch, "--run", refined_run, "--images", gray_images, *outputs)
        assert ", agreement unknown of 1 sub-head\n" in capsys.readouterr().out
    assert {row["agreement"] for row in table(tmp_path / "c.csv")} == {""}
    assert '"agreement": null' in (tmp_path / "c.jsonl").read_text()
    page = (tmp_path / "g.html").read_text()
    assert "mean agreement unknown of 1 sub-head" in " ".join(page.split())
    assert "nan" not in page.partition("<main>")[2].partition("<script")[0].replace("data:", "").lower().split()


@pytest.mark.usefixtures("one_thread")
def test_four_ranks_say_the_same_bit_for_bit(ranks: Ranks, gray_run: Path, gray_images: Path, tmp_path: Path) -> None:
    """90 images in batches of 16: six batches on four ranks. 18 of them cannot be read."""
    images = tmp_path / "images"
    for number, path in enumerate(sorted(gray_images.rglob("*.png"))):
        copy = images / path.relative_to(gray_images)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(b"damaged" if number % 5 == 2 else path.read_bytes())
    alone = predict_folder(load(gray_run, "cpu"), images)
    assert (len(alone.paths), len(alone.unreadable)) == (72, 18)
    for shared in ranks.run(4, rank_tasks.predicted, gray_run, images):
        assert (shared.paths, shared.unreadable) == (alone.paths, alone.unreadable)
        for name in ("clusters", "confidence", "sub_heads", "probabilities", "embeddings"):
            assert torch.equal(getattr(shared.prediction, name), getattr(alone.prediction, name)), name


def test_more_ranks_than_batches(ranks: Ranks, gray_run: Path, tmp_path: Path) -> None:
    images = write_odd_names(tmp_path)
    alone = predict_folder(load(gray_run, "cpu"), images)
    shared = ranks.run(4, rank_tasks.predicted, gray_run, images)[0]
    assert shared.paths == alone.paths
    assert torch.equal(shared.prediction.clusters, alone.prediction.clusters)


@pytest.mark.slow
def test_the_command_writes_the_same_bytes_under_torchrun(gray_run: Path, gray_images: Path, tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    (tmp_path / "names.csv").write_text("cluster,name\n0,a\n2,a\n")
    for name, launcher, option in (("one", [], "--run"), ("two", torchrun, "--folder")):
        (tmp_path / name).mkdir()
        files = ["--output", "c.csv", "--embeddings", "e.npy", "--gallery", "g.html", "--names", "../names.csv"]
        command = ["-m", "iic_dist.predict", option, str(gray_run), "--images", str(gray_images), *files]
        subprocess.run(
            [sys.executable, *launcher, *command],
            cwd=tmp_path / name,
            check=True,
            timeout=300,
        )
    for file in ("c.csv", "e.npy", "g.html"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_odd_names_come_through(gray_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_odd_names(tmp_path)
    out = tmp_path / ".out"  # hidden: it is none of the images
    out.mkdir()
    for ending in ("csv", "jsonl"):
        call(monkeypatch, "--run", gray_run, "--images", images, "--output", out / f"c.{ending}")
    rows = table(out / "c.csv")
    assert {os.fsencode(row["path"]) for row in rows} == set(ODD_NAMES)
    assert len(rows) == len(ODD_NAMES)
    objects = [json.loads(line) for line in (out / "c.jsonl").read_text("ascii").splitlines()]
    assert [each["path"] for each in objects] == [row["path"] for row in rows]
    assert [each["confidence"] for each in objects] == [float(row["confidence"]) for row in rows]


@pytest.mark.parametrize("copy", [False, True])
def test_a_folder_for_each_cluster(gray_run: Path, tmp_path: Path, copy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tmp_path / "images"
    for nested in ("one", "two"):  # the same names twice
        (images / nested).mkdir(parents=True)
        write_odd_names(images / nested)
    target = tmp_path / "clusters"
    arguments = ["--run", gray_run, "--images", images, "--link-to", target, "--output", tmp_path / "c.csv"]
    call(monkeypatch, *arguments, *(["--copy"] if copy else []))
    assert sorted(path.name for path in target.iterdir()) == ["cluster-0", "cluster-1", "cluster-2"]
    for row in table(tmp_path / "c.csv"):
        place = target / f"cluster-{row['cluster']}" / row["path"]
        assert place.is_symlink() is not copy
        assert place.read_bytes() == (images / row["path"]).read_bytes()
    assert sum(path.is_file() for path in target.rglob("*")) == 2 * len(ODD_NAMES)
    with pytest.raises(SystemExit):
        call(monkeypatch, *arguments)  # it is there now


def test_named_clusters(
    gray_run: Path, gray_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Clusters 0 and 2 have one name and become one; cluster 1 has none. The rest of the table stays as it is."""
    names = tmp_path / "names.csv"
    names.write_bytes('cluster,name\r\n2,"zebra/""ü"""\r\n0,"zebra/""ü"""\r\n'.encode())
    common = ["--run", gray_run, "--images", gray_images]
    for ending in ("csv", "jsonl"):
        call(monkeypatch, *common, "--output", tmp_path / f"c.{ending}", "--names", names)
    said = capsys.readouterr().out
    call(monkeypatch, *common, "--output", tmp_path / "plain.csv")
    rows, unnamed = table(tmp_path / "c.csv"), table(tmp_path / "plain.csv")
    wanted = {"0": 'zebra/"ü"', "1": "", "2": 'zebra/"ü"'}
    assert rows == [{**row, "name": wanted[row["cluster"]]} for row in unnamed]
    objects = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text("ascii").splitlines()]
    assert [each["name"] for each in objects] == [row["name"] or None for row in rows]
    assert f'images of each name: zebra/"ü": {sum(row["cluster"] != "1" for row in rows)}\n' in said
    call(monkeypatch, *common, "--link-to", tmp_path / "sorted", "--names", names)
    assert sorted(path.name for path in (tmp_path / "sorted").iterdir()) == ["cluster-1", "zebra__ü_"]
    for row in rows:
        folder = "cluster-1" if row["cluster"] == "1" else "zebra__ü_"
        assert (tmp_path / "sorted" / folder / row["path"]).read_bytes() == (gray_images / row["path"]).read_bytes()


def test_unreadable_files_are_listed(
    gray_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    images = write_odd_names(tmp_path)
    for number in range(12):
        (images / f"bad{number:02}.jpg").write_bytes(b"no picture")
    out = tmp_path / ".out.csv"
    call(monkeypatch, "--run", gray_run, "--images", images, "--output", out)
    assert len(table(out)) == len(ODD_NAMES)
    said = capsys.readouterr().out
    assert "12 files could not be read:" in said
    assert "bad09.jpg: not an image" in said
    assert "bad10.jpg" not in said
    lines = (tmp_path / ".out.csv.unreadable.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [f"bad{number:02}.jpg" for number in range(12)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nothing to do"),
        (["--output", "c.txt"], "--output c.txt: its name must end in .csv, .jsonl, .parquet"),
        (["--output", "no/c.csv"], "--output no/c.csv: there is no folder no"),
        (["--gallery", "g.pdf"], "--gallery g.pdf: its name must end in .html"),
        (["--embeddings", "e.txt"], "--embeddings e.txt: its name must end in .npy"),
        (["--link-to", "full"], "--link-to full: is there already"),
        (["--link-to", "images/clusters"], "--link-to images/clusters: lies in the image folder"),
        (["--copy", "--output", "c.csv"], "--copy: copies for --link-to"),
        (["--names", "n.csv", "--embeddings", "e.npy"], "--names n.csv: names for --output, --link-to or --gallery"),
        (["--names", "no.csv", "--output", "c.csv"], "--names no.csv: there is no such file"),
        (["--names", "images", "--output", "c.csv"], "--names images: is a folder, not a file"),
        (
            ["--names", "n.csv", "--output", "c.csv"],
            "--names n.csv, line 2: no cluster '3'; those of this run are 0 to 2",
        ),
        (
            ["--names", "full/bad.png", "--output", "c.csv"],
            "no column cluster and no column name in its first line, 'bad'",
        ),
        (["--output", "c.csv", "--run", "nowhere"], "nowhere: not a run"),
        (["--output", "c.csv", "--images", "missing"], "'missing' does not exist"),
        (
            ["--output", "c.csv", "--images", "full"],
            "'full' holds 1 image file, and none can be read; the first",
        ),
        (["--output", "c.csv", "--images", "images"], "the image folder 'images' holds no image file"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    says: str,
    gray_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "bad.png").write_bytes(b"bad")
    (tmp_path / "n.csv").write_text("cluster,name\n3,zebra\n")
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "--run", gray_run, "--images", "images", *arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert says in said
    assert said.count("\n") == 1
