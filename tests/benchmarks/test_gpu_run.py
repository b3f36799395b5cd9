"""benchmarks/gpu.py where there is no GPU: its one line, and what it makes of steps that fail."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import gpu  # benchmarks/gpu.py: pytest's pythonpath in pyproject.toml
import pytest

from iic_dist.ops import augment

SCRIPT = Path(gpu.__file__)


def test_without_a_gpu_it_is_one_line() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, timeout=60)
    assert run.returncode == 2
    assert run.stdout == ""
    [line] = run.stderr.splitlines()
    assert line.startswith("make gpu needs a CUDA GPU: ")


def test_the_whole_stays_under_nine_minutes(tmp_path: Path) -> None:
    assert [step.name for step in gpu.steps(tmp_path, "9.0")] == list(gpu.SECONDS)
    assert sum(gpu.SECONDS.values()) <= 9 * 60 - 10


def test_the_gpu_tests_of_every_op_are_run(tmp_path: Path) -> None:
    [tests] = [step for step in gpu.steps(tmp_path, "9.0") if step.name == "tests"]
    assert {"test_iic_cuda.py", "test_nt_xent_cuda.py", "test_augment_cuda.py"} <= {
        Path(word).name for word in tests.command
    }


def test_the_benchmarks_want_none_of_the_packages_that_only_a_comparison_needs() -> None:
    program = f"import sys; sys.modules.update(kornia=None, torchvision=None); import {', '.join(gpu.BENCHMARKS)}"
    path = os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parents[1])])
    environment = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif("cpu" not in augment.DEVICES, reason="the extension is not built")
def test_the_small_views_are_made(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.make_small_views("cpu")
    assert capsys.readouterr().out.count("views ") == 2 * len(gpu.SMALL_VIEWS)


def test_a_step_that_hangs_is_stopped_with_its_children(tmp_path: Path) -> None:
    program = "import subprocess, time; subprocess.Popen(['sleep', '50']); print('here', flush=True); time.sleep(50)"
    started = time.monotonic()
    result = gpu.run(gpu.Step("doctor", [sys.executable, "-c", program]), started + gpu.LAST_WORDS + 1)
    assert time.monotonic() - started < gpu.LAST_WORDS + 5
    assert (result["status"], result["timed_out"]) == ("failed", True)
    assert "here" in result["output_tail"]


def test_a_step_that_cannot_run_says_why() -> None:
    result = gpu.run(gpu.Step("training", ["no-such-program"], why_not=gpu.missing("torch", "no_such_module")), 0)
    assert result == {"status": "skipped", "reason": "not installed: no_such_module"}


def test_a_missing_package_fails_no_other_test(tmp_path: Path) -> None:
    (tmp_path / "test_good.py").write_text("def test_good(): pass\n")
    (tmp_path / "test_lacking.py").write_text("import no_such_package\n")
    report = tmp_path / "report.xml"
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", f"--junitxml={report}"]
    step = gpu.Step(
        "tests", [*pytest, "--continue-on-collection-errors", str(tmp_path)], {}, None, gpu.read_tests(report)
    )
    result = gpu.run(step, time.monotonic() + 60)
    assert result["status"] == "ok", result["output_tail"]
    assert (result["figures"]["passed"], result["figures"]["failed"]) == (1, 0)
    [why] = result["figures"]["not_collected"].values()
    assert why == "ModuleNotFoundError: No module named 'no_such_package'"
    (tmp_path / "test_good.py").write_text("def test_bad(): assert False\n")
    assert gpu.run(step, time.monotonic() + 60)["status"] == "failed"


def test_what_compute_sanitizer_says() -> None:
    summary = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert gpu.read_sanitizer(summary)["figures"]["summary"] == ["0 hazards displayed (0 errors, 0 warnings)"]
    assert gpu.read_sanitizer("========= Error: Device not supported.")["status"] == "skipped"
