"""A trained run, loaded and judged again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iic_dist import distributed
from iic_dist.config.weights import with_weights
from iic_dist.device import choose_device, use_threads
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.training import checkpoint
from iic_dist.training.open import open_trainer
from iic_dist.training.run_folder import settings_of


def evaluate_run(run: Path, place: Place, changes: Sequence[str] = (), best: bool = False) -> dict[str, Any]:
    """Load a run and evaluate it; return the contents of its result.json.

    Args:
        run: Its folder.
        place: This rank.
        changes: Options as those of the training that replace what the run was trained with, such as
            ["--data.evaluate_on", "test"].
        best: Take the checkpoint of lowest loss of the last stage that has one, instead of the newest.

    Raises:
        UsageError: there is no such run, or it has no checkpoint that can be loaded.

    Collective: all ranks must call.
    """
    config = settings_of(run, changes)
    device = choose_device(config.run.device, place)
    use_threads(config.run.threads, place)
    distributed.start(place, device, config.run.start_timeout_minutes)
    trainer = open_trainer(with_weights(config, place, lambda line: None), place, device)
    if not trainer.resume(run, best=best):
        raise UsageError(f"--run {run}: {checkpoint.why_none(run / 'checkpoints', best=best)}")
    distributed.set_timeout(config.run.timeout_minutes)
    return trainer.evaluate()
