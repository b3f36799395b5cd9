"""Builds the extension that this machine can: CUDA, CPU or none; the metadata stand in pyproject.toml.

IIC_DIST_BUILD=auto|cuda|cpu|none overrides the choice; a compile error is an error in any case.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import setup

ARCHITECTURES = {"8.0": "compute_80", "9.0": "compute_90", "10.0": "compute_100"}
USUAL_PLACE = "/usr/local/cuda/bin"  # where nvcc is looked for last


def cuda_toolkit() -> Path | None:
    """The directory of bin/nvcc and include/cuda_runtime.h, through symbolic links and wrapper scripts."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else os.environ.get("PATH", "") + os.pathsep + USUAL_PLACE)
    if nvcc is None:
        return None
    real = os.path.realpath(nvcc)
    dry_run = subprocess.run([real, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    tops = [line.split("=", 1)[1] for line in dry_run.stderr.splitlines() if line.startswith("#$ TOP=")]
    candidates = [Path(top).resolve() for top in (*tops, os.path.dirname(os.path.dirname(real)))]
    return next((top for top in candidates if (top / "include" / "cuda_runtime.h").exists()), None)


def why_no_compiler() -> str | None:
    """Why no C++ extension can be built here; None where one can."""
    try:
        from torch.utils.cpp_extension import get_cxx_compiler
    except ImportError as error:
        return f"torch is not there while building ({error}); pass --no-build-isolation"
    compiler = str(get_cxx_compiler())  # may be a command with arguments: "ccache g++"
    if shutil.which(compiler.partition(" ")[0]) is None:
        return f"no C++ compiler ({compiler})"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "no Python.h; install the Python development headers"
    return None


def why_no_cuda(toolkit: Path | None) -> str | None:
    """Why CUDA cannot be compiled here; None where it can. A visible GPU is not needed."""
    import torch

    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if toolkit is None:
        return "no nvcc with its headers"
    release = subprocess.check_output([f"{toolkit}/bin/nvcc", "--version"], text=True)
    if f"release {torch.version.cuda.split('.')[0]}." in release:
        return None
    return f"torch has CUDA {torch.version.cuda}, {toolkit} another major version"


def choose() -> tuple[str, str, Path | None]:
    """What to build ("cuda", "cpu" or "none"), why, and the CUDA toolkit."""
    wanted = os.environ.get("IIC_DIST_BUILD", "auto")
    if wanted not in ("auto", "cuda", "cpu", "none"):
        sys.exit(f"IIC_DIST_BUILD={wanted!r}: must be auto, cuda, cpu or none")
    if wanted == "none":
        return "none", "IIC_DIST_BUILD=none", None
    toolkit = cuda_toolkit() if wanted != "cpu" else None
    if toolkit is not None:
        os.environ["CUDA_HOME"] = str(toolkit)  # torch's module reads it when it is imported, and guesses else
    problem = why_no_compiler() or (why_no_cuda(toolkit) if wanted != "cpu" else "IIC_DIST_BUILD=cpu")
    if problem is None:
        return "cuda", f"toolkit {toolkit}", toolkit
    if wanted == "cuda" or (wanted == "cpu" and why_no_compiler()):
        sys.exit(f"IIC_DIST_BUILD={wanted}: {problem}")
    return ("none" if why_no_compiler() else "cpu"), problem, None


def extension(kind: str, toolkit: Path | None) -> dict[str, Any]:
    """The arguments of setup() that build it."""
    if kind == "cuda":
        known = subprocess.check_output([f"{toolkit}/bin/nvcc", "--list-gpu-arch"], text=True)
        targets = [number for number, name in ARCHITECTURES.items() if name in known]
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(targets) + "+PTX")
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    host = ["-O3", "-std=c++20", "-Wall", *(["-fopenmp"] if sys.platform == "linux" else [])]
    files = [*sorted(glob("csrc/*.cpp")), *sorted(glob("csrc/cpu/*.cpp"))]
    options: dict[str, Any] = {
        "depends": [path for path in glob("csrc/**", recursive=True) if Path(path).is_file()],
        "extra_compile_args": {"cxx": host, "nvcc": ["-O3", "-std=c++20", "-lineinfo"]},
    }
    if kind == "cuda":
        files += sorted(glob("csrc/cuda/*.cu"))
        options["define_macros"] = [("IIC_DIST_CUDA", torch.version.cuda)]
    module = (CUDAExtension if kind == "cuda" else CppExtension)("iic_dist._C", files, **options)
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


if __name__ == "__main__":
    kind, why, toolkit = choose()
    print(f"iic_dist extension: {kind} ({why})", flush=True)
    setup(**({} if kind == "none" else extension(kind, toolkit)))
