"""What heads on neighbours cost: time of one CPU thread and peak memory; extraction against the bare network.

    python benchmarks/bench_neighbours.py stage --rows 13394 --columns 1280      # all of the stage, 1000 steps
    python benchmarks/bench_neighbours.py search --rows 100000 --columns 384     # some blocks, and all from them
    python benchmarks/bench_neighbours.py extract --weights tf_efficientnet_lite0.safetensors

Features are random, of ten kinds: their numbers change no time. A line of JSON each, with commit, processor and load.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import provenance
import torch

from iic_dist.config.command_line import parse
from iic_dist.data.features import load_features
from iic_dist.distributed import Place
from iic_dist.ops.nearest import BLOCK, nearest
from iic_dist.training.features import frozen_embedder, load_run_features
from iic_dist.training.neighbour_stage import NeighbourStage

CPU = torch.device("cpu")


def write(folder: Path, rows: int, columns: int) -> Path:
    """Write float16 features around ten middles, some thousand rows at a time."""
    file = folder / "features.npy"
    out = np.lib.format.open_memmap(file, "w+", np.float16, (rows, columns))
    generator = np.random.default_rng(0)
    middles = generator.standard_normal((10, columns))
    for start in range(0, rows, 8192):
        count = min(8192, rows - start)
        noise = generator.standard_normal((count, columns), dtype=np.float32)
        out[start : start + count] = noise + middles[np.arange(start, start + count) % 10]
    out.flush()
    return file


def stage(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the whole stage on a mapped file."""
    file = write(folder, options.rows, options.columns)
    asked = ["--data.name", f"features:{file}", "--train.epochs", "0", "--model.num_clusters", "10"]
    config = parse([*asked, "--neighbours.steps", str(options.steps)])
    features = load_features(file).features
    marks = [time.process_time()]
    made = NeighbourStage(config, features, CPU)
    marks.append(time.process_time())
    made.run(lambda step, terms: None)
    marks.append(time.process_time())
    made.finish()
    marks.append(time.process_time())
    names = ("space_and_neighbours", "steps", "selection")
    spent = {name: round(after - before, 2) for name, before, after in zip(names, marks, marks[1:], strict=False)}
    return {"cpu_seconds": spent | {"all": round(marks[-1] - marks[0], 2)}}


def search(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Search the neighbours of some blocks of rows among all; the search of all takes so many blocks."""
    del folder
    base = torch.nn.functional.normalize(torch.randn(options.rows, options.columns))
    nearest(base[:BLOCK], 0, base, 20)
    before = time.process_time()
    for block in range(options.blocks):
        nearest(base[block * BLOCK :][:BLOCK], block * BLOCK, base, 20)
    a_block = (time.process_time() - before) / options.blocks
    return {"cpu_seconds_of_a_block": round(a_block, 3), "of_all": round(a_block * options.rows / BLOCK, 1)}


def extract(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Take the features of a folder of JPEGs, decoding and keeping included, and the bare forward of as many images."""
    from PIL import Image

    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(options.images):
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((160, 160)).save(folder / "images" / f"{number:05}.jpg")
    asked = ["--data.name", f"folder:{folder / 'images'}", "--data.cache", str(folder / "kept")]
    asked += ["--model.backbone", "timm/tf_efficientnet_lite0", "--model.weights", options.weights]
    asked += ["--model.freeze_backbone", "true", "--train.epochs", "0", "--neighbours.steps", "1"]
    asked += ["--data.image_size", "160", "--data.channels", "3", "--data.workers", "0", "--views.policy", "simclr"]
    config = parse([*asked, "--monitor.progress", "false", "--data.resampling", "bicubic"])
    embed = frozen_embedder(config, CPU)
    batch = torch.rand(embed.batch_size, 3, 160, 160).to(memory_format=torch.channels_last)
    spent = {"bare": 0.0, "extraction": 0.0}
    with torch.inference_mode(), embed.at_work():
        embed.backbone(batch)
        before = time.process_time()
        for _ in range(-(-options.images // len(batch))):
            embed.backbone(batch)
        spent["bare"] = time.process_time() - before
    before = time.process_time()
    load_run_features(config, Place(), CPU)
    spent["extraction"] = time.process_time() - before
    ratio = round(spent["extraction"] / spent["bare"], 3)
    return {"cpu_seconds": {name: round(each, 2) for name, each in spent.items()}, "ratio": ratio}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stage", "search", "extract"))
    parser.add_argument("--rows", type=int, default=13394)
    parser.add_argument("--columns", type=int, default=1280)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=4, help="of 1024 rows, for search")
    parser.add_argument("--images", type=int, default=256, help="for extract")
    parser.add_argument("--weights", help="for extract: a file of timm's tf_efficientnet_lite0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {"stage": stage, "search": search, "extract": extract}[options.what](options, Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    about = {"load": os.getloadavg()[0], **provenance.of("cpu")}
    print(json.dumps({**vars(options), **found, "peak_mib_of_the_process": round(peak), **about}))


if __name__ == "__main__":
    main()
