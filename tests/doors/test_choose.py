"""Several K in one run: their heads, what the run says of them, and the command that chooses; real files."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path

import pytest
import rank_tasks
import torch
from PIL import Image
from ranks import Ranks

from iic_dist import choose, load, train
from iic_dist.config.build import build_model, load_data
from iic_dist.config.command_line import parse
from iic_dist.config.complete import complete
from iic_dist.distributed import Place

SMALL = [
    *("--data.batch_size", "448", "--train.epochs", "2", "--model.sub_heads", "3", "--monitor.progress", "false"),
    *("--monitor.kmeans", "false", "--run.threads", "1"),
]


def call(
    command: object, name: str, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[str, str]:
    monkeypatch.setattr(sys, "argv", [name, *options])
    with contextlib.suppress(SystemExit):
        command.main()  # type: ignore[attr-defined]
    output = capsys.readouterr()
    return output.out, output.err


def test_a_run_with_several_k_recommends_one_and_choose_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [*SMALL, "--model.num_clusters", "4,10,6", "--run.name", "several"]
    said, _ = call(train, "train", options, monkeypatch, capsys)
    folder = tmp_path / "runs" / "several"
    result = json.loads((folder / "result.json").read_text())
    assert [choice["num_clusters"] for choice in result["choices"]] == [4, 6, 10]
    (decision,) = re.findall(r"(?:nothing was found: |K = \d+ is recommended: ).*", said)
    recommended = [choice["num_clusters"] for choice in result["choices"] if choice["recommended"]]
    assert recommended == ([] if decision.startswith("nothing") else [result["num_clusters"]])
    for choice in result["choices"]:
        assert sum(choice["sizes"]) == result["num_images"]
        assert len(choice["sizes"]) == choice["num_clusters"]
        assert choice["compared"] == 3
    assert f"K = {result['num_clusters']} is " in decision

    said, _ = call(choose, "choose", ["--run", str(folder)], monkeypatch, capsys)
    for choice in result["choices"]:
        (row,) = [line for line in said.splitlines() if line.split()[:1] == [str(choice["num_clusters"])]]
        assert f"{choice['information_share']:.3f} ln K" in row
        assert f"{choice['agreement']:.3f} ± {choice['agreement_error']:.3f}" in row
    assert decision in said
    with Image.open(folder / "choices.png") as picture:
        assert picture.width > 800

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for k in (4, 6, 10):
        assert lines[-1][f"evaluation_clustering_{k}/used_clusters"] <= k
        assert 0 < lines[-1][f"evaluation_clustering_{k}/confidence"] <= 1

    _, error = call(choose, "choose", ["--run", "runs/none"], monkeypatch, capsys)
    assert error == "error: runs/none: not a run, there is no runs/none/config.yaml\n"


def test_several_k_are_compared_by_the_heads_on_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every K gets new heads, and all commands take those: three of the training's sub-heads, five of theirs."""
    monkeypatch.chdir(tmp_path)
    later = ["--neighbours.steps", "20", "--neighbours.batch_size", "256", "--neighbours.sub_heads", "5"]
    options = [*SMALL, *later, "--model.num_clusters", "4,10,6", "--run.name", "several", "--train.epochs", "1"]
    said, _ = call(train, "train", options, monkeypatch, capsys)
    folder = tmp_path / "runs" / "several"
    result = json.loads((folder / "result.json").read_text())
    assert [choice["num_clusters"] for choice in result["choices"]] == [4, 6, 10]
    assert all(choice["compared"] == 5 for choice in result["choices"])
    assert f"K = {result['num_clusters']} is recommended: " in said
    said, _ = call(choose, "choose", ["--run", str(folder)], monkeypatch, capsys)
    for choice in result["choices"]:
        (row,) = [line for line in said.splitlines() if line.split()[:1] == [str(choice["num_clusters"])]]
        assert f"{choice['agreement']:.3f} ± {choice['agreement_error']:.3f}" in row
    run = load(folder, "cpu")
    assert run.num_clusters == result["num_clusters"]
    assert run.model.shapes == {f"clustering_{k}": (5, k) for k in (4, 10, 6)}


def test_a_run_with_one_k_leaves_nothing_to_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    call(train, "train", [*SMALL, "--train.epochs", "1", "--run.name", "one"], monkeypatch, capsys)
    _, error = call(choose, "choose", ["--run", "runs/one"], monkeypatch, capsys)
    assert error.startswith("error: --run runs/one: it was trained with one number of clusters, 10; train with several")
    assert error.count("\n") == 1


def test_one_k_keeps_its_names_and_first_weights() -> None:
    """A head for one K is called clustering, and comes first, so its weights are those it always had."""
    config = parse([])
    images = load_data(config, Place()).train
    one = build_model(complete(config, images), 1, 8)
    config.model.num_clusters = [10, 20]
    two = build_model(complete(config, images), 1, 8)
    assert list(one.heads) == ["clustering", "overclustering", "contrastive"]
    assert list(two.heads) == ["clustering_10", "clustering_20", "overclustering", "contrastive"]
    assert torch.equal(one.heads["clustering"].linear.weight, two.heads["clustering_10"].linear.weight)


def test_several_k_and_a_prior_are_the_same_on_one_and_four_ranks(ranks: Ranks) -> None:
    shared = ["--train.precision", "float64", "--model.norm", "none", "--data.batch_size", "128"]
    sizes = "[1,1,1,1,1,2,2,2,2,5]"
    for options in (["--model.num_clusters", "4,6"], ["--loss.prior", sizes], ["--loss.prior", "free"]):
        arguments = [*shared, "--model.sub_heads", "3", *options]
        one = rank_tasks.training_losses(0, None, arguments, 4)
        for result in ranks.run(4, rank_tasks.training_losses, arguments, 4):
            assert result["losses"] == pytest.approx(one["losses"], rel=0, abs=1e-10)
            torch.testing.assert_close(result["parameters"], one["parameters"], rtol=0, atol=1e-8)
            assert result["choices"] == one["choices"]
