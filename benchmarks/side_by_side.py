"""Forms of one computation side by side: whether they agree, how fast they are in turn, and what is written of it."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import measuring
import provenance
import torch
from torch import Tensor


def relative_error(values: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest relative norm of the errors; NaN where there is one among them."""
    pairs = zip(values, wanted, strict=True)
    return float(torch.stack([(value.double() - want).norm() / want.norm() for value, want in pairs]).max())


def assert_parity(values: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    """Raise unless value and gradients are those of the reference."""
    error = relative_error(values, wanted)
    assert error <= tolerance, f"relative error {error:.1e}, {tolerance} allowed"


def in_turn(works: Mapping[str, Callable[[], object]], seconds: float, least: int) -> dict[str, dict[str, Any]]:
    """Time one step of each work in turn, so that what else the machine does falls on all of them alike.

    Args:
        seconds: how long, on the wall; the round that has begun is finished.
        least: rounds, even where the time is up.

    Returns:
        By name: median and lower quartile of the CPU milliseconds of a step, and the number of steps.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    end, rounds = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or rounds < least:
        for name, work in works.items():
            times[name].append(measuring.cpu_milliseconds(work))
        rounds += 1
    return {
        name: {
            "median_ms": statistics.median(values),
            "lower_quartile_ms": statistics.quantiles(values, n=4)[0],
            "runs": len(values),
        }
        for name, values in times.items()
    }


def to_file(
    name: str,
    path: Path,
    cases: Iterable[tuple[Any, ...]],
    measure: Callable[..., dict[str, Any]],
    print_table: Callable[[list[dict[str, Any]]], None],
    alone: bool = False,
) -> None:
    """Measure all cases on a GPU and write the file after each, so that a run that is cut off leaves its figures.

    Args:
        name: the form that must not fail; an error of another one is a result.
        cases: arguments of `measure`, the last of them the form; it returns a row with its form, and with its error
            where there was one.
        alone: leave out the cases of other forms.

    Raises:
        SystemExit: the form that must not fail has failed somewhere; all is written and printed before.
    """
    rows: list[dict[str, Any]] = []
    figures = {"provenance": provenance.of("cuda"), "rows": rows}
    for case in cases:
        if alone and case[-1] != name:
            continue
        rows.append(measure(*case))
        path.write_text(json.dumps(figures, indent=2) + "\n")
        print(".", end="", flush=True)
    print()
    print_table(rows)
    print(f"written to {path}")
    if any("error" in row and row["form"] == name for row in rows):
        sys.exit(f"{name} failed: see the table")


def main(
    name: str, on_cpu: Callable[[Path, float], None], on_cuda: Callable[[Path, bool], None], seconds: float = 10
) -> None:
    """Measure on the device that the command line names; the help is the docstring of the benchmark's file.

    Args:
        name: of the JSON file, before the device.
        on_cpu, on_cuda: measure and write to a file; on a CPU within some seconds for each shape.
        seconds: the default of these.
    """
    parser = argparse.ArgumentParser(
        description=sys.modules[on_cpu.__module__].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=seconds, help="for each shape, on a CPU")
    parser.add_argument("--fused-only", action="store_true", help="leave out the rivals, on a GPU")
    parser.add_argument("--output", type=Path, help=f"the JSON file; default results/{name}_DEVICE.json")
    options = parser.parse_args()
    path = options.output or Path(__file__).parent / "results" / f"{name}_{options.device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if options.device == "cuda":
        on_cuda(path, options.fused_only)
    else:
        on_cpu(path, options.seconds)
