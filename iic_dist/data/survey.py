"""A look at a folder of images before they are decoded: how many, how large, in colour or gray."""

from __future__ import annotations

import statistics
import warnings
from dataclasses import dataclass
from pathlib import Path

from iic_dist.data.decode import decode_image, header_size
from iic_dist.data.formats import MAX_PIXELS
from iic_dist.data.listing import list_or_recall

_HEADERS = 256  # files whose size is read


_PIXELS = 32  # files that are decoded to see whether they have colours


@dataclass(frozen=True)
class Survey:
    """What a look at a folder found.

    Attributes:
        num_images: Files that are images by their names; see `num_readable`.
        num_read: Those whose header could be read, of up to 256 that are spread evenly over all.
        side: Median of their shorter sides, pixels.
        colour: Whether any of a smaller sample has a colour.
    """

    num_images: int
    num_read: int
    side: int
    colour: bool

    @property
    def num_looked_at(self) -> int:
        """Files whose header was to be read."""
        return min(self.num_images, _HEADERS)

    @property
    def num_readable(self) -> int:
        """Images that can be read: exact for a small folder, in a large one as many as the sample promises."""
        return max(1, self.num_images * self.num_read // self.num_looked_at)


def survey(
    root: Path,
    kept: Path | None = None,
    relist: bool = True,
    *,
    follow_links: bool = False,
    max_pixels: int = MAX_PIXELS,
    truncated: bool = False,
) -> Survey | None:
    """Look at a folder: the sizes of some hundred images from their headers, the colours of some that are decoded.

    Args:
        root: The folder.
        kept, relist: As of `list_or_recall`.
        follow_links: See `list_images`.
        max_pixels, truncated: See `decode_image`.

    Returns:
        None where there is no image that can be read; loading the folder says why.
    """
    if not root.is_dir():
        return None
    paths = list_or_recall(root, follow_links, kept, relist).paths
    sides = [side for path in _spread(paths, _HEADERS) if (side := _shorter_side(root / path, max_pixels))]
    if not sides:
        return None
    colour = any(_has_colour(root / path, max_pixels, truncated) for path in _spread(paths, _PIXELS))
    return Survey(len(paths), len(sides), int(statistics.median(sides)), colour)


def _spread(paths: list[str], count: int) -> list[str]:
    """Pick up to `count` of the paths, evenly."""
    count = min(count, len(paths))
    return [paths[i * len(paths) // count] for i in range(count)]


def _shorter_side(path: Path, max_pixels: int) -> int | None:
    """Read an image's shorter side from its header; None where it cannot be read or is too large to be decoded."""
    try:
        return min(header_size(path, max_pixels))
    except Exception:  # a malformed file can raise nearly anything; loading names it
        return None


def _has_colour(path: Path, max_pixels: int, truncated: bool) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            red, green, blue = decode_image(path, 64, max_pixels, truncated=truncated)
        except Exception:
            return False
    return bool((red != green).any() or (red != blue).any())
