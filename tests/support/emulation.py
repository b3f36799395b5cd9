"""The CUDA kernels on the host: csrc/cuda translated to C++, compiled against tests/emulation/device, loaded as ops.

`translate` does what nvcc's front end does with the few constructs that a C++ compiler does not know. Everything else,
host code included, is compiled as it stands. `tests/emulation/device` is the device: threads as fibres, watched memory,
the PTX instructions. Tensors are those of the CPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
DEVICE = ROOT / "tests/emulation/device"
BUILD = ROOT / "build/emulation"
OPS = ("iic", "nt_xent", "augment")
LIBRARY = "iic_dist_emulated"
RUNTIME = "libemulation.so"
COMPILER = shutil.which("g++")

TORCH = Path(torch.__file__).parent
FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-DEMULATED_ARCH=900"),
    *(f"-I{DEVICE / 'include'}", f"-I{DEVICE}"),  # before torch's own c10/cuda
    *(f"-isystem{TORCH / path}" for path in ("include", "include/torch/csrc/api/include")),
]
WATCHED = ["-fsanitize=thread,alignment,bounds", "-ftrivial-auto-var-init=pattern", "-fno-gnu-unique"]
"""What makes the compiler call tests/emulation/device/memory.cpp, and fills local variables with something absurd."""
LIBRARIES = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]


def why_not() -> str | None:
    """Why the kernels cannot be compiled for the emulated device here; None where they can."""
    if COMPILER is None:
        return "no g++ on this machine"
    version = subprocess.check_output([COMPILER, "-dumpversion"], text=True).strip()
    if sys.platform != "linux" or int(version.split(".")[0]) < 12:
        return f"the emulated device wants Linux and g++ 12, not {sys.platform} and {version}"
    return None


# ---- translation

LAUNCH = re.compile(r"<<<(.*?)>>>", re.DOTALL)
SHARED = re.compile(r"(?:alignas\((\d+)\) )?(?:\[\[maybe_unused\]\] )?__shared__ (\w+) ([^;]*);")
DYNAMIC = re.compile(r"extern __shared__ (?:__align__\((\d+)\) )?([\w ]+) (\w+)\[\];")
NAMES = {
    "__CUDA_ARCH__": "EMULATED_ARCH",
    ".is_cuda()": ".is_cpu()",  # where the tensors of the emulated device are
    "TORCH_LIBRARY_IMPL(iic_dist, CUDA,": "TORCH_LIBRARY_IMPL(EMULATED_LIBRARY, CPU,",
}
SMALL = {
    "kMultiprocessors = 132;": "kMultiprocessors = 4;",
    "kSpillingBlocks = 512;": "kSpillingBlocks = 4;",
    "kLibraryElements = 1 << 22;": "kLibraryElements = 1 << 10;",
}
"""A device so small that a block has several tiles or views, and a call several blocks, with small inputs already."""


def translate(text: str) -> str:
    """A source of csrc as C++, line by line."""

    def dynamic(match: re.Match[str]) -> str:
        alignment, kind, name = match.groups()
        return f"auto* const {name} = emulation::dynamic_shared<{kind}>({alignment or f'alignof({kind})'});"

    def shared(match: re.Match[str]) -> str:
        alignment, kind, variables = match.groups()
        made = []
        for variable in split(variables, ","):
            name, bounds = re.fullmatch(r"(\w+)(.*)", variable.strip(), re.DOTALL).groups()
            arguments = f"__COUNTER__, {alignment or f'alignof({kind})'}"
            made.append(f"auto& {name} = emulation::shared<{kind}{bounds}>({arguments});")
        return " ".join(made)

    text = DYNAMIC.sub(dynamic, text)
    text = SHARED.sub(shared, text)
    text = LAUNCH.sub(r" << emulation::Launch(\1)", text)
    for old, new in (NAMES | SMALL).items():
        text = text.replace(old, new)
    return assembler(text)


def assembler(text: str) -> str:
    """Each `asm("OPCODE %0, {%1, %2};" : outputs : inputs);` as a call of emulation::ptx::OPCODE(outputs, inputs)."""
    for match in reversed(list(re.finditer(r"\basm(?: volatile)?\(", text))):
        end = closing(text, match.end())
        code, *operands = split(text[match.end() : end], ":")
        registers = [
            each.strip()[each.strip().index("(") :]
            for part in operands[:2]
            if part.strip()
            for each in split(part, ",")
        ]
        opcode, _, given = "".join(re.findall(r'"(.*?)"', code)).rstrip(";").partition(" ")
        given = re.sub(r"[{}\[\]]", "", given)
        for number in reversed(range(len(registers))):
            given = given.replace(f"%{number}", registers[number])
        call = f"emulation::ptx::{opcode.replace('.', '_').replace('::', '_')}({given})"
        missing = text.count("\n", match.start(), end) - call.count("\n")
        text = f"{text[: match.start()]}{call}{chr(10) * missing}{text[end + 1 :]}"
    return text


def closing(text: str, start: int) -> int:
    """Where the parenthesis closes that was opened before `start`."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"no closing parenthesis after {text[start : start + 40]!r}")


def split(text: str, separator: str) -> list[str]:
    """`text` at a separator that stands outside of parentheses and strings."""
    parts, depth, quoted = [""], 0, False
    for character in text:
        quoted ^= character == '"'
        depth += 0 if quoted else {"(": 1, ")": -1, "[": 1, "]": -1}.get(character, 0)
        if character == separator and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    return parts


# ---- compilation


def build(folder: Path) -> Path:
    """Compile the device and all ops of this tree below `folder`, unless these very sources are there; gives where."""
    translated = translate_tree(CSRC)
    own = "".join(path.read_text() for path in sorted(DEVICE.rglob("*.*")))
    everything = "".join([*translated.values(), own, *FLAGS, *WATCHED, torch.__version__])
    target = folder / hashlib.sha256(everything.encode()).hexdigest()[:16]
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    older = [path for path in folder.iterdir() if not path.name.startswith("tmp")]  # where others build
    with TemporaryDirectory(dir=folder) as place:  # whole or not there, whoever else builds at the same time
        made = Path(place) / "made"
        write(translated, made)
        with ThreadPoolExecutor(2) as pool:
            started = [pool.submit(compile_op, op, made, LIBRARY) for op in OPS]
            compile_runtime(made)
            for op, each in zip(OPS, started, strict=True):
                each.result()
                link(f"{made}/{op}.o", f"{made}/{op}.so", made)
        with suppress(OSError):  # another process was faster
            made.rename(target)
    for path in older:
        shutil.rmtree(path, ignore_errors=True)
    return target


def translate_tree(csrc: Path, change: Callable[[str, str], str] = lambda _, text: text) -> dict[str, str]:
    """What the CUDA sources are made of, as C++: path -> text. `change` is given the name and text of each before."""
    paths = sorted([*csrc.glob("*.h"), *csrc.glob("cuda/*")])
    return {
        str(path.relative_to(csrc)): f'#line 1 "{path.name}"\n{translate(change(path.name, path.read_text()))}'
        for path in paths
    }


def write(translated: dict[str, str], folder: Path) -> None:
    for name, text in translated.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def compile_op(op: str, folder: Path, library: str) -> None:
    """Compile cuda/`op`_cuda.cu of a translated tree, its op to be registered in `library`."""
    compile_source(f"{folder}/cuda/{op}_cuda.cu", f"{folder}/{op}.o", f"-DEMULATED_LIBRARY={library}")


def compile_source(source: str, target: str, *given: str) -> None:
    """Compile a translated source so that the device sees what its threads do."""
    run([*FLAGS, *WATCHED, *given, "-include", "cuda.h", "-x", "c++", "-c", source, "-o", target])


def link(compiled: str, target: str, built: Path) -> None:
    """Link to the device in `built`, in the place of the compiler's own libraries for WATCHED."""
    run(["-shared", compiled, f"{built}/{RUNTIME}", *LIBRARIES, "-o", target])


def compile_runtime(folder: Path) -> None:
    """Compile the emulated device, which all ops share."""
    sources = map(str, sorted(DEVICE.glob("*.cpp")))
    result = ["-shared", f"-Wl,-soname,{RUNTIME}", "-o", f"{folder}/{RUNTIME}"]
    run([*FLAGS, "-O2", "-Wall", "-Werror", *sources, *LIBRARIES, *result])


def run(arguments: list[str]) -> None:
    assert COMPILER is not None
    done = subprocess.run([COMPILER, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"g++ {' '.join(arguments[-2:])}:\n{done.stderr[:4000]}")


# ---- use


def schemas() -> list[str]:
    """Those of csrc/library.cpp."""
    definitions = re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', (CSRC / "library.cpp").read_text())
    return ["".join(re.findall(r'"([^"]*)"', each)) for each in definitions]


@cache
def device(folder: Path) -> ctypes.CDLL:
    """The emulated device, which is one in a process."""
    return ctypes.CDLL(str(folder / RUNTIME), mode=ctypes.RTLD_GLOBAL)


@cache
def ops(folder: Path, library: str = LIBRARY, names: tuple[str, ...] = OPS) -> Any:
    """The ops that lie compiled in `folder`, as torch.ops gives them."""
    definitions = torch.library.Library(library, "DEF")
    _KEPT.append(definitions)
    for schema in schemas():
        definitions.define(schema)
    for name in names:
        torch.ops.load_library(str(folder / f"{name}.so"))
    return getattr(torch.ops, library)


_KEPT: list[torch.library.Library] = []
"""Libraries live as long as their definitions are held."""


@contextmanager
def running(folder: Path, seed: int = 0, compute_capability: int = 9) -> Iterator[None]:
    """Inside, tensors are watched buffers, full of NaN at first, and the emulated library can multiply as CUDA's does.

    Args:
        folder: as `build` gives it.
        seed: of the order in which blocks and warps run.
        compute_capability: of the device, 8 or 9.
    """
    library = torch.library.Library("aten", "IMPL")
    library.impl("bmm.dtype", lambda a, b, dtype: torch.bmm(a.to(dtype), b.to(dtype)), "CPU")
    library.impl("bmm.dtype_out", lambda a, b, dtype, out: out.copy_(torch.bmm(a.to(dtype), b.to(dtype))), "CPU")
    device(folder).emulation_seed(seed)
    device(folder).emulation_capability(compute_capability)
    device(folder).emulation_guard(True)
    try:
        yield
    finally:
        device(folder).emulation_guard(False)
        library._destroy()
