"""From image files to pixels of one size, in worker processes; a file that cannot be read is named, never fatal."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import warnings
from collections.abc import Iterable, Iterator
from ctypes import c_int64
from dataclasses import dataclass
from multiprocessing import RawArray
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from iic_dist.data.formats import MAX_PIXELS, ImageTooLarge, opened
from iic_dist.data.listing import Unreadable
from iic_dist.errors import UsageError
from iic_dist.wording import printable

DECODER = f"1 with Pillow {PIL.__version__}"
"""Names the pixels that `decode_image` makes of a file; count up when it makes others."""

Resampling = Literal["bilinear", "bicubic"]
"""How images are resized; both with antialias."""

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_MAX_WORKERS = 16
_CHUNK_IMAGES, _CHUNK_BYTES = 32, 2**24


def decode_image(
    path: Path,
    image_size: int,
    max_pixels: int = MAX_PIXELS,
    resampling: Resampling = "bilinear",
    truncated: bool = False,
) -> Tensor:
    """Decode one file: turned as its EXIF says, its central square resized with antialias (bilinear: triangle filter).

    Transparent pixels lie on white. 16-bit gray is scaled from its whole range, 0-65535. Of an animation the
    first picture counts.

    Args:
        path: The file.
        image_size: S, pixels.
        max_pixels, truncated: See `opened`.
        resampling: How it is resized.

    Returns:
        (3, S, S) uint8 RGB.

    Raises:
        Exception: the file is malformed; Pillow raises many kinds.
    """
    with opened(path, max_pixels, truncated) as image:
        image.load()
        with contextlib.suppress(Exception):  # a damaged EXIF block does not make the pixels bad
            ImageOps.exif_transpose(image, in_place=True)
        return square(image, image_size, resampling)


def header_size(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Read width and height of an image file in pixels, without decoding it, before it is turned as its EXIF says.

    Raises:
        Exception: the header is malformed, or says more than `max_pixels`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with opened(path, max_pixels) as image:
            return image.size


def square(image: Image.Image, image_size: int, resampling: Resampling = "bilinear") -> Tensor:
    """Resize the central square of a picture: (3, S, S) uint8 RGB. See `decode_image`; the EXIF is not looked at."""
    # Square first: a strip of 20000 x 1 resized by its shorter side would be 20000 squares long.
    fitted = ImageOps.fit(_to_rgb(image), (image_size, image_size), _RESAMPLING[resampling])
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("float pixels have no fixed range: save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # Pillow's own conversion cuts everything above 255 off
        wide = np.asarray(image).clip(0, 65535).astype(np.uint32)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class Decoded:
    """Some files one after the other, decoded.

    Attributes:
        images: (n, 3, S, S) uint8, what could be decoded, in the order of the files.
        paths: The n relative paths.
        malformed: The other files.
        has_colour: Whether a pixel of any of the images is not gray.
    """

    images: np.ndarray
    paths: list[str]
    malformed: Unreadable
    has_colour: bool


class _Chunks(Dataset[Decoded]):
    """The files in chunks of some consecutive ones; reading one decodes it.

    `at_work[w]` is the file that worker w is at, in memory that the processes share.
    """

    def __init__(
        self,
        root: Path,
        paths: list[str],
        image_size: int,
        max_pixels: int,
        workers: int,
        resampling: Resampling = "bilinear",
        truncated: bool = False,
    ) -> None:
        self.root, self.paths = root, paths
        self.image_size, self.decoding = image_size, (max_pixels, resampling, truncated)
        self.size = chunk_size(image_size)
        self.at_work = RawArray(c_int64, [-1] * max(1, workers))

    def __len__(self) -> int:
        return -(-len(self.paths) // self.size)

    def __getitem__(self, chunk: int) -> Decoded:
        worker = get_worker_info()
        place = 0 if worker is None else worker.id
        kept: list[str] = []
        malformed: Unreadable = []
        start = chunk * self.size
        images = np.empty((self.size, 3, self.image_size, self.image_size), dtype=np.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of oddities that it reads, and of sizes that we refuse
            for number, path in enumerate(self.paths[start : start + self.size], start):
                self.at_work[place] = number
                try:
                    image = decode_image(self.root / path, self.image_size, *self.decoding)
                    images[len(kept)] = image.numpy()
                except Exception as error:  # a malformed file can raise nearly anything
                    malformed.append((path, reason_for(error)))
                else:
                    kept.append(path)
        self.at_work[place] = -1
        images = images[: len(kept)]
        return Decoded(images, kept, malformed, bool((images != images[:, :1]).any()))


def chunk_size(image_size: int) -> int:
    """Return how many files `decoded_files` hands out at a time."""
    return max(1, min(_CHUNK_IMAGES, _CHUNK_BYTES // (3 * image_size**2)))


@contextlib.contextmanager
def decoded_files(
    root: Path,
    paths: list[str],
    image_size: int,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = 0,
    progress: bool = False,
    resampling: Resampling = "bilinear",
    truncated: bool = False,
) -> Iterator[Iterable[Decoded]]:
    """Decode files in their order, some at a time: `with decoded_files(...) as chunks: for chunk in chunks: ...`.

    Args:
        root: What the paths are relative to.
        paths: Of the files.
        image_size: S, side of the images in pixels.
        max_pixels, resampling, truncated: See `decode_image`.
        workers: Processes that decode. 0: this one does. None: one a core, at most 16.
        progress: Show a progress bar.

    Raises:
        UsageError: a worker ended, by a crash inside a decoder or because memory ran short.
    """
    workers = count_workers(workers)
    chunks = _Chunks(root, paths, image_size, max_pixels, workers, resampling, truncated)
    workers = min(workers, len(chunks))
    # What it yields are arrays, which pass through pipes: tensors take shared memory, of which containers have little.
    loader = DataLoader(
        chunks,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_ignore_signals,
    )
    decoded = iter(loader)
    try:
        with tqdm(desc="decoding images", unit="image", total=len(paths), disable=not progress) as bar:
            yield _counted(decoded, bar)
    except RuntimeError as error:  # by a signal handler of torch, wherever the main process is at that moment
        if "DataLoader worker (pid" not in str(error):
            raise
        at_work = [paths[number] for number in chunks.at_work if number >= 0]
        raise _worker_ended(f"{error} {error.__cause__}", root, at_work) from error
    finally:
        if workers:  # they do not heed SIGTERM, by which a process that ends would end them, and wait for them for ever
            decoded._shutdown_workers()  # type: ignore[attr-defined]


def _worker_ended(message: str, root: Path, at_work: list[str]) -> UsageError:
    cause = re.search(r"killed by signal: ([\w ]+\w)", message)
    files = ", ".join(repr(printable(path)) for path in at_work) or "none of its files"
    return UsageError(
        f"a process that decodes the images of {str(root)!r} ended ({cause[1] if cause else 'cause unknown'}); at work "
        f"were {files}: move away what crashes the decoder or, if memory ran short, use fewer --data.workers"
    )


def _counted(chunks: Iterable[Decoded], bar: tqdm[Any]) -> Iterator[Decoded]:
    for chunk in chunks:
        bar.update(len(chunk.paths) + len(chunk.malformed))
        yield chunk


def count_workers(workers: int | None, sharers: int = 1) -> int:
    """Return how many processes decode: as many as asked for, or else one a core, at most 16.

    Args:
        workers: As asked for, or None.
        sharers: Processes of this machine that decode at once, and share its cores.
    """
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // sharers, _MAX_WORKERS))


def _as_it_is(chunk: Any) -> Any:
    return chunk


def _ignore_signals(worker: int) -> None:
    """Leave it to the main process to stop: it decides for its workers when a job is to end."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def reason_for(error: Exception) -> str:
    """Say in one line why a file cannot be read."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or its header is damaged"
    if isinstance(error, ImageTooLarge):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, OSError) and "truncated" in str(error):
        return "it was cut short (--data.truncated true takes it, predict --truncated)"
    return printable(" ".join(f"{type(error).__name__}: {error}".split())[:200])
