"""The emulated device itself: it stops a kernel that does what a GPU forbids, and computes what PTX says."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import emulation
import pytest
import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("faulty_kernels.cu")

Run = Callable[..., tuple[str | None, Tensor]]


@pytest.fixture(scope="module")
def kernels(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("kernels")
    translated = folder / SOURCE.name
    translated.write_text(emulation.translate(SOURCE.read_text()))
    emulation.device(compiled)
    emulation.compile_source(str(translated), f"{folder}/kernels.o")
    emulation.link(f"{folder}/kernels.o", f"{folder}/kernels.so", compiled)
    return ctypes.CDLL(f"{folder}/kernels.so")


@pytest.fixture
def run(kernels: ctypes.CDLL, compiled: Path) -> Run:
    """Runs a kernel on 64 values; gives what the device says, and what the kernel writes."""

    def call(name: str, values: list[float] | None = None, seed: int = 0) -> tuple[str | None, Tensor]:
        function = getattr(kernels, name)
        function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p] * 2
        with emulation.running(compiled, seed):
            given, out = torch.arange(64.0), torch.empty(64)
            given[: len(values or [])] = torch.tensor(values or [])
            said = function(given.data_ptr(), out.data_ptr())
        return said and said.decode(), out

    return call


def test_a_kernel_that_is_right(run: Run) -> None:
    for seed in range(5):
        said, out = run("right", seed=seed)
        assert said is None
        assert torch.equal(out, torch.arange(63.0, -1, -1))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("no_barrier", "4 bytes (that another thread (reads|writes) between|of shared memory that nobody has written)"),
        ("race", "writes 4 bytes that another thread writes between the same barriers"),
        ("unwritten", "reads 4 bytes of shared memory that nobody has written"),
        ("read_past", "reads 4 bytes outside of every buffer"),
        ("write_past", "writes 4 bytes outside of every buffer"),
        ("shared_past", "writes 4 bytes outside of every variable in shared memory"),
        ("register_past", "an index outside of an array"),
        ("misaligned", "an address of a wrong alignment"),
        ("part_of_a_block", "at a barrier"),
        ("part_of_a_warp", "waits for ever: a shuffle"),
        ("two_barriers", "waits at another barrier"),
        ("no_wait", "that an asynchronous copy is still bringing"),
    ],
)
def test_a_fault_is_an_error(run: Run, name: str, what: str) -> None:
    for seed in range(3):
        said, _ = run(name, seed=seed)
        assert said is not None
        assert re.search(rf"emulated block \(0, 0, 0\), thread \(\d+, 0, 0\): .*{what}", said), said


def test_an_error_names_the_line(run: Run) -> None:
    said, _ = run("read_past")
    line = SOURCE.read_text().splitlines().index(next(t for t in SOURCE.read_text().splitlines() if "read_past" in t))
    assert said is not None
    assert f"(faulty_kernels.cu:{line + 1})" in said


def test_roundings(run: Run) -> None:
    """TF32: to nearest, ties away from zero. bfloat16: ties to even, the first operand above. ex2: no subnormals."""
    one = 2.0**-10  # of TF32 beside 1
    for given, want in [(1 + one / 2, 1 + one), (1 + one / 2 - 2**-23, 1.0), (-1 - one / 2, -1 - one)]:
        assert run("instructions", [given])[1][0] == want
    _, out = run("instructions", [1 + 2.0**-8, 1 + 3 * 2.0**-8, -127.0])
    assert out[1:4].tolist() == [1.0, 1 + 2.0**-6, 0.0]


def test_products_follow_the_fragments(run: Run) -> None:
    """A times the identity is A."""
    _, out = run("product")
    assert torch.equal(out, torch.arange(64.0))
