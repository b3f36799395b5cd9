"""Folders of images as the tests write and load them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iic_dist.data.folder import Reading
from iic_dist.data.image_set import ImageSet
from iic_dist.data.load import load_image_set
from iic_dist.errors import UsageError


def load_images(folder: Path | str, split: str = "all", **options: Any) -> ImageSet:
    """Load a folder; options are those of `load_image_set` and of a `Reading`, whose progress bar is off."""
    of_reading = {field.name for field in dataclasses.fields(Reading)} & set(options)
    reading = Reading(**{"progress": False} | {name: options.pop(name) for name in of_reading})
    return load_image_set(f"folder:{folder}", Path("unused"), split, reading=reading, **options)


def picture(height: int = 40, width: int = 40, seed: int = 0) -> np.ndarray:
    """A smooth colour picture, so that JPEG keeps it well."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def load_small(folder: Path | str, split: str = "all", unreadable: list | None = None, **options: Any) -> ImageSet:
    """Load a folder at 40 x 40; no warning tells what is skipped."""
    problems = [] if unreadable is None else unreadable
    return load_images(folder, split, unreadable=problems, **{"image_size": 40, **options})


def only_image(folder: Path) -> np.ndarray:
    """The pixels (H, W, C) of a folder's one image."""
    image_set = load_small(folder)
    assert len(image_set.images) == 1
    return image_set.images[0].permute(1, 2, 0).numpy()


def error_line(folder: Path | str, **options: Any) -> str:
    """The one line that refuses to load a folder."""
    with pytest.raises(UsageError) as caught:
        load_small(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
