"""The IIC loss in every form that a user could pick, forward and backward from logits, 5 sub-heads.

    pytest benchmarks/bench_iic.py --benchmark-only     pytest-benchmark's statistics, grouped by shape
    python benchmarks/bench_iic.py                      the forms in turn: a table, and results/iic_*.json

A CPU is measured at one thread in CPU time, a GPU in the time of its stream.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from iic_dist.losses import iic_loss

EPS = 2.2e-16
HEADS = 5
SHAPES = [(256, 10), (1024, 10), (700, 70), (1024, 70), (4096, 100), (1024, 1000)]
"""(N, K): batches of the CIFAR-10 and overclustering heads, and what a larger problem would ask for."""

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


def fits(name: str, n: int, k: int) -> bool:
    """False where a form would need more memory than a small machine has."""
    return name != "published loop" or n * k * k * 4 <= 1 << 30


def make_logits(n: int, k: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, noise = (3 * torch.randn(n, HEADS, k, generator=generator) for _ in range(2))
    views = [view.to(device, dtype).requires_grad_() for view in (a + noise / 2, a)]
    return views[1], views[0]


def step(form: Form, logits_a: Tensor, logits_b: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward, from logits to their gradients."""
    loss = form(logits_a, logits_b)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (logits_a, logits_b))


def assert_parity(form: Form, logits_a: Tensor, logits_b: Tensor) -> None:
    """Raise unless value and gradients are those of the published formula in float64."""
    reference = [x.detach().double().requires_grad_() for x in (logits_a, logits_b)]
    tolerance = 3e-5 if logits_a.dtype == torch.float32 else 2e-2
    for value, wanted in zip(step(form, logits_a, logits_b), step(published_product, *reference), strict=True):
        error = float((value.double() - wanted).norm() / wanted.norm())
        assert error <= tolerance, f"relative error {error:.1e} of {tuple(wanted.shape)}, {tolerance} allowed"


def peak_mebibytes(work: Callable[[], object], device: str) -> float:
    """The most memory that tensors held at once beyond what was there before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def milliseconds(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)
    before = time.thread_time()
    work()
    return (time.thread_time() - before) * 1e3


def measure(n: int, k: int, device: str, seconds: float) -> dict[str, dict[str, Any]]:
    """Median milliseconds and peak memory of every form, one step of each in turn until the time is up."""
    logits = make_logits(n, k, device)
    works = {name: (lambda form=form: step(form, *logits)) for name, form in FORMS.items() if fits(name, n, k)}
    for name in works:
        assert_parity(FORMS[name], *logits)
    times: dict[str, list[float]] = {name: [] for name in works}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["impl=fused"]) < 7:
        for name, work in works.items():
            times[name].append(milliseconds(work, device))
    return {
        name: {
            "median_ms": statistics.median(values),
            "lower_quartile_ms": statistics.quantiles(values, n=4)[0],
            "runs": len(values),
            "peak_mib": peak_mebibytes(works[name], device),
        }
        for name, values in times.items()
    }


def provenance(device: str) -> dict[str, Any]:
    from iic_dist import _C

    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else names[0].split(": ")[1],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "commit": git.stdout.strip(),
        "extension": _C.build_info(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=10, help="for each shape")
    parser.add_argument("--output", type=Path, help="the JSON file; default results/iic_DEVICE.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {f"{n} x {k}": measure(n, k, options.device, options.seconds) for n, k in SHAPES}
    print_table(results)
    path = options.output or Path(__file__).parent / "results" / f"iic_{options.device}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"provenance": provenance(options.device), "shapes": results}, indent=2) + "\n")
    print(f"written to {path}")


@pytest.mark.benchmark(timer=time.thread_time, min_rounds=5, max_time=1, warmup=False)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_forward_backward(benchmark: Any, n: int, k: int, name: str) -> None:
    if not fits(name, n, k):
        pytest.skip(f"{n} x {k} x {k} outer products need {n * k * k * 4 >> 20} MiB a sub-head")
    logits = make_logits(n, k, "cpu")
    assert_parity(FORMS[name], *logits)
    benchmark.group = f"IIC {n} x {k}"
    benchmark.extra_info["peak_mib"] = peak_mebibytes(lambda: step(FORMS[name], *logits), "cpu")
    benchmark(step, FORMS[name], *logits)


if __name__ == "__main__":
    main()
