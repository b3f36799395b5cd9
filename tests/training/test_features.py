"""Features of images by a frozen network: the numbers of a hand-written loop, kept, shared, and made anew in time."""

from __future__ import annotations

import logging
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import rank_tasks
import timm
import torch
from data_files import data_file
from PIL import Image
from ranks import Ranks
from safetensors.torch import load_file, save_file

from iic_dist.config import Config
from iic_dist.config.command_line import parse
from iic_dist.config.weights import with_weights
from iic_dist.data.cache import locked
from iic_dist.data.device import DeviceImages
from iic_dist.data.host import HostImages
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.models import build_backbone
from iic_dist.training import features as run_features
from iic_dist.training.extract import Embedder, embed_files, extract_images
from iic_dist.training.features import load_run_features
from iic_dist.views.policies import policy

CPU = torch.device("cpu")
_CONVNEXT = timm.data.resolve_data_config(pretrained_cfg=timm.models.get_pretrained_cfg("test_convnext").to_dict())
MEAN, STD = torch.tensor(_CONVNEXT["mean"]), torch.tensor(_CONVNEXT["std"])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights of timm/test_convnext, which wants bicubic images."""
    torch.manual_seed(5)
    file = tmp_path_factory.mktemp("weights") / "convnext.safetensors"
    save_file(timm.create_model("test_convnext").state_dict(), file)
    return file


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """150 pictures in colour and in gray of several sizes, in three sub-folders; two files cannot be read."""
    folder = tmp_path / "photographs"
    for number in range(150):
        generator = np.random.default_rng(number)
        height, width = generator.integers(70, 100, 2)
        coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        picture = coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC)
        path = folder / "abc"[number % 3] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        (picture.convert("L") if number % 10 == 0 else picture).save(path)
    (folder / "b" / "bad.png").write_bytes(b"no picture")
    (folder / "a" / "cut.png").write_bytes((folder / "a" / "003.png").read_bytes()[:100])
    return folder


def config_of(name: str, weights: Path, cache: Path, *options: str) -> Config:
    """A config of frozen features, with what its weights want filled in."""
    arguments = [
        *("--data.name", name, "--model.backbone", "timm/test_convnext", "--model.weights", str(weights)),
        *("--model.freeze_backbone", "true", "--train.epochs", "0", "--neighbours.steps", "10"),
        *("--data.cache", str(cache), "--run.threads", "1", "--monitor.progress", "false", "--views.policy", "simclr"),
        *("--data.workers", "0", "--data.image_size", "64", "--config", str(cache.parent / "empty.yaml"), *options),
    ]
    (cache.parent / "empty.yaml").write_text("{}\n")
    if not name.startswith("folder:"):
        arguments[arguments.index("--data.image_size") : arguments.index("--data.image_size") + 2] = []
    return with_weights(parse(arguments), Place(), print)


def expected_features(folder: Path, paths: tuple[str, ...], weights: Path, size: int = 64) -> torch.Tensor:
    """What PIL, PyTorch and timm make of the files, one by one."""
    net = timm.create_model("test_convnext", num_classes=0).eval()
    net.load_state_dict({k: v for k, v in load_file(weights).items() if not k.startswith("head.fc")})
    rows = []
    for path in paths:
        picture = Image.open(folder / path).convert("RGB")
        side = min(picture.size)
        left, top = (picture.width - side) / 2, (picture.height - side) / 2
        square = picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        image = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255
        with torch.inference_mode():
            rows.append(net(((image - MEAN[:, None, None]) / STD[:, None, None])[None]))
    return torch.cat(rows)


def test_a_folder_gives_what_pil_and_timm_give(photographs: Path, weights: Path, tmp_path: Path) -> None:
    config = config_of(f"folder:{photographs}", weights, tmp_path / "cache", "--data.folder_labels", "true")
    found = load_run_features(config, Place(), CPU)
    train = found.train
    assert found.evaluation is train
    assert len(train.paths) == len(train) == 150
    assert list(train.paths) == sorted(train.paths)
    assert [path for path, _ in found.unreadable] == ["a/cut.png", "b/bad.png"]
    assert (train.features.dtype, train.image_shape, train.class_names) == (torch.float32, (3, 64, 64), ("a", "b", "c"))
    assert train.labels is not None
    assert ["abc"[label] for label in train.labels] == [path[0] for path in train.paths]
    expected = expected_features(photographs, train.paths, weights)
    torch.testing.assert_close(train.features.clone(), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def extractions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the files of each extraction."""
    counts: list[int] = []
    real = run_features.embed_files

    def counted(embed, root, paths, **options):
        counts.append(len(paths))
        return real(embed, root, paths, **options)

    monkeypatch.setattr(run_features, "embed_files", counted)
    return counts


def test_what_is_kept_is_used_until_something_changes(
    photographs: Path, weights: Path, tmp_path: Path, extractions: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    def load(*options: str, file: Path = weights) -> torch.Tensor:
        config = config_of(f"folder:{photographs}", file, tmp_path / "cache", *options)
        return load_run_features(config, Place(), CPU).train.features.clone()

    caplog.set_level(logging.INFO)
    first = load()
    assert extractions == [152]
    assert torch.equal(load(), first)
    assert torch.equal(load("--data.folder_labels", "true", "--model.sub_heads", "2"), first)
    assert extractions == [152]
    assert "taken from" in caplog.text
    # Another size, another number format, another precision, other weights: each its own, beside the first.
    assert not torch.equal(load("--data.image_size", "32"), first)
    assert torch.equal(load("--data.keep_features", "float16"), first.half())
    assert (load("--train.precision", "float64") - first).abs().max() < 1e-4
    torch.manual_seed(6)
    other = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_convnext").state_dict(), other)
    assert not torch.equal(load(file=other), first)
    assert extractions == [152] * 5
    assert torch.equal(load(), first)
    assert extractions == [152] * 5
    # A file that changes, and one that goes.
    picture = photographs / "a" / "000.png"
    os.utime(picture, ns=(0, 0))
    assert torch.equal(load(), first)
    assert extractions == [152] * 6
    picture.unlink()
    assert torch.equal(load(), first[1:])
    assert extractions == [*[152] * 6, 151]


def test_a_run_that_goes_on_takes_what_it_has_kept(
    photographs: Path, weights: Path, tmp_path: Path, extractions: list[int]
) -> None:
    """Its config names the size of the views, which was left open before: all images were once looked at again."""

    def load(*options: str) -> torch.Tensor:
        config = config_of(f"folder:{photographs}", weights, tmp_path / "cache", *options)
        return load_run_features(config, Place(), CPU).train.features.clone()

    first = load()
    assert torch.equal(load("--views.size", "64", "--views.evaluate_size", "64"), first)
    assert extractions == [152]
    # Once taken for the same: an evaluation sees other pixels.
    assert not torch.equal(load("--views.evaluate_size", "32"), first)
    assert extractions == [152] * 2


def test_damage_and_what_a_killed_run_left_are_made_anew(
    photographs: Path, weights: Path, tmp_path: Path, extractions: list[int]
) -> None:
    config = config_of(f"folder:{photographs}", weights, tmp_path / "cache")
    first = load_run_features(config, Place(), CPU).train.features.clone()
    (kept,) = (tmp_path / "cache").glob("*.features")
    content = bytearray(kept.read_bytes())
    content[1000] ^= 1
    kept.write_bytes(content)
    kept.with_name(f"{kept.name}.part").write_bytes(b"of a run that was killed")
    assert torch.equal(load_run_features(config, Place(), CPU).train.features, first)
    assert extractions == [152, 152]
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_cache_that_cannot_be_written_is_done_without(
    photographs: Path, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(f"folder:{photographs}", weights, tmp_path / "cache")
    first = load_run_features(config, Place(), CPU).train
    (tmp_path / "file").write_text("")
    config.data.cache = str(tmp_path / "file" / "below")
    again = load_run_features(config, Place(), CPU).train
    assert torch.equal(again.features, first.features)
    assert "features cannot be kept in" in caplog.text
    assert again.checksum == first.checksum


def test_two_runs_at_once_do_not_wait_for_each_other(
    photographs: Path, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that waited in the lock would leave the other ranks in a collective."""
    config = config_of(f"folder:{photographs}", weights, tmp_path / "cache")
    first = load_run_features(config, Place(), CPU).train.features.clone()
    (kept,) = (tmp_path / "cache").glob("*.features")
    kept.unlink()
    with locked(kept.with_name(f"{kept.name}.part")):
        assert torch.equal(load_run_features(config, Place(), CPU).train.features, first)
    assert "another run makes them" in caplog.text
    assert not kept.exists()


def test_batches_and_workers_do_not_matter(photographs: Path, weights: Path) -> None:
    embed = embedder(weights, 64)
    paths = sorted(path.relative_to(photographs).as_posix() for path in photographs.rglob("*.png"))
    found = [
        torch.cat([part.features for part in embed_files(embed, photographs, paths, image_size=64, **options)])
        for options in ({}, {"workers": 2}, {"batch_size": 32}, {"batch_size": 1000})
    ]
    assert torch.equal(found[0], found[1])
    for other in found[2:]:
        torch.testing.assert_close(found[0], other, rtol=1e-5, atol=1e-5)


def embedder(weights: Path, size: int, precision: str = "float32") -> Embedder:
    backbone = build_backbone("timm/test_convnext", in_channels=3, image_size=size, weights=weights)
    views = policy("simclr", image_size=size, channels=3, seed=0, mean=MEAN.tolist(), std=STD.tolist())
    if precision == "float64":
        backbone.double()
    return Embedder(backbone, views, CPU, precision)  # type: ignore[arg-type]


@pytest.mark.parametrize("source", [HostImages, DeviceImages])
def test_images_in_memory(source: type, weights: Path) -> None:
    embed = embedder(weights, 32)
    images = torch.randint(0, 256, (70, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    calls = []
    embed.backbone.train()
    features = extract_images(embed, source(images, CPU), batch_size=32, after_each=lambda: calls.append(0))
    assert embed.backbone.training
    assert len(calls) == 3
    with torch.no_grad():
        normal = (images / 255 - MEAN[:, None, None]) / STD[:, None, None]
        expected = embed.backbone.eval()(normal)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    head = torch.nn.Linear(features.shape[1], 2)
    head(features).sum().backward()  # features made under inference_mode could not be trained on


@pytest.mark.parametrize(("pool", "world_size", "machines"), [("pair", 2, 1), ("ranks", 4, 1), ("ranks", 4, 2)])
def test_ranks_share_the_work_and_agree_to_the_bit(
    pool: str,
    world_size: int,
    machines: int,
    request: pytest.FixtureRequest,
    photographs: Path,
    weights: Path,
    tmp_path: Path,
) -> None:
    """152 files are two batches of 128: of four ranks two have nothing to do."""
    config = config_of(f"folder:{photographs}", weights, tmp_path / "cache")
    alone = load_run_features(config, Place(), CPU)
    ranks: Ranks = request.getfixturevalue(pool)
    for _ in range(2):  # made, then taken
        task = (rank_tasks.frozen_features, config.to_yaml(), str(tmp_path), machines)
        found = ranks.run(world_size, *task)
        for checksum, features, paths, unreadable, _ in found:
            assert checksum == alone.train.checksum
            assert torch.equal(features, alone.train.features)
            assert (paths, unreadable) == (alone.train.paths, alone.unreadable)
        kept = {str(path) for path in tmp_path.glob("machine-*/*.features")}
        assert len(kept) == machines
        assert {mapped for *_, mapped in found} == kept


def test_a_named_set(weights: Path, tmp_path: Path) -> None:
    config = config_of("digits", weights, tmp_path / "cache", "--views.size", "40")
    found = load_run_features(config, Place(), CPU).train
    assert found.features.shape == (1797, 64)
    assert (found.num_classes, found.image_shape) == (10, (3, 8, 8))
    assert config.data.image_size is None  # `complete` fills it


def test_features_of_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.eye(5, dtype=np.float32))
    np.save(tmp_path / "l.npy", np.arange(5) % 2)
    config = parse(
        [
            *("--data.name", f"features:{tmp_path}/x.npy", "--data.labels", f"{tmp_path}/l.npy"),
            *("--train.epochs", "0", "--neighbours.steps", "5"),
        ]
    )
    found = load_run_features(with_weights(config, Place(), print), Place(), CPU)
    assert torch.equal(found.train.features, torch.eye(5))
    assert found.train.num_classes == 2


def test_a_folder_of_which_nothing_can_be_read(tmp_path: Path, weights: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "bad.png").write_bytes(b"bad")
    config = config_of(f"folder:{folder}", weights, tmp_path / "cache")
    with pytest.raises(UsageError, match=r"holds 1 image file, and none can be read") as error:
        load_run_features(config, Place(), CPU)
    assert "\n" not in str(error.value)


def test_no_room_for_features(
    photographs: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(f"folder:{photographs}", weights, tmp_path / "cache")
    monkeypatch.setattr(os, "fstatvfs", lambda file: os.statvfs_result((4096, 4096, 10, 1, 1, 0, 0, 0, 0, 255)))
    with pytest.raises(UsageError, match=r"the features need .* free: keep them as --data.keep_features float16"):
        load_run_features(config, Place(), CPU)
    assert not list((tmp_path / "cache").glob("*.part"))


def test_the_nearest_photograph_by_real_weights_shows_the_same(tmp_path: Path) -> None:
    file = data_file("tf_efficientnet_lite0.safetensors")
    wanted = [f"imagenette/{kind}/{number:03}.jpg" for kind in ("church", "tench") for number in range(8)]
    with tarfile.open(data_file("imagenette160-val.tar.xz")) as archive:
        archive.extractall(tmp_path / "photographs", [archive.getmember(each) for each in wanted], filter="data")
    name = f"folder:{tmp_path}/photographs/imagenette"
    options = (
        "--model.backbone",
        "timm/tf_efficientnet_lite0",
        "--data.folder_labels",
        "true",
        "--data.image_size",
        "160",
    )
    config = config_of(name, file, tmp_path / "cache", *options)
    found = load_run_features(config, Place(), CPU).train
    assert found.labels is not None
    assert found.num_classes == 2
    z = torch.nn.functional.normalize(found.features - found.features.mean(0))
    nearest = (z @ z.T).fill_diagonal_(-2).argmax(1)
    assert (found.labels[nearest] == found.labels).sum() >= 15
