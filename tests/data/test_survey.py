"""What a look at a folder of images finds before they are decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iic_dist.data.survey import Survey, survey


def test_a_survey_of_mixed_files(tmp_path: Path) -> None:
    for number, size in enumerate([(10, 40), (50, 20), (30, 31)]):
        Image.effect_noise(size, 50).save(tmp_path / f"{number}.png")
    (tmp_path / "bad.png").write_bytes(b"bad")
    assert survey(tmp_path) == Survey(num_images=4, num_read=3, side=20, colour=False)
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.jpg")
    found = survey(tmp_path)
    assert found is not None
    assert found.colour


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16", "P", "RGB", "RGBA", "CMYK"])
def test_gray_is_gray_in_every_mode(mode: str, tmp_path: Path) -> None:
    gray = Image.effect_noise((16, 16), 80)
    picture = gray.convert("RGB").convert(mode) if mode in ("RGBA", "CMYK", "RGB", "LA", "1") else gray
    if mode == "P":
        picture = gray.convert("P")  # from RGB, the palette of the web would dither with colours
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    picture.save(tmp_path / ("image.tif" if mode == "CMYK" else "image.png"))
    assert survey(tmp_path) == Survey(1, 1, 16, False)


def test_only_some_hundred_headers_are_read(tmp_path: Path) -> None:
    Image.new("L", (9, 9)).save(tmp_path / "0.png")
    for number in range(1, 600):
        (tmp_path / f"{number}.png").hardlink_to(tmp_path / "0.png")
    assert survey(tmp_path) == Survey(600, 256, 9, False)


@pytest.mark.parametrize(("files", "read", "readable"), [(100, 10, 10), (3, 3, 3), (10_000, 128, 5000), (7, 0, 1)])
def test_what_can_be_read_is_counted(files: int, read: int, readable: int) -> None:
    assert Survey(files, read, 9, False).num_readable == readable
