from __future__ import annotations

from pathlib import Path

import pytest

from iic_dist.config.complete import read_sizes
from iic_dist.errors import UsageError


def test_sizes_are_read_one_a_line(tmp_path: Path) -> None:
    (tmp_path / "sizes.txt").write_text("10\r\n2.5\n\n 1e2 \n")
    assert read_sizes(str(tmp_path / "sizes.txt")) == [10, 2.5, 100]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"1\n0\n", "line 2 is '0', but must be a number above 0"),
        (b"1\n-3\n", "line 2 is '-3'"),
        (b"many\n", "line 1 is 'many'"),
        (b"1 2 3\n", "line 1 is '1 2 3'"),
        (b"nan\n", "line 1 is 'nan'"),
        (b"1\ninf\n", "line 2 is 'inf'"),
        (b"x" * 9000, "line 1 is 'x{40}', but"),
        (b"\xff\xfe\n", "must be uniform, free, or a file"),
        (None, "must be uniform, free, or a file"),
    ],
)
def test_what_is_no_size_is_one_line(content: bytes | None, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "sizes.txt").write_bytes(content)
    with pytest.raises(UsageError, match=says) as caught:
        read_sizes(str(tmp_path / "sizes.txt"))
    assert "\n" not in str(caught.value)
    assert "sizes.txt" in str(caught.value)


def test_a_path_that_no_file_can_have_is_one_line() -> None:
    with pytest.raises(UsageError, match="must be uniform, free, or a file"):
        read_sizes("a\0b")
