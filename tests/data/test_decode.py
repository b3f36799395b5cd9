"""Decoding by processes: the same images for any number of them, signals are left to the run, crashes are named."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from image_folders import load_images
from PIL import Image

from iic_dist.data import decode
from iic_dist.errors import UsageError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """70 files, three chunks: the pixels of picture i are i; every tenth is no image."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(70):
        path = folder / f"{number:03}.png"
        if number % 10 == 9:
            path.write_bytes(b"none")
        else:
            Image.new("RGB", (4, 4), (number, number, 0)).save(path)
    return folder


def load(folder: Path, workers: int | None, **options):
    return load_images(folder, image_size=4, workers=workers, **options)


@pytest.mark.parametrize("workers", [0, 1, 2, None])
def test_order_and_pixels_for_any_number_of_workers(pictures, workers, capfd):
    problems: list = []
    images = load(pictures, workers, unreadable=problems, progress=True)
    good = [number for number in range(70) if number % 10 != 9]
    assert images.images[:, 0, 0, 0].tolist() == good
    assert list(images.paths) == [f"{number:03}.png" for number in good]
    assert [path for path, _ in problems] == [f"{number:03}.png" for number in range(9, 70, 10)]
    shown = capfd.readouterr().err
    assert "decoding images: 100%" in shown
    assert "70/70" in shown


def test_chunks_of_large_images_are_small():
    assert decode._Chunks(Path(), ["x"] * 100, 96, 10, 0).size == 32
    assert decode._Chunks(Path(), ["x"] * 100, 1024, 10, 0).size == 5
    assert decode._Chunks(Path(), ["x"] * 100, 10_000, 10, 0).size == 1
    assert [len(decode._Chunks(Path(), ["x"] * n, 96, 10, 0)) for n in (0, 1, 32, 33)] == [0, 1, 1, 2]


def at_picture(monkeypatch: pytest.MonkeyPatch, name: str, action) -> None:
    """Do something in the process that decodes a file, before it decodes it."""
    real = decode.decode_image

    def decode_image(path: Path, *arguments):
        if path.name == name:
            action()
        return real(path, *arguments)

    monkeypatch.setattr(decode, "decode_image", decode_image)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_workers_ignore_the_signals_that_stop_a_run(pictures, monkeypatch, number):
    at_picture(monkeypatch, "042.png", lambda: os.kill(os.getpid(), number))
    assert len(load(pictures, 2, unreadable=[], progress=False).images) == 63


@pytest.mark.parametrize(("number", "says"), [(signal.SIGSEGV, "Segmentation fault"), (signal.SIGKILL, "Killed")])
def test_a_worker_that_crashes_is_one_line_that_names_the_file(pictures, monkeypatch, number, says):
    at_picture(monkeypatch, "042.png", lambda: os.kill(os.getpid(), number))
    started = time.monotonic()
    with pytest.raises(UsageError) as caught:
        load(pictures, 1, unreadable=[], progress=False, cache=pictures.parent / "cache")
    assert time.monotonic() - started < 60
    line = str(caught.value)
    assert "\n" not in line
    assert f"ended ({says}); at work were '042.png'" in line
    assert [path.suffix for path in (pictures.parent / "cache").iterdir()] == [".listing"]  # no half of the images
    monkeypatch.undo()
    assert len(load(pictures, 1, unreadable=[], progress=False, cache=pictures.parent / "cache").images) == 63


def test_an_error_of_our_own_is_not_taken_for_a_crash(pictures, monkeypatch):
    def fail(self, chunk: int):
        raise RuntimeError("a bug")

    monkeypatch.setattr(decode._Chunks, "__getitem__", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        load(pictures, 1, progress=False)
    assert multiprocessing.active_children() == []  # a process that ends would wait for them


def test_a_chunk_knows_whether_it_has_colour(tmp_path):
    gray = np.full((4, 4, 3), 7, dtype=np.uint8)
    for number in range(40):
        if number == 35:
            gray[3, 3, 2] = 8
        Image.fromarray(gray).save(tmp_path / f"{number:03}.png")
    names = sorted(path.name for path in tmp_path.iterdir())
    with decode.decoded_files(tmp_path, names, 4) as chunks:
        assert [chunk.has_colour for chunk in chunks] == [False, True]
