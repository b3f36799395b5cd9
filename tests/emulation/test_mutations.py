"""The emulated device sees: kernels with one wrong line each, and every one is noticed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from emulated_iic import IIC_CASES, check_iic
from emulated_nt_xent import NT_XENT_CASES, check_nt_xent
from emulated_views import VIEW_CASES, check_many_views, check_view
from kernel_mutations import MUTATIONS, Mutation, mutate

FEWER = {
    "AT_DISPATCH_CASE_REDUCED_FLOATING_TYPES(": "AT_DISPATCH_CASE(at::kBFloat16, ",
    "AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, ": "AT_DISPATCH_FLOATING_TYPES_AND(",
    "if (k <= 16) return body(std::integral_constant<int, 16>());": "",
    "if (k <= 80) return body(std::integral_constant<int, 80>());": "",
    "if (k <= 112) return body(std::integral_constant<int, 112>());": "",
    "if (k <= 32 * kWarp) return body(std::integral_constant<int, 32>());": "",
}
"""Types and sizes that are compiled without mutations alone."""

DTYPES = (torch.float32, torch.bfloat16, torch.float64)  # the order in which most is noticed early
CHECKS: dict[str, list[Callable[[Any], None]]] = {
    "iic": [partial(check_iic, case=case) for dtype in DTYPES for case in IIC_CASES if case.dtype == dtype],
    "nt_xent": [partial(check_nt_xent, case=case) for dtype in DTYPES for case in NT_XENT_CASES if case.dtype == dtype],
    "augment": [check_many_views, *(partial(check_view, case=case) for case in VIEW_CASES)],
}
"""Every case of an op that is compiled, as functions of the ops."""


@pytest.fixture(scope="module")
def mutated(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The ops with all mutations compiled in."""
    folder = tmp_path_factory.mktemp("mutated")
    emulation.write(emulation.translate_tree(emulation.CSRC, mutate), folder)
    for op in emulation.OPS:
        path = folder / f"cuda/{op}_cuda.cu"
        text = path.read_text()
        for old, new in FEWER.items():
            text = text.replace(old, new)
        path.write_text(text)
    library = f"{emulation.LIBRARY}_mutated"
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda op: emulation.compile_op(op, folder, library), emulation.OPS))
    for op in emulation.OPS:
        emulation.link(f"{folder}/{op}.o", f"{folder}/{op}.so", compiled)
    emulation.device(compiled)
    return emulation.ops(folder, library)


def notice(op: str, ops: Any) -> str | None:
    """What the first check says that fails."""
    for check in CHECKS[op]:
        try:
            check(ops)
        except (AssertionError, RuntimeError) as error:
            return f"{check}: {error}"
    return None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutation_is_one_line(mutation: Mutation) -> None:
    text = (emulation.CSRC / "cuda" / mutation.file).read_text()
    assert "\n" not in mutation.old + mutation.new
    assert mutation.place(text) > 0
    assert [str(each) for each in MUTATIONS].count(str(mutation)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("op", emulation.OPS)
def test_without_a_mutation_nothing_is_noticed(op: str, compiled: Path, mutated: Any, one_thread: None) -> None:
    with emulation.running(compiled):
        assert notice(op, mutated) is None


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=[str(each) for each in MUTATIONS])
def test_a_mutation_is_noticed(number: int, compiled: Path, mutated: Any, one_thread: None) -> None:
    with emulation.running(compiled):
        emulation.device(compiled).emulation_mutate(number)
        try:
            said = notice(MUTATIONS[number].op, mutated)
        finally:
            emulation.device(compiled).emulation_mutate(-1)
    assert said is not None
    print(said)
