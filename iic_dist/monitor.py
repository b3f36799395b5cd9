"""What a run writes while it runs: metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from iic_dist.figures import render
from iic_dist.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TENSORBOARD_FLUSH_SECONDS = 10  # the default of 120 makes a short run look dead


class Monitor:
    """Writes the scalars and pictures of a run; in all processes but one it is disabled and does nothing.

    Args:
        run_dir: where metrics.jsonl and the TensorBoard events go; created if missing.
        enabled: whether this process writes (rank 0).
        resume_step: the step of the checkpoint that the run goes on from. What an earlier attempt wrote for
            later steps is dropped. None for a new run: all that was written here before is dropped.
    """

    def __init__(self, run_dir: Path, enabled: bool, resume_step: int | None) -> None:
        self.enabled = enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # only the process that writes pays for the import

        run_dir.mkdir(parents=True, exist_ok=True)
        first_step = 0 if resume_step is None else resume_step + 1
        path = run_dir / "metrics.jsonl"
        _drop_from(path, first_step)
        self._lines = path.open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(run_dir), purge_step=first_step, flush_secs=_TENSORBOARD_FLUSH_SECONDS)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write `values` as a line of metrics.jsonl, null where not finite, and as TensorBoard scalars."""
        if not self.enabled:
            return
        line = {name: _json_number(value) for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, **line}, allow_nan=False) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Show `picture`, uint8 (H, W, 3), in TensorBoard."""
        if self.enabled:
            self._writer.add_image(tag, picture, step, dataformats="HWC")

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Show a matplotlib figure in TensorBoard."""
        if self.enabled:
            self.image(tag, render(figure), step)

    def close(self) -> None:
        """Write out what is buffered and close the files."""
        if self.enabled:
            self._lines.close()
            self._writer.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _json_number(value: float) -> float | None:
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def _drop_from(path: Path, first_step: int) -> None:
    """Rewrite `path` atomically without the steps from `first_step` on and without a line cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] < first_step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue
    write_whole(path, "".join(kept).encode())
