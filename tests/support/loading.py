"""Folders of images as the tests load them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from iic_dist.data.folder import Reading
from iic_dist.data.image_set import ImageSet
from iic_dist.data.load import load_image_set


def load_images(folder: Path | str, split: str = "all", **options: Any) -> ImageSet:
    """Load a folder; options are those of `load_image_set` and of a `Reading`, whose progress bar is off."""
    of_reading = {field.name for field in dataclasses.fields(Reading)} & set(options)
    reading = Reading(**{"progress": False} | {name: options.pop(name) for name in of_reading})
    return load_image_set(f"folder:{folder}", Path("unused"), split, reading=reading, **options)
