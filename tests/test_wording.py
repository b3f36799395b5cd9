"""Names that are safe to print, numbers with their nouns."""

from __future__ import annotations

import os

import pytest

from iic_dist.wording import counted, printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"plain name.png", "plain name.png"),
        ("日本語 ü ±.png".encode(), "日本語 ü ±.png"),
        (b"latin-\xe9.png", "latin-\\xe9.png"),
        (b"line\nfeed\r\ttab", "line\\nfeed\\r\\ttab"),
        (b"\x1b[31mred\x7f", "\\x1b[31mred\\x7f"),
        ("right\u202eleft\u2028\ufeff".encode(), "right\\u202eleft\\u2028\\ufeff"),
        (b"back\\slash", "back\\slash"),
    ],
)
def test_a_name_is_shown_in_one_line_of_text(name: bytes, shown: str) -> None:
    assert printable(os.fsdecode(name)) == shown
    assert printable(shown) == shown
    shown.encode("utf-8")


def test_any_bytes_can_be_shown() -> None:
    for byte in range(1, 256):
        shown = printable(os.fsdecode(bytes([65, byte])))
        assert shown.isprintable()
        shown.encode("utf-8")


@pytest.mark.parametrize(("number", "text"), [(0, "0 files"), (1, "1 file"), (2, "2 files"), (1797, "1797 files")])
def test_one_has_no_plural(number: int, text: str) -> None:
    """It said "1 files could not be read"."""
    assert counted(number, "file") == text
