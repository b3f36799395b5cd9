"""The IIC loss in every form that a user could pick, forward and backward from logits, 5 sub-heads.

    pytest benchmarks/bench_iic.py --benchmark-only     pytest-benchmark's statistics, grouped by shape
    python benchmarks/bench_iic.py                      the forms in turn: a table, and results/iic_cpu.json
    python benchmarks/bench_iic.py --device cuda        likewise on a GPU: results/iic_cuda.json

A CPU is measured at one thread in CPU time; a GPU in its own time in a replayed graph and in eager time on the wall.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measuring
import provenance
import pytest
import side_by_side
import torch
from side_by_side import assert_parity, relative_error
from torch import Tensor

from iic_dist.losses import iic_loss
from iic_dist.ops import iic

EPS = 2.2e-16
HEADS = 5
SHAPES = [(256, 10), (1024, 10), (700, 70), (1024, 70), (4096, 100), (1024, 1000)]
"""(N, K): batches of the CIFAR-10 and overclustering heads, and what a larger problem would ask for."""
GPU_SHAPES = [(1024, 10), (1024, 70), (4096, 100), (1024, 1000), (8192, 1000)]
H100_BARS_US = {
    "1024 x 10": {"float32": 15, "bfloat16": 15},
    "1024 x 70": {"float32": 20, "bfloat16": 20},
    "4096 x 100": {"float32": 50, "bfloat16": 50},
    "1024 x 1000": {"tf32": 130, "bfloat16": 130},
    "8192 x 1000": {"tf32": 900, "bfloat16": 500},
}
"""GPU time of a step in a graph that the fused loss may take on an H100."""
PRECISIONS = {
    "float32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bfloat16": (torch.bfloat16, "highest"),
}
"""dtype of the logits and torch.set_float32_matmul_precision."""
TOLERANCE = {"float32": 3e-5, "tf32": 2e-2, "bfloat16": 2e-2}
"""Largest relative norm of the error of the loss and of each gradient."""

Form = Callable[[Tensor, Tensor], Tensor]


def information_loss(joint: Tensor) -> Tensor:
    """The published loss of one (K, K) or of several (H, K, K) unnormalised joints."""
    joint = (joint + joint.mT) / 2
    joint = joint / joint.sum((-2, -1), keepdim=True)
    row = joint.sum(-1, keepdim=True).clamp(min=EPS)
    column = joint.sum(-2, keepdim=True).clamp(min=EPS)
    joint = joint.clamp(min=EPS)
    return -(joint * (joint.log() - row.log() - column.log())).sum((-2, -1))


def published_loop(logits_a: Tensor, logits_b: Tensor) -> Tensor:
    """Every IIC code: per sub-head, materialise the N x K x K outer products and sum them."""
    losses = []
    for a, b in zip(logits_a.unbind(1), logits_b.unbind(1), strict=True):
        joint = (a.softmax(1).unsqueeze(2) * b.softmax(1).unsqueeze(1)).sum(0)
        losses.append(information_loss(joint))
    return torch.stack(losses)


def published_product(logits_a: Tensor, logits_b: Tensor) -> Tensor:
    """The same loop with the joint as a matrix product."""
    pairs = zip(logits_a.unbind(1), logits_b.unbind(1), strict=True)
    return torch.stack([information_loss(a.softmax(1).T @ b.softmax(1)) for a, b in pairs])


def einsum(logits_a: Tensor, logits_b: Tensor) -> Tensor:
    """All sub-heads at once."""
    return information_loss(torch.einsum("nhi,nhj->hij", logits_a.softmax(2), logits_b.softmax(2)))


FORMS: dict[str, Form] = {
    "published loop": published_loop,
    "published, product": published_product,
    "einsum": einsum,
    "torch.compile": torch.compile(einsum, dynamic=False, fullgraph=True),
    "impl=torch": lambda a, b: iic_loss(a, b, impl="torch").loss,
    "impl=fused": lambda a, b: iic_loss(a, b, impl="fused").loss,
}
RIVALS = ("published, product", "einsum", "torch.compile", "impl=torch")
"""The PyTorch forms that the fused loss must beat, each shape's best of them."""


def fits(name: str, n: int, k: int, limit: int = 1 << 30) -> bool:
    """Say whether the form's outer products of a sub-head, in bytes, stay below a limit; other forms have none."""
    return name != "published loop" or n * k * k * 4 <= limit


def make_logits(n: int, k: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, noise = (3 * torch.randn(n, HEADS, k, generator=generator) for _ in range(2))
    views = [view.to(device, dtype).requires_grad_() for view in (a + noise / 2, a)]
    return views[1], views[0]


def step(form: Form, logits_a: Tensor, logits_b: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward, from logits to their gradients."""
    loss = form(logits_a, logits_b)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (logits_a, logits_b))


def reference(logits_a: Tensor, logits_b: Tensor) -> tuple[Tensor, ...]:
    """What `step` should give: the published formula in float64."""
    doubles = [x.detach().double().requires_grad_() for x in (logits_a, logits_b)]
    return step(published_product, *doubles)


def measure(n: int, k: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Median milliseconds and peak memory of every form, one step of each in turn until the time is up."""
    logits = make_logits(n, k, "cpu")
    works = {name: (lambda form=form: step(form, *logits)) for name, form in FORMS.items() if fits(name, n, k)}
    wanted = reference(*logits)
    for work in works.values():
        assert_parity(work(), wanted, TOLERANCE["float32"])
    times = side_by_side.in_turn(works, seconds, 7)
    return {
        name: {**figures, "peak_mib": measuring.peak_mebibytes(works[name], "cpu")} for name, figures in times.items()
    }


def print_table(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    print(f"{'ms, median':14}" + "".join(f"{name:>20}" for name in FORMS) + f"{'vs published':>14}{'vs best':>9}")
    for shape, forms in results.items():
        line = f"{shape:14}"
        for name in FORMS:
            line += f"{forms[name]['median_ms']:20.3f}" if name in forms else f"{'-':>20}"
        fused = forms["impl=fused"]["median_ms"]
        published = forms.get("published loop", {}).get("median_ms")
        line += f"{published / fused:13.1f}x" if published else f"{'-':>14}"
        print(line + f"{min(forms[name]['median_ms'] for name in RIVALS) / fused:8.2f}x")
    print("peak MiB")
    for shape, forms in results.items():
        peaks = (f"{forms[name]['peak_mib']:20.1f}" if name in forms else f"{'-':>20}" for name in FORMS)
        print(f"{shape:14}" + "".join(peaks))


def gpu_cases() -> Iterator[tuple[str, int, int, str]]:
    """(precision, N, K, form): the fused loss first, torch.compile, which takes seconds a shape, last."""
    for precision in PRECISIONS:
        for n, k in GPU_SHAPES:
            yield precision, n, k, "impl=fused"
    for name in ("impl=torch", "einsum", "published, product", "published loop", "torch.compile"):
        for n, k in GPU_SHAPES:
            yield "float32", n, k, name
            if name in ("impl=torch", "einsum") and k > 160:
                yield "tf32", n, k, name


def measure_ops(logits_a: Tensor, logits_b: Tensor) -> dict[str, float]:
    """Microseconds of GPU time of each of the three native ops."""
    ops = iic.implementation("fused", logits_a.device)
    views = logits_a.detach(), logits_b.detach()
    sums, probs_a, probs_b = ops.iic_joint(*views)
    *terms, joint_grad = ops.iic_information(sums, views[0].shape[2], 1.0)
    works: dict[str, measuring.Work] = {
        "iic_joint": lambda: ops.iic_joint(*views),
        "iic_information": lambda: ops.iic_information(sums, views[0].shape[2], 1.0),
        "iic_logits_grad": lambda: ops.iic_logits_grad(*views, probs_a, probs_b, joint_grad, terms[0]),
    }
    return {name: 1e3 * measuring.graph_milliseconds(work)[0] for name, work in works.items()}


def measure_on_gpu(precision: str, n: int, k: int, name: str) -> dict[str, Any]:
    """Measure one form at one shape; an error is part of the result."""
    row: dict[str, Any] = {"shape": f"{n} x {k}", "precision": precision, "form": name}
    if not fits(name, n, k, torch.cuda.mem_get_info()[0] // 6):
        return row | {"left_out": f"{n * k * k * 4 >> 30} GiB of outer products a sub-head"}
    dtype, matmul = PRECISIONS[precision]
    torch.set_float32_matmul_precision(matmul)
    try:
        logits = make_logits(n, k, "cuda", dtype)
        wanted = reference(*logits)

        def work() -> tuple[Tensor, ...]:
            return step(FORMS[name], *logits)

        row["relative_error"] = relative_error(work(), wanted)
        row["wall_us"] = 1e3 * measuring.wall_milliseconds(work)
        row["peak_mib"] = measuring.peak_mebibytes(work, "cuda")
        milliseconds, replayed = measuring.graph_milliseconds(work)
        row["graph_us"] = 1e3 * milliseconds
        if name == "impl=fused":
            for values in (work(), replayed):
                assert_parity(values, wanted, TOLERANCE[precision])
            row |= {"ops_us": measure_ops(*logits), "h100_bar_us": H100_BARS_US[row["shape"]].get(precision)}
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
    finally:
        torch.set_float32_matmul_precision("highest")
    return row


def print_gpu_table(rows: list[dict[str, Any]]) -> None:
    """One line a case; the last columns compare with the fused loss, eager, at the same shape and precision."""
    fused = {(row["shape"], row["precision"]): row for row in rows if row["form"] == "impl=fused"}
    print(f"{'us':14}{'precision':>10}  {'form':20}{'graph':>10}{'H100 bar':>10}{'eager':>10}{'MiB':>8}{'/ fused':>9}")
    shapes = [f"{n} x {k}" for n, k in GPU_SHAPES]
    for row in sorted(rows, key=lambda row: shapes.index(row["shape"])):
        line = f"{row['shape']:14}{row['precision']:>10}  {row['form']:20}"
        if "graph_us" not in row:
            print(line, row.get("left_out") or row["error"])
            continue
        bar = row.get("h100_bar_us") or "-"
        line += f"{row['graph_us']:10.1f}{bar:>10}{row['wall_us']:10.1f}{row['peak_mib']:8.0f}"
        wall = fused[row["shape"], row["precision"]].get("wall_us")
        print(line + (f"{row['wall_us'] / wall:8.2f}x" if wall else f"{'-':>9}"))


def on_cpu(path: Path, seconds: float) -> None:
    torch.set_num_threads(1)
    results = {f"{n} x {k}": measure(n, k, seconds) for n, k in SHAPES}
    print_table(results)
    path.write_text(json.dumps({"provenance": provenance.of("cpu"), "shapes": results}, indent=2) + "\n")
    print(f"written to {path}")


def on_cuda(path: Path, alone: bool) -> None:
    side_by_side.to_file("impl=fused", path, gpu_cases(), measure_on_gpu, print_gpu_table, alone)


def main() -> None:
    side_by_side.main("iic", on_cpu, on_cuda)


@pytest.mark.benchmark(timer=time.thread_time, min_rounds=5, max_time=1, warmup=False)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_forward_backward(benchmark: Any, n: int, k: int, name: str) -> None:
    if not fits(name, n, k):
        pytest.skip(f"{n} x {k} x {k} outer products need {n * k * k * 4 >> 20} MiB a sub-head")
    logits = make_logits(n, k, "cpu")
    assert_parity(step(FORMS[name], *logits), reference(*logits), TOLERANCE["float32"])
    benchmark.group = f"IIC {n} x {k}"
    benchmark.extra_info["peak_mib"] = measuring.peak_mebibytes(lambda: step(FORMS[name], *logits), "cpu")
    benchmark(step, FORMS[name], *logits)


if __name__ == "__main__":
    main()
