"""Small folders of images, small runs on them and made-up predictions, for the tests of what a trained run is for."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from iic_dist.config import folder
from iic_dist.config.command_line import parse
from iic_dist.distributed import Place
from iic_dist.prediction.clusterer import Prediction
from iic_dist.train import train
from iic_dist.training.stop import StopSignals

ODD_NAMES = (
    b'comma, "quote" and space.png',
    b"line\nfeed.png",
    b"carriage\rreturn.png",
    b"=1+1.png",
    b"latin-\xe9.png",
    "日本語 ü.png".encode(),
    b"\"><img src=x onerror=alert(1)> & 'x'.png",
    b"{{ 7 * 7 }}.png",
)
"""File names that break tables and pages that are not careful; one is not UTF-8."""


def write_digits(folder: Path, count: int) -> Path:
    """Write scikit-learn's first digits below 3 as PNG, one sub-folder a digit."""
    digits = load_digits(n_class=3)
    for number, (image, label) in enumerate(zip(digits.images[:count], digits.target, strict=False)):
        path = folder / str(label) / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((image * 255 / 16).round().astype(np.uint8)).save(path)
    return folder


def write_colours(folder: Path, count: int) -> Path:
    """Write noise with a tint of red, green or blue, 14 x 12."""
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 120, (12, 14, 3), dtype=np.uint8)
        pixels[..., number % 3] += 100
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    return folder


def write_odd_names(folder: Path) -> Path:
    """Write an image under each of ODD_NAMES."""
    for number, name in enumerate(ODD_NAMES):
        with open(bytes(folder) + b"/" + name, "wb") as file:
            Image.effect_noise((9, 9), 20 + 10 * number).save(file, "png")
    return folder


def train_on(images: Path, root: Path, *options: str) -> Path:
    """Train in this process on a folder of images, three clusters; return the run's folder."""
    arguments = [
        *("--data.name", f"folder:{images}", "--model.num_clusters", "3", "--run.root", str(root), "--run.name", "run"),
        *("--run.threads", "1", "--run.device", "cpu", "--monitor.progress", "false"),
        *("--data.cache", str(root / "decoded"), "--train.evaluate_batch_size", "16", "--neighbours.steps", "0"),
        *options,
    ]
    train(parse(arguments, partial(folder.choose, say=lambda line: None)), Place(), StopSignals())
    return root / "run"


def made_up(clusters: torch.Tensor, num_clusters: int, features: int = 5) -> Prediction:
    """Make a prediction with embeddings around a direction of each cluster."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(num_clusters, features, generator=generator)
    embeddings = directions[clusters] + 0.3 * torch.randn(len(clusters), features, generator=generator)
    confidence = torch.rand(len(clusters), generator=generator)
    probabilities = torch.full((len(clusters), num_clusters), 1 / num_clusters)
    return Prediction(clusters, confidence, clusters[:, None].repeat(1, 2), probabilities, embeddings, 0)
