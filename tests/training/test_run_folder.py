"""The folder of a run: its number, and its settings, which every command reads in the same way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import iic_dist
from iic_dist.config import Config
from iic_dist.config.command_line import parse
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.training.evaluate import evaluate_run
from iic_dist.training.owner import LOCK, owned
from iic_dist.training.run_folder import as_begun, run_folder, settings_of

READERS = [settings_of, lambda run: evaluate_run(run, Place()), iic_dist.load]
every_reader = pytest.mark.parametrize("read", READERS, ids=["settings", "evaluation", "prediction"])


def written(folder: Path, config: Config) -> Path:
    (folder / "config.yaml").write_text(config.to_yaml())
    return folder


def test_settings_read_back_with_changes(tmp_path: Path) -> None:
    config = parse(["--config", "cifar10-alternate", "--optim.lr", "0.25"])
    run = written(tmp_path, config)
    assert settings_of(run) == config
    config.data.evaluate_on = "test"
    assert settings_of(run, ["--data.evaluate_on", "test"]) == config


def test_a_setting_that_the_run_does_not_know_has_its_default(tmp_path: Path) -> None:
    """As in a run of an older version."""
    (tmp_path / "config.yaml").write_text("optim: {lr: 0.25}\n")
    expected = Config()
    expected.optim.lr = 0.25
    assert settings_of(tmp_path) == expected


@every_reader
@pytest.mark.parametrize("kind", ["missing", "empty", "a file", "config.yaml is a folder"])
def test_what_is_no_run_is_said_in_the_same_words(read: Callable[[Path], object], kind: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    if kind == "a file":
        run.write_text("")
    elif kind != "missing":
        (run / "config.yaml").mkdir(parents=True) if "config" in kind else run.mkdir()
    with pytest.raises(UsageError) as caught:
        read(run)
    assert str(caught.value) == f"{run}: not a run, there is no {run / 'config.yaml'}"


@every_reader
@pytest.mark.parametrize("content", [b"data: {name: [", b"\xff\xfe\x00", b"optim: {speed: 3}", b"optim: {lr: 0}"])
def test_settings_that_cannot_be_read_are_one_line(
    read: Callable[[Path], object], content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_run_without_a_name_gets_the_next_number(tmp_path: Path) -> None:
    config = parse(["--run.root", str(tmp_path)])
    config.data.name = "folder:~/my photos/"
    for name in ("my-photos-1", "my-photos-7", "my-photos-old", "other-30"):
        (tmp_path / name).mkdir()
    assert run_folder(config) == tmp_path / "my-photos-8"
    assert run_folder(config) == tmp_path / "my-photos-9"
    assert (tmp_path / "my-photos-9").is_dir()


def test_a_launch_finds_its_own_folder_and_no_other(tmp_path: Path) -> None:
    """A restart took the newest folder of its name, which another job had opened meanwhile."""
    config = parse(["--run.root", str(tmp_path)])
    for launches in (["one"], ["two", "three"]):
        with owned(run_folder(config, launches), launches, 0):
            (run_folder(config, launches) / "kept").touch()
    for launches, number in ((["one"], 1), (["four", "three"], 2), (["two"], 2), (["four"], 3), (["four"], 4)):
        assert run_folder(config, launches) == tmp_path / f"digits-{number}"  # nobody owns what "four" has opened
    (tmp_path / "digits-2" / LOCK).write_text('{"host": 3')
    assert run_folder(config, ["two"]) == tmp_path / "digits-5"


def test_what_nobody_asks_for_stays_as_the_run_began() -> None:
    """Other images choose other settings, and a run was refused for a number that its user had never seen."""
    before, now = Config(), Config()
    before.data.batch_size, before.data.image_size, before.views.mean, before.optim.lr = 64, 20, [0.5], 0.25
    now.data.batch_size, now.data.image_size, now.optim.lr = 128, 24, 0.5
    lines: list[str] = []
    found = as_begun(now, before, {"data.batch_size", "data.image_size"}, lines.append)
    assert (found.data.batch_size, found.data.image_size, found.views.mean, found.optim.lr) == (64, 20, [0.5], 0.5)
    assert lines == [
        "--data.batch_size 64, as the run began; for the images as they are now: 128",
        "--data.image_size 20, as the run began; for the images as they are now: 24",
    ]
    assert as_begun(now, None, {"data.batch_size"}, lines.append) == now
    assert as_begun(now, before, frozenset(), lines.append).data.batch_size == 128


@pytest.mark.parametrize("name", ["../up", "a/b", ".", "..", "", "a b"])
def test_a_name_is_that_of_a_file(name: str) -> None:
    config = Config()
    config.run.name = name
    with pytest.raises(UsageError, match="run.name="):
        run_folder(config)
