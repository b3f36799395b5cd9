"""The emulated device sees: kernels with one wrong line each, and every one is noticed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from emulated_iic import IIC_CASES, check_iic
from emulated_nt_xent import NT_XENT_CASES, check_nt_xent
from emulated_views import VIEW_CASES, check_many_views, check_view
from kernel_mutations import MUTATIONS, Mutation

FEWER = {
    "AT_DISPATCH_CASE_REDUCED_FLOATING_TYPES(": "AT_DISPATCH_CASE(at::kBFloat16, ",
    "AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, ": "AT_DISPATCH_FLOATING_TYPES_AND(",
    "if (k <= 16) return body(std::integral_constant<int, 16>());": "",
    "if (k <= 80) return body(std::integral_constant<int, 80>());": "",
    "if (k <= 112) return body(std::integral_constant<int, 112>());": "",
    "if (k <= 32 * kWarp) return body(std::integral_constant<int, 32>());": "",
}
"""Types and sizes that a mutated op is compiled without, which takes a third of the time."""


def precompile(folder: Path) -> str:
    """The headers of torch, which take longer than a kernel, in a form that the compiler reads at once."""
    sources = emulation.CSRC.glob("cuda/*.cu")
    included = sorted({line for path in sources for line in re.findall("#include <.*>", path.read_text())})
    header = folder / "prelude.h"
    header.write_text("\n".join(["#pragma once", '#include "cuda.h"', *included, ""]))
    emulation.run([*emulation.FLAGS, *emulation.WATCHED, "-x", "c++-header", str(header), "-o", f"{header}.gch"])
    return str(header)


def compile_mutation(number: int, folder: Path, prelude: str, built: Path) -> None:
    """The op of a mutation, in a tree of its own."""
    mutation = MUTATIONS[number]
    path = emulation.CSRC / "cuda" / mutation.file
    tree = emulation.translate_tree(emulation.CSRC)
    tree[f"cuda/{mutation.file}"] = emulation.translate(mutation.apply(path.read_text()))
    main = f"cuda/{mutation.op}_cuda.cu"
    for old, new in FEWER.items():
        tree[main] = tree[main].replace(old, new)
    emulation.write(tree, folder)
    emulation.compile_op(mutation.op, folder, f"{emulation.LIBRARY}_{number}", prelude)
    emulation.link(f"{folder}/{mutation.op}.o", f"{folder}/{mutation.op}.so", built)


Compilations = dict[int, tuple[Path, "Future[None]"]]


@pytest.fixture(scope="module")
def compilations(
    request: pytest.FixtureRequest, compiled: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Compilations]:
    """Of all mutations that this run asks for, two at a time, while others are checked."""
    items = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    numbers = [item.callspec.params["number"] for item in items if "number" in getattr(item, "fixturenames", ())]
    prelude = precompile(tmp_path_factory.mktemp("prelude"))
    folders = {number: tmp_path_factory.mktemp(f"mutation{number}") for number in numbers}
    with ThreadPoolExecutor(2) as pool:
        yield {n: (to, pool.submit(compile_mutation, n, to, prelude, compiled)) for n, to in folders.items()}
        pool.shutdown(cancel_futures=True)


CHECKS: dict[str, list[Callable[[Any], None]]] = {
    "iic": [partial(check_iic, case=case) for case in IIC_CASES if case.dtype != torch.float16],
    "nt_xent": [partial(check_nt_xent, case=case) for case in NT_XENT_CASES if case.dtype != torch.float16],
    "augment": [check_many_views, *(partial(check_view, case=case) for case in VIEW_CASES)],
}
"""Every case of an op that is compiled, as functions of the ops."""


def notice(mutation: Mutation, ops: Any) -> str | None:
    """What the first check says that fails."""
    for check in CHECKS[mutation.op]:
        try:
            check(ops)
        except (AssertionError, RuntimeError) as error:
            return str(error)
    return None


def test_there_are_enough() -> None:
    assert len(set(map(str, MUTATIONS))) == len(MUTATIONS) >= 30


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutation_fits_the_sources(mutation: Mutation) -> None:
    text = (emulation.CSRC / "cuda" / mutation.file).read_text()
    changed = mutation.apply(text)
    lines = [(old, new) for old, new in zip(text.splitlines(), changed.splitlines(), strict=True) if old != new]
    assert len(lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=[str(each) for each in MUTATIONS])
def test_a_mutation_is_noticed(number: int, compiled: Path, compilations: Compilations, one_thread: None) -> None:
    folder, done = compilations[number]
    done.result()
    mutation = MUTATIONS[number]
    with emulation.running(compiled):
        said = notice(mutation, emulation.ops(folder, f"{emulation.LIBRARY}_{number}", (mutation.op,)))
    assert said is not None
    print(f"{mutation}: {said.splitlines()[0]}")
