"""The NT-Xent loss in every form that a user could pick, forward and backward from embeddings, D = 128.

    pytest benchmarks/bench_nt_xent.py --benchmark-only     pytest-benchmark's statistics, grouped by shape
    python benchmarks/bench_nt_xent.py                      the forms in turn: a table, and results/nt_xent_cpu.json

One thread of a CPU, in CPU time. The three bare products, of the whole matrices, are the floor that the bar names.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import pytest
import torch
import torch.nn.functional as F
from bench_iic import relative_error
from torch import Tensor

from iic_dist.losses import nt_xent_loss

DIMENSIONS = 128
TEMPERATURE = 0.5
ROWS = [512, 2048, 8192]
"""2G: both views of the global batch."""
MOST_ROWS, MOST_MEBIBYTES = 65536, 128
"""Where PERFORMANCE.md sets a bar for memory: the whole matrix is 16 GiB there."""
TOLERANCE = 3e-5
"""Largest relative norm of the error of the loss and of each gradient."""
MOST_OF_CROSS_ENTROPY, MOST_OF_PRODUCTS = 1 / 2.2, 1.15
"""PERFORMANCE.md: what the fused loss may take at 8192 of the diagonal-mask form and of the three bare products."""

Form = Callable[[Tensor, Tensor], Tensor]


def similarities(embeddings_a: Tensor, embeddings_b: Tensor) -> Tensor:
    z = F.normalize(torch.cat([embeddings_a, embeddings_b]), dim=1)
    return z @ z.T / TEMPERATURE


def boolean_mask(embeddings_a: Tensor, embeddings_b: Tensor) -> Tensor:
    """As the much copied PyTorch codes do: pick positives and negatives out of the matrix by boolean masks."""
    similarity = similarities(embeddings_a, embeddings_b)
    rows = len(similarity)
    image = torch.arange(rows // 2).repeat(2)
    others = ~torch.eye(rows, dtype=torch.bool)
    same = (image[:, None] == image)[others].view(rows, -1)
    similarity = similarity[others].view(rows, -1)
    logits = torch.cat([similarity[same].view(rows, -1), similarity[~same].view(rows, -1)], 1)
    return F.cross_entropy(logits, torch.zeros(rows, dtype=torch.int64))


def four_blocks(embeddings_a: Tensor, embeddings_b: Tensor) -> Tensor:
    """As SimCLR's own code does: four products of views, cross-entropy over pairs of blocks."""
    a, b = F.normalize(embeddings_a, dim=1), F.normalize(embeddings_b, dim=1)
    itself = 1e9 * torch.eye(len(a), dtype=a.dtype)
    labels = torch.arange(len(a))
    logits_a = torch.cat([a @ b.T / TEMPERATURE, a @ a.T / TEMPERATURE - itself], 1)
    logits_b = torch.cat([b @ a.T / TEMPERATURE, b @ b.T / TEMPERATURE - itself], 1)
    return (F.cross_entropy(logits_a, labels) + F.cross_entropy(logits_b, labels)) / 2


def cross_entropy(embeddings_a: Tensor, embeddings_b: Tensor) -> Tensor:
    """Cross-entropy over the matrix with its diagonal masked."""
    similarity = similarities(embeddings_a, embeddings_b)
    similarity = similarity.masked_fill(torch.eye(len(similarity), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(similarity, torch.arange(len(similarity)).roll(len(embeddings_a)))


FORMS: dict[str, Form] = {
    "boolean mask": boolean_mask,
    "four blocks": four_blocks,
    "cross-entropy": cross_entropy,
    "torch.compile": torch.compile(cross_entropy, dynamic=False, fullgraph=True),
    "impl=torch": lambda a, b: nt_xent_loss(a, b, temperature=TEMPERATURE, impl="torch"),
    "impl=fused": lambda a, b: nt_xent_loss(a, b, temperature=TEMPERATURE, impl="fused"),
}
PRODUCTS = "3 products"
COLUMNS = (*FORMS, PRODUCTS)


def make_embeddings(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, noise = torch.randn(2, rows // 2, DIMENSIONS, generator=generator)
    return a.requires_grad_(), (a.detach() + noise).requires_grad_()


def step(form: Form, embeddings_a: Tensor, embeddings_b: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward, from embeddings to their gradients."""
    loss = form(embeddings_a, embeddings_b)
    return loss.detach(), *torch.autograd.grad(loss, (embeddings_a, embeddings_b))


def products(embeddings_a: Tensor, embeddings_b: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """What no form can do without as long as it computes every pair: z z^T twice and a matrix times z."""
    z = torch.cat([embeddings_a, embeddings_b]).detach()
    matrix, grad = z.new_empty(len(z), len(z)), torch.empty_like(z)

    def work() -> tuple[Tensor, ...]:
        for _ in range(2):
            torch.mm(z, z.T, out=matrix)
        return (torch.mm(matrix, z, out=grad),)

    return work


def assert_parity(values: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """Raise unless value and gradients are those of cross-entropy in float64."""
    error = relative_error(values, wanted)
    assert error <= TOLERANCE, f"relative error {error:.1e}, {TOLERANCE} allowed"


def reference(embeddings_a: Tensor, embeddings_b: Tensor) -> tuple[Tensor, ...]:
    """What `step` should give."""
    return step(cross_entropy, *(x.detach().double().requires_grad_() for x in (embeddings_a, embeddings_b)))


def measure(rows: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Median milliseconds and peak memory of every form, one step of each in turn until the time is up."""
    embeddings = make_embeddings(rows)
    works: dict[str, measuring.Work] = {}
    for name, form in FORMS.items():
        works[name] = lambda form=form: step(form, *embeddings)
    wanted = reference(*embeddings)
    for work in works.values():
        assert_parity(work(), wanted)
    del wanted
    works[PRODUCTS] = products(*embeddings)
    times: dict[str, list[float]] = {name: [] for name in works}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[PRODUCTS]) < 5:
        for name, work in works.items():
            times[name].append(measuring.cpu_milliseconds(work))
    return {
        name: {
            "median_ms": statistics.median(values),
            "lower_quartile_ms": statistics.quantiles(values, n=4)[0],
            "runs": len(values),
            "peak_mib": measuring.peak_mebibytes(works[name], "cpu") if name in FORMS else None,
        }
        for name, values in times.items()
    }


def peaks_at_most_rows() -> dict[str, float]:
    """Peak memory of one step of the tiled forms at 65536 rows, on all cores: a minute or two of work for one."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    embeddings = make_embeddings(MOST_ROWS)
    tiled = ("impl=torch", "impl=fused")
    peaks = {name: measuring.peak_mebibytes(lambda name=name: step(FORMS[name], *embeddings), "cpu") for name in tiled}
    torch.set_num_threads(before)
    return peaks


def print_table(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    print(f"{'2G':6}{'':8}" + "".join(f"{name:>15}" for name in COLUMNS))
    for rows, forms in results.items():
        print(f"{rows:6}{'ms':8}" + "".join(f"{forms[name]['median_ms']:15.2f}" for name in COLUMNS))
        fused = forms["impl=fused"]["median_ms"]
        print(f"{'':6}{'/ fused':8}" + "".join(f"{forms[name]['median_ms'] / fused:14.2f}x" for name in COLUMNS))
        print(f"{'':6}{'MiB':8}" + "".join(f"{forms[name]['peak_mib']:15.1f}" for name in FORMS))


def print_bars(forms: dict[str, dict[str, Any]]) -> None:
    """Say whether the bars of PERFORMANCE.md are met, which hold at 8192."""
    fused = forms["impl=fused"]["median_ms"]
    for name, most in (("cross-entropy", MOST_OF_CROSS_ENTROPY), (PRODUCTS, MOST_OF_PRODUCTS)):
        share = fused / forms[name]["median_ms"]
        print(f"{'met' if share <= most else 'MISSED'}: {share:.3f} of {name}, {most:.3f} allowed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="for each shape")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "nt_xent_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {str(rows): measure(rows, options.seconds) for rows in ROWS}
    print_table(results)
    print_bars(results["8192"])
    peaks = peaks_at_most_rows()
    for name, peak in peaks.items():
        verdict = "met" if peak <= MOST_MEBIBYTES else "MISSED"
        print(f"{verdict}: {name} holds {peak:.1f} MiB at {MOST_ROWS}, {MOST_MEBIBYTES} allowed")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figures = {"provenance": measuring.provenance("cpu"), "rows": results, f"peak_mib_{MOST_ROWS}": peaks}
    options.output.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"written to {options.output}")


@pytest.mark.benchmark(timer=time.thread_time, min_rounds=3, max_time=1, warmup=False)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("rows", ROWS)
def test_forward_backward(benchmark: Any, rows: int, name: str) -> None:
    embeddings = make_embeddings(rows)
    assert_parity(step(FORMS[name], *embeddings), reference(*embeddings))
    benchmark.group = f"NT-Xent {rows} x {DIMENSIONS}"
    benchmark.extra_info["peak_mib"] = measuring.peak_mebibytes(lambda: step(FORMS[name], *embeddings), "cpu")
    benchmark(step, FORMS[name], *embeddings)


if __name__ == "__main__":
    main()
