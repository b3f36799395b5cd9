"""Runs of several stages on small digits: their order, their figures, going on after any stop, what may change."""

from __future__ import annotations

import itertools
import json
import operator
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import rank_tasks
import torch
from ranks import Ranks
from runs import assert_equal, timeless
from sklearn.datasets import load_digits

from iic_dist.config.build import RunData
from iic_dist.config.command_line import parse
from iic_dist.data.image_set import ImageSet
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.losses import step as step_losses
from iic_dist.models.feature_heads import FeatureSubHeads
from iic_dist.prediction.clusterer import Clusterer
from iic_dist.training import checkpoint, report, resume, stages
from iic_dist.training.run_folder import claimed, open_folder
from iic_dist.training.stop import StopSignals
from iic_dist.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

# 51 images: two epochs of four steps, six steps on neighbours, two epochs of four steps.
OPTIONS = [
    *("--data.batch_size", "12", "--train.epochs", "2", "--model.sub_heads", "2", "--monitor.progress", "false"),
    *("--model.num_overclusters", "6", "--model.projection_dim", "8", "--train.evaluate_every", "0"),
    *("--neighbours.steps", "6", "--neighbours.batch_size", "20", "--neighbours.sub_heads", "3", "--neighbours.k", "5"),
    *("--refine.epochs", "2", "--refine.confidence", "0.4", "--monitor.log_every", "1"),
]
TOWARDS = {
    "labels": ["--refine.towards", "labels", "--neighbours.whitening", "0.75"],
    "neighbours": ["--refine.towards", "neighbours", "--refine.contrastive", "0.5"],
}


def images() -> ImageSet:
    digits = load_digits(n_class=3)
    pixels = torch.from_numpy(digits.images[:51] * 255 / 16).to(torch.uint8).unsqueeze(1)
    return ImageSet("digits", pixels, torch.from_numpy(digits.target[:51]).long(), tuple("012"))


def trainer(*options: str) -> Trainer:
    config = parse([*OPTIONS, *options])
    return Trainer(config, RunData(images(), images()), Place(), torch.device("cpu"))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the runs."""
    for picture in ("show_views", "show_clusters", "show_choices"):
        monkeypatch.setattr(report, picture, lambda *arguments: None)


def run_and_keep_states(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str
) -> tuple[Trainer, dict, list[Path]]:
    """Train to the end and save after every step, each state in a folder of its own."""
    saved: list[Path] = []
    keep = resume.save

    def save_each(where: Path, state: Mapping[str, Any], loss: float | None = None) -> bool:
        saved.append(folder / f"{len(saved):02}")
        return keep(saved[-1], state, loss)

    with monkeypatch.context() as patched:
        patched.setattr(resume, "save", save_each)
        whole = trainer(*options, "--train.checkpoint_every_steps", "1", "--train.checkpoint_every", "1")
        result = whole.train(folder / "whole")
    assert result is not None
    return whole, result, saved


def state_in(folder: Path) -> dict[str, Any]:
    state = checkpoint.load_newest(folder / "checkpoints")
    assert state is not None
    return state


def accuracy(clusters: list[int]) -> float:
    """The best share of images whose cluster has the name of their digit, over all ways to name three clusters."""
    digits = images().labels
    assert digits is not None
    named = [[names[cluster] for cluster in clusters] for names in itertools.permutations(range(3))]
    return max(sum(map(operator.eq, each, digits.tolist())) for each in named) / len(clusters)


def without_seconds(result: dict[str, Any]) -> dict[str, Any]:
    stage_figures = {stage: {**figures, "seconds": 0} for stage, figures in result["stages"].items()}
    return {**result, "train_seconds": 0, "images_per_second": 0, "stages": stage_figures}


@pytest.mark.parametrize("towards", TOWARDS)
@pytest.mark.parametrize("every", [pytest.param(4, id="some"), pytest.param(1, marks=pytest.mark.slow, id="all")])
def test_a_run_that_dies_in_any_stage_ends_alike(
    towards: str, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: weights, optimiser, record, figures."""
    whole, result, saved = run_and_keep_states(tmp_path, monkeypatch, *TOWARDS[towards])
    assert whole.step == 8 + 6 + 8
    known = [(state["stage"], state["step"], state["stage_done"]) for state in map(state_in, saved)]
    assert sorted({step for _, step, _ in known}) == list(range(1, 23))
    assert {stage for stage, _, _ in known} == set(stages.STAGES)
    assert [stage for stage, _, done in known if done] == list(stages.STAGES)
    assert known == sorted(known, key=lambda each: (each[1], each[2]))
    ends = [place for place, (_, _, done) in enumerate(known) if done]
    for place in sorted({*range(0, len(saved), every), *ends}):
        resumed = trainer(*TOWARDS[towards])
        assert resumed.resume(saved[place])
        again = resumed.train(saved[place])
        where = f"after {known[place]}"
        assert again is not None, where
        assert without_seconds(again) == without_seconds(result), where
        if place < len(saved) - 1:  # the last one has nothing to do and leaves its optimiser as it is
            assert_equal(timeless(resumed.state_dict()), timeless(whole.state_dict()), where)


def test_the_result_has_the_figures_of_each_stage_and_k_means_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, result, saved = run_and_keep_states(tmp_path, monkeypatch)
    assert json.loads((tmp_path / "whole" / "result.json").read_text()) == result
    assert list(result["stages"]) == list(stages.STAGES)
    for figures in result["stages"].values():
        assert set(figures["accuracy"]) == {"selected", "mean", "std", "best"}
        assert {"nmi", "ari", "seconds"} <= set(figures)
    assert 0 < result["stages"]["neighbours"]["kmeans_accuracy"] <= 1
    assert [stage for stage, figures in result["stages"].items() if "kmeans_accuracy" in figures] == ["neighbours"]
    assert result["accuracy"] == result["stages"]["refine"]["accuracy"]
    assert result["epochs"] == 4
    for state in map(state_in, saved):  # the figures are those of the networks that were saved
        if state["stage_done"]:
            run = Clusterer(whole.config, state, torch.device("cpu"))
            assert run.selected == int(state["sub_heads"]["losses"]["clustering"].argmin())
            clusters = run.predict(images()).clusters
            assert result["stages"][state["stage"]]["accuracy"]["selected"] == accuracy(clusters.tolist())


def test_a_run_without_later_stages_is_what_it_was(tmp_path: Path) -> None:
    short = trainer("--neighbours.steps", "0", "--refine.epochs", "0")
    result = short.train(tmp_path)
    assert result is not None
    assert list(result["stages"]) == ["representation"]
    assert short.step == 8
    assert "clustering" in short.learner.sub_heads.losses


def test_stages_can_be_added_to_a_finished_run(tmp_path: Path) -> None:
    """One after the other, in the same folder, to the same end as in one go."""
    alone = ["--neighbours.steps", "0", "--refine.epochs", "0"]
    trainer(*alone).train(tmp_path / "parts")
    for options in (["--refine.epochs", "0"], []):
        later = trainer(*options)
        assert later.resume(tmp_path / "parts")
        later.train(tmp_path / "parts")
    whole = trainer()
    whole.train(tmp_path / "whole")
    assert_equal(timeless(later.state_dict()), timeless(whole.state_dict()))


class StopAt(StopSignals):
    """Receives a signal when it has been looked at some times."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    @property
    def received(self) -> str | None:
        self.looks -= 1
        return signal.Signals.SIGTERM.name if self.looks < 0 else None

    @received.setter
    def received(self, value: object) -> None:
        pass


@pytest.mark.parametrize("every", [pytest.param(7, id="some"), pytest.param(1, marks=pytest.mark.slow, id="all")])
def test_a_signal_at_any_time_is_heeded_and_the_run_ends_alike(every: int, tmp_path: Path) -> None:
    """Also while features are found, while the new heads are evaluated, and at the first step of a stage."""
    whole = trainer()
    looks = StopAt(10**6)
    result = whole.train(tmp_path / "whole", looks)
    assert result is not None
    seen = set()
    for number in range(1, 10**6 - looks.looks, every):
        folder = tmp_path / str(number)
        stopped = trainer()
        if stopped.train(folder, StopAt(number)) is not None:
            continue
        assert (folder / "PREEMPTED").exists()
        seen.add((stopped.stage, stopped.stage_done))
        resumed = trainer()
        assert resumed.resume(folder)
        again = resumed.train(folder)
        assert again is not None
        assert without_seconds(again) == without_seconds(result), f"{number} looks"
        assert_equal(timeless(resumed.state_dict()), timeless(whole.state_dict()), f"{number} looks")
    assert {stage for stage, _ in seen} == set(stages.STAGES)
    assert every > 1 or ("neighbours", True) in seen  # the new heads were in the network, but not evaluated


class _DuringNeighbours(StopSignals):
    """Receives a signal when a run has taken steps on neighbours."""

    run: Trainer

    @property
    def received(self) -> str | None:
        return signal.Signals.SIGTERM.name if self.run.step >= 8 + 3 else None

    @received.setter
    def received(self, value: object) -> None:
        pass


def test_seconds_before_a_signal_count(tmp_path: Path) -> None:
    """Those of a stage of neighbours that was stopped were once forgotten: 7 of 430 were reported."""
    stopped, stop = trainer(), _DuringNeighbours()
    stop.run = stopped
    assert stopped.train(tmp_path, stop) is None
    state = state_in(tmp_path)
    assert state["stage"] == "neighbours"
    assert state["train_seconds"] > state["stage_figures"]["representation"]["seconds"] + 0.005  # it is rounded to that


def test_refinement_towards_labels_learns_from_sure_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner once took the loss of pairs there: nobody had told it."""
    asked = []
    plain = step_losses.self_label_loss

    def recorded(*arguments: Any, **options: Any) -> Any:
        asked.append(options["confidence"])
        return plain(*arguments, **options)

    monkeypatch.setattr(step_losses, "self_label_loss", recorded)
    trainer(*TOWARDS["labels"]).train(tmp_path / "labels")
    assert asked == [0.4] * 8  # steps of the last stage alone
    trainer(*TOWARDS["neighbours"]).train(tmp_path / "neighbours")
    assert len(asked) == 8


def test_refinement_takes_one_second_view_however_many_the_first_stage_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of four views of an image were once split as if they were two."""
    seen = []
    plain = step_losses.self_label_loss

    def recorded(first: torch.Tensor, second: torch.Tensor, **options: Any) -> Any:
        seen.append((len(first), len(second)))
        return plain(first, second, **options)

    monkeypatch.setattr(step_losses, "self_label_loss", recorded)
    trainer(*TOWARDS["labels"], "--views.repeats", "3", "--train.epochs", "1").train(tmp_path)
    assert seen == [(12, 12)] * 8


def test_the_last_stage_trains_the_network_and_the_selected_sub_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _, saved = run_and_keep_states(tmp_path, monkeypatch, *TOWARDS["neighbours"])
    [before] = [
        state for state in map(state_in, saved) if (state["stage"], state["stage_done"]) == ("neighbours", True)
    ]
    assert list(whole.model.heads) == ["clustering", "contrastive"]
    head = whole.model.heads["clustering"]
    assert isinstance(head, FeatureSubHeads)
    assert head.shape == (1, 3)
    after = whole.model.state_dict()
    moved = {name for name, value in after.items() if name in before["model"] and name.startswith("backbone")}
    still = {name for name in moved if torch.equal(after[name], before["model"][name])}
    assert not still
    for part in ("mean", "projection", "shift"):
        name = f"heads.clustering.space.{part}"
        assert torch.equal(after[name], before["model"][name])


@pytest.mark.parametrize("stage", ["neighbours", "refine"])
@pytest.mark.parametrize(
    "wrong", ["backbone.convs.0.weight", "heads.clustering.linear.weight", "heads.clustering.space.shift"]
)
def test_a_checkpoint_of_another_network_is_one_line(
    stage: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, saved = run_and_keep_states(tmp_path, monkeypatch)
    [state] = [state for state in map(state_in, saved) if (state["stage"], state["stage_done"]) == (stage, True)]
    if wrong not in state["model"]:
        wrong = next(name for name in state["model"] if name.startswith("backbone") and name.endswith("weight"))
    state["model"] = {**state["model"], wrong: torch.zeros(3)}
    checkpoint.save(tmp_path / "bad" / "checkpoints", state["epoch"], state["step"], state)
    with pytest.raises(UsageError, match="its checkpoint is not of this network") as caught:
        trainer().resume(tmp_path / "bad")
    assert "\n" not in str(caught.value)


def test_a_state_of_before_there_were_stages_goes_on(tmp_path: Path) -> None:
    steady = ["--optim.schedule", "constant"]  # else the rate depends on how many epochs are asked for
    first = trainer("--neighbours.steps", "0", "--refine.epochs", "0", "--train.epochs", "1", *steady)
    first.train(tmp_path / "first")
    old = {key: value for key, value in first.state_dict().items() if "stage" not in key and "neighbour" not in key}
    del old["first_step"]
    checkpoint.save(tmp_path / "old" / "checkpoints", old["epoch"], old["step"], old)
    later = trainer(*steady)
    assert later.resume(tmp_path / "old")
    result = later.train(tmp_path / "old")
    whole = trainer(*steady)
    expected = whole.train(tmp_path / "whole")
    assert result is not None
    assert expected is not None
    assert result["accuracy"] == expected["accuracy"]
    assert_equal(later.model.state_dict(), whole.model.state_dict())


def opened(root: Path, *options: str) -> Trainer:
    """Open the folder of a run as the command does."""
    made = trainer("--run.root", str(root), "--run.name", "r", *options)
    with claimed(made.config, Place()) as folder:
        open_folder(folder, made, resume.load(folder.path), Place())
    return made


ALONE = ["--neighbours.steps", "0", "--refine.epochs", "0"]
UNREFINED = ["--refine.epochs", "0"]


@pytest.mark.parametrize(
    ("before", "now", "says"),
    [
        (ALONE, ["--neighbours.k", "7", *UNREFINED], None),
        (ALONE, ["--train.epochs", "3", *ALONE], None),
        (UNREFINED, ["--refine.epochs", "1", "--refine.lr", "0.01"], None),
        (UNREFINED, UNREFINED, None),
        (UNREFINED, ["--train.epochs", "3", *UNREFINED], r"train.epochs=2, not 3"),
        (UNREFINED, ["--neighbours.k", "7", *UNREFINED], r"neighbours.k=5, not 7"),
        (UNREFINED, ["--neighbours.steps", "9", *UNREFINED], r"neighbours.steps=6, not 9"),
        (UNREFINED, ALONE, r"neighbours.steps=6, not 0"),
        ([], ["--refine.epochs", "3"], r"refine.epochs=2, not 3"),
        ([], ["--refine.lr", "0.01"], r"refine.lr=0.0001, not 0.01"),
        ([], ["--neighbours.lr", "0.01"], r"neighbours.lr=0.005, not 0.01"),
        (ALONE, ["--optim.lr", "0.5"], r"optim.lr=0.002, not 0.5"),
    ],
)
def test_what_a_stage_was_trained_with_stays(
    before: list[str], now: list[str], says: str | None, tmp_path: Path
) -> None:
    opened(tmp_path, *before).train(tmp_path / "r")
    written = (tmp_path / "r" / "config.yaml").read_text()
    if says is None:
        assert opened(tmp_path, *now).train(tmp_path / "r") is not None
        return
    with pytest.raises(UsageError, match=says) as caught:
        opened(tmp_path, *now)
    assert "\n" not in str(caught.value)
    assert "choose another --run.name" in str(caught.value)
    assert (tmp_path / "r" / "config.yaml").read_text() == written


def test_refinement_without_new_heads_is_one_line() -> None:
    with pytest.raises(UsageError, match="^refine.epochs=2: refines heads that neighbours.steps trains"):
        parse(["--refine.epochs", "2", "--neighbours.steps", "0"])
    with pytest.raises(UsageError, match="^refine.confidence=1.0: must be below 1"):
        parse(["--refine.confidence", "1"])


@pytest.mark.parametrize("towards", TOWARDS)
def test_two_and_four_ranks_go_through_the_stages_as_one(pools: dict[int, Ranks], towards: str) -> None:
    arguments = [
        *("--train.precision", "float64", "--model.norm", "none", "--data.batch_size", "256", "--train.epochs", "1"),
        *("--model.sub_heads", "2", "--monitor.progress", "false", "--train.evaluate_every", "0"),
        *("--neighbours.steps", "5", "--neighbours.batch_size", "512", "--refine.epochs", "1", *TOWARDS[towards]),
        *("--model.projection_dim", "8", "--refine.confidence", "0.3", "--train.evaluate_batch_size", "300"),
    ]
    one = rank_tasks.all_stages(0, None, arguments)
    for world_size in (2, 4):
        for result in pools[world_size].run(world_size, rank_tasks.all_stages, arguments):
            torch.testing.assert_close(result["weights"], one["weights"], rtol=0, atol=1e-8)
            assert result["stages"] == one["stages"]


def test_the_learning_rate_of_a_later_stage_begins_and_ends_with_it() -> None:
    whole = trainer("--refine.epochs", "8", "--refine.lr", "0.01")
    course = stages.refine(whole.config, Place(), 51, first_step=14)
    assert (course.first_epoch, course.last_epoch, course.total_steps) == (2, 10, 32)
    rates = [course.learning_rate(course.config.heads, step) for step in range(14, 14 + 32)]
    assert rates[0] == pytest.approx(0.01 / 4)  # an epoch of warming up
    assert max(rates) == pytest.approx(0.01)
    assert rates[-1] < 2e-4
    assert [len(course.steps_left(2 + epoch, 14 + 4 * epoch)) for epoch in range(8)] == [4] * 8
    assert len(course.steps_left(3, 14 + 4 + 3)) == 1
