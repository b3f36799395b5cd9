"""Folders of links, of files that are too large or were cut short, and of files that are no images; whole commands."""

from __future__ import annotations

import contextlib
import csv
import sys
from pathlib import Path

import pytest
from PIL import Image
from small_runs import train_on, write_digits

from iic_dist import predict
from iic_dist.errors import UsageError
from iic_dist.training.run_folder import settings_of

SMALL = ["--train.epochs", "1", "--model.sub_heads", "2", "--model.num_overclusters", "0", "--data.batch_size", "4"]


def predicted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Path, images: Path, *options: str
) -> tuple[list[str], str]:
    """Run predict; return the paths of its table, and what it said."""
    table = run.parent / ".table.csv"
    table.unlink(missing_ok=True)
    arguments = ["predict", "--run", run, "--images", images, "--output", table, "--device", "cpu", "--no-progress"]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments), *options])
    with contextlib.suppress(SystemExit):
        predict.main()
    said = capsys.readouterr()
    if not table.exists():
        return [], said.err
    with table.open(newline="") as file:
        return [row["path"] for row in csv.DictReader(file)], said.out


def test_a_cluster_is_clustered_again(
    gray_run: Path,
    gray_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The folders that predict makes of links were refused by training and by predict."""
    links = tmp_path / "sorted"
    predicted(monkeypatch, capsys, gray_run, gray_images, "--link-to", str(links))
    cluster = max(links.iterdir(), key=lambda folder: len(list(folder.rglob("*.png"))))
    count = len(list(cluster.rglob("*.png")))
    with pytest.raises(
        UsageError, match=r"a symbolic link out of the image folder \(--data.follow_links true takes it"
    ):
        train_on(cluster, tmp_path / "refused", *SMALL)
    run = train_on(cluster, tmp_path / "again", *SMALL, "--data.follow_links", "true")
    assert settings_of(run).data.follow_links
    assert f"{count} images in" in predicted(monkeypatch, capsys, run, cluster)[1]  # as in the training
    paths, said = predicted(monkeypatch, capsys, gray_run, cluster)
    assert paths == []
    assert "predict --follow-links" in said
    assert len(predicted(monkeypatch, capsys, gray_run, cluster, "--follow-links")[0]) == count


def test_large_and_cut_files_are_taken_if_asked(
    gray_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Photographs above 50 million pixels and a JPEG without its last byte were passed over, whatever one asked."""
    images = write_digits(tmp_path, 12)
    Image.new("L", (8000, 6500), 90).save(images / "large.png")
    Image.effect_noise((30, 30), 50).save(images / "cut.jpg")
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:-1])
    (images / "raw.dng").write_bytes(b"raw")
    out = tmp_path / ".runs"
    takes = ["--data.max_megapixels", "52", "--data.truncated", "true"]
    run = train_on(images, out, *SMALL, *takes)
    assert not (run / "unreadable.txt").exists()
    paths, said = predicted(monkeypatch, capsys, run, images, "--gallery", str(out / "g.html"))
    assert len(paths) == 14
    assert "1 file left out: 1 .dng" in said
    paths, said = predicted(monkeypatch, capsys, gray_run, images)
    assert len(paths) == 12
    assert "large.png: 8000 x 6500 pixels, the limit is 50 million (--data.max_megapixels, predict --max-meg" in said
    assert "cut.jpg: it was cut short (--data.truncated true takes it, predict --truncated)" in said
    paths, _ = predicted(monkeypatch, capsys, gray_run, images, "--truncated", "--max-megapixels", "52")
    assert len(paths) == 14
    assert "must be above 0" in predicted(monkeypatch, capsys, gray_run, images, "--max-megapixels", "0")[1]


def test_more_clusters_than_images_are_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Four of ten clusters of six images stayed empty, without a word."""
    images = write_digits(tmp_path, 6)
    train_on(images, tmp_path / ".runs", *SMALL, "--model.num_clusters", "10")
    warnings = [line for line in caplog.messages if "num_clusters" in line]
    assert warnings == ["warning: model.num_clusters=10 of 6 images: 4 or more will stay empty"]
