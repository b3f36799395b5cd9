"""What the commands share: lines for a person, the option that names a run, errors in one line."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from iic_dist import distributed, failure
from iic_dist.distributed import Place
from iic_dist.errors import RunError, UsageError


def say(place: Place, line: str) -> None:
    """Print a line on rank 0."""
    if place.is_main:
        print(line, flush=True)


def run_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the folder of a run, as `run`."""
    parser.add_argument(
        *("--run", "--folder"),
        required=True,
        type=Path,
        metavar="DIR",
        help="folder of the run, runs/NAME; under torchrun, which takes --run for its own --run-path, say --folder",
    )


@contextmanager
def errors_in_one_line(place: Place, *, system_error: int = 1) -> Iterator[None]:
    """Turn what a caller or an administrator can mend into one line and an exit code; leave the ranks at the end.

    Code 2 is a mistake of the caller, code 1 a run that failed; what is neither keeps its traceback.

    Args:
        place: This rank.
        system_error: Code for errors of the system, such as a full disk.
    """
    try:
        yield
    except UsageError as error:
        _fail(place, error, 2)
    except RunError as error:
        _fail(place, error, 1)
    except OSError as error:
        _fail(place, error, system_error)
    except RuntimeError as error:
        if (why := failure.why_it_failed(error, place)) is None:
            raise
        print(f"error: rank {place.rank}: {why}", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        distributed.stop()


def log_to_console(level: int = logging.INFO) -> None:
    """Print log lines without decoration."""
    logging.basicConfig(level=level, format="%(message)s")
    for library in ("timm", "httpx", "httpx2"):  # they tell of every file and request
        logging.getLogger(library).setLevel(max(level, logging.WARNING))


def _fail(place: Place, error: Exception, code: int) -> None:
    """Print the line of an error, once a machine, and exit."""
    if place.local_rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(code)
