"""What is chosen for a folder of images, and that options and files win over it."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from small_runs import train_on, write_colours, write_digits

from iic_dist.config import Config, folder
from iic_dist.config.build import load_data
from iic_dist.config.command_line import PRESETS, parse, settings_in
from iic_dist.config.folder import settings
from iic_dist.data.survey import Survey
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.models.pretrained import preprocessing


def asked(*arguments: str) -> tuple[Config, str]:
    """Parse as the training command does; return the config and what was printed."""
    lines: list[str] = []
    config = parse(list(arguments), partial(folder.choose, say=lines.append))
    return config, "\n".join(lines)


def chosen(found: Survey, **asked_for: Any) -> dict[str, object]:
    nothing: dict[str, Any] = {"image_size": None, "channels": None, "num_clusters": 10}
    return {name: choice.value for name, choice in settings(found, **{**nothing, **asked_for}).items()}


def test_what_is_chosen() -> None:
    digits = chosen(Survey(1797, 256, 8, False))
    assert digits["views.policy"] == "digits"
    assert digits["model.backbone"] == "small_cnn"
    assert (digits["data.image_size"], digits["data.batch_size"], digits["train.epochs"]) == (8, 128, 67)
    assert digits["neighbours.steps"] == 1000  # measured to help on gray drawings
    photographs = chosen(Survey(50_000, 256, 480, True), num_clusters=20)
    assert photographs["views.policy"] == "simclr"
    assert photographs["model.backbone"] == "resnet18"
    assert (photographs["data.image_size"], photographs["data.batch_size"]) == (96, 256)
    assert photographs["neighbours.steps"] == 1000
    assert digits["neighbours.whitening"] == photographs["neighbours.whitening"] == 0.75  # of networks trained on them
    assert digits["model.num_overclusters"] == 30
    assert (digits["optim.name"], digits["optim.lr"]) == ("adam", 2e-3)
    small = chosen(Survey(100, 100, 480, True), image_size=20, channels=1)
    assert (small["model.backbone"], small["optim.name"], small["optim.lr"]) == ("medium_cnn", "muon", 0.14)
    assert (photographs["optim.name"], photographs["optim.lr"]) == ("adam", 1e-3)


def test_a_cpu_gets_what_it_can_do_in_half_an_hour() -> None:
    """400 epochs of a ResNet-18 were chosen for 400 small photographs on two cores: hours."""
    for found in (Survey(10_000, 256, 32, True), Survey(10_000, 256, 500, True), Survey(70_000, 256, 28, False)):
        here, there = chosen(found, on_cpu=True), chosen(found, on_cpu=False)
        pixels = found.num_images * here["train.epochs"] * here["data.image_size"] ** 2  # type: ignore[operator]
        assert here["model.backbone"] == "medium_cnn"
        assert 0.9 * 200_000 * 32**2 < pixels < 1.1 * 200_000 * 32**2  # 130 images of 32 px a second, in four views
        assert here["train.epochs"] < there["train.epochs"]  # type: ignore[operator]
    assert chosen(Survey(10**9, 256, 500, True), on_cpu=True)["train.epochs"] == 1
    small = Survey(1797, 256, 8, False)
    assert chosen(small, on_cpu=True) == chosen(small, on_cpu=False)
    photographs = chosen(Survey(10_000, 256, 32, True), on_cpu=True)
    assert (photographs["views.size"], photographs["views.evaluate_size"]) == (24, 32)
    assert (photographs["views.repeats"], photographs["data.batch_size"]) == (3, 128)
    drawings = chosen(Survey(5000, 256, 28, False), on_cpu=True)
    assert (drawings["train.epochs"], drawings["views.size"], drawings["neighbours.steps"]) == (15, 21, 1000)
    assert drawings["model.num_overclusters"] == 30  # clusters and contrast together: 0.962, contrast alone 0.942


def test_a_learning_rate_of_the_users_is_adams(tmp_path: Path) -> None:
    """0.002 of Muon would be nothing, 0.14 of Adam too much."""
    write_colours(tmp_path, 20)
    name = ["--data.name", f"folder:{tmp_path}", "--data.image_size", "20", "--run.device", "cpu"]
    for options, optimizer, rate in (
        ([], "muon", 0.14),
        (["--optim.lr", "0.002"], "adam", 0.002),
        (["--optim.name", "adam"], "adam", 0.001),
        (["--optim.name", "muon", "--optim.lr", "0.05"], "muon", 0.05),
        (["--model.backbone", "resnet18"], "muon", 0.14),
    ):
        config, _ = asked(*name, *options)
        assert (config.optim.name, config.optim.lr) == (optimizer, rate)


def test_a_batch_is_never_more_than_the_images() -> None:
    chance = random.Random(0)
    for count in [*range(1, 40), *(chance.randrange(40, 100_000) for _ in range(200))]:
        choices = chosen(Survey(count, 1, chance.randrange(1, 5000), chance.random() < 0.5))
        batch, size, epochs = (choices[name] for name in ("data.batch_size", "data.image_size", "train.epochs"))
        assert isinstance(batch, int)
        assert isinstance(size, int)
        assert isinstance(epochs, int)
        assert 2 <= batch <= max(2, min(256, count))
        assert batch & (batch - 1) == 0  # divides by 2, 4, 8 ranks
        assert 8 <= size <= 96
        assert 5 <= epochs <= 400


def test_a_batch_divides_by_the_ranks_and_counts_what_can_be_read() -> None:
    """Three ranks, or 90 of 100 files that cannot be read, were refused for a number that nobody had chosen."""
    for ranks in range(1, 20):
        for readable in (ranks, ranks + 1, 40, 100, 1000, 100_000):
            batch = chosen(Survey(10 * readable, min(256, 10 * readable) // 10 or 1, 20, False), world_size=ranks)[
                "data.batch_size"
            ]
            assert isinstance(batch, int)
            assert batch % ranks == 0
            assert (batch // ranks) & (batch // ranks - 1) == 0
            assert batch <= max(2, ranks, min(256, readable))
    assert chosen(Survey(100, 10, 20, False))["data.batch_size"] == 8
    half, whole = (chosen(Survey(*files, 20, False))["train.epochs"] for files in ((100_000, 128), (50_000, 256)))
    assert half == whole


def test_options_and_files_win(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    write_digits(images, 40)
    name = ["--data.name", f"folder:{images}", "--model.num_clusters", "3"]
    config, said = asked(*name)
    assert (config.data.image_size, config.data.batch_size, config.model.num_overclusters) == (8, 16, 9)
    assert config.train.epochs == 400
    assert "40 images, gray, 8 px at the median shorter side (40 of 40 that were looked at can be read)" in said
    assert "--data.batch_size 16" in said
    config, _ = asked(*name, "--data.batch_size", "20", "--views.policy=simclr", "--data.image_size", "64")
    assert (config.data.batch_size, config.views.policy, config.data.image_size) == (20, "simclr", 64)
    config, _ = asked(*name, "--refine.epochs", "2")  # of heads that are chosen too
    assert (config.refine.epochs, config.neighbours.steps) == (2, 1000)
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"data": {"name": f"folder:{images}"}, "optim": {"lr": 0.5}}))
    config, said = asked("--config", str(own), "--model.num_clusters", "3")
    assert (config.optim.lr, config.data.batch_size) == (0.5, 16)
    assert said
    config, said = asked("--config", "cifar10", *name)
    assert "model.backbone" not in said  # what is not in force is not said
    assert (config.data.batch_size, config.data.image_size, config.train.epochs) == (512, 8, 450)


@pytest.mark.parametrize("preset", ["stl10-mobilenet", "cifar10-iic", "digits", "photos"])
def test_a_preset_is_its_own_recipe_on_a_folder_too(preset: str, tmp_path: Path) -> None:
    """The two views of stl10-mobilenet once became contrast alone: what it left out was chosen as for no preset."""
    write_colours(tmp_path, 20)
    of_folder, _ = asked("--config", preset, "--data.name", f"folder:{tmp_path}", "--model.num_clusters", "3")
    alone = parse(["--config", preset, "--model.num_clusters", "3"])
    alone.data.name, alone.data.image_size = of_folder.data.name, of_folder.data.image_size
    alone.data.batch_size, alone.train.evaluate_batch_size = (
        of_folder.data.batch_size,
        of_folder.train.evaluate_batch_size,
    )
    assert of_folder == alone
    assert preset == "photos" or of_folder.data.batch_size == settings_in(PRESETS / f"{preset}.yaml")["data.batch_size"]


def test_all_that_may_be_chosen_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the others, other settings of another rank are a mistake."""
    monkeypatch.setattr(folder, "preprocessing", lambda name: preprocessing("timm/test_resnet"))
    names = {
        *settings(Survey(1, 1, 8, False), None, None, None),
        *settings(Survey(1, 1, 32, True), None, None, None, on_cpu=True),
        *folder.frozen_settings(folder.DEFAULT),
    }
    assert names == folder.CHOICES


def test_what_more_time_would_bring_is_said_where_a_cpu_ends_early(tmp_path: Path) -> None:
    write_colours(tmp_path, 20)
    name = ["--data.name", f"folder:{tmp_path}", "--model.num_clusters", "3", "--run.device", "cpu"]
    _, said = asked(*name)
    assert "takes four times as long" not in said  # 400 epochs of 20 images are done in no time
    config, said = asked(*name, "--data.image_size", "2000")
    assert config.train.epochs == 3
    assert "--train.epochs 12 takes four times as long" in said


def test_the_named_sets_are_left_alone() -> None:
    assert asked() == (parse([]), "")
    assert asked("--config", "cifar10") == (parse(["--config", "cifar10"]), "")


@pytest.mark.parametrize("folder", ["missing", "empty", "bad"])
def test_a_folder_without_images_is_said_by_loading_it(folder: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "bad.png").write_bytes(b"bad")
    config, said = asked("--data.name", f"folder:{tmp_path / folder}")
    assert said == ""
    with pytest.raises(UsageError, match=folder):
        load_data(config, Place())


def test_all_that_is_chosen_stands_in_config_yaml(gray_run: Path, gray_images: Path, colour_run: Path) -> None:
    written = yaml.safe_load((gray_run / "config.yaml").read_text())
    expected, _ = asked("--data.name", f"folder:{gray_images}", "--model.num_clusters", "3")
    assert written["data"]["batch_size"] == expected.data.batch_size == 16
    assert (written["data"]["image_size"], written["data"]["channels"], written["views"]["size"]) == (8, 1, 8)
    assert len(written["views"]["mean"]) == len(written["views"]["std"]) == 1
    written = yaml.safe_load((colour_run / "config.yaml").read_text())
    assert (written["data"]["image_size"], written["data"]["channels"]) == (12, 3)
    assert len(written["views"]["mean"]) == 3


def test_channels_can_be_asked_for(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    write_colours(images, 20)
    small = ["--train.epochs", "1", "--model.backbone", "small_cnn"]
    run = train_on(images, tmp_path, "--data.channels", "1", *small)
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert (written["data"]["channels"], written["views"]["policy"]) == (1, "digits")
    assert json.loads((run / "result.json").read_text())["num_images"] == 20


def test_gray_channels_are_pillows(tmp_path: Path) -> None:
    write_colours(tmp_path, 3)
    arguments = ["--data.name", f"folder:{tmp_path}", "--data.image_size", "12", "--data.channels"]
    gray = load_data(parse([*arguments, "1"]), Place()).train.images
    colour = load_data(parse([*arguments, "3"]), Place()).train.images
    assert gray.shape == (3, 1, 12, 12)
    for one, three in zip(gray, colour, strict=True):
        luma = Image.fromarray(three.permute(1, 2, 0).numpy()).convert("L")
        assert np.array_equal(one[0].numpy(), np.asarray(luma))


def test_a_named_set_has_its_own_size() -> None:
    from iic_dist.config.complete import complete

    config = parse(["--data.image_size", "64"])
    with pytest.raises(UsageError, match=r"data.image_size=64: the images of 'digits' have their own, 8"):
        complete(config, load_data(config, Place()).train)
