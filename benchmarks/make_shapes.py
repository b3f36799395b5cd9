"""Write an artificial image folder: shapes at any angle, like cells under a microscope, one sub-folder a shape.

    python benchmarks/make_shapes.py DIR [--count 3000] [--size 40] [--colour]

The sub-folders' names are the truth that `--data.folder_labels true` compares the clusters with.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

_BIG = 4  # drawn so many times larger, then reduced: smooth edges
Point = tuple[float, float]


def _star(points: int, inner: float) -> list[Point]:
    radii = [1.0, inner] * points
    return [(r * math.cos(math.pi * i / points), r * math.sin(math.pi * i / points)) for i, r in enumerate(radii)]


SHAPES: dict[str, list[Point]] = {
    "triangle": [(math.cos(a), math.sin(a)) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)],
    "rod": [(-1, -0.22), (1, -0.22), (1, 0.22), (-1, 0.22)],
    "disc": [(0.8 * math.cos(a / 20 * math.pi), 0.8 * math.sin(a / 20 * math.pi)) for a in range(40)],
    "star": _star(5, 0.4),
    "angle": [(-0.8, -0.8), (0.8, -0.8), (0.8, -0.35), (-0.35, -0.35), (-0.35, 0.8), (-0.8, 0.8)],
    "bow": [(-0.9, -0.7), (0, -0.12), (0.9, -0.7), (0.9, 0.7), (0, 0.12), (-0.9, 0.7)],
}


def draw(shape: str, size: int, colour: bool, chance: random.Random) -> Image.Image:
    """Draw one shape, bright on dark with noise, at any angle, of a size and place that vary."""
    angle, radius = chance.uniform(0, 2 * math.pi), chance.uniform(0.27, 0.4) * size * _BIG
    x0, y0 = ((0.5 + chance.uniform(-0.08, 0.08)) * size * _BIG for _ in range(2))
    cos, sin = radius * math.cos(angle), radius * math.sin(angle)
    corners = [(x0 + cos * x - sin * y, y0 + sin * x + cos * y) for x, y in SHAPES[shape]]
    bands = []
    for _ in range(3 if colour else 1):
        band = Image.new("L", (size * _BIG, size * _BIG), chance.randint(20, 60))
        ImageDraw.Draw(band).polygon(corners, fill=chance.randint(130, 230))
        small = band.resize((size, size), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(0.5))
        noise = Image.frombytes("L", (size, size), chance.randbytes(size * size))
        bands.append(Image.blend(small, noise, 0.08))
    return Image.merge("RGB", bands) if colour else bands[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--size", type=int, default=40)
    parser.add_argument("--colour", action="store_true")
    options = parser.parse_args()
    chance = random.Random(0)
    for number in range(options.count):
        shape = list(SHAPES)[number % len(SHAPES)]
        path = options.folder / shape / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(shape, options.size, options.colour, chance).save(path)


if __name__ == "__main__":
    main()
