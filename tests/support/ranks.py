"""A few processes with a gloo group, started once for all tests that need several ranks."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 400
"""Seconds that a task may take, which is more than its collectives may wait."""


def _serve(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=3),
    )
    groups = {size: dist.new_group(list(range(size))) for size in range(1, world_size + 1)}
    while (task := pipe.recv()) is not None:
        function, size, arguments = task
        try:
            pipe.send((True, function(rank, groups[size], *arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """Runs functions of importable modules on the first W of its processes.

    A function is called as f(rank, group, *arguments); what it returns must pickle.
    """

    def __init__(self, world_size: int) -> None:
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            arguments = (rank, world_size, f"{self._folder.name}/store", there)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()  # so that `here` ends when the process does
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what `function` returned on each of the ranks."""
        for pipe in self._pipes[:world_size]:
            pipe.send((function, world_size, arguments))
        until = time.monotonic() + PATIENCE
        for rank, pipe in enumerate(self._pipes[:world_size]):
            assert pipe.poll(max(0.0, until - time.monotonic())), f"rank {rank} did not answer in {PATIENCE} s"
        answers = [pipe.recv() for pipe in self._pipes[:world_size]]
        for good, answer in answers:
            assert good, answer
        return [answer for _, answer in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(timeout=30)
        self._folder.cleanup()
