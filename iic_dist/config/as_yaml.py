"""Settings as YAML and back, whatever bytes the names of files and folders in them hold."""

from __future__ import annotations

import os
from typing import Any

import jsonargparse
import yaml

MODE = "settings"
"""What jsonargparse calls this way of reading and writing."""


class _Dumper(yaml.SafeDumper):
    """Writes a name that is not UTF-8 as binary, because YAML has no such text."""


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return dumper.represent_binary(os.fsencode(text))
    return dumper.represent_str(text)


_Dumper.add_representer(str, _write_text)


def dump(values: Any) -> str:
    """Write nested settings, in their order."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False)
    return text


def load(text: str) -> Any:
    """Read settings, or one value; binary is the name of a file.

    Raises:
        YAMLError: it is no YAML.
    """
    return _named(jsonargparse.get_loader("yaml")(text))


def _named(value: Any) -> Any:
    if isinstance(value, bytes):
        return os.fsdecode(value)
    if isinstance(value, dict):
        return {key: _named(each) for key, each in value.items()}
    return [_named(each) for each in value] if isinstance(value, list) else value


jsonargparse.set_loader(MODE, load, (yaml.YAMLError,))
jsonargparse.set_dumper(MODE, dump)
