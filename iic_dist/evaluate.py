"""Evaluate: `python -m iic_dist.evaluate --run runs/NAME` repeats the final figures of a run from its checkpoint."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from iic_dist import distributed
from iic_dist.training import report
from iic_dist.config.build import load_data
from iic_dist.config.command_line import parse
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.train import fail, say, use_threads
from iic_dist.training.trainer import Trainer


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m iic_dist.evaluate",
        usage="%(prog)s [-h] --run DIR [--best] [--json] [-- --GROUP.FIELD VALUE ...]",
        description="Evaluate the newest checkpoint of a run; also under torchrun, with the same figures.",
    )
    parser.add_argument(
        *("--run", "--folder"),
        required=True,
        type=Path,
        metavar="DIR",
        help="folder of the run, runs/NAME; under torchrun, which takes --run for its own --run-path, say --folder",
    )
    parser.add_argument("--best", action="store_true", help="the checkpoint of lowest loss instead of the newest")
    parser.add_argument("--json", action="store_true", help="print the contents of result.json and nothing else")
    parser.add_argument(
        "rest",
        nargs=argparse.REMAINDER,
        metavar="-- --GROUP.FIELD VALUE",
        help="settings of the run to change, such as -- --data.evaluate_on test",
    )
    return parser.parse_args()


def evaluate(run: Path, place: Place, changes: list[str], best: bool = False) -> dict[str, Any]:
    """Load a run and evaluate it; return the contents of its result.json.

    Args:
        run: Its folder.
        changes: Options as those of the training that replace what the run was trained with, such as
            ["--data.evaluate_on", "test"].
        best: Take the checkpoint of lowest loss instead of the newest.

    Raises:
        UsageError: there is no such run, or it has no checkpoint that verifies.

    Collective: all ranks must call.
    """
    asked = run / "config.yaml"
    if not asked.is_file():
        raise UsageError(f"--run {run}: there is no {asked}")
    config = parse(["--config", str(asked), *changes])
    device = distributed.choose_device(config.run.device, place)
    use_threads(config, place)
    distributed.start(place, device, config.run.timeout_minutes)
    trainer = Trainer(config, load_data(config, place), place, device)
    if not trainer.resume(run, best=best):
        which = "with a loss" if best else "that verifies"
        raise UsageError(f"--run {run}: there is no checkpoint {which} in {run / 'checkpoints'}")
    return trainer.evaluate()


def main() -> None:
    """Evaluate, and turn a caller's mistake into one line and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options, place = _options(), Place.from_environment()
    try:
        changes = options.rest[1:] if options.rest[:1] == ["--"] else options.rest
        result = evaluate(options.run, place, changes, options.best)
        say(place, json.dumps(result, indent=1) if options.json else report.summary(result))
    except UsageError as error:
        fail(place, error, 2)
    finally:
        distributed.stop()


if __name__ == "__main__":
    main()
