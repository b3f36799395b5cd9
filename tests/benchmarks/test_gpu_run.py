"""benchmarks/gpu.py where there is no GPU: its one line, and what it makes of steps that fail."""

from __future__ import annotations

import json
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


def pretend_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every step succeed at once; return the list that their names go into."""
    ran: list[str] = []

    def run(step: gpu.Step, deadline: float) -> dict[str, object]:
        ran.append(step.name)
        code = gpu.UNFINISHED if step.name == gpu.CIFAR10 else 0
        return {"status": "failed" if code else "ok", "return_code": code, "seconds": 1, "output_tail": ""}

    monkeypatch.setattr(gpu, "find_gpu", lambda: ("a GPU", "9.0"))
    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr("provenance.of", lambda device: {"device": "a GPU", "commit": "1234", "extension": None})
    return ran


def test_cifar10_comes_last_and_goes_on_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, output = pretend_a_gpu(monkeypatch), tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "iic_dist").mkdir()
    (tmp_path / "iic_dist" / "_C.so").touch()
    assert gpu.run_all(output, False, tmp_path, tmp_path) == gpu.UNFINISHED
    assert ran == [*gpu.SECONDS, gpu.CIFAR10]
    ran.clear()
    assert gpu.run_all(output, False, tmp_path, tmp_path) == gpu.UNFINISHED
    assert ran == [gpu.CIFAR10]
    report = json.loads(output.read_text())
    assert report["steps"].keys() == {*gpu.SECONDS, gpu.CIFAR10}
    assert report["steps"][gpu.CIFAR10]["status"] == "unfinished"
    ran.clear()
    (tmp_path / "iic_dist" / "_C.so").unlink()  # a fresh machine
    gpu.run_all(output, False, tmp_path, tmp_path)
    assert ran == ["build", gpu.CIFAR10]
    ran.clear()
    assert gpu.run_all(output, False) == 0  # without it, all is measured anew
    assert ran == list(gpu.SECONDS)


def test_steps_of_another_commit_are_done_again(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    output.write_text(json.dumps({"provenance": {"device": "a GPU", "commit": "1"}, "steps": {"x": {"status": "ok"}}}))
    assert gpu.done_before(output, {"device": "a GPU", "commit": "1"}) == {"x": {"status": "ok"}}
    assert gpu.done_before(output, {"device": "a GPU", "commit": "2"}) == {}
    output.write_text("{")
    assert gpu.done_before(output, {"device": "a GPU", "commit": "1"}) == {}


def test_no_images_are_one_line(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--cifar10", str(tmp_path / "no.tar")], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].endswith("no.tar: there is no such file or folder")
