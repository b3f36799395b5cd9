from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from iic_dist.config import Config
from iic_dist.config.command_line import PRESETS, parse
from iic_dist.errors import UsageError


def test_no_argument_means_the_digits_preset() -> None:
    assert parse([]) == parse(["--config", "digits"])
    assert (
        parse([]).loss.entropy_weight == yaml.safe_load((PRESETS / "digits.yaml").read_text())["loss"]["entropy_weight"]
    )


def test_help_lists_every_setting_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    settings = [f"--{group}.{name}" for group, fields in dataclasses.asdict(Config()).items() for name in fields]
    assert listed == ["--config", "--print_config", *settings]


def test_help_says_what_the_docstrings_say(capsys: pytest.CaptureFixture[str]) -> None:
    """jsonargparse reads them with a package of its extra `signatures`, and shows None without it."""
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for settings in Config().__dict__.values():
        described = (settings.__doc__ or "").partition("Attributes:")[2].split()
        assert len(described) > 10
        texts = " ".join(described).split(": ", 1)[1]  # of the first setting
        assert texts[:10] in shown
        assert str(type(settings)) not in shown


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_a_preset_sets_what_it_says(preset: str) -> None:
    config, written = parse(["--config", preset]), yaml.safe_load((PRESETS / f"{preset}.yaml").read_text())
    for group, fields in written.items():
        for name, value in fields.items():
            assert getattr(getattr(config, group), name) == value, f"{group}.{name}"


@pytest.mark.parametrize(
    "arguments", [["--config=cifar10", "--optim.lr=0.5"], ["--optim.lr", "0.5", "--config", "cifar10"]]
)
def test_options_win_over_the_preset_wherever_they_stand(arguments: list[str]) -> None:
    config = parse(arguments)
    assert config.optim.lr == 0.5
    assert config.model.backbone == "resnet18"


def test_the_yaml_of_a_config_reads_back(tmp_path: Path) -> None:
    config = parse(["--config", "cifar10-iic", "--views.crop_area", "[0.3, 0.9]", "--run.name", "a.b-c_1"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert parse(["--config", str(tmp_path / "config.yaml")]) == config


def test_the_heads_follow_from_their_sizes() -> None:
    config = Config()
    assert config.heads == ("clustering",)
    config.model.projection_dim = 8
    assert config.heads == ("clustering", "contrastive")
    config.model.num_overclusters = 20
    assert config.heads == ("clustering", "overclustering", "contrastive")


def test_several_numbers_of_clusters_have_a_head_each() -> None:
    config = parse(["--model.num_clusters", "5,10,20"])
    assert config.model.num_clusters == [5, 10, 20]
    assert config == parse(["--model.num_clusters=[5,10,20]"])
    assert config.heads == ("clustering_5", "clustering_10", "clustering_20", "overclustering", "contrastive")
    assert config.clustering_heads == {"clustering_5": 5, "clustering_10": 10, "clustering_20": 20}
    config.model.num_clusters = 7
    assert config.heads == ("clustering", "overclustering", "contrastive")
    assert config.clustering_heads == {"clustering": 7}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data.batch_size", "many"], "data.batch_size.*many"),
        (["--data.bach_size", "1"], "bach_size"),
        (["--config", "cifar11"], "--config cifar11.*cifar10"),
        (["--run.device", "tpu"], "run.device.*tpu"),
        (["--views.crop_area", "0.2"], "views.crop_area.*0.2"),
        (["--train.epochs"], "train.epochs"),
        (["surplus"], "surplus"),
    ],
)
def test_a_mistake_is_one_line_that_quotes_it(arguments: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        parse(arguments)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("data: {name: [")
    with pytest.raises(UsageError) as caught:
        parse(["--config", str(broken)])
    assert "\n" not in str(caught.value)
