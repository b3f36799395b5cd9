"""What a run shows of its clusters in TensorBoard."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from iic_dist import load
from iic_dist.training import report


@pytest.mark.parametrize(("count", "shown"), [(1, 1), (999, 999), (1000, 1000), (1001, 1000), (70_000, 1000)])
def test_the_projector_shows_a_thousand_images_spread_evenly(count: int, shown: int) -> None:
    sample = report.projector_sample(count)
    assert len(sample) == len(sample.unique()) == shown
    assert int(sample[0]) == 0
    assert count - int(sample[-1]) <= -(-count // shown)


def test_a_run_shows_its_clusters_and_its_features(gray_run: Path, gray_images: Path) -> None:
    assert {"clusters/most_confident", "clusters/most_doubtful"} <= set(
        EventAccumulator(str(gray_run)).Reload().Tags()["images"]
    )
    [folder] = gray_run.glob("*/features")
    run = load(gray_run, "cpu")
    prediction = run.predict(sorted(gray_images.rglob("*.png")))
    lines = (folder / "tensors.tsv").read_text().splitlines()
    features = torch.tensor([[float(number) for number in line.split("\t")] for line in lines])
    torch.testing.assert_close(features, prediction.embeddings, atol=1e-4, rtol=1e-4)
    assert (folder / "metadata.tsv").read_text().split() == [str(k) for k in prediction.clusters.tolist()]
    assert Image.open(folder / "sprite.png").size == (80, 80)  # 90 images of 8 px
