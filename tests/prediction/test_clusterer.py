"""A run in use: loaded from its folder alone, on every kind of image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import iic_dist
from iic_dist.config.build import load_data
from iic_dist.config.command_line import parse
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.prediction.clusterer import Prediction
from iic_dist.training import checkpoint
from iic_dist.training.trainer import Trainer


@pytest.fixture(scope="module")
def moved_run(gray_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the gray digits elsewhere, without the images that its config names."""
    moved = tmp_path_factory.mktemp("moved") / "run"
    shutil.copytree(gray_run, moved)
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace("name: folder:", "name: folder:/nowhere"))
    return moved


def same(first: Prediction, second: Prediction) -> bool:
    """Whether two predictions say the same, up to the rounding of batches of different sizes."""
    close = torch.allclose(first.probabilities, second.probabilities, atol=1e-5)
    return close and torch.equal(first.clusters, second.clusters) and torch.equal(first.sub_heads, second.sub_heads)


def test_it_says_what_the_training_said(gray_run: Path, moved_run: Path) -> None:
    config = parse(["--config", str(gray_run / "config.yaml")])
    trainer = Trainer(config, load_data(config, Place()), Place(), torch.device("cpu"))
    assert trainer.resume(gray_run)
    evaluated = trainer.evaluator.evaluate(
        trainer.learner.model, trainer.learner.sub_heads, trainer.learner.stuck.restarts
    )["clustering"]
    run = iic_dist.load(moved_run, "cpu")
    prediction = run.predict(trainer.data.train)
    assert run.selected == prediction.selected == evaluated.selected
    assert torch.equal(prediction.sub_heads, evaluated.assigned.clusters)
    assert torch.equal(prediction.clusters, prediction.sub_heads[:, run.selected])
    torch.testing.assert_close(prediction.confidence, evaluated.assigned.confidence[:, run.selected])


@pytest.mark.parametrize("name", ["neighbour_run", "refined_run"])
def test_a_run_of_later_stages_says_what_its_training_said(name: str, request: pytest.FixtureRequest) -> None:
    """Its heads look at the features through a space of their own; the table is that of the last stage."""
    folder: Path = request.getfixturevalue(name)
    config = parse(["--config", str(folder / "config.yaml")])
    trainer = Trainer(config, load_data(config, Place()), Place(), torch.device("cpu"))
    assert trainer.resume(folder)
    evaluated = trainer.evaluator.evaluate(trainer.model, trainer.sub_heads, trainer.restarts)["clustering"]
    run = iic_dist.load(folder, "cpu")
    prediction = run.predict(trainer.data.train)
    assert prediction.sub_heads.shape == (90, 4 if name == "neighbour_run" else 1)
    assert run.selected == evaluated.selected
    assert torch.equal(prediction.sub_heads, evaluated.assigned.clusters)
    assert torch.equal(prediction.clusters, prediction.sub_heads[:, run.selected])
    space = run.model.heads["clustering"].space
    vectors = space(prediction.embeddings)  # the embeddings are the features themselves
    linear = run.model.heads["clustering"].linear
    logits = (vectors @ linear.weight.T + linear.bias).unflatten(1, (-1, 3))[:, run.selected]
    torch.testing.assert_close(torch.softmax(logits, -1), prediction.probabilities)
    result = json.loads((folder / "result.json").read_text())
    assert list(result["stages"]) == ["representation", "neighbours", "refine"][: 2 if name == "neighbour_run" else 3]


def test_a_checkpoint_whose_heads_do_not_fit_is_one_line(neighbour_run: Path, tmp_path: Path) -> None:
    shutil.copy(neighbour_run / "config.yaml", tmp_path)
    state = checkpoint.load_newest(neighbour_run / "checkpoints")
    assert state is not None
    for part in ("space.mean", "space.projection", "space.shift", "linear.weight", "linear.bias"):
        bad = {**state, "model": {**state["model"], f"heads.clustering.{part}": torch.zeros(5)}}
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        checkpoint.save(tmp_path / "checkpoints", state["epoch"], state["step"], bad)
        with pytest.raises(UsageError, match="its checkpoint is not of the network") as caught:
            iic_dist.load(tmp_path, "cpu")
        assert "\n" not in str(caught.value)


def test_its_columns_fit_together(moved_run: Path, gray_images: Path) -> None:
    run = iic_dist.load(moved_run, "cpu")
    prediction = run.predict(sorted(gray_images.rglob("*.png")))
    assert (run.num_clusters, run.image_size, run.channels, len(prediction)) == (3, 8, 1, 90)
    assert prediction.probabilities.shape == (90, 3)
    torch.testing.assert_close(prediction.probabilities.sum(1), torch.ones(90))
    assert torch.equal(prediction.probabilities.argmax(1), prediction.clusters)
    assert torch.equal(prediction.probabilities.amax(1), prediction.confidence)
    head = run.model.heads["clustering"]
    logits = head(prediction.embeddings)[:, run.selected]  # the embeddings are what the head sees
    torch.testing.assert_close(torch.softmax(logits, -1), prediction.probabilities)
    assert prediction.agreement().shape == (90,)


def test_every_kind_of_image_is_one_image(moved_run: Path, gray_images: Path) -> None:
    run = iic_dist.load(moved_run, "cpu")
    paths = sorted(gray_images.rglob("*.png"))[:20]
    pictures = [Image.open(path) for path in paths]
    array = np.stack([np.asarray(picture) for picture in pictures])[:, None]
    expected = run.predict(paths)
    assert same(run.predict([str(path) for path in paths]), expected)
    assert same(run.predict(pictures), expected)
    assert same(run.predict(array), expected)
    assert same(run.predict(torch.from_numpy(array)), expected)
    assert same(run.predict(torch.from_numpy(array).expand(-1, 3, -1, -1)), expected)  # a gray run, gray RGB images
    one = run.predict(paths[0])
    assert torch.equal(one.clusters, expected.clusters[:1])
    assert len(run.predict([])) == 0


def test_a_gray_run_sees_the_luma_of_colours(moved_run: Path) -> None:
    run = iic_dist.load(moved_run, "cpu")
    colours = torch.randint(0, 256, (7, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    luma = np.stack([np.asarray(Image.fromarray(c.permute(1, 2, 0).numpy()).convert("L")) for c in colours])
    assert same(run.predict(colours), run.predict(luma[:, None]))


def test_a_colour_run_sees_gray_images_in_rgb(colour_run: Path, gray_images: Path) -> None:
    run = iic_dist.load(colour_run, "cpu")
    assert (run.channels, run.image_size) == (3, 12)
    paths = sorted(gray_images.rglob("*.png"))[:5]
    in_rgb = [Image.open(path).convert("RGB") for path in paths]
    assert same(run.predict(paths), run.predict(in_rgb))


def test_images_of_another_size_are_cut_square_and_resized(colour_run: Path, tmp_path: Path) -> None:
    run = iic_dist.load(colour_run, "cpu")
    wide = Image.effect_noise((60, 36), 60).convert("RGB")
    wide.save(tmp_path / "wide.png")
    square = wide.resize((12, 12), Image.Resampling.BILINEAR, box=(12, 0, 48, 36))
    expected = run.predict(square)
    assert same(run.predict(wide), expected)
    assert same(run.predict(tmp_path / "wide.png"), expected)
    assert same(run.predict(np.asarray(wide).transpose(2, 0, 1)[None]), expected)
    turned = wide.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise, that is upright again
    turned.save(tmp_path / "turned.png", exif=exif)
    assert same(run.predict(tmp_path / "turned.png"), expected)
    assert same(run.predict(Image.open(tmp_path / "turned.png")), expected)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 8, 8),
        torch.zeros(8, 8, dtype=torch.uint8),
        torch.zeros(2, 2, 8, 8, dtype=torch.uint8),
        np.zeros((2, 8, 8, 3), dtype=np.uint8),
    ],
)
def test_arrays_that_are_not_images_are_named(moved_run: Path, images: Tensor) -> None:
    with pytest.raises(UsageError, match=r"images of shape \(.*: must be \(M, 1 or 3, H, W\), torch.uint8"):
        iic_dist.load(moved_run, "cpu").predict(images)


def test_what_is_no_picture_is_named(moved_run: Path) -> None:
    with pytest.raises(UsageError, match="an image as int"):
        iic_dist.load(moved_run, "cpu").predict([1])  # type: ignore[list-item]


def test_a_folder_that_is_no_run_is_named(gray_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run"):
        iic_dist.load(tmp_path)
    shutil.copy(gray_run / "config.yaml", tmp_path)
    with pytest.raises(UsageError, match=r"no checkpoint in .* yet; one comes every train.checkpoint_every epochs"):
        iic_dist.load(tmp_path)  # "no checkpoint verifies" was said of a run that had none yet
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "epoch_00001_step_00000001.pt").write_bytes(b"damaged")
    with pytest.raises(UsageError, match=r"no checkpoint in .* verifies$"):
        iic_dist.load(tmp_path)
    (tmp_path / "config.yaml").write_text("data: {name: digits}")
    with pytest.raises(UsageError, match="lacks data.image_size"):
        iic_dist.load(tmp_path)
