"""From presets, files and options to a checked config."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml

from iic_dist.config import Config, as_yaml
from iic_dist.config.check import check, check_course
from iic_dist.config.expected import in_words
from iic_dist.errors import UsageError

Choose = Callable[[Config, frozenset[str]], dict[str, Any] | None]
TakeSmaller = Callable[[Config, Path, frozenset[str]], bool]

PRESETS = Path(__file__).parent / "presets"
_ON_CPU = ".cpu"
_GROUPS = tuple(group.name for group in dataclasses.fields(Config))
_SETTINGS = {
    f"{group.name}.{each.name}"
    for group in dataclasses.fields(Config)
    for each in dataclasses.fields(getattr(Config(), group.name))
}
_LEFT_TO_IMAGES = {"data.image_size", "data.batch_size", "train.evaluate_batch_size"}
"""What the images of a folder decide beside a preset that does not say it; all else of a preset is its recipe."""

_LISTS = {
    f"--{group.name}.{each.name}"
    for group in dataclasses.fields(Config)
    for each in dataclasses.fields(getattr(Config(), group.name))
    if "list[" in str(each.type) or "tuple[" in str(each.type)
}


class _Help(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the settings alone, and a default where there is one; the texts say what None means."""

    def add_argument(self, action: argparse.Action) -> None:
        """Pass over what jsonargparse adds for whole groups, such as --run FILE, which is nothing to begin with."""
        if action.dest not in _GROUPS:
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        text: str = super()._format_action_invocation(action)
        return re.sub(r", --\S+\+ \S+$", "", text)  # --GROUP.FIELD+ appends to a list

    def _get_help_string(self, action: argparse.Action) -> str:
        named = "." in action.dest and action.default is not None
        return f"{action.help} (default: %(default)s)" if named else str(action.help)


class _Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        line = " ".join(message.split())
        raise UsageError(f"{in_words(line) or line} (--help lists all options)") from ex


_DESCRIPTION = """\
Cluster unlabelled images, alone or under torchrun:

  python -m iic_dist.train                              scikit-learn's digits, a minute
  torchrun --nproc_per_node=2 -m iic_dist.train --data.name folder:photos --model.num_clusters 8
  python -m iic_dist.train --config cifar10 --train.epochs 100

Presets for --config:
  {presets}

A default below counts where neither the preset nor what is chosen for a folder sets the value;
--print_config shows what a command line comes to."""


def _presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml") if not path.stem.endswith(_ON_CPU))


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m iic_dist.train",
        usage="%(prog)s [--config NAME|FILE] [--GROUP.FIELD VALUE ...] [--print_config]",
        description=_DESCRIPTION.format(presets=", ".join(_presets())),
        formatter_class=_Help,
        parser_mode=as_yaml.MODE,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="A preset's name or a YAML file; options given beside it win. Default: digits; for folder:DIR what "
        "is chosen from the images, for features:FILE what features need.",
    )
    for group in dataclasses.fields(Config):
        parser.add_class_arguments(group.default_factory, group.name)
    return parser


def _find(name: str) -> str:
    """Return the file of a preset's name, or `name` itself where it is a file."""
    preset = PRESETS / f"{name}.yaml"
    if preset.is_file():
        return str(preset)
    if Path(name).is_file():
        return name
    raise UsageError(f"--config {name}: neither a file nor a preset ({', '.join(_presets())})")


def _with_lists(arguments: list[str]) -> list[str]:
    """Write 5,10,20 as the list that it is, where an option of a list has it; names and folders may have commas."""
    rewritten, option = [], ""
    for argument in arguments:
        name, equals, value = argument.partition("=") if argument.startswith("--") else (option, "", argument)
        option = name if argument.startswith("--") and not equals else ""
        if name in _LISTS and re.fullmatch(r"\s*[\w.+-]+(\s*,\s*[\w.+-]+)+\s*", value):
            argument = f"{name}=[{value}]" if equals else f"[{value}]"
        rewritten.append(argument)
    return rewritten


def _take_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Take --config out of the options: its value, None where it is not there, and the others."""
    config, rest = None, []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config":
            config = next(remaining, "")
        elif argument.startswith("--config="):
            config = argument.removeprefix("--config=")
        else:
            rest.append(argument)
    return config, rest


def parse(
    arguments: list[str] | None = None, choose: Choose | None = None, take_smaller: TakeSmaller | None = None
) -> Config:
    """Read the command line into a checked `Config`.

    Args:
        arguments: Options without the program's name; None takes the process's own.
        choose: Asked for settings where the images are a folder's, or features: gets the config so far and the names
            "group.field" of what an option or a named file sets, and returns values by such names. They take the place
            of the defaults, and of the preset where none is named. None: another rank chooses for this one.
        take_smaller: Asked where a preset has a file NAME.cpu.yaml beside it, with what a CPU can do: gets the config
            so far, the file and the names that options set, and returns whether the file counts on top of the preset.

    Raises:
        UsageError: an unknown option, a value of the wrong type, or values that do not fit together.
    """
    parser = _parser()
    named, options = _take_config(_with_lists(sys.argv[1:] if arguments is None else arguments))
    # --config comes first, so that the options win wherever they stand.
    preset = ["--config", _find("digits" if named is None else named)]
    choices: dict[str, Any] | None = {}
    if choose is not None:
        first = _config(parser, preset + [option for option in options if not option.startswith("--print_config")])
        if first.data.name.startswith(("folder:", "features:")):
            asked = _asked(options, named)
            choices = choose(first, asked)
            parser.set_defaults({name: value for name, value in (choices or {}).items() if name not in asked})
            preset = [] if named is None else preset
        smaller = PRESETS / f"{named}{_ON_CPU}.yaml"
        if take_smaller is not None and smaller.is_file() and take_smaller(first, smaller, _asked(options, None)):
            preset += ["--config", str(smaller)]
    config = _config(parser, preset + options)
    if choices is not None:
        check_course(config)
    return config


def _asked(options: list[str], named: str | None) -> frozenset[str]:
    """Return the names "group.field" that options or a named file set; a preset sets nearly all, if by its defaults."""
    asked = {match[1] for option in options if (match := re.match(r"--(\w+\.\w+)", option))}
    if named is not None:
        asked |= settings_in(Path(_find(named))).keys()
        asked |= _SETTINGS - _LEFT_TO_IMAGES if (PRESETS / f"{named}.yaml").is_file() else set()
    return frozenset(asked)


def settings_in(file: Path) -> dict[str, Any]:
    """Return the values that a YAML file sets, by names "group.field"."""
    content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    return {f"{group}.{name}": value for group, fields in content.items() for name, value in (fields or {}).items()}


def _config(parser: _Parser, arguments: list[str]) -> Config:
    try:
        groups = parser.instantiate(parser.parse_args(arguments))
    except UsageError:
        raise
    except Exception as error:  # jsonargparse has its own ones for files that are YAML but no settings
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"the settings cannot be read: {type(error).__name__}: {reason} (--help lists all)") from error
    config = Config(**{group.name: getattr(groups, group.name) for group in dataclasses.fields(Config)})
    check(config)
    return config
