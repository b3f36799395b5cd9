"""Whether all ranks of a run were asked for the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Set

from iic_dist import distributed
from iic_dist.config import Config
from iic_dist.errors import UsageError

_CHOSEN = "what the images ask for"


def check_same(config: Config, chosen: Set[str] = frozenset()) -> None:
    """Compare the settings of all ranks.

    Ranks that train with different settings would wait for each other for ever, or train something that nobody asked
    for.

    Args:
        config: Of this rank.
        chosen: Names "group.field" that nobody has asked for and that the images decide, as rank 0 sees them.

    Raises:
        UsageError: a setting differs; on every rank, with its name and both values.

    Collective: all ranks must call; gathers the settings.
    """
    own = {
        f"{group}.{name}": _CHOSEN if f"{group}.{name}" in chosen else value
        for group, fields in dataclasses.asdict(config).items()
        for name, value in fields.items()
    }
    everywhere = distributed.gather_objects(own)
    for rank, theirs in enumerate(everywhere):
        for name in everywhere[0]:
            if theirs[name] != everywhere[0][name]:
                raise UsageError(
                    f"rank {rank} was started with {name}={theirs[name]!r}, rank 0 with {everywhere[0][name]!r}: "
                    "start all ranks with the same settings"
                )
