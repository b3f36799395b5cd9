"""Evaluate: `python -m iic_dist.evaluate --run runs/NAME` repeats the final figures of a run from its checkpoint."""

from __future__ import annotations

import argparse
import json

from iic_dist.config.console import Parser, errors_in_one_line, log_to_console, run_option, say
from iic_dist.distributed import Place
from iic_dist.training import report
from iic_dist.training.evaluate import evaluate_run


def _options() -> argparse.Namespace:
    parser = Parser(
        prog="python -m iic_dist.evaluate",
        usage="%(prog)s [-h] --run DIR [--best] [--json] [-- --GROUP.FIELD VALUE ...]",
        description="Evaluate the newest checkpoint of a run; also under torchrun, with the same figures.",
    )
    run_option(parser)
    parser.add_argument("--best", action="store_true", help="the checkpoint of lowest loss of the last stage")
    parser.add_argument("--json", action="store_true", help="print the contents of result.json and nothing else")
    parser.add_argument(
        "rest",
        nargs=argparse.REMAINDER,
        metavar="-- --GROUP.FIELD VALUE",
        help="settings of the run to change, such as -- --data.evaluate_on test",
    )
    return parser.parse_args()


def main() -> None:
    """Evaluate and print."""
    log_to_console()
    options, place = _options(), Place.from_environment()
    with errors_in_one_line(place):
        changes = options.rest[1:] if options.rest[:1] == ["--"] else options.rest
        result = evaluate_run(options.run, place, changes, options.best)
        say(place, *(json.dumps(result, indent=1) if options.json else report.summary(result)).split("\n"))


if __name__ == "__main__":
    main()
