"""What the monitor writes, read back with the json module and TensorBoard's own reader."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from disks import fill, small_disk
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from iic_dist.training.monitor import Monitor


def _lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _events(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir)).Reload()


def _steps(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in _events(run_dir).Scalars(tag)]


def test_scalars_reach_both_places(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "new"
    with Monitor(run_dir, enabled=True, resume_step=None) as monitor:
        monitor.scalars(10, {"loss/clustering": -1.5, "clusters_used": 7})
        assert _lines(run_dir) == [{"step": 10, "loss/clustering": -1.5, "clusters_used": 7}]  # without a close
        monitor.scalars(20, {"loss/clustering": -2.0})
    assert _lines(run_dir)[1] == {"step": 20, "loss/clustering": -2.0}
    assert _steps(run_dir, "loss/clustering") == [(10, -1.5), (20, -2.0)]
    assert _steps(run_dir, "clusters_used") == [(10, 7.0)]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with Monitor(tmp_path, enabled=True, resume_step=None) as monitor:
        monitor.scalars(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float32(0.5)})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": null, "b": null, "c": null, "d": 0.5}\n'


def test_pictures_reach_tensorboard(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    figure = Figure(figsize=(2, 1), dpi=100)
    figure.add_subplot().plot([0, 1])
    with Monitor(tmp_path, enabled=True, resume_step=None) as monitor:
        monitor.image("views", picture, 3)
        monitor.figure("confusion", figure, 4)
    events = _events(tmp_path)
    (shown,) = events.Images("views")
    assert shown.step == 3
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(shown.encoded_image_string))), picture)
    (drawn,) = events.Images("confusion")
    assert (drawn.step, drawn.width, drawn.height) == (4, 200, 100)


def test_points_reach_the_projector(tmp_path: Path) -> None:
    vectors = torch.arange(6.0).view(3, 2)
    labels = {"cluster": ["0", "1", "0"], "class": ["cat", "dog", "a\u00fc"]}
    with Monitor(tmp_path, enabled=True, resume_step=None) as monitor:
        monitor.embedding("features", vectors, labels, torch.rand(3, 3, 4, 4), 7)
    folder = tmp_path / "00007" / "features"
    assert np.array_equal(np.loadtxt(folder / "tensors.tsv"), vectors.numpy())
    lines = (folder / "metadata.tsv").read_text().splitlines()
    assert lines == ["cluster\tclass", "0\tcat", "1\tdog", "0\ta\u00fc"]
    assert Image.open(folder / "sprite.png").size == (8, 8)  # four places of 4 px
    assert 'tensor_path: "00007/features/tensors.tsv"' in (tmp_path / "projector_config.pbtxt").read_text()


def test_resuming_drops_the_steps_after_the_checkpoint(tmp_path: Path) -> None:
    with Monitor(tmp_path, enabled=True, resume_step=None) as monitor:
        for step in (10, 20, 30, 40):
            monitor.scalars(step, {"loss": float(step)})
            monitor.image("views", np.full((4, 4, 3), step, np.uint8), step)
    with Monitor(tmp_path, enabled=True, resume_step=20) as monitor:
        monitor.scalars(30, {"loss": -30.0})
    assert _lines(tmp_path) == [
        {"step": 10, "loss": 10.0},
        {"step": 20, "loss": 20.0},
        {"step": 30, "loss": -30.0},
    ]
    assert _steps(tmp_path, "loss") == [(10, 10.0), (20, 20.0), (30, -30.0)]
    assert [event.step for event in _events(tmp_path).Images("views")] == [10, 20]


def test_resuming_drops_a_line_that_a_crash_cut_short(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    with Monitor(tmp_path, enabled=True, resume_step=5) as monitor:
        monitor.scalars(6, {"loss": 6.0})
    assert [line["step"] for line in _lines(tmp_path)] == [1, 6]
    assert not list(tmp_path.glob("*.part"))


def test_a_new_run_in_an_old_folder_starts_from_nothing(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        with Monitor(tmp_path, enabled=True, resume_step=None) as monitor:
            monitor.scalars(0, {"loss": value})
    assert _lines(tmp_path) == [{"step": 0, "loss": 2.0}]
    assert _steps(tmp_path, "loss") == [(0, 2.0)]


def test_a_disabled_monitor_touches_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with Monitor(run_dir, enabled=False, resume_step=None) as monitor:
        monitor.scalars(1, {"loss": 1.0})
        monitor.image("views", np.zeros((4, 4, 3), np.uint8), 1)
        monitor.figure("confusion", Figure(), 1)
        monitor.embedding("features", torch.zeros(1, 2), {"cluster": ["0"]}, torch.zeros(1, 3, 4, 4), 1)
    assert not run_dir.exists()


def test_an_error_inside_still_closes_the_files(tmp_path: Path) -> None:
    def train() -> None:
        with Monitor(tmp_path, enabled=True, resume_step=None) as monitor:
            monitor.scalars(1, {"loss": 1.0})
            raise RuntimeError("training fell over")

    with pytest.raises(RuntimeError, match="training fell over"):
        train()
    assert _steps(tmp_path, "loss") == [(1, 1.0)]


def test_a_full_disk_is_said_once_and_lines_come_back_with_the_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    with small_disk(tmp_path / "disk", 2) as disk:
        with Monitor(disk, enabled=True, resume_step=None) as monitor:
            monitor.scalars(1, {"loss": 1.0})
            ballast = fill(disk)
            for step in range(2, 300):
                monitor.scalars(step, {"loss": float(step)})
                monitor.image("views", np.full((64, 64, 3), step % 256, np.uint8), step)
            ballast.unlink()
            monitor.scalars(300, {"loss": 300.0})
        assert "lines are missing in metrics.jsonl, training goes on: [Errno 28] No space left" in caplog.text
        assert "nothing more goes to TensorBoard until the run is started again: [Errno 28] No space" in caplog.text
        assert len(caplog.messages) == 2
        steps = [line["step"] for line in _lines(disk)]
        assert steps == [*range(1, steps[-2] + 1), 300]
        assert steps[-2] < 299
        with Monitor(disk, enabled=True, resume_step=300) as monitor:
            monitor.scalars(301, {"loss": 301.0})
        assert _steps(disk, "loss")[-1] == (301, 301.0)
