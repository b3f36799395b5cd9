"""Choose K: `python -m iic_dist.choose --run runs/NAME` compares the heads of a run with several num_clusters."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from iic_dist.config.console import Parser, errors_in_one_line, log_to_console, run_option, say
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.evaluation import charts
from iic_dist.evaluation.health import Health, Recommendation, recommend
from iic_dist.files import check_writable, whole
from iic_dist.training.evaluate import evaluate_run

PICTURE = "choices.png"

_log = logging.getLogger(__name__)


def _options() -> argparse.Namespace:
    parser = Parser(
        prog="python -m iic_dist.choose",
        description="Compare the clustering heads of a run that was trained with several --model.num_clusters, without "
        f"labels, and recommend one; also under torchrun. Writes {PICTURE} into the folder of the run.",
    )
    run_option(parser)
    return parser.parse_args()


def choose(run: Path, place: Place) -> Recommendation:
    """Evaluate a run and compare its clustering heads.

    Raises:
        UsageError: there is no such run, it has no checkpoint that verifies, or it was trained with one K.

    Collective: all ranks must call.
    """
    choices = evaluate_run(run, place)["choices"]
    if len(choices) == 1:
        raise UsageError(
            f"--run {run}: it was trained with one number of clusters, {choices[0]['num_clusters']}; train with "
            "several, as in --model.num_clusters 5,10,20"
        )
    return recommend([Health.from_json(choice) for choice in choices])


def table(recommendation: Recommendation) -> str:
    """Write a line for each K, and which is recommended and why."""
    lines = ["    K   information   agreement (ARI)   used clusters   images in a cluster   confidence"]
    for each in recommendation.choices:
        sizes = f"{each.sizes[-1]:,} to {each.sizes[0]:,}"
        lines.append(
            f"{each.num_clusters:5d}   {each.information_share:6.3f} ln K   {each.agreement_text():>15s}   "
            f"{each.used_clusters:13d}   {sizes:>19s}   {each.confidence:10.3f}"
        )
    return "\n".join([*lines, recommendation.line()])


@contextlib.contextmanager
def _no_picture(path: Path) -> Iterator[None]:
    """Say that a picture cannot be written, and go on: the table is what was asked for."""
    try:
        yield
    except OSError as error:
        _log.warning("no picture: %s cannot be written (%s)", path, error.strerror)


def can_be_drawn(path: Path) -> bool:
    """Say before the work if the picture cannot be written."""
    drawn = False
    with _no_picture(path):
        check_writable(path)
        drawn = True
    return drawn


def draw(recommendation: Recommendation, path: Path) -> None:
    """Write the picture, if it still can be written."""
    with _no_picture(path):
        with whole(path) as part:
            charts.choices(recommendation).savefig(part)
        say(Place(), f"picture: {path}")


def main() -> None:
    """Choose, print and draw."""
    log_to_console()
    options, place = _options(), Place.from_environment()
    with errors_in_one_line(place):
        picture = options.run / PICTURE
        drawn = place.is_main and options.run.is_dir() and can_be_drawn(picture)
        recommendation = choose(options.run, place)
        say(place, *table(recommendation).splitlines())
        if drawn:
            draw(recommendation, picture)


if __name__ == "__main__":
    main()
