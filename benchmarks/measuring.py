"""How the benchmarks measure: CPU time of one thread; on a GPU its time in a graph's replay, and time on the wall."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], Sequence[Tensor]]
"""One step to be measured; returns its results."""

LONG_MS = 2.0
"""Steps longer than this are repeated less often: what a launch costs no longer shows."""


def cpu_milliseconds(work: Callable[[], object]) -> float:
    """Time one step of this thread; other load on the machine does not count, but shares its caches."""
    before = time.thread_time()
    work()
    return (time.thread_time() - before) * 1e3


def stream_milliseconds(work: Callable[[], object]) -> float:
    """Time one call between two events of the current stream.

    Sync: waits for the second event.
    """
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def graph_milliseconds(work: Work) -> tuple[float, list[Tensor]]:
    """Time a step on the GPU alone: several steps captured in one CUDA graph, median of its replays.

    Returns:
        Milliseconds a step, and what the last step of the last replay wrote over NaN.

    Sync: waits for every replay.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up before the capture
        work()
        work()
    torch.cuda.current_stream().wait_stream(side)
    steps, replays = (20, 21) if stream_milliseconds(work) < LONG_MS else (1, 7)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(steps):
            outputs = work()
    graph.replay()
    for output in outputs:
        output.fill_(float("nan"))
    times = [stream_milliseconds(graph.replay) for _ in range(replays)]
    return statistics.median(times) / steps, [output.clone() for output in outputs]


def wall_milliseconds(work: Work) -> float:
    """Time a step as a caller sees it, launches by Python included: median of several rows of steps.

    Sync: waits for the device after each row.
    """
    work()
    torch.cuda.synchronize()
    steps, rows = (20, 11) if stream_milliseconds(work) < LONG_MS else (2, 5)
    times = []
    for _ in range(rows):
        before = time.perf_counter()
        for _ in range(steps):
            work()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - before) * 1e3 / steps)
    return statistics.median(times)


def peak_mebibytes(work: Work, device: str) -> float:
    """Measure the most memory that tensors held at once beyond what was there before."""
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
