"""Text for a person: names that are safe to show, numbers with their nouns."""

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
