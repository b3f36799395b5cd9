"""What the commands share: lines of one rank, one line for an error, the option that names a run."""

from __future__ import annotations

import argparse
import errno
import logging
from pathlib import Path

import pytest

from iic_dist import distributed
from iic_dist.config.console import Parser, errors_in_one_line, log_to_console, run_option, say
from iic_dist.distributed import Place
from iic_dist.errors import RunError, UsageError

MAIN, SECOND, OTHER_MACHINE = Place(0, 4, 0, 2), Place(1, 4, 1, 2), Place(2, 4, 0, 2)
FULL_DISK = OSError(errno.ENOSPC, "No space left on device", "runs/one")


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An entry for each time that the process group was left."""
    seen: list[None] = []
    monkeypatch.setattr(distributed, "stop", lambda: seen.append(None))
    return seen


def ended_by(error: Exception, place: Place, **options: int) -> object:
    """Raise an error in a command; return the exit code."""
    with pytest.raises(SystemExit) as ended, errors_in_one_line(place, **options):
        raise error
    return ended.value.code


def test_only_rank_0_says_something(capsys: pytest.CaptureFixture[str]) -> None:
    for place in (MAIN, SECOND, OTHER_MACHINE):
        say(place, f"rank {place.rank}")
    assert capsys.readouterr().out == "rank 0\n"


@pytest.mark.parametrize(
    ("error", "options", "code"),
    [
        (UsageError("optim.lr=-1.0: must be above 0"), {}, 2),
        (RunError("40 steps in a row were not finite"), {}, 1),
        (FULL_DISK, {}, 1),
        (FULL_DISK, {"system_error": 2}, 2),
        (UsageError("a mistake"), {"system_error": 3}, 2),
        (RunError("a failure"), {"system_error": 3}, 1),
    ],
)
@pytest.mark.parametrize("place", [MAIN, SECOND, OTHER_MACHINE], ids=["main", "second", "other machine"])
def test_an_error_is_one_line_a_machine(
    error: Exception,
    options: dict[str, int],
    code: int,
    place: Place,
    stops: list[None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ended_by(error, place, **options) == code
    said = capsys.readouterr()
    assert said.err == (f"error: {error}\n" if place.local_rank == 0 else "")
    assert said.out == ""
    assert len(stops) == 1


@pytest.mark.parametrize("place", [MAIN, SECOND])
def test_a_broken_connection_is_said_by_every_rank(
    place: Place, stops: list[None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each rank saw another end of it, and the one that died first says nothing of the kind."""
    assert ended_by(RuntimeError("[gloo/tcp] Connection closed by peer [127.0.0.1]:4711"), place) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: rank {place.rank}: the connection to another rank broke")
    assert said.count("\n") == 1
    assert len(stops) == 1


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("heads")])
def test_a_bug_keeps_its_traceback(error: Exception, stops: list[None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(error)) as caught, errors_in_one_line(MAIN):
        raise error
    assert caught.value is error
    assert capsys.readouterr().err == ""
    assert len(stops) == 1


def test_without_an_error_the_group_is_left_too(stops: list[None]) -> None:
    with errors_in_one_line(MAIN):
        assert stops == []
    assert len(stops) == 1


@pytest.mark.parametrize("option", ["--run", "--folder"])
def test_a_run_has_two_options(option: str) -> None:
    parser = argparse.ArgumentParser()
    run_option(parser)
    assert parser.parse_args([option, "runs/one"]).run == Path("runs/one")
    with pytest.raises(SystemExit):
        parser.parse_args([])


def test_names_that_a_shell_has_put_among_the_options_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        Parser(prog="predict").parse_args(["one\x1b[31m\udce9.png"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("error: unrecognized arguments: one\\x1b[31m\\xe9.png\n")


def test_lines_keep_what_is_printable_and_escape_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    say(MAIN, "ü ± 日本", "a\nb\x1b\udce9")
    assert capsys.readouterr().out == "ü ± 日本\na\\nb\\x1b\\xe9\n"


def test_log_lines_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, root.handlers[:] = root.handlers[:], []
    try:
        log_to_console()
        logging.getLogger("iic_dist.test").warning("checkpoint %s is damaged", "a\nb\x1b")
    finally:
        root.handlers[:] = before
    assert capsys.readouterr().err == "checkpoint a\\nb\\x1b is damaged\n"
