from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import rank_tasks
import torch
from ranks import Ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from iic_dist.config import Config
from iic_dist.config.build import RunData, load_data
from iic_dist.config.command_line import PRESETS, parse
from iic_dist.data.image_set import ImageSet
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.training import checkpoint
from iic_dist.training.trainer import Trainer

CPU = torch.device("cpu")
QUIET = ["--monitor.progress", "false", "--train.evaluate_every", "0"]
TINY = [
    *QUIET,
    "--data.batch_size",
    "512",
    "--train.epochs",
    "2",
    "--model.sub_heads",
    "2",
    "--data.train_on",
    "train",
]

# Images, channels, side, classes of each named set; a preset's fake images have these shapes.
SHAPES = {
    "digits": (1, 8, 10),
    "mnist": (1, 28, 10),
    "fashion-mnist": (1, 28, 10),
    "cifar10": (3, 32, 10),
    "cifar100-20": (3, 32, 20),
    "stl10": (3, 96, 10),
}


def fake(name: str, count: int, labelled: bool = True) -> ImageSet:
    channels, side, classes = SHAPES[name]
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, channels, side, side), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % classes if labelled else None
    return ImageSet(name, images, labels, tuple(map(str, range(classes))) if labelled else ())


def digits_trainer(*arguments: str) -> Trainer:
    config = parse([*TINY, *arguments])
    return Trainer(config, load_data(config, Place()), Place(), CPU)


def losses_of(terms: dict[str, Any]) -> list[Tensor]:
    return [value if isinstance(value, Tensor) else value.loss for value in terms.values()]


# "photos" looks at features alone: test_feature_trainer trains such a run.
@pytest.mark.parametrize("preset", sorted({path.stem for path in PRESETS.glob("*.yaml")} - {"photos"}))
def test_a_preset_takes_steps_on_images_of_its_shape(preset: str) -> None:
    # There is no network to fetch weights, and a frozen network of random ones sees nothing.
    options = ["--model.pretrained", "false", "--model.freeze_backbone", "false"]
    named, _, on_cpu = preset.partition(".")
    arguments = ["--config", named, "--data.batch_size", "4", *QUIET, *options]
    config = parse(arguments, lambda *_: {}, lambda *_: bool(on_cpu))
    train = fake(config.data.name, 9)
    unlabelled = fake(config.data.name, 11, labelled=False) if config.data.unlabelled else None
    trainer = Trainer(config, RunData(train, train, unlabelled), Place(), CPU)
    before = {name: parameter.detach().clone() for name, parameter in trainer.learner.model.named_parameters()}
    for epoch in sorted({0, config.train.contrastive_warmup_epochs}):  # behind the last one where contrast is alone
        trainer.epoch = epoch
        for each in trainer.course.schedule.passes(epoch):
            terms = trainer.train_step(each, 0)
            assert set(terms) == set(each.heads)
            assert all(loss.isfinite().all() for loss in losses_of(terms))
    still = [name for name, p in trainer.learner.model.named_parameters() if torch.equal(p, before[name])]
    assert still == []


class NoHostSync(TorchDispatchMode):
    """Fails at an op whose result the host must wait for."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waiting = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal.default", "unique")
        assert not any(name in str(function) for name in waiting), f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_step_never_waits_for_the_device(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = digits_trainer("--optim.clip_norm", "1", "--optim.name", optimizer)
    # Adam on the CPU reads its own step counter, which on CUDA too stays on the host.
    if optimizer == "adam":
        monkeypatch.setattr(trainer.learner.optimizer, "step", lambda: None)
    else:
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    with NoHostSync():
        trainer.train_step(trainer.course.schedule.passes(0)[0], 0)
    with NoHostSync(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(3).sum().item()


@pytest.mark.parametrize(("schedule", "repeats"), [("joint", 1), ("joint", 3), ("alternate", 1)])
def test_training_on_four_ranks_is_training_on_one(ranks: Ranks, schedule: str, repeats: int) -> None:
    arguments = [*TINY, "--data.batch_size", "64", "--train.precision", "float64", "--model.norm", "none"]
    arguments += ["--train.schedule", schedule, "--optim.weight_decay", "0.01", "--views.repeats", str(repeats)]
    one = rank_tasks.training_losses(0, None, arguments, 9)
    four = ranks.run(4, rank_tasks.training_losses, arguments, 9)
    for result in four:
        assert result["losses"] == pytest.approx(one["losses"], rel=0, abs=1e-10)
        torch.testing.assert_close(result["parameters"], one["parameters"], rtol=0, atol=1e-8)
        assert result["accuracy"] == one["accuracy"]
        assert result["nmi"] == one["nmi"]


@pytest.mark.parametrize("schedule", ["joint", "alternate"])
def test_with_synchronised_batch_normalisation_too(pools: dict[int, Ranks], schedule: str) -> None:
    """Weights, losses and running statistics of 1, 2 and 4 ranks are alike, through nine steps and an evaluation."""
    arguments = [*TINY, "--data.batch_size", "64", "--train.precision", "float64", "--model.norm", "batch"]
    arguments += ["--train.schedule", schedule, "--train.sync_batchnorm", "true", "--optim.weight_decay", "0.01"]
    one = rank_tasks.training_losses(0, None, arguments, 9)
    assert one["statistics"].numel() > 100
    for world_size in (2, 4):
        for result in pools[world_size].run(world_size, rank_tasks.training_losses, arguments, 9):
            assert result["losses"] == pytest.approx(one["losses"], rel=0, abs=1e-10)
            torch.testing.assert_close(result["statistics"], one["statistics"], rtol=0, atol=1e-10)
            torch.testing.assert_close(result["parameters"], one["parameters"], rtol=0, atol=1e-8)
            assert result["accuracy"] == one["accuracy"]


def test_a_head_that_waits_for_its_turn_is_not_moved() -> None:
    trainer = digits_trainer("--train.schedule", "alternate", "--optim.weight_decay", "0.1")
    over, clustering, _ = trainer.course.schedule.passes(0)
    trainer.train_step(clustering, 0)
    before = [p.detach().clone() for p in trainer.learner.model.heads["clustering"].parameters()]
    trainer.train_step(over, 0)
    for old, new in zip(before, trainer.learner.model.heads["clustering"].parameters(), strict=True):
        assert torch.equal(old, new)


def test_sub_heads_are_judged_by_their_last_pass_alone(tmp_path: Path) -> None:
    order = "[overclustering, clustering, clustering, contrastive]"
    options = ["--train.schedule", "alternate", "--train.order", order, "--loss.entropy_weight", "1"]
    trainer = digits_trainer(*options, "--train.epochs", "1")
    trainer.train(tmp_path)
    # Minus a mutual information; the joints of two passes taken for one would give up to 2 ln 2.
    for loss in trainer.learner.sub_heads.losses.values():
        assert (loss < 1e-5).all()
        assert (loss != 0).all()


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = digits_trainer("--train.checkpoint_every", "1")
    whole.train(tmp_path)
    for path in checkpoint.available(tmp_path / "checkpoints")[:1]:
        path.unlink()  # as if the run had died in its second epoch
    resumed = digits_trainer("--train.checkpoint_every", "1")
    assert resumed.resume(tmp_path)
    assert (resumed.epoch, resumed.step) == (1, 2)
    resumed.train(tmp_path)
    for old, new in zip(whole.learner.model.parameters(), resumed.learner.model.parameters(), strict=True):
        assert torch.equal(old, new)
    assert torch.equal(whole.learner.sub_heads.losses["clustering"], resumed.learner.sub_heads.losses["clustering"])


def test_a_run_leaves_its_files(tmp_path: Path) -> None:
    result = digits_trainer("--monitor.log_every", "1").train(tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert set(result) == {
        *("data", "num_images", "num_clusters", "epochs", "world_size", "seed", "accuracy", "nmi", "ari"),
        *("images_per_second", "train_seconds", "skipped_steps", "collapsed_sub_heads", "choices", "stages"),
    }
    assert set(result["accuracy"]) == {"selected", "mean", "std", "best"}
    assert (result["data"], result["num_images"], result["epochs"], result["world_size"]) == (
        "digits",
        1797,
        2,
        1,
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss/clustering" in line] == [1, 2, 3, 4]
    wanted = {"loss/contrastive", "clustering/used_clusters", "overclustering/information_share_of_ln_k"}
    assert wanted <= set(lines[0])
    assert lines[-1]["accuracy/selected"] == result["accuracy"]["selected"]
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_the_evaluation_does_not_depend_on_its_batch_size() -> None:
    figures = [digits_trainer("--train.evaluate_batch_size", size).evaluate() for size in ("1797", "100", "7")]
    assert figures[0] == figures[1] == figures[2]


def test_the_selected_sub_head_is_that_of_lowest_loss_whatever_the_labels() -> None:
    trainer = digits_trainer("--model.sub_heads", "4")
    trainer.learner.sub_heads.losses["clustering"] = torch.tensor([-1.0, -2.0, -2.5, -0.1])
    assert trainer.learner.sub_heads.selected() == 2
    assert trainer.evaluate()["accuracy"]["best"] >= trainer.evaluate()["accuracy"]["selected"]


def test_images_without_labels_train_and_have_no_accuracy(tmp_path: Path) -> None:
    config = parse([*TINY, "--model.num_clusters", "4", "--data.batch_size", "8", "--train.epochs", "1"])
    images = fake("digits", 20, labelled=False)
    result = Trainer(config, RunData(images, images), Place(), CPU).train(tmp_path)
    assert (result["accuracy"], result["nmi"], result["ari"]) == (None, None, None)
    assert result["num_clusters"] == 4


def test_unlabelled_images_teach_only_the_other_heads() -> None:
    config = parse([*TINY, "--data.batch_size", "8"])
    train, more = fake("digits", 16), fake("digits", 40, labelled=False)
    trainer = Trainer(config, RunData(train, train, more), Place(), CPU)
    (first_heads, first), (other_heads, other) = trainer.course.schedule.batches(0, config.heads, 0)
    assert first_heads == ("clustering",)
    assert first.indices.max() < 16
    assert other_heads == ("overclustering", "contrastive")
    assert other.indices.max() >= 16
    terms = trainer.train_step(trainer.course.schedule.passes(0)[0], 0)
    assert all(loss.isfinite().all() for loss in losses_of(terms))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data.batch_size", "5000"], "5000 is larger than the data set"),
        (["--model.backbone", "resnet81"], "unknown backbone 'resnet81'"),
        (["--views.policy", "iic", "--views.crop_sides", "[20]"], "20"),
        (["--views.gray", "0.5"], "gray"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        digits_trainer(*arguments)
    assert "\n" not in str(caught.value)


def test_clusters_must_be_given_where_no_class_is_known() -> None:
    images = fake("digits", 300, labelled=False)
    with pytest.raises(UsageError, match="--model.num_clusters"):
        Trainer(parse([]), RunData(images, images), Place(), CPU)


def test_a_prior_is_read_into_the_config_and_reaches_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sizes.txt").write_text("".join(f"{size}\n" for size in range(1, 11)))
    plain, read, listed, free, alone = (
        digits_trainer(*options)
        for options in (
            [],
            ["--loss.prior", "sizes.txt"],
            ["--loss.prior", "[1,2,3,4,5,6,7,8,9,10]"],
            ["--loss.prior", "free"],
            ["--loss.entropy_weight", "1"],
        )
    )
    assert read.config.loss.prior == listed.config.loss.prior == list(range(1, 11))
    trainers = (plain, read, listed, free, alone)
    steps = [trainer.train_step(trainer.course.schedule.passes(0)[0], 0) for trainer in trainers]
    clustering, over = ([step[head].loss for step in steps] for head in ("clustering", "overclustering"))
    assert torch.equal(clustering[1], clustering[2])
    assert torch.equal(clustering[3], clustering[4])
    assert not torch.allclose(clustering[0], clustering[1])
    assert torch.equal(over[0], over[1])  # clusters of equal size there, whatever the prior
    assert torch.equal(over[0], over[3])
    with pytest.raises(UsageError, match="loss.prior has 10 sizes for model.num_clusters=7"):
        digits_trainer("--loss.prior", "sizes.txt", "--model.num_clusters", "7")


def test_the_batch_size_must_divide_by_the_ranks() -> None:
    config: Config = parse(["--data.batch_size", "100"])
    with pytest.raises(UsageError, match=r"100 does not divide by 8 ranks: use 96 or 104"):
        Trainer(config, load_data(config, Place()), Place(3, 8, 3, 8), CPU)


@pytest.mark.slow
def test_a_compiled_network_trains_alike() -> None:
    plain, compiled = digits_trainer(), digits_trainer("--train.compile", "true")
    for step in range(2):
        terms = [t.train_step(t.course.schedule.passes(0)[0], step) for t in (plain, compiled)]
        pairs = zip(*map(losses_of, terms), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
