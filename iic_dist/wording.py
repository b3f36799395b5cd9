"""Text for a person: names that are safe to show, numbers with their nouns, times."""

from __future__ import annotations


def printable(text: str) -> str:
    """Escape what would break a line, an encoding or a terminal; a file name may hold any byte but "/" and NUL.

    A byte that is not UTF-8, a surrogate in Python, becomes \\xNN; whatever else is no letter, digit, sign or space
    becomes its escape in Python, such as \\n. What is printable stays as it is, so a second time changes nothing.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # a byte, as Python reads file names
        return f"\\x{number - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def counted(number: int, noun: str) -> str:
    """Write a number with its noun: 1 file, 2 files."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """Write a time as far as it matters: 45 s, 12 min, 4 h 10 min, 2 days 5 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    minutes = round(minutes, -1)
    if minutes < 24 * 60:
        return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")
    hours = round(seconds / 3600)
    return counted(hours // 24, "day") + (f" {hours % 24} h" if hours % 24 else "")
