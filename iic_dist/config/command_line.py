"""From presets, files and options to a checked config."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse

from iic_dist.config import HEADS, Config
from iic_dist.errors import UsageError

PRESETS = Path(__file__).parent / "presets"
_GROUPS = tuple(group.name for group in dataclasses.fields(Config))


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
        raise UsageError(f"{' '.join(message.split())} (--help lists all options)") from ex


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
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m iic_dist.train",
        usage="%(prog)s [--config NAME|FILE] [--GROUP.FIELD VALUE ...] [--print_config]",
        description=_DESCRIPTION.format(presets=", ".join(_presets())),
        formatter_class=_Help,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="A preset's name or a YAML file; options given beside it win. Default: digits; for folder:DIR what "
        "is chosen from the images.",
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


def _split(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Take --config out of the options: its value, None where it is not there, and the others."""
    config, rest = None, []
    remaining = iter(arguments)
    for argument in remaining:
        argument = re.sub(r"(^|=)(\d+(?:,\d+)+)$", r"\1[\2]", argument)  # 5,10,20 is a list as well
        if argument == "--config":
            config = next(remaining, "")
        elif argument.startswith("--config="):
            config = argument.removeprefix("--config=")
        else:
            rest.append(argument)
    return config, rest


def parse(arguments: list[str] | None = None, choose: Callable[[Config], dict[str, Any]] | None = None) -> Config:
    """Read the command line into a checked `Config`.

    Args:
        arguments: Options without the program's name; None takes the process's own.
        choose: Asked for settings where the images are a folder's: gets the config so far and returns values by
            "group.field". They take the place of the defaults, and of the preset where none is named.

    Raises:
        UsageError: an unknown option, a value of the wrong type, or values that do not fit together.
    """
    parser = _parser()
    named, options = _split(sys.argv[1:] if arguments is None else arguments)
    # --config comes first, so that the options win wherever they stand.
    preset = ["--config", _find("digits" if named is None else named)]
    if choose is not None:
        first = _config(parser, preset + [option for option in options if not option.startswith("--print_config")])
        if first.data.name.startswith("folder:"):
            parser.set_defaults(choose(first))
            preset = [] if named is None else preset
    return _config(parser, preset + options)


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


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise UsageError(f"{name}={value!r}: must be {rule}")


def check(config: Config) -> None:
    """Raise a UsageError for the first value that no run could work with."""
    for group, defaults in dataclasses.asdict(Config()).items():
        for name, default in defaults.items():  # a file may say null where the parser lets it pass
            value = getattr(getattr(config, group), name)
            _require(value is not None or default is None, f"{group}.{name}", value, "given")
    positive = {
        "data": ("batch_size",),
        "views": ("repeats",),
        "model": ("sub_heads",),
        "loss": ("entropy_weight", "temperature"),
        "optim": ("lr",),
        "train": ("epochs", "evaluate_batch_size", "checkpoint_every"),
        "run": ("timeout_minutes",),
        "monitor": ("log_every",),
    }
    not_negative = {
        "data": ("device_budget_gib",),
        "model": ("num_overclusters", "projection_dim"),
        "loss": ("clustering", "overclustering", "contrastive"),
        "optim": ("warmup_epochs", "weight_decay", "clip_norm", "momentum"),
        "train": (
            *("contrastive_warmup_epochs", "evaluate_every", "restart_after"),
            *("checkpoint_every_steps", "max_skipped_steps"),
        ),
        "monitor": ("pictures_every",),
    }
    for names, lowest, rule in ((positive, 0, "above 0"), (not_negative, -1, "0 or more")):
        for group, fields in names.items():
            for name in fields:
                value = getattr(getattr(config, group), name)
                above = value > 0 if lowest == 0 else value >= 0
                _require(math.isfinite(value) and above, f"{group}.{name}", value, rule)
    workers = config.data.workers
    _require(workers is None or workers >= 0, "data.workers", workers, "0 or more")
    std = config.model.head_init_std
    _require(std is None or 0 < std < math.inf, "model.head_init_std", std, "above 0")
    _require(0 <= config.run.seed < 2**63, "run.seed", config.run.seed, "from 0 to 2^63 - 1")
    _check_heads(config)


def _check_heads(config: Config) -> None:
    model, train = config.model, config.train
    clusters, over = model.num_clusters, model.num_overclusters
    if isinstance(clusters, list):
        _check_several(config, clusters)
    else:
        _require(clusters is None or clusters >= 2, "model.num_clusters", clusters, "2 or more")
    _require(over == 0 or over >= 2, "model.num_overclusters", over, "2 or more")
    unknown = [head for head in train.order if head not in HEADS]
    _require(not unknown, "train.order", train.order, f"made of {', '.join(HEADS)}")
    if train.schedule == "alternate":
        missing = [head for head in config.kinds if head not in train.order]
        _require(not missing, "train.order", train.order, f"complete; the model also has {', '.join(missing)}")
    if train.contrastive_warmup_epochs and "contrastive" not in config.kinds:
        raise UsageError(
            f"train.contrastive_warmup_epochs={train.contrastive_warmup_epochs}: there is no contrastive head; "
            "set model.projection_dim, e.g. 128"
        )
    if isinstance(config.loss.prior, list):
        good = bool(config.loss.prior) and all(0 < size < math.inf for size in config.loss.prior)
        _require(good, "loss.prior", config.loss.prior, "uniform, free, a file of sizes, or sizes above 0")
    if config.data.unlabelled and len(config.kinds) == 1:
        raise UsageError(
            "data.unlabelled=true: only the overclustering and contrastive heads use unlabelled images; "
            "set model.num_overclusters or model.projection_dim"
        )


def _check_several(config: Config, clusters: list[int]) -> None:
    good = len(clusters) >= 2 and min(clusters) >= 2 and len(set(clusters)) == len(clusters)
    _require(good, "model.num_clusters", clusters, "one number, or several different ones of 2 or more")
    sub_heads, prior = config.model.sub_heads, config.loss.prior
    if sub_heads < 3:
        raise UsageError(
            f"model.sub_heads={sub_heads}: to choose among several model.num_clusters, the agreement of at least 3 is "
            "compared"
        )
    if prior not in ("uniform", "free"):
        raise UsageError(f"loss.prior={prior!r}: sizes are those of one number of clusters, not of {clusters}")
