"""Training steps on 1, 2 and 4 ranks, their link, and a model that predicts 8, 64 and 512 GPUs.

    python benchmarks/bench_scaling.py                 gloo ranks on this machine, or NCCL on its GPUs; a few minutes
    python benchmarks/bench_scaling.py --device cpu

Each world is a torchrun of its own; the worlds take turns, round by round, and the median of all rounds counts. Writes
results/scaling_DEVICE.json. The model (scaling_model.py) gets what one rank alone and the bare collectives take, and is
held against what 2 and 4 ranks took; then it predicts GPUs from ASSUMED, of which nothing is measured.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import provenance
import torch
import torch.distributed as dist
from scaling_model import Network, Step, Traffic, contrast_flops, predict

from iic_dist import distributed
from iic_dist.config.build import load_data
from iic_dist.config.command_line import parse
from iic_dist.device import choose_device
from iic_dist.distributed import Place
from iic_dist.losses import nt_xent_loss
from iic_dist.training.trainer import Trainer

WORLDS = (1, 2, 4)
WEAK, STRONG = 128, 256
"""Images of each rank, and images over all ranks."""
SIZES = [2**power for power in (3, 10, 14, 17, 20, 22, 24)]
"""Bytes of the bare collectives."""
SETTLE, STEPS = 3, 12
OPTIONS = ["--run.threads", "1", "--monitor.progress", "false", "--train.epochs", "1000"]

# What a GPU's figures stand on: none of this is measured here.
ASSUMED = {
    "images_per_second_of_a_gpu": 20_000.0,  # the bar of 40,000 views of a ResNet-18 at 32 px, bfloat16, H100
    "least_step_seconds": 0.006,  # launches of about a thousand kernels
    "backward_share": 2 / 3,
    "overlap": 0.9,
    "contrast_flops_per_second": 300e12,  # the bar of the NT-Xent kernel
}
SHAPE: dict[str, Any] = {
    "parameters": 11_702_864,
    "statistics": 10_624,
    "clusters": [10, 70],
    "sub_heads": 5,
    "embedding": 128,
}
"""A ResNet-18 and all three heads, as counted: a joint step on CIFAR-10."""
NETWORKS = {
    # 80 % of the data sheet: NVLink 4 450 GB/s each way; InfiniBand NDR 8 x 50 GB/s a node; Ethernet 12.5 GB/s a node.
    "InfiniBand, 8 x 400 Gb/s a node": (360e9, 320e9, 2e-6, 6e-6),
    "Ethernet, 100 Gb/s a node": (360e9, 10e9, 2e-6, 30e-6),
}
"""Bytes per second inside and between nodes of 8 GPUs, seconds of a hop inside and between."""
GPU_WEAK, GPU_STRONG = 512, 4096
"""Images of each GPU, and images over all GPUs."""


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Time one call on the wall, as long as the slowest of the ranks that start it together.

    Sync: waits for the device.
    """
    distributed.barrier()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def usual_seconds(work: Callable[[], object], device: torch.device, times: int) -> float:
    """Lower quartile of several calls, because other work on the machine can only make them longer."""
    return statistics.quantiles([seconds_of(work, device) for _ in range(SETTLE + times)][SETTLE:], n=4)[0]


def link_seconds(device: torch.device) -> dict[str, dict[int, float]]:
    """Seconds of bare collectives by the number of bytes: of the sum, or of the gathered whole."""
    ranks = distributed.world_size()
    found: dict[str, dict[int, float]] = {"all_reduce": {}, "all_gather": {}}
    for size in SIZES:
        whole = torch.zeros(max(1, size // 4 // ranks) * ranks, device=device)
        part = torch.zeros(len(whole) // ranks, device=device)
        works: dict[str, Callable[[], object]] = {
            "all_reduce": lambda whole=whole: dist.all_reduce(whole),
            "all_gather": lambda whole=whole, part=part: distributed._all_gather(whole, part),
        }
        for name, work in works.items():
            found[name][whole.numel() * 4] = usual_seconds(work, device, 30)
    return found


def step_seconds(images: int, place: Place, device: torch.device) -> dict[str, Any]:
    """Seconds of training steps on `images` images over all ranks, and what the model must know of them."""
    config = parse([*OPTIONS, "--data.batch_size", str(images)])
    trainer = Trainer(config, load_data(config, place), place, device)
    [joint] = trainer.course.schedule.passes(0)
    trainer.learner.model.train()
    work = functools.partial(trainer.train_step, joint, 0)
    return {"seconds": usual_seconds(work, device, STEPS), "shape": shape_of(trainer)}


def shape_of(trainer: Trainer) -> dict[str, Any]:
    """What the traffic of a step depends on, but for the number of images."""
    model = trainer.config.model
    return {
        "parameters": sum(parameter.numel() for parameter in trainer.learner.model.parameters()),
        "statistics": sum(buffer.numel() for buffer in trainer.learner.model.buffers() if buffer.is_floating_point()),
        "clusters": [model.num_clusters, model.num_overclusters],
        "sub_heads": model.sub_heads,
        "embedding": model.projection_dim,
    }


def contrast_rate(device: torch.device) -> float:
    """Operations per second of the NT-Xent loss with as many embeddings as the largest batch here has."""
    images = WEAK * WORLDS[-1]
    pair = torch.randn(2, images, 128, device=device).requires_grad_()

    def work() -> object:
        return torch.autograd.grad(nt_xent_loss(*pair.unbind()), pair)

    return contrast_flops(images, images, 128) / usual_seconds(work, device, STEPS)


def work_of_a_rank(device_name: str, output: Path) -> None:
    """Measure on all ranks of a world, and let rank 0 write."""
    place = Place.from_environment()
    device = choose_device(device_name, place)
    torch.set_num_threads(1)
    distributed.start(place, device, 10)
    ranks = place.world_size
    found: dict[str, Any] = {"weak": step_seconds(WEAK * ranks, place, device)}
    found["strong"] = step_seconds(STRONG, place, device)
    if ranks == 1:
        sizes = sorted({WEAK, *(STRONG // world for world in WORLDS)})
        found["alone"] = {size: step_seconds(size, place, device)["seconds"] for size in sizes}
        found["contrast_rate"] = contrast_rate(device)
    else:
        found["link"] = link_seconds(device)
    if place.is_main:
        output.write_text(json.dumps(found))
    distributed.stop()


def run_world(ranks: int, device: str) -> dict[str, Any]:
    """Measure one world in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [*torchrun, __file__, "--device", device, "--rank-output", str(output)], check=True, env=environment
        )
        found: dict[str, Any] = json.loads(output.read_text())
        return found


def median_of(rounds: list[Any]) -> Any:
    """Take the median of every number of equally built answers; what stands in a list is the same in all."""
    first = rounds[0]
    if isinstance(first, dict):
        return {key: median_of([each[key] for each in rounds]) for key in first}
    if isinstance(first, list):
        return first
    return statistics.median(rounds)


def fit_network(link: dict[str, dict[str, float]], ranks: int) -> Network:
    """Find the latency and the bandwidth of which the model is nearest to the bare collectives, in relative terms."""
    rows, wanted = [], []
    for name, laps in (("all_reduce", 2), ("all_gather", 1)):
        for size, seconds in link[name].items():
            share = int(size) * (ranks - 1) / ranks
            rows.append([laps * (ranks - 1) / seconds, laps * share / seconds])
            wanted.append(1.0)
    solution = torch.linalg.lstsq(
        torch.tensor(rows, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64).unsqueeze(1)
    ).solution.flatten()
    latency, per_byte = (max(float(value), 1e-12) for value in solution)
    return Network(latency, latency, 1 / per_byte, ranks, tree=False)


def validate(worlds: dict[int, dict[str, Any]], crowding: Callable[[int], float]) -> list[dict[str, Any]]:
    """Hold the model against the measured worlds; a rank alone and the bare collectives are all that it is told."""
    alone = {int(size): seconds for size, seconds in worlds[1]["alone"].items()}
    rows = []
    for kind in ("weak", "strong"):
        for ranks in [ranks for ranks in worlds if ranks > 1]:
            found = worlds[ranks][kind]
            own = WEAK if kind == "weak" else STRONG // ranks
            shape = found["shape"]
            step = predict(
                ranks=ranks,
                own_images=own,
                compute=alone[own] * crowding(ranks),
                contrast_rate=worlds[1]["contrast_rate"] / crowding(ranks),
                embedding=shape["embedding"],
                traffic=Traffic.of_step(images=own * ranks, **shape),
                network=fit_network(worlds[ranks]["link"], ranks),
                backward_share=2 / 3,
                overlap=0.0,  # a rank has one core, which cannot compute while it sends
            )
            rows.append(
                {
                    "scaling": kind,
                    "ranks": ranks,
                    "images_of_a_rank": own,
                    "measured_ms": found["seconds"] * 1e3,
                    "predicted_ms": step.total * 1e3,
                    "predicted_over_measured": step.total / found["seconds"],
                    "pieces_ms": pieces(step),
                }
            )
    return rows


def network_of(found: dict[str, Any], ranks: int) -> dict[str, float]:
    network = fit_network(found["link"], ranks)
    return {"hop_us": network.latency * 1e6, "bandwidth_mb_per_s": network.bandwidth / 1e6}


def pieces(step: Step) -> dict[str, float]:
    names = ("compute", "contrast", "losses", "gradients", "exposed")
    return {name: getattr(step, name) * 1e3 for name in names}


def predict_gpu_step(network: Network, ranks: int, own: int) -> Step:
    return predict(
        ranks=ranks,
        own_images=own,
        compute=max(ASSUMED["least_step_seconds"], own / ASSUMED["images_per_second_of_a_gpu"]),
        contrast_rate=ASSUMED["contrast_flops_per_second"],
        embedding=SHAPE["embedding"],
        traffic=Traffic.of_step(images=own * ranks, **SHAPE),
        network=network,
        backward_share=ASSUMED["backward_share"],
        overlap=ASSUMED["overlap"],
    )


def predict_gpus() -> list[dict[str, Any]]:
    """Predict 8, 64 and 512 GPUs in nodes of 8 from ASSUMED and NETWORKS."""
    rows = []
    for name, (inside, between, latency, latency_between) in NETWORKS.items():
        for kind, gpus in itertools.product(("weak", "strong"), (8, 64, 512)):
            own = GPU_WEAK if kind == "weak" else GPU_STRONG // gpus
            network = Network(latency, latency_between, inside if gpus <= 8 else min(inside, between), 8, tree=True)
            step = predict_gpu_step(network, gpus, own)
            alone = predict_gpu_step(network, 1, GPU_WEAK if kind == "weak" else GPU_STRONG)
            perfect = alone.total if kind == "weak" else alone.total / gpus
            rows.append(
                {
                    "network": name,
                    "scaling": kind,
                    "gpus": gpus,
                    "images_of_a_gpu": own,
                    "step_ms": step.total * 1e3,
                    "images_per_second": own * gpus / step.total,
                    "efficiency": perfect / step.total,
                    "pieces_ms": pieces(step),
                }
            )
    return rows


def print_measured(worlds: dict[int, dict[str, Any]]) -> None:
    print(f"{'ranks':>5} {'weak ms':>9} {'images/s':>9} {'strong ms':>10} {'images/s':>9}")
    for ranks, found in worlds.items():
        weak, strong = found["weak"]["seconds"], found["strong"]["seconds"]
        print(f"{ranks:5} {weak * 1e3:9.1f} {WEAK * ranks / weak:9.0f} {strong * 1e3:10.1f} {STRONG / strong:9.0f}")
    for ranks, found in worlds.items():
        for name, sizes in found.get("link", {}).items():
            text = "  ".join(f"{int(size):,} B {seconds * 1e3:.3f} ms" for size, seconds in sizes.items())
            print(f"{name} on {ranks} ranks: {text}")


def print_predicted(checks: list[dict[str, Any]], gpus: list[dict[str, Any]]) -> None:
    for row in checks:
        print(
            f"{row['scaling']:6} {row['ranks']} ranks: {row['measured_ms']:.1f} ms measured, {row['predicted_ms']:.1f} "
            f"predicted ({row['predicted_over_measured']:.2f})"
        )
    for row in gpus:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in row["pieces_ms"].items())
        print(
            f"{row['network']:30} {row['scaling']:6} {row['gpus']:3} GPUs: {row['step_ms']:6.2f} ms, "
            f"{row['images_per_second']:10,.0f} images/s, efficiency {row['efficiency']:.2f} ({parts})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="default: results/scaling_DEVICE.json")
    parser.add_argument("--rank-output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_output:
        work_of_a_rank(options.device, options.rank_output)
        return
    device = choose_device(options.device, Place()).type
    count = torch.cuda.device_count() if device == "cuda" else max(WORLDS)
    rounds = [{ranks: run_world(ranks, device) for ranks in WORLDS if ranks <= count} for _ in range(options.rounds)]
    worlds = median_of(rounds)
    cores = os.cpu_count() or 1
    checks = validate(worlds, lambda ranks: 1.0 if device == "cuda" else max(1.0, ranks / cores))
    gpus = predict_gpus()
    print_measured(worlds)
    print_predicted(checks, gpus)
    figures = {
        "provenance": {**provenance.of(device), "cores": cores, "load": os.getloadavg(), "rounds": len(rounds)},
        "images": {"weak, of a rank": WEAK, "strong, of all": STRONG},
        "measured": worlds,
        "fitted": {ranks: network_of(found, ranks) for ranks, found in worlds.items() if ranks > 1},
        "model_against_measured": checks,
        "assumed": {**ASSUMED, **SHAPE, "networks": NETWORKS},
        "predicted_gpus": gpus,
    }
    output = options.output or Path(__file__).parent / "results" / f"scaling_{device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
