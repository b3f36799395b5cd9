"""benchmarks/side_by_side.py: what counts as agreement, whose turn it is, and what a run that is cut off leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_augment
import pytest
import side_by_side
import torch


def test_the_error_is_that_of_the_worst_result() -> None:
    wanted = [torch.tensor([3.0, 4.0]).double(), torch.tensor(2.0).double()]
    values = [torch.tensor([3.0, 4.5]), torch.tensor(2.1)]
    assert side_by_side.relative_error(values, wanted) == pytest.approx(0.1)
    side_by_side.assert_parity(values, wanted, 0.11)
    with pytest.raises(AssertionError, match=r"relative error 1\.0e-01, 0\.09 allowed"):
        side_by_side.assert_parity(values, wanted, 0.09)


def test_nan_is_no_agreement() -> None:
    """The largest of some errors is not NaN in Python where one of them is: max(1e-9, nan) is 1e-9."""
    with pytest.raises(AssertionError, match="nan"):
        side_by_side.assert_parity([torch.ones(2), torch.tensor([1.0, torch.nan])], [torch.ones(2)] * 2, 1.0)


def test_works_take_turns_and_have_their_least_number_of_rounds() -> None:
    seen: list[str] = []
    figures = side_by_side.in_turn({name: (lambda name=name: seen.append(name)) for name in "ab"}, seconds=0, least=3)
    assert "".join(seen) == "ababab"
    for row in figures.values():
        assert row["runs"] == 3
        assert 0 <= row["lower_quartile_ms"] <= row["median_ms"]


def test_a_run_on_a_gpu_that_is_cut_off_leaves_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side.provenance, "of", lambda device: {"device": device})

    def measure(number: int) -> dict[str, Any]:
        if number == 2:
            raise KeyboardInterrupt
        return {"form": "impl=fused", "number": number}

    path = tmp_path / "figures.json"
    with pytest.raises(KeyboardInterrupt):
        side_by_side.to_file("impl=fused", path, [(0,), (1,), (2,)], measure, print)
    assert json.loads(path.read_text()) == {
        "provenance": {"device": "cuda"},
        "rows": [{"form": "impl=fused", "number": 0}, {"form": "impl=fused", "number": 1}],
    }


@pytest.mark.parametrize("failed", ["impl=fused", "torch.compile"])
def test_only_the_form_that_must_work_fails_the_benchmark(
    failed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side.provenance, "of", lambda device: {})
    tables: list[list[dict[str, Any]]] = []

    def run() -> None:
        side_by_side.to_file(
            "impl=fused",
            tmp_path / "figures.json",
            [(failed,)],
            lambda form: {"form": form, "error": "E"},
            tables.append,
        )

    if failed == "impl=fused":
        with pytest.raises(SystemExit, match="impl=fused failed"):
            run()
    else:
        run()
    assert tables == [[{"form": failed, "error": "E"}]]


def test_the_command_line_names_device_time_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def main(*options: str) -> None:
        monkeypatch.setattr("sys.argv", ["bench", *options])
        side_by_side.main("iic", lambda *arguments: calls.append(arguments), lambda *a: calls.append(a), seconds=3)

    main()
    main("--device", "cuda")
    main("--device", "cuda", "--fused-only")
    main("--seconds", "0.5", "--output", str(tmp_path / "new" / "figures.json"))
    results = Path(side_by_side.__file__).parent / "results"
    new = tmp_path / "new" / "figures.json"
    assert calls == [
        (results / "iic_cpu.json", 3),
        (results / "iic_cuda.json", False),
        (results / "iic_cuda.json", True),
        (new, 0.5),
    ]
    assert new.parent.is_dir()


def test_all_forms_of_views_are_of_one_chain() -> None:
    """Ours is the policy `simclr`, by name: another strength there would compare unequal work."""
    crop, flip, applied, gray, normalise = bench_augment.torchvision_chain(64).transforms[1:]
    [jitter] = applied.transforms
    views = bench_augment.our_views(64, "torch")
    spec = views.first
    assert spec == views.second
    assert (spec.size, spec.crop_area, spec.crop_ratio) == (crop.size[0], crop.scale, crop.ratio)
    assert (spec.flip, spec.jitter_probability, spec.gray) == (flip.p, applied.p, gray.p)
    for name in ("brightness", "contrast", "saturation"):
        strength = getattr(spec, name)
        assert getattr(jitter, name) == pytest.approx((1 - strength, 1 + strength))
    assert jitter.hue == (-spec.hue, spec.hue)
    assert (*spec.mean * 3, *spec.std * 3) == (*normalise.mean, *normalise.std)
    assert not any((spec.moves, spec.blur, spec.sobel, spec.crop_sides))
