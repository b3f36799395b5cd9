"""Decoded images on the disk: used when they are right, made anew when stale or damaged, and whole or not there."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import load_images
from PIL import Image

from iic_dist.data import cache as decoded_cache
from iic_dist.data import folder as folders
from iic_dist.data import listing as listings
from iic_dist.data.decode import Decoded
from iic_dist.errors import UsageError

SIZE = 8


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        save(folder / f"{number}.png", number)
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


def save(path: Path, seed: int) -> None:
    Image.fromarray(pixels(seed)).save(path)


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(SIZE, SIZE, 3), dtype=np.uint8)


def load(folder: Path, **options):
    options = {"image_size": SIZE, "cache": folder.parent / "cache", "unreadable": [], **options}
    return load_images(folder, **options)


def seeds_of(images: torch.Tensor) -> list[int]:
    """Which of the pictures these are."""
    return [next(s for s in range(100) if np.array_equal(image.permute(1, 2, 0), pixels(s))) for image in images]


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the files of each decoding."""
    counts: list[int] = []
    real = folders.decoded_files

    def counted(root: Path, paths: list[str], *arguments):
        counts.append(len(paths))
        return real(root, paths, *arguments)

    monkeypatch.setattr(folders, "decoded_files", counted)
    return counts


def cache_file(folder: Path) -> Path:
    [path] = (folder.parent / "cache").glob("*.images")
    return path


def test_a_second_load_maps_what_the_first_has_decoded(pictures, decodings):
    problems: list = []
    first = load(pictures)
    again = load(pictures, unreadable=problems)
    assert decodings == [6]
    assert seeds_of(again.images) == seeds_of(first.images) == [0, 1, 2, 3, 4]
    assert again.paths == first.paths == ("0.png", "1.png", "2.png", "3.png", "4.png")
    assert again.checksum == first.checksum != 0
    assert problems == [("bad.png", "not an image, or its header is damaged")]
    assert cache_file(pictures).name.startswith("pictures-")


def test_the_pixels_come_first_in_the_file(pictures):
    images = load(pictures).images
    assert cache_file(pictures).read_bytes().startswith(images.numpy().tobytes())


def test_what_is_mapped_may_be_replaced_and_removed(pictures):
    images = load(pictures).images
    save(pictures / "5.png", 5)
    load(pictures)
    cache_file(pictures).unlink()
    assert seeds_of(images) == [0, 1, 2, 3, 4]


def add(folder: Path) -> None:
    save(folder / "5.png", 5)


def remove(folder: Path) -> None:
    (folder / "0.png").unlink()


def rename(folder: Path) -> None:
    (folder / "0.png").rename(folder / "9.png")


def rewrite(folder: Path) -> None:
    save(folder / "0.png", 7)


def rewrite_within_the_clock_tick(folder: Path) -> None:
    """Another size at the same time of change."""
    before = (folder / "0.png").stat()
    (folder / "0.png").write_bytes(b"")
    os.utime(folder / "0.png", ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "seeds"),
    [
        (add, [0, 1, 2, 3, 4, 5]),
        (remove, [1, 2, 3, 4]),
        (rename, [1, 2, 3, 4, 0]),
        (rewrite, [7, 1, 2, 3, 4]),
        (rewrite_within_the_clock_tick, [1, 2, 3, 4]),
    ],
)
def test_a_changed_folder_is_decoded_again(pictures, decodings, change, seeds):
    load(pictures)
    change(pictures)
    assert seeds_of(load(pictures).images) == seeds
    assert seeds_of(load(pictures).images) == seeds
    assert len(decodings) == 2


def test_another_decoder_or_limit_decodes_again_and_another_size_has_its_own_file(pictures, decodings, monkeypatch):
    load(pictures)
    load(pictures, max_pixels=10**6)
    assert len(decodings) == 2
    monkeypatch.setattr(folders, "DECODER", "2 with Pillow 99")
    load(pictures, max_pixels=10**6)
    assert len(decodings) == 3
    assert load(pictures, image_size=4, max_pixels=10**6).images.shape == (5, 3, 4, 4)
    load(pictures, max_pixels=10**6)
    assert len(decodings) == 4
    assert len(list((pictures.parent / "cache").glob("*.images"))) == 2


def test_labels_are_those_of_the_moment(pictures, decodings):
    (pictures / "dog").mkdir()
    save(pictures / "dog" / "x.png", 8)
    assert load(pictures).labels is None
    assert load(pictures, folder_labels=True).labels.tolist() == [-1, -1, -1, -1, -1, 0]
    assert len(decodings) == 1


# --- damage


def test_any_flipped_bit_is_noticed(pictures, decodings, caplog):
    caplog.set_level(logging.INFO)
    load(pictures)
    content = cache_file(pictures).read_bytes()
    rng = np.random.default_rng(0)
    places = [0, len(content) - 1, *rng.integers(0, len(content), 98)]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        cache_file(pictures).write_bytes(bytes(damaged))
        assert seeds_of(load(pictures).images) == [0, 1, 2, 3, 4], place
    assert len(decodings) == 1 + len(places)
    assert caplog.text.count("it is damaged") == len(places)
    assert cache_file(pictures).read_bytes() == content


def test_any_truncation_is_noticed(pictures, decodings):
    load(pictures)
    content = cache_file(pictures).read_bytes()
    lengths = [0, 1, 15, 16, len(content) - 1, *np.random.default_rng(0).integers(0, len(content), 45).tolist()]
    for length in lengths:
        cache_file(pictures).write_bytes(content[:length])
        assert seeds_of(load(pictures).images) == [0, 1, 2, 3, 4], length
    cache_file(pictures).write_bytes(content + bytes(1))
    load(pictures)
    assert len(decodings) == 2 + len(lengths)


def test_a_process_that_need_not_verify_does_not_read_the_pixels(pictures, decodings):
    load(pictures)
    content = bytearray(cache_file(pictures).read_bytes())
    content[0] ^= 1
    cache_file(pictures).write_bytes(bytes(content))
    assert load(pictures, verify=False).images[0, 0, 0, 0] == int(pixels(0)[0, 0, 0]) ^ 1
    assert len(decodings) == 1


def test_each_block_has_its_checksum(tmp_path, monkeypatch):
    monkeypatch.setattr(decoded_cache, "_BLOCK", 100)
    images = np.stack([pixels(seed).transpose(2, 0, 1) for seed in range(3)])  # 576 bytes
    path = tmp_path / "x"
    with path.open("w+b") as file:
        decoded_cache.write(file, "here", SIZE, [Decoded(images, ["a", "b", "c"], [], True)])
        found, contents = decoded_cache.read(file, "here", verify=True)
    assert np.array_equal(found, images)
    assert len(contents.checksums) == 6
    for place in (0, 99, 100, 575):
        content = bytearray(path.read_bytes())
        content[place] ^= 4
        (tmp_path / "y").write_bytes(bytes(content))
        with (
            (tmp_path / "y").open("rb") as file,
            pytest.raises(decoded_cache.Unusable, match=f"of bytes {place // 100 * 100} "),
        ):
            decoded_cache.read(file, "here", verify=True)


# --- one channel


@pytest.mark.parametrize("count", [1, 4, 7])
def test_one_channel_of_gray_images_of_any_number(tmp_path, monkeypatch, count):
    monkeypatch.setattr(decoded_cache, "_BLOCK", 3 * 3 * SIZE * SIZE)  # three images at a time
    gray = np.stack([pixels(seed)[..., 0] for seed in range(count)])
    chunks = [
        Decoded(np.stack([gray[n : n + 2]] * 3, 1), [str(n)] * len(gray[n : n + 2]), [], False)
        for n in range(0, count, 2)
    ]
    with (tmp_path / "x").open("w+b") as file:
        decoded_cache.write(file, "here", SIZE, chunks)
        found, contents = decoded_cache.read(file, "here", verify=True)
    assert np.array_equal(found, gray[:, None])
    assert len(contents.paths) == count


# --- several processes, and disks that refuse


def load_and_tell(folder: str, answers) -> None:
    answers.put(load(Path(folder), workers=0).images.long().sum().item())


def test_processes_that_need_the_same_file_at_once(pictures):
    for number in range(5, 400):
        save(pictures / f"{number}.png", number % 100)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=load_and_tell, args=(str(pictures), answers)) for _ in range(4)]
    for process in processes:
        process.start()
    sums = {answers.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sums == {sum(int(pixels(n % 100).astype(int).sum()) for n in range(400))}
    assert {path.suffix for path in cache_file(pictures).parent.iterdir()} == {".images", ".listing"}  # no part is left


def test_one_process_decodes_and_those_that_came_meanwhile_wait(pictures, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    context = multiprocessing.get_context("fork")
    begun, answers = context.Event(), context.Queue()
    real = decoded_cache.write

    def slow(*arguments) -> None:
        begun.set()
        time.sleep(1)
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(decoded_cache, "write", slow)
        other = context.Process(target=load_and_tell, args=(str(pictures), answers))
        other.start()
        begun.wait(30)
    monkeypatch.setattr(decoded_cache, "write", None)  # this process must not
    total = load(pictures).images.long().sum().item()
    assert total == answers.get(timeout=30)
    other.join()
    assert "waiting for another process" in caplog.text


def test_what_a_killed_process_has_left_is_overwritten(pictures):
    load(pictures)
    path = cache_file(pictures)
    content = path.read_bytes()
    path.rename(f"{path}.part")
    Path(f"{path}.part").write_bytes(b"half" * 10_000)
    load(pictures)
    assert cache_file(pictures).read_bytes() == content


def test_a_folder_that_cannot_be_written_is_said_once_and_a_temporary_file_is_used(pictures, decodings, caplog):
    (pictures.parent / "cache").write_text("a file, not a folder")
    assert seeds_of(load(pictures).images) == [0, 1, 2, 3, 4]
    assert seeds_of(load(pictures, verify=False).images) == [0, 1, 2, 3, 4]  # another rank
    assert decodings == [6, 6]
    [record] = caplog.records
    assert f"decoded images cannot be kept in {pictures.parent / 'cache'} (File exists)" in record.getMessage()
    assert "--data.cache" in record.getMessage()


def test_a_full_disk_is_one_line_and_leaves_nothing(pictures, monkeypatch):
    def full(*arguments) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(decoded_cache.os, "fsync", full)
    for options in ({}, {"cache": None}):
        with pytest.raises(
            UsageError, match=r"cannot be kept in .* \(No space left on device\).*--data.cache"
        ) as caught:
            load(pictures, **options)
        assert "\n" not in str(caught.value)
    assert list((pictures.parent / "cache").iterdir()) == []


def test_images_that_fit_no_disk_are_refused_before_decoding(pictures, decodings):
    with pytest.raises(UsageError, match="6 decoded images of 30000000 x 30000000 pixels need .* GB of disk"):
        load(pictures, image_size=30_000_000)
    assert decodings == []
    assert [path.suffix for path in (pictures.parent / "cache").iterdir()] == [".listing"]


def test_a_file_system_without_locks_is_one_that_cannot_be_used(pictures, monkeypatch, caplog):
    def no_locks(*arguments) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(decoded_cache.fcntl, "flock", no_locks)
    assert seeds_of(load(pictures).images) == [0, 1, 2, 3, 4]
    assert "No locks available" in caplog.text


def test_a_kept_listing_is_trusted_if_asked(pictures, decodings, monkeypatch):
    first = load(pictures)
    add(pictures)
    monkeypatch.setattr(listings, "list_images", lambda *arguments: pytest.fail("the files are looked at"))
    problems: list = []
    trusted = load(pictures, relist=False, unreadable=problems)
    assert trusted.paths == first.paths
    assert torch.equal(trusted.images, first.images)
    assert problems == [("bad.png", "not an image, or its header is damaged")]
    assert decodings == [6]
    monkeypatch.undo()
    assert len(load(pictures).images) == 6


@pytest.mark.parametrize(
    "damage", [lambda text: text[:-3], lambda text: text.replace("0.png", "9.png"), lambda text: ""]
)
def test_a_damaged_listing_is_made_anew(pictures, damage):
    load(pictures)
    [listing] = (pictures.parent / "cache").glob("*.listing")
    listing.write_text(damage(listing.read_text()))
    add(pictures)
    assert len(load(pictures, relist=False).images) == 6


def test_another_rule_for_links_does_not_take_the_listing(pictures):
    load(pictures)
    add(pictures)
    assert len(load(pictures, relist=False).images) == 5
    assert len(load(pictures, relist=False, follow_links=True).images) == 6
