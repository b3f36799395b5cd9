"""Whether all ranks of a run were asked for the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Set

from iic_dist import distributed
from iic_dist.config import Config
from iic_dist.errors import UsageError


def check_same(config: Config, chosen: Set[str] = frozenset()) -> None:
    """Compare the settings of all ranks.

    Ranks that train with different settings would wait for each other for ever, or train something that nobody asked
    for.

    Args:
        config: Of this rank.
        chosen: Names "group.field" that any rank may have chosen otherwise, because files came or went between looks.

    Raises:
        UsageError: a setting differs; on every rank, with its name and both values.

    Collective: all ranks must call; gathers the settings.
    """
    own = {
        f"{group}.{name}": value
        for group, fields in dataclasses.asdict(config).items()
        for name, value in fields.items()
        if f"{group}.{name}" not in chosen
    }
    everywhere = distributed.gather_objects(own)
    for rank, theirs in enumerate(everywhere):
        for name in everywhere[0].keys() & theirs.keys():
            if theirs[name] != everywhere[0][name]:
                raise UsageError(
                    f"rank {rank} was started with {name}={theirs[name]!r}, rank 0 with {everywhere[0][name]!r}: "
                    "start all ranks with the same settings"
                )
