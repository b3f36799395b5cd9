"""benchmarks/gpu.py where there is no GPU: its one line, and what it makes of steps that fail."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import gpu  # benchmarks/gpu.py: pytest's pythonpath in pyproject.toml

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
