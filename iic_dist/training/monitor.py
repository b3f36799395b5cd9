"""What a run writes while it runs: metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from iic_dist.evaluation.charts import render
from iic_dist.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

_logger = logging.getLogger(__name__)

_TENSORBOARD_FLUSH_SECONDS = 10  # the default of 120 makes a short run look dead


class Monitor:
    """Writes the scalars and pictures of a run; in all processes but one it is disabled and does nothing.

    A full disk does not end the run. One warning says that lines of metrics.jsonl are missing, and each further line is
    tried again; one says that nothing more goes to TensorBoard, until the next process that goes on with the run.

    Args:
        run_dir: where metrics.jsonl and the TensorBoard events go; created if missing.
        enabled: whether this process writes (rank 0).
        resume_step: the step of the checkpoint that the run goes on from. What an earlier attempt wrote for
            later steps is dropped. None for a new run: all that was written here before is dropped.

    Raises:
        OSError: the files cannot even be opened.
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
        self._lines = path.open("ab", buffering=0)
        self._lines_are_missing = False
        self._tensorboard: SummaryWriter | None = SummaryWriter(
            str(run_dir), purge_step=first_step, flush_secs=_TENSORBOARD_FLUSH_SECONDS
        )
        self._excepthook_before = threading.excepthook
        threading.excepthook = _without_traceback

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write `values` as a line of metrics.jsonl, null where not finite, and as TensorBoard scalars."""
        if not self.enabled:
            return
        line = {name: _json_number(value) for name, value in values.items()}
        self._append(json.dumps({"step": step, **line}, allow_nan=False).encode() + b"\n")

        def show(tensorboard: SummaryWriter) -> None:
            for name, value in values.items():
                tensorboard.add_scalar(name, value, step)

        self._show(show)

    def _append(self, line: bytes) -> None:
        """Write a line of metrics.jsonl, whole or not at all."""
        before = self._lines.seek(0, os.SEEK_END)
        try:
            while line:  # a disk that fills up takes a part, and refuses the rest with the reason
                line = line[self._lines.write(line) :]
        except OSError as error:
            self._lines.truncate(before)
            if not self._lines_are_missing:
                _logger.warning("lines are missing in metrics.jsonl, training goes on: %s", error)
            self._lines_are_missing = True

    def _show(self, write: Callable[[SummaryWriter], None]) -> None:
        if self._tensorboard is None:
            return
        try:
            write(self._tensorboard)
        except OSError as error:
            # Its file may end in a part of a record, behind which no reader finds anything.
            self._tensorboard = None
            _logger.warning("nothing more goes to TensorBoard until the run is started again: %s", error)

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Show `picture`, uint8 (H, W, 3), in TensorBoard."""
        if self.enabled:
            self._show(lambda tensorboard: tensorboard.add_image(tag, picture, step, dataformats="HWC"))

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Show a matplotlib figure in TensorBoard."""
        if self.enabled:
            self.image(tag, render(figure), step)

    def embedding(
        self, tag: str, vectors: Tensor, labels: Mapping[str, Sequence[str]], images: Tensor | None, step: int
    ) -> None:
        """Show points in TensorBoard's projector.

        Args:
            vectors: (N, F) float.
            labels: by the name of a column, a text for each point.
            images: (N, 3, S, S) float in [0, 1], its picture; None where there are none.
        """
        if not self.enabled:
            return
        rows: list[Any] = [list(texts) for texts in zip(*labels.values(), strict=True)]
        header = list(labels)
        if len(header) == 1:  # the projector takes the first line of a single column for a point
            rows, header = [text for [text] in rows], []
        self._show(
            lambda tensorboard: tensorboard.add_embedding(vectors, rows, images, step, tag, metadata_header=header)
        )

    def close(self) -> None:
        """Write out what is buffered and close the files."""
        if self.enabled:
            self._lines.close()
            self._show(lambda tensorboard: tensorboard.close())
            threading.excepthook = self._excepthook_before

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _without_traceback(arguments: threading.ExceptHookArgs) -> None:
    """Leave an OSError of TensorBoard's thread to the monitor, which gets it too and says it in one line."""
    if arguments.exc_type is None or not issubclass(arguments.exc_type, OSError):
        threading.__excepthook__(arguments)


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
