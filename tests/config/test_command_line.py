from __future__ import annotations

import dataclasses
import re
import typing
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
    named, _, smaller = preset.partition(".")
    config = parse(["--config", named], lambda *_: {}, lambda *_: bool(smaller))
    written = yaml.safe_load((PRESETS / f"{preset}.yaml").read_text())
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


@pytest.mark.parametrize("taken", [True, False])
def test_what_a_cpu_can_do_counts_on_top_of_a_preset_and_below_options(taken: bool) -> None:
    seen = {}

    def take_smaller(config: Config, smaller: Path, asked: frozenset[str]) -> bool:
        seen[smaller.name] = config.run.device, asked
        return taken

    own = ["--train.epochs", "7", "--run.device=cpu"]
    config = parse(["--config", "cifar10", *own], lambda *_: {}, take_smaller)
    assert seen == {"cifar10.cpu.yaml": ("cpu", {"train.epochs", "run.device"})}
    assert config.train.epochs == 7
    assert (config.model.backbone, config.refine.epochs) == (("medium_cnn", 0) if taken else ("resnet18", 100))
    assert config.optim.schedule == "cosine"  # of the preset alone
    parse(["--config", "cifar10-iic"], lambda *_: {}, take_smaller)  # published recipes stay as they are
    parse(own, lambda *_: {}, take_smaller)
    assert len(seen) == 1


def test_what_a_cpu_can_do_is_no_preset_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert ".cpu" not in capsys.readouterr().out


def test_the_yaml_of_a_config_reads_back(tmp_path: Path) -> None:
    config = parse(["--config", "cifar10-iic", "--views.crop_area", "[0.3, 0.9]", "--run.name", "a.b-c_1"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert parse(["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize(
    "name",
    [
        *(
            "folder:ph\udce9 ü",
            "\udcff",
            "folder:line\nfeed",
            "folder:\x1b[31m",
            "folder:\u202e",
            "folder:\x85",
            "folder:😀",
        ),
        *("folder: a: b #c", "folder:[x]", "!!binary eA==", "null", "1,2"),
    ],
    ids=ascii,
)
def test_any_name_reads_back(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YAML has no text for a name that is not UTF-8: what was written of it, no command could read."""
    config = parse(["--data.name", name, "--run.root", name, "--model.num_clusters", "3"])
    assert (config.data.name, config.run.root) == (name, name)
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert parse(["--config", str(tmp_path / "config.yaml")]) == config
    with pytest.raises(SystemExit):
        parse(["--data.name", name, "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert parse(["--config", str(tmp_path / "printed.yaml")]).data.name == name


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


def test_numbers_between_commas_are_a_list_where_an_option_takes_one() -> None:
    """A name with a comma became a list, and ranges of decimals, or with a space, ended in the parser's own words."""
    options = ["--model.num_clusters", "5, 10", "--views.crop_area=0.2,1", "--views.crop_sides", "10,12"]
    config = parse([*options, "--run.name", "1,2", "--data.root=3,4"])
    assert config.model.num_clusters == [5, 10]
    assert config.views.crop_area == (0.2, 1.0)
    assert config.views.crop_sides == [10, 12]
    assert (config.run.name, config.data.root) == ("1,2", "3,4")


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


def test_a_value_of_the_wrong_type_is_said_in_words() -> None:
    """The types of Python stood in the line, and for settings that may be left out a dump of all of them."""
    for group, fields in Config().__dict__.items():
        kinds = typing.get_type_hints(type(fields))
        for name in dataclasses.asdict(fields):
            if str in (kinds[name], *typing.get_args(kinds[name])):
                continue
            with pytest.raises(UsageError) as caught:
                parse([f"--{group}.{name}", "?!"])
            line = str(caught.value)
            assert line.startswith(f"{group}.{name}=?!: must be ")
            assert not re.search("class|typing|Union|None|Expected", line)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--data.channels 2", "data.channels=2: must be 1 or 3"),
        (
            "--model.num_clusters 5,x",
            "model.num_clusters=[5, 'x']: must be a whole number or several",
        ),
        ("--views.crop_area 1,2,3", "views.crop_area=[1, 2, 3]: must be 2 numbers, as in 0.2,1"),
        ("--run.device tpu", "run.device=tpu: must be auto, cpu, cuda or mps"),
        ("--views.sobel maybe", "views.sobel=maybe: must be true or false"),
        ("--views.mean 1,b", "views.mean=[1.0, 'b']: must be several numbers"),
    ],
)
def test_what_a_setting_may_be(options: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        parse(options.split())
    assert str(caught.value).startswith(says)


def test_a_value_of_the_wrong_type_in_a_file_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("data: {batch_size: many}")
    with pytest.raises(UsageError, match=r"^data.batch_size=many: must be a whole number"):
        parse(["--config", str(tmp_path / "own.yaml")])


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("data: {name: [")
    with pytest.raises(UsageError) as caught:
        parse(["--config", str(broken)])
    assert "\n" not in str(caught.value)
