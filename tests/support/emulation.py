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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
DEVICE = ROOT / "tests/emulation/device"
BUILD = ROOT / "build/emulation"
OPS = ("iic", "nt_xent", "augment")
COMPILER = shutil.which("g++")

TORCH = Path(torch.__file__).parent
INCLUDE = [DEVICE / "include", DEVICE, TORCH / "include", TORCH / "include/torch/csrc/api/include"]
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-DEMULATED_ARCH=900", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
WATCHED = ["-fsanitize=thread,alignment,bounds", "-ftrivial-auto-var-init=pattern", "-fno-gnu-unique"]
"""What makes the compiler call tests/emulation/device/memory.cpp, and fills local variables with something absurd."""
LIBRARIES = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]


# ---- translation

LAUNCH = re.compile(r"<<<(.*?)>>>", re.DOTALL)
SHARED = re.compile(r"(?:alignas\((\d+)\) )?(?:\[\[maybe_unused\]\] )?__shared__ (\w+) ([^;]*);")
DYNAMIC = re.compile(r"extern __shared__ (?:__align__\((\d+)\) )?([\w ]+) (\w+)\[\];")
NAMES = {
    "__CUDA_ARCH__": "EMULATED_ARCH",
    ".is_cuda()": ".is_cpu()",  # where the tensors of the emulated device are
    "TORCH_LIBRARY_IMPL(iic_dist, CUDA,": "TORCH_LIBRARY_IMPL(EMULATED_LIBRARY, CPU,",
}


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
    for old, new in NAMES.items():
        text = text.replace(old, new)
    return assembler(text)


def assembler(text: str) -> str:
    """Each `asm("OPCODE %0, {%1, %2};" : outputs : inputs);` as a call of emulation::ptx::OPCODE(outputs, inputs)."""
    for match in reversed(list(re.finditer(r"\basm(?: volatile)?\(", text))):
        end = closing(text, match.end())
        code, *operands = split(text[match.end() : end], ":")
        registers = [each.strip()[each.strip().index("(") :] for part in operands[:2] if part.strip() for each in split(part, ",")]
        opcode, _, given = "".join(re.findall(r'"(.*?)"', code)).rstrip(";").partition(" ")
        given = re.sub(r"%(\d+)", lambda number: registers[int(number[1])], re.sub(r"[{}\[\]]", "", given))
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


def write(csrc: Path, folder: Path) -> None:
    """Translate what the CUDA sources of `csrc` are made of into a tree below `folder`."""
    for path in (*csrc.glob("*.h"), *csrc.glob("cuda/*")):
        target = folder / path.relative_to(csrc)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f'#line 1 "{path.name}"\n{translate(path.read_text())}')


def compile_op(op: str, folder: Path, library: str, runtime: Path) -> Path:
    """Compile csrc/cuda/`op`_cuda.cu of a translated tree into `folder`; its ops register in `library`."""
    source, compiled, target = (folder / name for name in (f"cuda/{op}_cuda.cu", f"{op}.o", f"{op}.so"))
    given = [f"-DEMULATED_LIBRARY={library}", "-include", "cuda.h", "-x", "c++", "-c", str(source)]
    run([*FLAGS, *WATCHED, *includes(), *given, "-o", str(compiled)])
    run(["-shared", str(compiled), str(runtime), *LIBRARIES, "-o", str(target)])  # not the compiler's own for WATCHED
    return target


def compile_runtime(folder: Path) -> Path:
    """The emulated device, without an op."""
    target = folder / "libemulation.so"
    sources = [str(DEVICE / name) for name in ("device.cpp", "memory.cpp", "ptx.cpp")]
    run([*FLAGS, *includes(), "-Wall", *sources, "-shared", *LIBRARIES, "-o", str(target)])
    return target


def includes() -> list[str]:
    return [f"-I{path}" for path in INCLUDE[:2]] + [f"-isystem{path}" for path in INCLUDE[2:]]


def run(arguments: list[str]) -> None:
    assert COMPILER is not None
    done = subprocess.run([COMPILER, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"g++ {arguments[-1]}:\n{done.stderr[-4000:]}")
