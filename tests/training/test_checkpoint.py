from __future__ import annotations

import json
import logging
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from iic_dist.training import checkpoint


def state(value: float) -> dict[str, object]:
    return {
        "step": int(value),
        "weights": {"w": torch.full((3, 2), value, dtype=torch.float64)},
        "list": [1, None],
    }


def save(folder: Path, step: int, loss: float | None = None) -> Path:
    return checkpoint.save(folder, step // 10, step, state(step), loss)


def newest_step(folder: Path) -> int | None:
    loaded = checkpoint.load_newest(folder)
    return None if loaded is None else loaded["step"]


def test_the_newest_checkpoint_comes_back_and_three_are_kept(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path / "none") is None
    for step in (5, 30, 200, 1000):
        save(tmp_path, step)
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded is not None
    assert loaded["step"] == 1000
    assert torch.equal(loaded["weights"]["w"], torch.full((3, 2), 1000.0, dtype=torch.float64))
    assert [path.name for path in checkpoint.available(tmp_path)] == [
        "epoch_00100_step_00001000.pt",
        "epoch_00020_step_00000200.pt",
        "epoch_00003_step_00000030.pt",
    ]
    assert len(list(tmp_path.iterdir())) == 6  # each with its manifest, nothing temporary


def test_the_one_of_lowest_loss_outlives_the_newest_three(tmp_path: Path) -> None:
    for step, loss in ((1, -1.0), (2, -2.0), (3, None), (4, -1.5), (5, float("nan")), (6, -1.9), (7, None)):
        save(tmp_path, step, loss)
    assert [int(path.stem[-8:]) for path in checkpoint.available(tmp_path)] == [7, 6, 5, 2]
    best = checkpoint.load_best(tmp_path)
    assert best is not None
    assert best["step"] == 2
    save(tmp_path, 8, -3.0)
    assert [int(path.stem[-8:]) for path in checkpoint.available(tmp_path)] == [8, 7, 6]


def test_a_later_stage_has_the_best_whatever_its_loss(tmp_path: Path) -> None:
    """Losses of two stages are those of different pairs."""
    for step, (loss, stage) in enumerate([(-3.0, 0), (-1.0, 1), (-2.0, 1), (-1.5, 1), (None, 2)]):
        checkpoint.save(tmp_path, 0, step, {"step": step}, loss, stage)
    best = checkpoint.load_best(tmp_path)
    assert best is not None
    assert best["step"] == 2
    manifest = tmp_path / "epoch_00000_step_00000002.json"
    manifest.write_text(manifest.read_text().replace('"stage": 1', '"stage": "b"'))
    best = checkpoint.load_best(tmp_path)  # malformed
    assert best is not None
    assert best["step"] == 3


def test_the_best_falls_back_to_the_next_best(tmp_path: Path) -> None:
    for step, loss in ((1, -1.0), (2, -2.0), (3, -3.0)):
        path = save(tmp_path, step, loss)
    path.write_bytes(b"")
    best = checkpoint.load_best(tmp_path)
    assert best is not None
    assert best["step"] == 2


def test_a_checkpoint_that_is_there_and_good_is_not_written_again(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    before = path.stat().st_mtime_ns, path.stat().st_ino
    save(tmp_path, 1)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    path.write_bytes(b"damaged")
    save(tmp_path, 1)
    assert newest_step(tmp_path) == 1


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    bit = int(place * len(content) * 8)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def truncate(path: Path, place: float) -> None:
    path.write_bytes(path.read_bytes()[: int(place * path.stat().st_size)])


def manifest(path: Path, **changes: object) -> None:
    beside = path.with_suffix(".json")
    beside.write_text(json.dumps(json.loads(beside.read_text()) | changes))


def swap_manifests(path: Path) -> None:
    mine, other = path.with_suffix(".json"), path.with_name("epoch_00000_step_00000001.json")
    contents = mine.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    mine.write_bytes(contents[1])


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "manifest missing": lambda path: path.with_suffix(".json").unlink(),
    "manifest cut": lambda path: path.with_suffix(".json").write_text("{"),
    "manifest empty": lambda path: path.with_suffix(".json").write_text(""),
    "manifest without keys": lambda path: path.with_suffix(".json").write_text("{}"),
    "manifest a list": lambda path: path.with_suffix(".json").write_text("[1]"),
    "manifest not text": lambda path: path.with_suffix(".json").write_bytes(b"\xff\xfe\x00"),
    "manifest nested": lambda path: path.with_suffix(".json").write_text("[" * 100_000),
    "another digest": lambda path: manifest(path, sha256="0" * 64),
    "a digest that is none": lambda path: manifest(path, sha256=None),
    "another size": lambda path: manifest(path, bytes=7),
    "another step": lambda path: manifest(path, step=7),
    "an infinite loss": lambda path: manifest(path, loss=float("inf")),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    assert callable(damage)
    damage(newest)
    with caplog.at_level(logging.WARNING):
        assert newest_step(tmp_path) == 1
    assert newest.name in caplog.text
    assert len(caplog.messages) == 1


def test_swapped_manifests_are_both_damaged(tmp_path: Path) -> None:
    save(tmp_path, 1)
    swap_manifests(save(tmp_path, 2))
    assert newest_step(tmp_path) is None


@pytest.mark.parametrize("damage", [flip, truncate])
def test_every_flipped_bit_and_every_missing_end_is_noticed(tmp_path: Path, damage: object) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    whole = newest.read_bytes()
    draw = random.Random(0)
    assert callable(damage)
    noticed = 0
    for _ in range(100):
        damage(newest, draw.random())
        noticed += newest_step(tmp_path) == 1
        newest.write_bytes(whole)
    assert noticed == 100
    assert newest_step(tmp_path) == 2


def test_a_failed_save_leaves_the_old_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:  # the manifest and its folder are through; the checkpoint is not
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert newest_step(tmp_path) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_kill_has_left_is_removed_by_the_next_save(tmp_path: Path) -> None:
    (tmp_path / ".epoch_00000_step_00000001.pt.tmp").write_bytes(b"half")
    (tmp_path / "epoch_00000_step_00000001.json").write_text("{}")
    save(tmp_path, 2)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".pt"]


def killed_while_saving(folder: Path, step: int, content: dict[str, object], after_seconds: float) -> None:
    """Save in a child process, and kill it so long after it began."""
    begun, begin = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(begin, b"1")
        checkpoint.save(folder, 0, step, content)
        os._exit(0)
    os.read(begun, 1)
    time.sleep(after_seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for descriptor in (begun, begin):
        os.close(descriptor)


def test_a_kill_at_any_point_of_a_save_leaves_a_checkpoint_that_verifies(tmp_path: Path) -> None:
    points = 30
    content = {"step": 0, "weights": torch.arange(2_000_000, dtype=torch.float32)}
    started = time.perf_counter()
    checkpoint.save(tmp_path, 0, 0, content)
    duration = time.perf_counter() - started
    found, cut_short = 0, 0
    for point in range(1, points + 1):
        before = newest_step(tmp_path)
        killed_while_saving(tmp_path, point, content | {"step": point}, 3 * duration * point / points)
        left = newest_step(tmp_path)
        found += left in (before, point)
        cut_short += left != point
    assert found == points
    assert cut_short > 0  # else every kill came too late


def test_only_tensors_and_plain_values_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1)
    checkpoint.save(tmp_path, 2, 20, {"step": 20, "evil": Path("/")})
    assert newest_step(tmp_path) == 1
    assert "epoch_00002_step_00000020.pt is damaged and passed over: torch refuses it" in caplog.text


def test_none_yet_is_not_none_that_verifies(tmp_path: Path) -> None:
    """Of a run that had not saved yet it was said that no checkpoint verifies."""
    assert checkpoint.why_none(tmp_path).startswith(f"no checkpoint in {tmp_path} yet; one comes every ")
    assert checkpoint.why_none(tmp_path / "checkpoints", best=True).startswith("no checkpoint in ")
    (tmp_path / "epoch_00001_step_00000001.pt").write_bytes(b"damaged")
    assert checkpoint.why_none(tmp_path) == f"no checkpoint in {tmp_path} verifies"
    assert checkpoint.why_none(tmp_path, best=True) == f"no checkpoint in {tmp_path} has a loss and verifies"
