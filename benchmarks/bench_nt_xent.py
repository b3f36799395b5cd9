"""The NT-Xent loss in every form that a user could pick, forward and backward from embeddings, D = 128.

    pytest benchmarks/bench_nt_xent.py --benchmark-only     pytest-benchmark's statistics, grouped by shape
    python benchmarks/bench_nt_xent.py                      the forms in turn: a table, and results/nt_xent_cpu.json
    python benchmarks/bench_nt_xent.py --device cuda        likewise on a GPU: results/nt_xent_cuda.json

A CPU is measured at one thread in CPU time; the three bare products, of the whole matrices, are the floor that the bar
names. A GPU is measured in its own time in a replayed graph and in eager time on the wall.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measuring
import provenance
import pytest
import side_by_side
import torch
import torch.nn.functional as F
from side_by_side import assert_parity, relative_error
from torch import Tensor

from iic_dist.losses import nt_xent_loss
from iic_dist.ops import nt_xent

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

GPU_ROWS = [512, 2048, 8192, 32768, 65536]
H100_BARS_MS = {32768: 3.0, 65536: 11.0}
"""GPU time of a step in a graph that the fused loss may take on an H100, bfloat16."""
PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
GPU_TOLERANCE = {"bfloat16": 2e-2, "float32": TOLERANCE}
COMPILED_ON_GPU = 8192
"""The one 2G at which torch.compile is measured on a GPU: it takes many seconds a shape."""
MATRICES = 10
"""Matrices of 2G x 2G values that the forms which are not tiled may hold at once, on the safe side."""

Form = Callable[[Tensor, Tensor], Tensor]


def similarities(embeddings_a: Tensor, embeddings_b: Tensor) -> Tensor:
    z = F.normalize(torch.cat([embeddings_a, embeddings_b]), dim=1)
    return z @ z.T / TEMPERATURE


def boolean_mask(embeddings_a: Tensor, embeddings_b: Tensor) -> Tensor:
    """As the much copied PyTorch codes do: pick positives and negatives out of the matrix by boolean masks."""
    similarity = similarities(embeddings_a, embeddings_b)
    rows = len(similarity)
    image = torch.arange(rows // 2, device=similarity.device).repeat(2)
    others = ~torch.eye(rows, dtype=torch.bool, device=similarity.device)
    same = (image[:, None] == image)[others].view(rows, -1)
    similarity = similarity[others].view(rows, -1)
    logits = torch.cat([similarity[same].view(rows, -1), similarity[~same].view(rows, -1)], 1)
    return F.cross_entropy(logits, torch.zeros(rows, dtype=torch.int64, device=logits.device))


def four_blocks(embeddings_a: Tensor, embeddings_b: Tensor) -> Tensor:
    """As SimCLR's own code does: four products of views, cross-entropy over pairs of blocks."""
    a, b = F.normalize(embeddings_a, dim=1), F.normalize(embeddings_b, dim=1)
    itself = 1e9 * torch.eye(len(a), dtype=a.dtype, device=a.device)
    labels = torch.arange(len(a), device=a.device)
    logits_a = torch.cat([a @ b.T / TEMPERATURE, a @ a.T / TEMPERATURE - itself], 1)
    logits_b = torch.cat([b @ a.T / TEMPERATURE, b @ b.T / TEMPERATURE - itself], 1)
    return (F.cross_entropy(logits_a, labels) + F.cross_entropy(logits_b, labels)) / 2


def cross_entropy(embeddings_a: Tensor, embeddings_b: Tensor) -> Tensor:
    """Cross-entropy over the matrix with its diagonal masked."""
    similarity = similarities(embeddings_a, embeddings_b)
    itself = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    labels = torch.arange(len(similarity), device=similarity.device).roll(len(embeddings_a))
    return F.cross_entropy(similarity.masked_fill(itself, -torch.inf), labels)


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


def make_embeddings(
    rows: int, device: str = "cpu", dtype: torch.dtype = torch.float32, dimensions: int = DIMENSIONS
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, noise = torch.randn(2, rows // 2, dimensions, generator=generator)
    views = [view.to(device, dtype).requires_grad_() for view in (a, a + noise)]
    return views[0], views[1]


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


def reference(embeddings_a: Tensor, embeddings_b: Tensor) -> tuple[Tensor, ...]:
    """What `step` should give: cross-entropy in float64."""
    return step(cross_entropy, *(x.detach().double().requires_grad_() for x in (embeddings_a, embeddings_b)))


def measure(rows: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Median milliseconds and peak memory of every form, one step of each in turn until the time is up."""
    embeddings = make_embeddings(rows)
    works: dict[str, measuring.Work] = {
        name: functools.partial(step, form, *embeddings) for name, form in FORMS.items()
    }
    wanted = reference(*embeddings)
    for work in works.values():
        assert_parity(work(), wanted, TOLERANCE)
    del wanted
    works[PRODUCTS] = products(*embeddings)
    times = side_by_side.in_turn(works, seconds, 5)
    peaks = {name: measuring.peak_mebibytes(works[name], "cpu") for name in FORMS}
    return {name: {**figures, "peak_mib": peaks.get(name)} for name, figures in times.items()}


def peaks_at_most_rows() -> dict[str, float]:
    """Peak memory of one step of the tiled forms at 65536 rows, on all cores: a minute or two of work for one."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    embeddings = make_embeddings(MOST_ROWS)
    tiled = {name: functools.partial(step, FORMS[name], *embeddings) for name in ("impl=torch", "impl=fused")}
    peaks = {name: measuring.peak_mebibytes(work, "cpu") for name, work in tiled.items()}
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


def gpu_cases() -> Iterator[tuple[str, int, str]]:
    """(precision, 2G, form): the fused loss first, torch.compile last."""
    for precision in PRECISIONS:
        for rows in GPU_ROWS:
            yield precision, rows, "impl=fused"
    for name in ("impl=torch", "cross-entropy", "four blocks"):  # the boolean mask makes the host wait
        for rows in GPU_ROWS:
            yield "bfloat16", rows, name
    yield "bfloat16", COMPILED_ON_GPU, "torch.compile"


def tiled_reference(embeddings_a: Tensor, embeddings_b: Tensor) -> tuple[Tensor, ...]:
    """What `step` should give where the whole matrix is too large: the PyTorch form in float64."""
    return step(FORMS["impl=torch"], *(x.detach().double().requires_grad_() for x in (embeddings_a, embeddings_b)))


def measure_ops(embeddings_a: Tensor, embeddings_b: Tensor) -> dict[str, float]:
    """Milliseconds of GPU time of the two native ops, which hold all products."""
    ops = nt_xent.implementation("fused", embeddings_a.device)
    z = F.normalize(torch.cat([embeddings_a, embeddings_b]).detach(), dim=1)
    place = (0, len(z), TEMPERATURE)
    log_sum_exp, _ = ops.nt_xent_rows(z, *place)
    works: dict[str, measuring.Work] = {
        "nt_xent_rows": lambda: ops.nt_xent_rows(z, *place),
        "nt_xent_rows_grad": lambda: (ops.nt_xent_rows_grad(z, log_sum_exp, *place),),
    }
    return {name: measuring.graph_milliseconds(work)[0] for name, work in works.items()}


def measure_on_gpu(precision: str, rows: int, name: str) -> dict[str, Any]:
    """Measure one form at one size; an error is part of the result."""
    row: dict[str, Any] = {"rows": rows, "precision": precision, "form": name}
    dtype = PRECISIONS[precision]
    matrices = MATRICES * rows * rows * dtype.itemsize
    if not name.startswith("impl=") and matrices > torch.cuda.mem_get_info()[0]:
        return row | {"left_out": f"may hold {matrices >> 30} GiB"}
    try:
        embeddings = make_embeddings(rows, "cuda", dtype)

        def work() -> tuple[Tensor, ...]:
            return step(FORMS[name], *embeddings)

        row["wall_ms"] = measuring.wall_milliseconds(work)
        row["peak_mib"] = measuring.peak_mebibytes(work, "cuda")
        row["graph_ms"], replayed = measuring.graph_milliseconds(work)
        row["tflops"] = 3 * 2 * rows * rows * DIMENSIONS / row["graph_ms"] / 1e9
        if name == "impl=fused":
            wanted = tiled_reference(*embeddings)
            row["relative_error"] = relative_error(replayed, wanted)
            for values in (work(), replayed):
                assert_parity(values, wanted, GPU_TOLERANCE[precision])
            row["ops_ms"] = measure_ops(*embeddings)
            row["h100_bar_ms"] = H100_BARS_MS.get(rows) if precision == "bfloat16" else None
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
    torch.cuda.empty_cache()
    return row


def print_gpu_table(rows: list[dict[str, Any]]) -> None:
    """One line a case; the last column compares eager time with that of the fused loss in the same precision."""
    fused = {(row["rows"], row["precision"]): row for row in rows if row["form"] == "impl=fused"}
    titles = ("graph ms", "H100 bar", "eager ms", "TFLOP/s", "MiB", "/ fused")
    print(f"{'2G':7}{'precision':>10}  {'form':15}" + "".join(f"{title:>10}" for title in titles))
    for row in sorted(rows, key=lambda row: row["rows"]):
        line = f"{row['rows']:<7}{row['precision']:>10}  {row['form']:15}"
        if "graph_ms" not in row:
            print(line, row.get("left_out") or row["error"])
            continue
        line += f"{row['graph_ms']:10.3f}{row.get('h100_bar_ms') or '-':>10}{row['wall_ms']:10.3f}"
        line += f"{row['tflops']:10.1f}{row['peak_mib']:10.1f}"
        wall = fused[row["rows"], row["precision"]].get("wall_ms")
        print(line + (f"{row['wall_ms'] / wall:9.2f}x" if wall else f"{'-':>10}") + f" {row.get('error', '')}")


def on_cpu(path: Path, seconds: float) -> None:
    torch.set_num_threads(1)
    results = {str(rows): measure(rows, seconds) for rows in ROWS}
    print_table(results)
    print_bars(results["8192"])
    peaks = peaks_at_most_rows()
    for name, peak in peaks.items():
        verdict = "met" if peak <= MOST_MEBIBYTES else "MISSED"
        print(f"{verdict}: {name} holds {peak:.1f} MiB at {MOST_ROWS}, {MOST_MEBIBYTES} allowed")
    figures = {"provenance": provenance.of("cpu"), "rows": results, f"peak_mib_{MOST_ROWS}": peaks}
    path.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"written to {path}")


def on_cuda(path: Path, alone: bool) -> None:
    side_by_side.to_file("impl=fused", path, gpu_cases(), measure_on_gpu, print_gpu_table, alone)


def main() -> None:
    side_by_side.main("nt_xent", on_cpu, on_cuda)


@pytest.mark.benchmark(timer=time.thread_time, min_rounds=3, max_time=1, warmup=False)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("rows", ROWS)
def test_forward_backward(benchmark: Any, rows: int, name: str) -> None:
    embeddings = make_embeddings(rows)
    assert_parity(step(FORMS[name], *embeddings), reference(*embeddings), TOLERANCE)
    benchmark.group = f"NT-Xent {rows} x {DIMENSIONS}"
    benchmark.extra_info["peak_mib"] = measuring.peak_mebibytes(lambda: step(FORMS[name], *embeddings), "cpu")
    benchmark(step, FORMS[name], *embeddings)


if __name__ == "__main__":
    main()
