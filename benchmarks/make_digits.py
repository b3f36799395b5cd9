"""Write a folder of handwritten digits, gray, one sub-folder a digit: scikit-learn's, enlarged and changed.

    python benchmarks/make_digits.py DIR [--count 5000] [--size 28] [--kind plain|wavy] [--seed 0]

Each of the 1797 digits of 8 x 8 comes two or three times, every time drawn otherwise. `plain` is turned, slanted,
moved and gets noise; `wavy` is also bent, thinner or thicker, and blurred. What is tuned on the one
is to be tried on the other. The sub-folders' names are the truth that `--data.folder_labels true` compares the clusters
with.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_digits

Pixels = NDArray[np.float64]


def draw(digit: Pixels, size: int, kind: str, chance: np.random.Generator) -> Image.Image:
    """Draw a digit (8, 8) in [0, 1] with `size` pixels a side, bright on dark."""
    angle, slant = np.radians(chance.uniform(-10, 10)), np.tan(np.radians(chance.uniform(-10, 10)))
    zoom = chance.uniform(0.9, 1.1) * size / 9  # 8 pixels and a margin
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = np.linalg.inv(turn @ np.array([[1, 0], [slant, 1]]) * zoom)
    places = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij")).reshape(2, -1).astype(float)
    if kind == "wavy":
        bends = ndimage.gaussian_filter(chance.standard_normal((2, size, size)), (0, size / 7, size / 7))
        places += bends.reshape(2, -1) * (0.045 * size / bends.std())
    centre = (size - 1) / 2 + chance.uniform(-0.05, 0.05, (2, 1)) * size
    drawn = ndimage.map_coordinates(digit, matrix @ (places - centre) + 3.5, order=3).reshape(size, size)
    if kind == "wavy":
        drawn = ndimage.gaussian_filter(drawn, chance.uniform(0, 0.04) * size)
        drawn = (drawn.clip(0, 1) / max(drawn.max(), 1e-3)) ** chance.uniform(0.5, 2)
    shade = chance.uniform(0.7, 1.0)
    noisy = drawn.clip(0, 1) * shade + chance.normal(0, 0.05, drawn.shape)
    return Image.fromarray(np.rint(noisy.clip(0, 1) * 255).astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--kind", choices=["plain", "wavy"], default="plain")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pixels, labels = load_digits(return_X_y=True)
    chance = np.random.default_rng(options.seed)
    order = chance.permutation(len(labels))
    for number in range(options.count):
        which = order[number % len(labels)]
        path = options.folder / str(labels[which]) / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(pixels[which].reshape(8, 8) / 16, options.size, options.kind, chance).save(path)


if __name__ == "__main__":
    main()
