"""How fast images get from a folder to the device: listing, decoding, opening what is decoded, gathering batches.

    python benchmarks/bench_loader.py       a table, and results/loader_cpu.json

Times on the wall, since reading and worker processes are the matter: the load of the machine stands beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import provenance
import torch
from PIL import Image
from torch import Tensor

from iic_dist.data.device import DeviceImages
from iic_dist.data.folder import Reading
from iic_dist.data.host import HostImages
from iic_dist.data.listing import list_images
from iic_dist.data.load import load_image_set
from iic_dist.data.source import ImageSource

LISTED = 100_000
PHOTO_SIDE, IMAGE_SIZE = 400, 96
BATCH = 256


def seconds(work: Callable[[], object]) -> float:
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


def cpu_seconds(work: Callable[[], object]) -> float:
    """Time of this process and of children that it has waited for, in user and system."""
    before = os.times()
    work()
    return sum(after - earlier for after, earlier in zip(os.times()[:4], before[:4], strict=True))


def make_photos(folder: Path, count: int) -> None:
    """JPEG files of smooth random colours with some noise, about 25 kB each, in folders of 500."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels = (pixels + rng.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8)
        path = folder / f"{number // 500:03}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=85)


def measure_listing(scratch: Path) -> dict[str, Any]:
    """List 100,000 names of 1000 folders, three times."""
    for folder in range(LISTED // 100):
        (scratch / f"{folder:04}").mkdir(parents=True)
        for number in range(100):
            (scratch / f"{folder:04}" / f"{number:03}.jpg").touch()
    times = [seconds(lambda: list_images(scratch, follow_links=False)) for _ in range(3)]
    cpu = cpu_seconds(lambda: list_images(scratch, follow_links=False))
    return {"files": LISTED, "median_s": statistics.median(times), "runs": len(times), "cpu_s": cpu}


def measure_decoding(photos: Path, count: int, rounds: int) -> dict[str, Any]:
    """Images a second with each number of workers, in turn."""
    times: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for _ in range(rounds):
        for workers, taken in times.items():
            taken.append(seconds(lambda workers=workers: load(photos, None, workers=workers)))
    speeds = {
        f"{workers} workers": {"images_per_second": count / statistics.median(taken), "runs": len(taken)}
        for workers, taken in times.items()
    }
    return {"images_per_cpu_second": count / cpu_seconds(lambda: load(photos, None, workers=0)), **speeds}


def load(folder: Path, cache: Path | None, **options: Any) -> Tensor:
    reading = Reading(**{"progress": False, "cache": cache, **options})
    return load_image_set(f"folder:{folder}", folder, "all", image_size=IMAGE_SIZE, reading=reading).images


def measure_opening(photos: Path, cache: Path) -> dict[str, Any]:
    """Open decoded images again, with and without their checksums."""
    load(photos, cache)
    size = next(cache.iterdir()).stat().st_size
    times = {
        verify: [seconds(lambda verify=verify: load(photos, cache, verify=verify)) for _ in range(5)]
        for verify in (True, False)
    }
    return {
        "mebibytes": size / 2**20,
        **{f"verify={verify}_s": statistics.median(taken) for verify, taken in times.items()},
    }


def forget(path: Path) -> None:
    """Drop a file from the system's memory, so that it is read from the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_gathering(scratch: Path, count: int, batches: int) -> dict[str, Any]:
    """Batches of random images a second: what the step waits for where nothing was prefetched."""
    path = scratch / "images"
    shape = (count, 3, IMAGE_SIZE, IMAGE_SIZE)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    images.numpy().tofile(path)
    mapped = torch.from_numpy(np.memmap(path, np.uint8, mode="c", shape=shape))
    device = torch.device("cpu")
    sources: dict[str, ImageSource] = {
        "device": DeviceImages(images, device),
        "host": HostImages(images, device),
        "disk, in the system's memory": HostImages(mapped, device),
    }
    order = torch.randperm(count).split(BATCH)[:batches]
    times: dict[str, list[float]] = {name: [] for name in sources}
    for indices in order:
        for name, source in sources.items():
            times[name].append(seconds(lambda source=source, indices=indices: pixels_of(source, indices)))
    del mapped, sources["disk, in the system's memory"]
    forget(path)
    cold = HostImages(torch.from_numpy(np.memmap(path, np.uint8, mode="c", shape=shape)), device)
    times["disk, cold"] = [seconds(lambda indices=indices: pixels_of(cold, indices)) for indices in order]
    return {
        name: {"images_per_second": BATCH / statistics.median(taken), "batch_ms": 1e3 * statistics.median(taken)}
        for name, taken in times.items()
    }


def pixels_of(source: ImageSource, indices: Tensor) -> Tensor:
    """Read every pixel of a batch, as views do; images that stay where they are, are copied here."""
    images, rows, _ = source.gather(indices)
    return images.index_select(0, rows) if isinstance(source, DeviceImages) else images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=1500)
    parser.add_argument("--images", type=int, default=20_000, help="of the set that batches are gathered from")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "loader_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"provenance": provenance.of("cpu"), "load_before": os.getloadavg()}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        make_photos(scratch / "photos", options.photos)
        results["listing"] = measure_listing(scratch / "names")
        results["decoding"] = {
            "files": f"{options.photos} JPEGs of {PHOTO_SIDE} x {PHOTO_SIDE} to {IMAGE_SIZE} x {IMAGE_SIZE}",
            **measure_decoding(scratch / "photos", options.photos, options.rounds),
        }
        results["opening"] = measure_opening(scratch / "photos", scratch / "cache")
        results["gathering"] = {
            "batch": f"{BATCH} of {options.images} images of 3 x {IMAGE_SIZE} x {IMAGE_SIZE}",
            **measure_gathering(scratch, options.images, 60),
        }
    results["load_after"] = os.getloadavg()
    print(json.dumps(results, indent=2))
    options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
