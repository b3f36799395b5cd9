"""The error of a caller who can mend it."""

from __future__ import annotations


class UsageError(ValueError):
    """Something the caller got wrong: one line that quotes what came and says what to do.

    The commands print the message alone and exit with code 2; a traceback means a bug of ours.
    """


class RunError(RuntimeError):
    """A run that cannot go on, though nobody asked wrongly: one line that says why and what is left.

    The commands print the message alone and exit with code 1.
    """
