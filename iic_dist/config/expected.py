"""What a setting may be, in words, for whoever gave something else."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from typing import Any

from iic_dist.config import Config

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_SEVERAL = {int: ("whole numbers", "5,10"), float: ("numbers", "0.2,1"), str: ("names", "a,b")}
_REFUSED = re.compile(r'Parser key "(\w+)\.(\w+)": .*?(?:Given value|Got value): (.*)')


def in_words(refusal: str) -> str | None:
    """Say what a parser's refusal of a value means, "group.field=value: must be ..."; None where it is of another kind.

    Args:
        refusal: What jsonargparse says of a value of the wrong type, in one line.
    """
    found = _REFUSED.match(refusal)
    if found is None or not hasattr(Config(), found[1]):
        return None
    group, name = found[1], found[2]
    types_of = typing.get_type_hints(type(getattr(Config(), group)))
    if name not in {field.name for field in dataclasses.fields(getattr(Config(), group))}:
        return None
    value = found[3].rpartition("Given value: ")[2]
    return f"{group}.{name}={value}: must be {describe(types_of[name])}"


def describe(kind: Any) -> str:
    """Say in words which values a type has; None, which stands for a default, is passed over."""
    if kind in _WORDS:
        return _WORDS[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        *others, last = map(str, arguments)
        return f"{', '.join(others)} or {last}" if others else last
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(each) for each in arguments if each is not type(None))
    words, example = _SEVERAL[arguments[0]]
    number = "" if origin is list else f"{len(arguments)} "
    return f"{number or 'several '}{words}, as in {example}"
