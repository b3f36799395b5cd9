"""Malformed files by the thousand: none ends a load, each is named once, and the memory does not rise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import malformed
import numpy as np
import pytest
from image_folders import load_images
from PIL import Image

LOAD = """
import json, resource, sys
from pathlib import Path
from iic_dist.data.folder import Reading, load_folder
problems = []
reading = Reading(cache=Path(sys.argv[2]), workers=int(sys.argv[3]), progress=False)
images = load_folder(Path(sys.argv[1]), reading, image_size=32, unreadable=problems)
print(json.dumps({
    "paths": images.paths, "problems": problems,
    "peak_kib": max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)),
}))
"""


def good_files(folder: Path, count: int) -> dict[str, np.ndarray]:
    made = {}
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
        made[f"good-{number}.png"] = pixels
        Image.fromarray(pixels).save(folder / f"good-{number}.png")
    return made


def add_malformed(folder: Path, count: int) -> tuple[set[str], set[str]]:
    """Write `count` malformed files and four bombs; return what cannot be read, and what perhaps can."""
    perhaps, hopeless = set(), set(malformed.bombs())
    for name, content, damaged in malformed.malformed(count):
        (folder / name).write_bytes(content)
        (perhaps if damaged else hopeless).add(name)
    for name, content in malformed.bombs().items():
        (folder / name).write_bytes(content)
    return hopeless, perhaps


def check(answer: dict, folder: Path, hopeless: set[str], perhaps: set[str]) -> None:
    named = [name for name, _ in answer["problems"]]
    assert len(named) == len(set(named))
    assert sorted([*named, *answer["paths"]]) == sorted(path.name for path in folder.iterdir())
    assert hopeless <= set(named) <= hopeless | perhaps
    assert all(reason and "\n" not in reason for _, reason in answer["problems"])


@pytest.mark.parametrize("workers", [0, 2])
def test_malformed_files_and_bombs_among_as_many_good_ones(tmp_path, workers):
    folder = tmp_path / "pictures"
    folder.mkdir()
    good = good_files(folder, 110)
    hopeless, perhaps = add_malformed(folder, 110)
    answers = []
    for _ in range(2):  # the second time from the cache
        problems: list = []
        options = {"cache": tmp_path / "cache", "workers": workers, "unreadable": problems}
        images = load_images(folder, image_size=32, **options)
        answers.append({"paths": images.paths, "problems": problems})
        for row, path in enumerate(images.paths):
            if path in good:
                assert np.array_equal(images.images[row].permute(1, 2, 0), good[path])
    check(answers[0], folder, hopeless, perhaps)
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_a_thousand_malformed_files_take_no_memory(tmp_path):
    def load() -> dict:
        command = [sys.executable, "-c", LOAD, str(folder), str(tmp_path / "cache"), "2"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        answer: dict = json.loads(done.stdout)
        return answer

    folder = tmp_path / "pictures"
    folder.mkdir()
    good = good_files(folder, 1000)
    before = load()
    assert sorted(before["paths"]) == sorted(good)
    hopeless, perhaps = add_malformed(folder, 1000)
    after = load()
    check(after, folder, hopeless, perhaps)
    rise = (after["peak_kib"] - before["peak_kib"]) / 1024
    print(f"{len(after['problems'])} of {len(list(folder.iterdir()))} files named, memory {rise:+.1f} MiB")
    assert rise < 100


def test_every_kind_is_as_hopeless_as_it_says(tmp_path):
    for number, (name, content, perhaps) in enumerate(malformed.malformed(176)):
        if not perhaps:
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match="holds 1 image file, and none"):
                load_images(folder, unreadable=[])
