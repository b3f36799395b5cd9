"""All that a CUDA GPU can say about this tree, in less than 9 minutes, without a network or an installation.

    make gpu PYTHON=python3         or: python3 benchmarks/gpu.py [--output FILE]
    make gpu CIFAR10=cifar10-jpeg.tar.xz                    or: --cifar10 DATA; again until it has ended

Builds the extension in place, runs the tests marked `gpu`, the benchmarks, a short training and compute-sanitizer,
each in a process of its own and within a time limit, and writes one JSON after each step. With CIFAR-10 what the JSON
has of this commit and device is not done again, and `train_cifar10.py` gets what is left of the nine minutes.
Exit code 0: nothing failed; 1: a step failed; 2: no GPU here; 75: CIFAR-10 goes on with the same command.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from train_cifar10 import UNFINISHED

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {
    "build": 140,
    "tests": 105,
    "bench_iic": 65,
    "bench_nt_xent": 45,
    "bench_augment": 30,
    "doctor": 15,
    "training": 30,
    "memcheck": 35,
    "racecheck": 60,
}
"""Share of each step; what one leaves over goes to the next ones. Together 525 s."""
CIFAR10, LEAST_SECONDS = "cifar10", 60
"""The step that takes what all others leave, if that is not too little to be worth a start."""
BENCHMARKS = ("bench_iic", "bench_nt_xent", "bench_augment")
WITH_RIVALS = ("bench_iic", "bench_nt_xent")
LAST_WORDS = 8
"""Seconds between the request to stop and the end by force, within the share."""
TAIL = 6000
"""Characters of a step's output that the JSON keeps."""
SMALL_SHAPES = [(3500, 10), (70, 20), (70, 40), (1800, 70), (900, 100), (900, 150), (70, 200)]
"""(N, K) of every kernel family for compute-sanitizer; with 5 sub-heads the first two sizes of N make a block of the
first kernels take two tiles, so that a missing barrier between tiles would show."""
LIBRARY_CLUSTERS, LIBRARY_BYTES = 160, 1024
"""Above these K of IIC and bytes of a row of NT-Xent the library multiplies."""
SMALL_ROWS, SMALL_DIMENSIONS = 9000, [128, 200, 300, 600]
"""2G and D likewise for NT-Xent, of which two of the ops' blocks of rows are looked at: enough columns for several
tiles a block, each shape of block, and the library."""
SMALL_VIEWS = [(8, 1, 9, 32), (8, 3, 97, 64), (260, 3, 9, 66), (8, 3, 9, 96)]
"""Images, channels, side and side of the views likewise: everything in shared memory; all but the image; all but the
blurred planes, where more views than blocks make a block take two; no plane."""


@dataclass
class Step:
    """One process to run, and what to make of it.

    Attributes:
        why_not: reason to leave it out, or None.
        figures: reads what the process left, given all its output.
    """

    name: str
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    why_not: str | None = None
    figures: Callable[[str], dict[str, Any]] = lambda output: {}


def missing(*modules: str) -> str | None:
    """Which of these modules are not installed, as a reason."""
    names = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(names)}" if names else None


def stop(process: subprocess.Popen[str]) -> None:
    """End a process and its children, giving it the time to write down what it has."""
    for number, seconds in ((signal.SIGINT, LAST_WORDS), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    # A child that left the group may still hold the pipe: nothing here waits for it.


def run(step: Step, deadline: float) -> dict[str, Any]:
    """Run a step until it ends or its deadline (time.monotonic) comes."""
    if step.why_not is not None:
        return {"status": "skipped", "reason": step.why_not}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **step.environment}
    started = time.monotonic()
    limit = max(1.0, deadline - LAST_WORDS - started)
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
        )
        try:
            process.wait(limit)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            if process.poll() is None:
                stop(process)
        log.seek(0)
        output = log.read()
    result: dict[str, Any] = {
        "status": "ok" if process.returncode == 0 and not timed_out else "failed",
        "return_code": process.returncode,
        "seconds": round(time.monotonic() - started, 1),
        "limit_seconds": round(limit, 1),
        "timed_out": timed_out,
        "command": list(step.command),
        "output_tail": output[-TAIL:],
    }
    try:
        return result | step.figures(output)
    except (OSError, ValueError, ElementTree.ParseError) as error:
        return result | {"status": "failed", "no_figures": f"{type(error).__name__}: {error}"}


def read_json(path: Path) -> Callable[[str], dict[str, Any]]:
    return lambda output: {"figures": json.loads(path.read_text())}


def read_tests(path: Path) -> Callable[[str], dict[str, Any]]:
    """Count the outcomes in pytest's XML, and name what failed and the files that could not be collected.

    A file that wants a package which is not installed here is named, and fails nothing.
    """

    def figures(output: str) -> dict[str, Any]:
        counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
        failed: dict[str, str] = {}
        not_collected: dict[str, str] = {}
        slowest: dict[str, float] = {}
        for case in ElementTree.parse(path).iterfind(".//testcase[@name]"):
            name = f"{case.get('classname')}::{case.get('name')}"
            slowest[name] = float(case.get("time") or 0)
            bad = next((child for child in case if child.tag in ("failure", "error")), None)
            if bad is not None and bad.get("message") == "collection failure":
                lines = [line[1:].strip() for line in (bad.text or "").splitlines() if line.startswith("E ")]
                not_collected[str(case.get("name"))] = lines[-1] if lines else str(bad.text)[-300:]
            elif bad is not None:
                counts["failed"] += 1
                failed[name] = str(bad.get("message"))[:500]
            else:
                counts["skipped" if case.find("skipped") is not None else "passed"] += 1
        lacks_package = all(re.match(r"ModuleNotFoundError: (?!.*'iic_dist)", why) for why in not_collected.values())
        good = not failed and lacks_package and counts["passed"] and "KeyboardInterrupt" not in output
        return {
            "status": "ok" if good else "failed",
            "figures": {
                **counts,
                "failures": failed,
                "not_collected": not_collected,
                "slowest_seconds": dict(sorted(slowest.items(), key=lambda item: -item[1])[:10]),
            },
        }

    return figures


def read_sanitizer(output: str) -> dict[str, Any]:
    """What compute-sanitizer sums up; a machine that it cannot look into is no failure of the kernels."""
    if "Device not supported" in output:
        return {"status": "skipped", "reason": "compute-sanitizer: Device not supported"}
    summary = re.findall(r"={9} (?:\w+ )?SUMMARY: (.*)", output)
    if not summary:
        raise ValueError("no summary by compute-sanitizer")
    return {"figures": {"summary": summary}}


def steps(folder: Path, capability: str, again: bool = False) -> list[Step]:
    """All steps, in order; `folder` is for what they write."""
    python = sys.executable
    marked = [str(path) for path in sorted(ROOT.glob("tests/**/test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    pytest = ["-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    pytest += ["--continue-on-collection-errors", f"--junitxml={folder / 'tests.xml'}"]
    run_folder = ["--run.root", str(folder), "--run.name", "digits", "--monitor.progress", "false"]
    training = ["-m", "iic_dist.train", "--run.device", "cuda", "--train.epochs", "10", *run_folder]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    small = [python, str(Path(__file__).resolve()), "--small-shapes"]
    # racecheck stumbles over the library's own products (an illegal access in the first bf16 one, seen with CUDA 13.0)
    shapes = {"memcheck": [*small, "all"], "racecheck": [*small, "own"]}
    options = ["--kernel-name", "kns=iic_dist", "--error-exitcode", "1"]  # the namespace, in the mangled name
    own = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
    checks = [
        Step(
            tool,
            [sanitizer or "", "--tool", tool, *own[tool], *options, *shapes[tool]],
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # else all tensors lie in one block, and no access is outside it
            None if sanitizer else "compute-sanitizer is not installed",
            figures=read_sanitizer,
        )
        for tool in own
    ]
    return [
        Step(
            "build",
            [python, "setup.py", "build_ext", "--inplace", "--force"],
            {"IIC_DIST_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": capability},
            "--again" if again else None,
        ),
        Step("tests", [python, *pytest, *marked], figures=read_tests(folder / "tests.xml")),
        *(
            Step(
                name,
                [
                    *(python, f"benchmarks/{name}.py", "--device", "cuda", "--output", str(folder / f"{name}.json")),
                    *(["--fused-only"] if again and name in WITH_RIVALS else []),
                ],
                figures=read_json(folder / f"{name}.json"),
            )
            for name in BENCHMARKS
        ),
        Step("doctor", [python, "-m", "iic_dist.doctor"]),
        Step(
            "training",
            [python, *training],
            why_not=missing("jsonargparse", "yaml", "tensorboard", "matplotlib", "tqdm", "sklearn", "scipy"),
            figures=read_json(folder / "digits" / "result.json"),
        ),
        *checks,
    ]


def run_small_shapes(library: bool) -> None:
    """Forward and backward of every kernel family; for compute-sanitizer.

    Args:
        library: whether to run what multiplies with the library too; else of that only the kernels that use shared
            memory.
    """
    import torch
    from bench_iic import FORMS, make_logits
    from bench_iic import step as train
    from bench_nt_xent import make_embeddings

    from iic_dist.ops import iic, nt_xent

    for n, k in SMALL_SHAPES:
        if k > LIBRARY_CLUSTERS and not library:
            sums = torch.rand(2 * k * k + 1, device="cuda")
            terms = iic.implementation("fused", sums.device).iic_information(sums, k, 1.0)
            assert all(term.isfinite().all() for term in terms)
            print(f"IIC information {k}", flush=True)
            continue
        for dtype in (torch.float32, torch.bfloat16):
            a, b = make_logits(n, k, "cuda", dtype)
            twice = torch.cat([b, b]).detach().requires_grad_()
            results = train(FORMS["impl=fused"], a, twice)
            assert all(result.isfinite().all() for result in results)
            print(f"IIC {n} x {k} {dtype}", flush=True)
    ops = nt_xent.implementation("fused", torch.device("cuda"))
    for dimensions in SMALL_DIMENSIONS:
        for dtype in (torch.float32, torch.bfloat16):
            if dimensions * dtype.itemsize > LIBRARY_BYTES and not library:
                continue
            z = torch.cat(make_embeddings(SMALL_ROWS, "cuda", dtype, dimensions)).detach()
            place = (100, 200, 0.5 * dimensions)  # the rows are not normalised
            log_sum_exp, positive = ops.nt_xent_rows(z, *place)
            all_log_sum_exp = log_sum_exp.repeat(SMALL_ROWS // 200)
            grad = ops.nt_xent_rows_grad(z, all_log_sum_exp, *place)
            assert all(result.isfinite().all() for result in (log_sum_exp, positive, grad))
            print(f"NT-Xent {SMALL_ROWS} x {dimensions} {dtype}", flush=True)
    make_small_views("cuda")


def make_small_views(device: str) -> None:
    """Two views of a few images in every layout of the native op, with all that it can do."""
    import torch
    from view_specs import EVERYTHING, GRAY

    from iic_dist.views.views import Views

    for count, channels, side, size in SMALL_VIEWS:
        images = torch.arange(count * channels * side * side, device=device).to(torch.uint8)
        rows = torch.arange(count, device=device)
        everything = replace(EVERYTHING if channels == 3 else GRAY, size=size)
        gradients = replace(everything, sobel=True, mean=(), std=())
        for dtype, spec in ((torch.float32, everything), (torch.bfloat16, gradients)):
            views = Views(spec, spec, spec, repeats=1, seed=0, impl="fused")
            made = views.training(images.view(count, channels, side, side), rows, rows, 0, dtype=dtype)
            assert made.isfinite().all()
            print(f"views {count} x {channels} x {side} px to {size} px {dtype}", flush=True)


def find_gpu() -> tuple[str, str]:
    """Name and compute capability of the GPU.

    Raises:
        SystemExit: with code 2 and one line, where there is none.
    """
    try:
        import torch
    except ImportError as error:
        why = f"no torch in {sys.executable} ({error})"
    else:
        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            return torch.cuda.get_device_name(), f"{major}.{minor}"
        why = f"torch {torch.__version__} in {sys.executable} sees no CUDA GPU"
    print(f"make gpu needs a CUDA GPU: {why}", file=sys.stderr)
    sys.exit(2)


def describe(name: str, result: dict[str, Any]) -> str:
    """One line for a person."""
    figures = result.get("figures", {})
    details = [result["reason"]] if "reason" in result else [f"{result['seconds']} s"]
    details += ["stopped at its time limit"] if result.get("timed_out") else []
    if name == "tests" and figures:
        details += [f"{figures[key]} {key}" for key in ("passed", "failed", "skipped")]
        details += [f"not collected: {path} ({why})" for path, why in figures["not_collected"].items()]
    return f"{name:12}{result['status']:9}{', '.join(details)}"


def cifar10_step(data: Path, root: Path, seconds: float) -> Step:
    """Train on CIFAR-10 for so long, or go on with it; see `train_cifar10`."""
    script = [sys.executable, "benchmarks/train_cifar10.py", "--data", str(data.resolve()), "--root", str(root)]

    def figures(output: str) -> dict[str, Any]:
        result = root / "runs" / "cifar10" / "result.json"
        return {"figures": json.loads(result.read_text())} if result.exists() else {}

    return Step(CIFAR10, [*script, "--seconds", str(round(seconds))], figures=figures)


def done_before(output: Path, provenance: dict[str, Any]) -> dict[str, Any]:
    """Return the steps that a report of the same commit and device has, and that did not fail."""
    try:
        before = json.loads(output.read_text())
    except (OSError, ValueError):
        return {}
    if any(before["provenance"].get(name) != provenance.get(name) for name in ("commit", "device")):
        return {}
    built = any((ROOT / "iic_dist").glob("_C*.so"))
    kept = {name: result for name, result in before["steps"].items() if result["status"] in ("ok", "skipped")}
    return kept if built else {name: result for name, result in kept.items() if name != "build"}


def train_on_cifar10(data: Path, root: Path, deadline: float) -> dict[str, Any]:
    """Give CIFAR-10 what is left of the time; "unfinished" where the same command goes on with it."""
    left = deadline - time.monotonic() - 4 * LAST_WORDS  # it needs some to save
    if left < LEAST_SECONDS:
        return {"status": "unfinished", "reason": "no time was left: the same command again"}
    result = run(cifar10_step(data, root, left), deadline)
    if result["return_code"] == UNFINISHED:
        result["status"] = "unfinished"
    return result


def run_all(output: Path, again: bool, cifar10: Path | None = None, root: Path = ROOT / "build" / "cifar10") -> int:
    """Run every step; return the exit code.

    Args:
        output: JSON file of the report.
        again: Leave out the build and the rivals.
        cifar10: Archive or folder to train on in the end, with what was done before left out; None: it is not.
        root: Folder of that training.
    """
    started = time.monotonic()
    device, capability = find_gpu()
    from provenance import of as provenance_of

    results: dict[str, Any] = {}
    provenance = provenance_of("cuda")
    del provenance["extension"]  # it is still to be built; the benchmarks say which one they ran
    report: dict[str, Any] = {"provenance": provenance, "steps": results}
    deadline = started
    before = {} if cifar10 is None else done_before(output, provenance)
    output.parent.mkdir(parents=True, exist_ok=True)
    print(f"{device}, compute capability {capability}", flush=True)
    with tempfile.TemporaryDirectory() as folder:

        def note(name: str, result: dict[str, Any]) -> None:
            results[name] = result
            report["seconds"] = round(time.monotonic() - started, 1)
            output.write_text(json.dumps(report, indent=2) + "\n")
            print(describe(name, result), flush=True)
            if result["status"] == "failed" or name in (*BENCHMARKS, "doctor"):
                print(result["output_tail"], flush=True)

        results.update(before)
        for step in steps(Path(folder), capability, again):
            if step.name in before:
                continue
            deadline += SECONDS[step.name]
            try:
                result = run(step, deadline)
            except OSError as error:  # the program is not there, or the disk is full
                result = {"status": "failed", "reason": str(error), "output_tail": ""}
            note(step.name, result)
        if cifar10 is not None:
            note(CIFAR10, train_on_cifar10(cifar10, root, started + sum(SECONDS.values())))
    print(f"{report['seconds']} s; written to {output}")
    statuses = {result["status"] for result in results.values()}
    return 1 if "failed" in statuses else UNFINISHED if "unfinished" in statuses else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--again", action="store_true", help="leave out the build and the rivals: 3 minutes")
    parser.add_argument("--cifar10", type=Path, metavar="DATA", help="archive or folder of CIFAR-10's images")
    parser.add_argument("--small-shapes", choices=("all", "own"), help="only what compute-sanitizer looks at")
    options = parser.parse_args()
    if options.small_shapes:
        run_small_shapes(options.small_shapes == "all")
    else:
        if options.cifar10 is not None and not options.cifar10.exists():
            parser.error(f"--cifar10 {options.cifar10}: there is no such file or folder")
        sys.exit(run_all(options.output.resolve(), options.again, options.cifar10))


if __name__ == "__main__":
    main()
