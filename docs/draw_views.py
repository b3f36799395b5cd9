"""Draw the views of every policy: `python docs/draw_views.py --output docs/views.png`.

Digits are scikit-learn's; colour images are tiles of its two sample photographs. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

from iic_dist.evaluation import mosaics
from iic_dist.views.policies import policy

REPEATS = 5


def digits(count: int) -> Tensor:
    """(count, 1, 8, 8) uint8."""
    images = load_digits().images[:count]
    return torch.from_numpy((images * (255 / 16)).astype(np.uint8)).unsqueeze(1)


def tiles(count: int, side: int) -> Tensor:
    """(count, 3, side, side) uint8: places of the two photographs that hold something, at half their size."""
    places = [(0, 160, 120), (1, 40, 200), (0, 200, 380), (1, 150, 60)][:count]
    photographs = load_sample_images().images
    cut = [photographs[which][top : top + 2 * side, left : left + 2 * side] for which, top, left in places]
    return torch.stack([torch.from_numpy(np.array(tile)).permute(2, 0, 1)[:, ::2, ::2] for tile in cut])


def row_of(name: str, images: Tensor, **options: object) -> np.ndarray:
    """Some images, each with its first view and `REPEATS` second ones, under the name of the policy."""
    views = policy(name, image_size=images.shape[-1], channels=images.shape[1], seed=3, repeats=REPEATS, **options)  # type: ignore[arg-type]
    rows = torch.arange(len(images))
    made = views.training(images, rows, rows, epoch=0)
    spec = views.first
    picture = mosaics.view_pairs(
        made[: len(images)], made[len(images) :], images, mean=spec.mean or None, std=spec.std or None
    )
    head = Image.new("RGB", (picture.shape[1], 18), (236, 236, 236))
    title = f"{name}, {images.shape[1]} x {images.shape[2]} px to {views.channels(images.shape[1])} x {views.size} px"
    ImageDraw.Draw(head).text((8, 4), title, fill=(40, 40, 40), font=ImageFont.load_default(12))
    return np.concatenate([np.asarray(head), picture])


def draw() -> np.ndarray:
    """Every policy on digits and on colour images, (height, width, 3) uint8."""
    pictures = [
        row_of("digits", digits(2)),
        row_of("iic", digits(2)),
        row_of("simclr", digits(2)),
        row_of("iic", tiles(1, 96)),
        row_of("iic", tiles(2, 96), sobel=False),
        row_of("simclr", tiles(4, 96), blur=0.5),
    ]
    width = max(picture.shape[1] for picture in pictures)
    padded = [
        np.pad(picture, ((0, 6), (0, width - picture.shape[1]), (0, 0)), constant_values=236) for picture in pictures
    ]
    return np.concatenate(padded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("views.png"))
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw()).quantize(256, dither=Image.Dither.NONE).save(options.output, optimize=True)
    print(f"written to {options.output}, {options.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
