"""Going on with other images: noticed, said, and refused unless asked for; in this process, on small real files."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import assert_equal, timeless
from small_runs import write_digits

from iic_dist import train as command
from iic_dist.config.build import RunData, load_data
from iic_dist.config.command_line import parse
from iic_dist.data.features import FeatureSet
from iic_dist.data.image_set import ImageSet
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.training import checkpoint
from iic_dist.training.features import RunFeatures
from iic_dist.training.stop import StopSignals
from iic_dist.training.trained_images import compare, images_of, sketch

pytestmark = pytest.mark.usefixtures("one_thread")

BRIEF = [
    *("--model.num_clusters", "3", "--run.threads", "1", "--run.device", "cpu", "--monitor.progress", "false"),
    *("--model.sub_heads", "2", "--train.evaluate_every", "0", "--run.name", "run", "--monitor.log_every", "1"),
    *("--neighbours.steps", "0"),
]
NEIGHBOURS = ["--neighbours.steps", "6", "--neighbours.batch_size", "20", "--neighbours.sub_heads", "3"]


def run(folder: Path, *options: str) -> Path:
    """Train as the command does, on what the folder's images are now."""
    root = ["--run.root", str(folder.parent / "runs"), "--data.cache", str(folder.parent / "decoded")]
    place = Place()
    config, chosen = command.read(["--data.name", f"folder:{folder}", *root, *BRIEF, *options], place)
    command.train(config, place, StopSignals(), chosen)
    return folder.parent / "runs" / "run"


def change(folder: Path, kind: str, count: int, draw: random.Random) -> None:
    """Change so many images of a folder."""
    paths = sorted(folder.rglob("*.png"))
    for number, path in enumerate(draw.sample(paths, count)):
        if kind == "added":
            shutil.copy(path, path.with_name(f"new-{number}.png"))
        elif kind == "gone":
            path.unlink()
        else:
            pixels = np.array(Image.open(path))
            pixels[draw.randrange(8), draw.randrange(8)] ^= 64
            Image.fromarray(pixels).save(path)


def state_of(run: Path) -> dict[str, object]:
    state = checkpoint.load_newest(run / "checkpoints")
    assert state is not None
    return state


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Sixty images."""
    (tmp_path / "images").mkdir()
    return write_digits(tmp_path / "images", 60)


def test_other_images_are_noticed_and_what_changed_is_said(images: Path) -> None:
    """A run went on with other images without a word, or blamed views.mean, which nobody had set."""
    trained = run(images, "--train.epochs", "1")
    kept, draw = images.with_name("kept"), random.Random(0)
    images.rename(kept)
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file() and path.name != "owner.json"}
    for kind in ("added", "gone", "changed"):
        for count in (1, 2, 5, 20, 40):
            shutil.rmtree(images, ignore_errors=True)
            shutil.copytree(kept, images)
            change(images, kind, count, draw)
            counts = {"added": 0, "gone": 0, "changed": 0} | {kind: count}
            with pytest.raises(UsageError) as refused:
                run(images, "--train.epochs", "1")
            assert str(refused.value) == (
                f"{trained} was trained on other images than folder:{images} holds now: "
                f"{', '.join(f'{number} {what}' for what, number in counts.items())}, of 60; "
                "--run.new_images true goes on with them, another --run.name begins anew"
            )
    assert {path: path.read_bytes() for path in before} == before
    shutil.rmtree(images)
    shutil.copytree(kept, images)  # other times, the same images
    run(images, "--train.epochs", "1")


@pytest.mark.parametrize("count", [100, -28])
def test_new_images_are_trained_on_where_that_is_asked_for(count: int, images: Path) -> None:
    """With fewer images whole epochs took no step, and were reported as trained."""
    trained = run(images, "--train.epochs", "2")
    batch = int(parse(["--config", str(trained / "config.yaml")]).data.batch_size)
    assert state_of(trained)["step"] == 2 * (60 // batch)
    draw = random.Random(1)
    for _ in range(2 if count > 0 else 1):
        change(images, "added" if count > 0 else "gone", abs(count) // 2 if count > 0 else -count, draw)
        for path in images.rglob("new-*"):
            path.rename(path.with_name(f"{draw.random()}.png"))
    run(images, "--train.epochs", "4", "--run.new_images", "true")
    steps = 2 * (60 // batch) + 2 * ((60 + count) // batch)
    assert state_of(trained)["step"] == steps
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss/clustering" in line] == list(range(1, steps + 1))
    assert json.loads((trained / "result.json").read_text())["num_images"] == 60 + count
    run(images, "--train.epochs", "5")  # they are the run's now
    assert state_of(trained)["step"] == steps + (60 + count) // batch


def test_a_later_stage_finds_the_neighbours_of_new_images_until_its_heads_are_there(images: Path) -> None:
    trained = run(images, "--train.epochs", "1")
    change(images, "added", 10, random.Random(2))
    run(images, "--train.epochs", "1", "--run.new_images", "true", *NEIGHBOURS)
    state = state_of(trained)
    assert state["stage_done"]
    neighbours = state["neighbours"]
    assert isinstance(neighbours, torch.Tensor)
    assert len(neighbours) == 70
    change(images, "gone", 3, random.Random(3))
    with pytest.raises(UsageError, match="0 added, 3 gone, 0 changed, of 70, and its heads on neighbours were trained"):
        run(images, "--train.epochs", "1", "--run.new_images", "true", *NEIGHBOURS)


def test_other_rows_of_a_file_are_refused(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    options = ["--data.name", f"features:{tmp_path / 'rows.npy'}", "--run.root", str(tmp_path), *BRIEF, *NEIGHBOURS]

    def cluster(*more: str) -> None:
        config, chosen = command.read([*options, *more], Place())
        command.train(config, Place(), StopSignals(), chosen)

    np.save(tmp_path / "rows.npy", rows)
    cluster()
    cluster()
    np.save(tmp_path / "rows.npy", np.concatenate([rows[:-1] + (np.arange(59) == 7)[:, None], rows[:4]]))
    with pytest.raises(UsageError, match="other rows than features:.* holds now: 3 added, 0 gone, 2 changed, of 60; "):
        cluster()
    with pytest.raises(UsageError, match="its heads on neighbours were trained on those: choose another --run.name"):
        cluster("--run.new_images", "true")


def test_a_state_of_before_says_nothing_of_images_and_goes_on(images: Path) -> None:
    trained = run(images, "--train.epochs", "1")
    state = state_of(trained)
    wanted = timeless(state)
    newest = checkpoint.available(trained / "checkpoints")[0]
    newest.unlink()
    checkpoint.save(newest.parent, 1, int(str(state["step"])), {k: v for k, v in state.items() if k != "images"})
    run(images, "--train.epochs", "2")
    again = state_of(trained)
    assert_equal(again["images"], wanted["images"])


def test_a_named_set_and_its_unlabelled_images_are_known_again() -> None:
    digits = load_data(parse([]), Place()).train
    other = ImageSet("digits", digits.images.clone(), digits.labels, digits.class_names)
    other.images[7, 0, 3, 3] ^= 1
    alone, changed, both = (
        images_of(data) for data in (RunData(digits, digits), RunData(other, digits), RunData(digits, digits, other))
    )
    assert not compare(alone, alone)
    assert str(compare(alone, changed)) == "0 added, 0 gone, 1 changed"
    assert str(compare(alone, both)) == "1797 added, 0 gone, 0 changed"
    assert alone["checksum"] != changed["checksum"]


def test_rows_of_a_file_are_known_by_their_bits() -> None:
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    more = torch.cat([rows, rows[:3]])
    more[4, 2] += 1e-6
    of = [images_of(RunFeatures(FeatureSet("features:x.npy", each), FeatureSet("", each))) for each in (rows, more)]
    assert str(compare(*of)) == "3 added, 0 gone, 1 changed"


def test_features_made_by_other_arithmetic_are_those_of_the_same_images() -> None:
    """Features of one image differ in their last bits between devices, and with its place in a batch."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(500, 384, generator=generator) + 1.0
    noisy = features.to(torch.bfloat16).float() * (1 + 2**-8 * torch.randn(features.shape, generator=generator))
    shape = (3, 8, 8)
    one, other = (
        images_of(RunFeatures(FeatureSet("folder:x", each, image_shape=shape), FeatureSet("", each)))
        for each in (features, noisy)
    )
    assert not compare(one, other)
    turned = features.roll(1, 0)
    turned = images_of(RunFeatures(FeatureSet("folder:x", turned, image_shape=shape), FeatureSet("", turned)))
    assert str(compare(one, turned)) == "0 added, 0 gone, 500 changed"
    unit = torch.nn.functional.normalize(features, dim=1)
    distance = (unit - unit.roll(1, 0)).norm(dim=1)
    apart = (sketch(features).float() - sketch(features.roll(1, 0)).float()).square().mean(1).sqrt()
    assert float((apart / distance).mean()) == pytest.approx(1, abs=0.05)
