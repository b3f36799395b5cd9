from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from iic_dist import checkpoint


def state(value: float) -> dict[str, object]:
    return {
        "step": int(value),
        "weights": {"w": torch.full((3, 2), value, dtype=torch.float64)},
        "list": [1, None],
    }


def test_the_newest_checkpoint_comes_back_and_three_are_kept(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path / "none") is None
    for step in (5, 30, 200, 1000):
        checkpoint.save(tmp_path, step, state(step))
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded is not None
    assert loaded["step"] == 1000
    assert torch.equal(loaded["weights"]["w"], torch.full((3, 2), 1000.0, dtype=torch.float64))
    assert [path.name for path in checkpoint.available(tmp_path)] == [
        "step_00001000.pt",
        "step_00000200.pt",
        "step_00000030.pt",
    ]
    assert len(list(tmp_path.iterdir())) == 6  # each with its manifest, nothing temporary


def damage_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        damage_bit,
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(b""),
        lambda path: path.with_suffix(".json").unlink(),
        lambda path: path.with_suffix(".json").write_text("{"),
        lambda path: path.with_suffix(".json").write_text(json.dumps({"sha256": "0" * 64})),
        lambda path: path.with_suffix(".json").write_text("{}"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    newest = checkpoint.save(tmp_path, 2, state(2))
    assert callable(damage)
    damage(newest)
    with caplog.at_level(logging.WARNING):
        loaded = checkpoint.load_newest(tmp_path)
    assert loaded is not None
    assert loaded["step"] == 1
    assert newest.name in caplog.text


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, state(1))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, state(2))
    monkeypatch.undo()
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded is not None
    assert loaded["step"] == 1


def test_only_tensors_and_plain_values_are_read(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"step": 1, "evil": Path("/")})
    with pytest.raises(Exception, match="[Ww]eights"):
        checkpoint.load_newest(tmp_path)
