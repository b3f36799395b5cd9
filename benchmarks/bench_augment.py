"""The SimCLR chain (crop and resize, flip, colour jitter, gray, normalise) by everything that a user could pick.

    pytest benchmarks/bench_augment.py --benchmark-only     pytest-benchmark's statistics, grouped by shape
    python benchmarks/bench_augment.py                      the forms in turn: a table, and results/augment_cpu.json

One thread of a CPU, in CPU time; images per second from bytes to normalised float32, one view of each, everything
included: drawing parameters and reading the bytes of the batch. With --device cuda the native op on a GPU.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measuring
import provenance
import pytest
import side_by_side
import torch
from torch import Tensor

from iic_dist.ops import augment as native
from iic_dist.ops.philox import uniforms
from iic_dist.views.draw import NUM_UNIFORMS, draw
from iic_dist.views.policies import policy
from iic_dist.views.views import Views

SHAPES = [(32, 32), (64, 64), (96, 64)]
"""Side of the images and of the views, pixels."""
IMAGES, BATCH, DRAWN = 2048, 256, 64
"""Images of the set and of a batch, and batches before they come round again."""
PER_BATCH = "torchvision batch"
"""Marked in the table: it draws one set of parameters for all images of a batch, which no training can use."""
KORNIA, FUSED = "kornia", "impl=fused"
FORMS = ("torchvision", PER_BATCH, KORNIA, "impl=torch", FUSED)
BARS = {(32, 32): 10.0, (96, 64): 5.0}
"""PERFORMANCE.md: how many times as fast as kornia the fused op must be."""
MEAN, STD = 0.5, 0.25

Form = Callable[[Tensor, Tensor, int], Tensor]
"""Images of a set, rows of a batch, number of the batch -> views."""


def pictures(count: int, side: int, device: str = "cpu") -> Tensor:
    """Random bytes, as no form looks at what it sees."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator).to(device)


def torchvision_chain(size: int) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    jitter = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    chain: Callable[[Tensor], Tensor] = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([jitter], 0.8),
            v2.RandomGrayscale(0.2),
            v2.Normalize([MEAN] * 3, [STD] * 3),
        ]
    )
    return chain


def kornia_chain(size: int) -> Callable[[Tensor], Tensor]:
    import kornia.augmentation as kornia

    return torch.nn.Sequential(
        kornia.RandomResizedCrop((size, size), scale=(0.2, 1.0), cropping_mode="resample"),  # the faster one
        kornia.RandomHorizontalFlip(),
        kornia.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        kornia.RandomGrayscale(p=0.2),
        kornia.Normalize([MEAN] * 3, [STD] * 3),
    )


def our_views(size: int, impl: str) -> Views:
    """The chain is the policy `simclr`: two views of each image, of one distribution."""
    return policy("simclr", image_size=size, channels=3, seed=0, mean=[MEAN], std=[STD], impl=impl)


def forms(size: int) -> dict[str, Form]:
    """Each gives one view a row; ours two views of each image in the first half of the rows."""
    one, batch, per_sample = torchvision_chain(size), torchvision_chain(size), kornia_chain(size)
    ours = {impl: our_views(size, impl) for impl in ("torch", "fused")}

    def by_ours(impl: str) -> Form:
        def make(images: Tensor, rows: Tensor, number: int) -> Tensor:
            half = rows[: len(rows) // 2]
            return ours[impl].training(images, half, half, number)

        return make

    made: tuple[Form, ...] = (
        lambda images, rows, _: torch.stack([one(images[row]) for row in rows.tolist()]),
        lambda images, rows, _: batch(images[rows]),
        lambda images, rows, _: per_sample(images[rows].float().div_(255.0)),
        by_ours("torch"),
        by_ours("fused"),
    )
    return dict(zip(FORMS, made, strict=True))


def assert_parity(size: int, images: Tensor) -> None:
    """Raise unless the fused op makes the views that PyTorch makes, which the tests hold against torchvision."""
    rows = torch.arange(64, device=images.device)
    made = our_views(size, "fused").training(images, rows, rows, 0)
    wanted = our_views(size, "torch").training(images, rows, rows, 0, dtype=torch.float64)
    error = (made - wanted).abs().max().item() * STD
    assert error <= 1e-5, f"error {error:.1e}, 1e-5 allowed"


def assert_same_distribution(size: int, side: int) -> None:
    """Raise unless every form sees views of the same mean and spread of a pixel, to a few percent."""
    images = (pictures(512, side).float() * 0.5 + torch.linspace(0, 127, side)).to(torch.uint8)
    rows = torch.arange(512)
    seen = {name: form(images, rows, 0) for name, form in forms(size).items() if name != PER_BATCH}
    for name, views in seen.items():
        assert views.shape == (512, 3, size, size), name
        assert abs(float(views.mean() - seen[FUSED].mean())) < 0.15, name
        assert abs(float(views.std() / seen[FUSED].std()) - 1) < 0.15, name


def batches() -> Iterator[tuple[Tensor, int]]:
    """Rows and number of one batch after the other, the same for every form, drawn before any time is taken."""
    drawn = torch.randint(IMAGES, (DRAWN, BATCH), generator=torch.Generator().manual_seed(1))
    return itertools.cycle([(rows, number) for number, rows in enumerate(drawn)])


def next_views(form: Form, images: Tensor, batches: Iterator[tuple[Tensor, int]]) -> Tensor:
    return form(images, *next(batches))


def measure(side: int, size: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Median images per second of every form, one batch of each in turn until the time is up."""
    images = pictures(IMAGES, side)
    assert_parity(size, images)
    assert_same_distribution(size, side)
    works = {name: functools.partial(next_views, form, images, batches()) for name, form in forms(size).items()}
    times = side_by_side.in_turn(works, seconds, 8)
    return {
        name: {"median_images_per_second": BATCH / figures["median_ms"] * 1e3, **figures}
        for name, figures in times.items()
    }


def measure_on_gpu() -> dict[str, dict[str, float]]:
    """Views per second on the current GPU.

    Returns:
        By shape: the native op alone in the replay of a graph; whole calls of `training` on the wall, parameters
        included, fused and in PyTorch.

    Sync: waits for the device.
    """
    results: dict[str, dict[str, float]] = {}
    for side, size in SHAPES:
        images = pictures(8192, side, "cuda")
        assert_parity(size, images)
        rows = torch.randperm(len(images), device="cuda")[:4096]
        spec = our_views(size, "fused").first
        numbers = uniforms(0, 0, rows, torch.arange(2, device="cuda").unsqueeze(1), NUM_UNIFORMS).flatten(0, 1)
        table = native.table(vars(draw(spec, numbers, side, side)), len(numbers), side, side, images.device)
        common: dict[str, Any] = {"blur_kernel": 1, "sobel": False, "mean": spec.mean, "std": spec.std}
        common |= {"size": size, "dtype": torch.float32, "channels_last": False}
        milliseconds = {
            "op": measuring.graph_milliseconds(
                lambda i=images, r=rows, t=table, c=common: [  # type: ignore[misc]
                    native.augment_views(i, r, t, **c)
                ]
            )[0]
        }
        for impl in ("fused", "torch"):
            views = our_views(size, impl)
            milliseconds[impl] = measuring.wall_milliseconds(
                lambda v=views, i=images, r=rows: [v.training(i, r, r, 0)]  # type: ignore[misc]
            )
        results[f"{side}->{size}"] = {
            f"{name}_views_per_second": len(numbers) / value * 1e3 for name, value in milliseconds.items()
        }
    return results


def print_table(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    names = list(next(iter(results.values())))
    print(f"{'img/s':10}" + "".join(f"{name:>19}" for name in names))
    for shape, made in results.items():
        print(f"{shape:10}" + "".join(f"{made[name]['median_images_per_second']:19.0f}" for name in names))
        least = made[KORNIA]["median_ms"]
        print(f"{'/ kornia':10}" + "".join(f"{least / made[name]['median_ms']:18.2f}x" for name in names))
    print(f"({PER_BATCH}: one set of parameters for all images of a batch)")
    for (side, size), wanted in BARS.items():
        made = results[f"{side}->{size}"]
        ratio = made[KORNIA]["median_ms"] / made[FUSED]["median_ms"]
        print(f"{'met' if ratio >= wanted else 'MISSED'}: {side}->{size} {ratio:.1f}x kornia, {wanted:.0f}x asked")


def on_cpu(path: Path, seconds: float) -> None:
    torch.set_num_threads(1)
    results = {f"{side}->{size}": measure(side, size, seconds) for side, size in SHAPES}
    print_table(results)
    write(path, "cpu", results)


def on_cuda(path: Path, alone: bool) -> None:  # there are no rivals to leave out
    torch.set_num_threads(1)
    results = measure_on_gpu()
    print(json.dumps(results, indent=2))
    write(path, "cuda", results)


def write(path: Path, device: str, results: dict[str, Any]) -> None:
    figures = {"provenance": provenance.of(device), "batch": BATCH, "shapes": results}
    path.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"written to {path}")


def main() -> None:
    side_by_side.main("augment", on_cpu, on_cuda, seconds=20)


@pytest.mark.benchmark(timer=time.thread_time, min_rounds=3, max_time=1, warmup=False)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("side", "size"), SHAPES)
def test_views(benchmark: Any, side: int, size: int, name: str) -> None:
    images = pictures(IMAGES, side)
    form, rows = forms(size)[name], torch.arange(BATCH)
    assert_parity(size, images)
    benchmark.group = f"views {side}->{size}"
    benchmark.extra_info["images"] = BATCH
    benchmark(form, images, rows, 0)


if __name__ == "__main__":
    main()
