"""What the commands share: lines for a person, the option that names a run, errors in one line."""

from __future__ import annotations

import argparse
import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from iic_dist import distributed, failure
from iic_dist.distributed import Place
from iic_dist.errors import RunError, UsageError
from iic_dist.wording import printable


def say(place: Place, *lines: str) -> None:
    """Print lines on rank 0; names in them may hold anything."""
    if place.is_main:
        for line in lines:
            print(printable(line), flush=True)


def run_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the folder of a run, as `run`."""
    parser.add_argument(
        *("--run", "--folder"),
        required=True,
        type=Path,
        metavar="DIR",
        help="folder of the run, runs/NAME; under torchrun, which takes --run for its own --run-path, say --folder",
    )


class Parser(argparse.ArgumentParser):
    """Options of a command; what it quotes of them may be names that a shell has put there."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit with 2."""
        super().error(printable(message))


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
        print(f"error: rank {place.rank}: {printable(why)}", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        distributed.stop()


class _Line(logging.Formatter):
    """A message without decoration, in one line whatever the names in it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(record.message)


def log_to_console(level: int = logging.INFO) -> None:
    """Print log lines without decoration; what the console has no letters for, such as ± in ASCII, is escaped there."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(_Line())
    logging.basicConfig(level=level, handlers=[handler])
    for library in ("timm", "httpx", "httpx2"):  # they tell of every file and request
        logging.getLogger(library).setLevel(max(level, logging.WARNING))


def _fail(place: Place, error: Exception, code: int) -> None:
    """Print the line of an error, once a machine, and exit."""
    if place.local_rank == 0:
        print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
    sys.exit(code)
