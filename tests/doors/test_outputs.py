"""Outputs of the commands that cannot be written: found before the work, and whole or not there."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disks import fill, leave_room, make_read_only, small_disk
from PIL import Image

from iic_dist import choose, export, predict, train
from iic_dist.evaluation.health import Health, recommend

pytestmark = pytest.mark.usefixtures("one_thread")

OUTPUTS = [
    *(("--output", f"c{ending}") for ending in (".csv", ".jsonl", ".parquet")),
    ("--embeddings", "e.npy"),
    ("--gallery", "g.html"),
    ("--link-to", "sorted"),
]
Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in this process; return its exit code and what it said of errors."""

    def run(command: object, *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        code: object = 0
        try:
            command.main()  # type: ignore[attr-defined]
        except SystemExit as end:
            code = end.code
        return int(str(code)), capsys.readouterr().err

    return run


def gone(disk: Path, name: str) -> Path:
    return disk / "nowhere" / name


def full(disk: Path, name: str) -> Path:
    fill(disk)
    return disk / name


def read_only(disk: Path, name: str) -> Path:
    make_read_only(disk)
    return disk / name


def a_folder(disk: Path, name: str) -> Path:
    (disk / name / "kept").mkdir(parents=True)
    return disk / name


KINDS = [gone, full, read_only, a_folder]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 8) as folder:
        yield folder


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("option", "name", "kind"),
    [
        (*output, kind)
        for output in OUTPUTS
        for kind in KINDS
        if output[0] != "--link-to" or kind in (read_only, a_folder)  # folders are made, and links take no room here
    ],
)
def test_predict_looks_before_it_works(
    option: str,
    name: str,
    kind: Callable[[Path, str], Path],
    gray_run: Path,
    gray_images: Path,
    disk: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What could not be written was found when all images had been clustered."""
    monkeypatch.setattr(predict, "predict_folder", lambda *_, **__: pytest.fail("the images were clustered"))
    path = kind(disk, name)
    before = listing(disk)
    arguments = ("--run", gray_run, "--images", gray_images, option, path, "--device", "cpu", "--no-progress")
    code, said = call(predict, *arguments)
    assert code == 2, said
    assert said.startswith(f"error: {option} {path}: ")
    assert said.count("\n") == 1
    assert listing(disk) == before


def test_a_folder_in_the_place_of_the_unreadable_files_list_is_found_first(
    gray_run: Path, gray_images: Path, tmp_path: Path, call: Call
) -> None:
    (tmp_path / "c.csv.unreadable.txt").mkdir()
    code, said = call(predict, "--run", gray_run, "--images", gray_images, "--output", tmp_path / "c.csv")
    assert (code, said) == (
        2,
        f"error: --output {tmp_path / 'c.csv.unreadable.txt'}: cannot be written (Is a directory)\n",
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", sorted(export.FORMATS))
def test_export_looks_before_it_works(
    form: str,
    kind: Callable[[Path, str], Path],
    gray_run: Path,
    disk: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(export.FORMATS, form, lambda *_: pytest.fail("the run was exported"))
    path = kind(disk, f"model.{form}")
    before = listing(disk)
    code, said = call(export, "--run", gray_run, "--format", form, "--output", path)
    assert code == 2, said
    assert said.startswith(f"error: --output {path}: ")
    assert said.count("\n") == 1
    assert listing(disk) == before


@pytest.mark.parametrize("form", sorted(export.FORMATS))
def test_an_export_is_whole_or_not_there(form: str, gray_run: Path, disk: Path, call: Call) -> None:
    """A cut .onnx stayed on a full disk; safetensors has an error of its own, which was a traceback."""
    (disk / "old").write_bytes(b"old")
    leave_room(disk, 16)
    before = listing(disk)
    code, said = call(export, "--run", gray_run, "--format", form, "--output", disk / f"model.{form}")
    assert code == 2, said
    assert said.splitlines()[-1].startswith("error: [Errno 28] No space left on device")
    assert "Traceback" not in said
    assert listing(disk) == before


@pytest.mark.parametrize("there", [False, True])
def test_folders_of_copies_are_all_there_or_none(there: bool, gray_run: Path, tmp_path: Path, call: Call) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(8):
        Image.effect_noise((128, 128), 90).save(images / f"{number}.bmp")
    with small_disk(tmp_path / "disk", 1) as disk:
        if there:
            (disk / "sorted").mkdir()
        leave_room(disk, 64)
        before = listing(disk)
        arguments = ("--run", gray_run, "--images", images, "--link-to", disk / "sorted", "--copy", "--no-progress")
        code, said = call(predict, *arguments, "--device", "cpu")
        assert code == 2, said
        assert "No space left on device" in said
        assert listing(disk) == before


def test_all_outputs_have_one_mode(gray_run: Path, gray_images: Path, tmp_path: Path, call: Call) -> None:
    before = os.umask(0o027)
    try:
        files = [argument for option, name in OUTPUTS[2:5] for argument in (option, tmp_path / name)]
        given = ("--run", gray_run, "--images", gray_images, "--device", "cpu", "--no-progress")
        assert call(predict, *given, *files)[0] == 0
        assert call(predict, *given, "--output", tmp_path / "c.csv")[0] == 0
        for form in export.FORMATS:
            assert call(export, "--run", gray_run, "--format", form, "--output", tmp_path / f"model.{form}")[0] == 0
        health = [Health.from_json(choice) for choice in CHOICES]
        choose.draw(recommend(health), tmp_path / "choices.png")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir() if path.is_file()}
    assert len(modes) == 7
    assert set(modes.values()) == {0o640}, modes


@pytest.mark.parametrize("kind", [full, read_only, a_folder])
def test_a_root_where_no_run_can_be_kept_is_found_before_the_images_are_read(
    kind: Callable[[Path, str], Path], gray_images: Path, disk: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "load_what_is_trained_on", lambda *_: pytest.fail("the images were read"))
    root = kind(disk, "runs")
    if kind is a_folder:
        root = root / "a file"
        root.write_text("")
    before = listing(disk)
    arguments = ("--data.name", f"folder:{gray_images}", "--model.num_clusters", 3, "--run.root", root)
    code, said = call(train, *arguments, "--data.cache", disk.parent / "kept", "--run.device", "cpu")
    assert code == 2, said
    assert said.startswith(f"error: --run.root {root}: no run can be kept there (")
    assert said.count("\n") == 1
    assert [name for name in listing(disk) if name != "runs" or kind is a_folder] == before


CHOICES = [Health(f"clustering_{k}", k, 0.5, 0.9, k, [10] * k, 0.5, 0.5, 0.1, 3).as_json() for k in (3, 5)]


def test_choose_draws_nothing_where_the_disk_fills_up(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    leave_room(disk, 16)
    before = listing(disk)
    with caplog.at_level("WARNING"):
        assert choose.can_be_drawn(disk / "choices.png")
        choose.draw(recommend([Health.from_json(choice) for choice in CHOICES]), disk / "choices.png")
    assert caplog.messages == [f"no picture: {disk / 'choices.png'} cannot be written (No space left on device)"]
    assert listing(disk) == before


def test_choose_prints_its_table_where_no_picture_can_be_written(
    disk: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
) -> None:
    """A run that lies where nothing can be written ended in a traceback instead of the table."""
    said: list[str] = []

    def evaluate_run(*_: object) -> dict[str, object]:
        assert len(caplog.messages) == 1  # said before the work
        return {"choices": CHOICES}

    monkeypatch.setattr(choose, "evaluate_run", evaluate_run)
    monkeypatch.setattr(choose, "say", lambda _, *lines: said.extend(lines))
    make_read_only(disk)
    with caplog.at_level("WARNING"):
        assert call(choose, "--run", disk)[0] == 0
    assert said[0].split()[0] == "K"
    assert [line.split()[0] for line in said[1:3]] == ["3", "5"]
    assert caplog.messages == [f"no picture: {disk / 'choices.png'} cannot be written (Read-only file system)"]
    assert listing(disk) == []
