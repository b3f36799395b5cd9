"""Exported runs: ONNX against the run itself, the preprocessing of every policy, safetensors."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from iic_dist import export, load
from iic_dist.prediction.export import EvaluationView
from iic_dist.views.policies import policy


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("digits", {}),
        ("simclr", {"mean": [0.4], "std": [0.3]}),
        ("simclr", {"size": 11}),
        ("iic", {}),
        ("iic", {"size": 20, "sobel": True}),
        ("digits", {"sobel": True, "size": 24}),
    ],
)
def test_the_view_is_that_of_an_evaluation(name: str, options: dict, channels: int) -> None:
    """Sides of 29 and 96: crops at odd places, and the policy's other branch for large images."""
    for side in (29, 96):
        views = policy(name, image_size=side, channels=channels, seed=0, **options)
        generator = torch.Generator().manual_seed(side)
        images = torch.randint(0, 256, (4, channels, side, side), generator=generator, dtype=torch.uint8)
        expected = views.evaluation(images, torch.arange(4))
        made = EvaluationView(views.second, side)(images)
        torch.testing.assert_close(made, expected, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("run", ["gray_run", "colour_run"])
def test_onnx_says_what_the_run_says(
    run: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    folder: Path = request.getfixturevalue(run)
    path = tmp_path / "m.onnx"
    monkeypatch.setattr(sys, "argv", ["export", "--run", str(folder), "--format", "onnx", "--output", str(path)])
    export.main()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [each.type for each in session.get_inputs()] == ["tensor(uint8)"]
    trained = load(folder, "cpu")
    for batch in (1, 2, 7):
        shape = (batch, trained.channels, trained.image_size, trained.image_size)
        images = np.random.default_rng(batch).integers(0, 256, shape, dtype=np.uint8)
        [probabilities] = session.run(["probabilities"], {"images": images})
        np.testing.assert_allclose(probabilities, trained.predict(images).probabilities, atol=1e-5)


def test_safetensors_hold_the_weights_and_the_config(
    gray_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")
    path = tmp_path / "m.safetensors"
    monkeypatch.setattr(
        sys, "argv", ["export", "--run", str(gray_run), "--format", "safetensors", "--output", str(path)]
    )
    export.main()
    assert "1 x 8 x 8 uint8; 3 clusters" in capsys.readouterr().out
    trained = load(gray_run, "cpu")
    with safetensors.safe_open(path, "pt") as file:
        about = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = trained.model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert about["selected_sub_head"] == str(trained.selected)
    assert yaml.safe_load(about["config"]) == yaml.safe_load((gray_run / "config.yaml").read_text())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--run", "nowhere"], "nowhere: not a run"),
        (["--output", "no/m.onnx"], "--output no/m.onnx: there is no folder no"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], says: str, gray_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["export", "--run", str(gray_run), "--format", "onnx", *arguments])
    with pytest.raises(SystemExit) as ended:
        export.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert says in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("kind", ["onnx", "safetensors"])
def test_a_library_that_is_not_there_is_named(
    kind: str, gray_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["export", "--run", str(gray_run), "--format", kind])
    with pytest.raises(SystemExit):
        export.main()
    assert f"error: --format {kind} needs {kind}" in capsys.readouterr().err
