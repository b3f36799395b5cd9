"""A whole training step against the pipeline that IIC codes have: same network, same images, one run.

    python benchmarks/bench_train_step.py       a table, and results/train_step_cpu.json

The other pipeline: a DataLoader that makes the views of one image after the other with torchvision on PIL images, a
pass of its own over the images for each head, both views of every repeat through the backbone, a loop over the
sub-heads, and negatives by a matrix with its diagonal masked. An image counts when all heads have been trained on it.
CPU time of one thread, one step of each pipeline in turn.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import provenance
import torch
from bench_iic import published_loop
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from iic_dist.config.build import RunData, load_data
from iic_dist.config.command_line import parse
from iic_dist.data.image_set import ImageSet
from iic_dist.distributed import Place
from iic_dist.training.optim import build_optimizer
from iic_dist.training.trainer import Trainer

COMMON = [
    *("--monitor.progress", "false", "--train.precision", "float32", "--train.channels_last", "false"),
    *("--train.contrastive_warmup_epochs", "0"),  # every step trains all heads
]
CASES = {
    "digits, 8 px, small CNN, batch 128": ["--config", "digits"],
    "32 px colour, small CNN, batch 128": [
        *("--config", "cifar10", "--model.backbone", "small_cnn", "--data.batch_size", "128"),
    ],
    "32 px colour, ResNet-18, batch 32": ["--config", "cifar10", "--data.batch_size", "32"],
    "32 px colour, ResNet-18, 3 repeats, batch 16": [
        *("--config", "cifar10", "--data.batch_size", "16", "--views.repeats", "3"),
    ],
}
STEPS = 4
"""Steps of an epoch of the colour images, which are drawn at random: their speed is that of photographs."""


def images_of(arguments: list[str]) -> RunData:
    """The digits, or random colour images in place of CIFAR-10's."""
    config = parse([*arguments, *COMMON])
    if config.data.name == "digits":
        return load_data(config, Place())
    generator = torch.Generator().manual_seed(0)
    count = STEPS * config.data.batch_size
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    images = ImageSet("random", pixels, torch.arange(count) % 10, tuple("0123456789"))
    return RunData(images, images)


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """A first and a second view of each image, made from a PIL image with torchvision's transforms."""

    def __init__(self, images: Tensor, policy: str, mean: list[float], std: list[float]) -> None:
        self.images = images.permute(0, 2, 3, 1).squeeze(-1).numpy()
        size = images.shape[-1]
        chain: list[Any] = [
            transforms.RandomResizedCrop(size, (0.2, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            transforms.RandomGrayscale(0.2),
        ]
        if policy == "digits":
            bilinear = transforms.InterpolationMode.BILINEAR
            moved = transforms.RandomAffine(12, (0.08, 0.08), (0.85, 1.15), 10, interpolation=bilinear)
            chain = [moved, transforms.ColorJitter(0.3, 0.3)]
        self.transform = transforms.Compose([*chain, transforms.ToTensor(), transforms.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = Image.fromarray(self.images[index])
        return self.transform(image), self.transform(image)


def masked_nt_xent(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    z = functional.normalize(torch.cat([z_a, z_b]))
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(float("-inf"))
    n = len(z_a)
    return functional.cross_entropy(similarity, torch.cat([torch.arange(n, 2 * n), torch.arange(n)]))


class Published:
    """The pipeline that ours is compared with."""

    def __init__(self, trainer: Trainer) -> None:
        config = trainer.config
        self.config = config
        self.model = copy.deepcopy(trainer.learner.model)
        optim = config.optim
        self.optimizer = build_optimizer(
            self.model, optim.name, lr=optim.lr, weight_decay=optim.weight_decay, momentum=optim.momentum
        )
        spec = trainer.views.first
        pairs = Pairs(trainer.data.train.images, config.views.policy, list(spec.mean), list(spec.std))
        loader = DataLoader(pairs, config.data.batch_size, shuffle=True, drop_last=True)
        self.batches = self._endless(loader)

    @staticmethod
    def _endless(loader: DataLoader[Any]) -> Iterator[Any]:
        while True:
            yield from loader

    def step(self, stages: Stages) -> None:
        """Train each head on one batch."""
        for head in self.config.heads:
            repeats = 1 if head == "contrastive" else self.config.views.repeats
            pairs = stages.timed("views", lambda repeats=repeats: [next(self.batches) for _ in range(repeats)])()
            first, second = (torch.cat(views) for views in zip(*pairs, strict=True))
            forward = stages.timed("forward", self.model)
            outputs = [forward(views, [head])[head] for views in (first, second)]
            loss = stages.timed("losses", self._loss)(head, *outputs)
            self.optimizer.zero_grad()
            stages.timed("backward", loss.backward)()
            stages.timed("optimizer", self.optimizer.step)()

    def _loss(self, head: str, a: Tensor, b: Tensor) -> Tensor:
        if head == "contrastive":
            return masked_nt_xent(a, b, self.config.loss.temperature)
        return published_loop(a, b).mean()


class Stages:
    """CPU seconds of the stages of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with its time added to a stage."""

        def call(*arguments: Any, **options: Any) -> Any:
            before = time.process_time()
            answer = function(*arguments, **options)
            self.seconds[name] += time.process_time() - before
            return answer

        return call


def our_step(trainer: Trainer, position: int, stages: Stages) -> None:
    """One joint step, its stages timed from outside."""
    [each] = trainer.course.schedule.passes(0)
    assert each.heads == trainer.config.heads, "a joint step"
    with (
        mock.patch.object(trainer.images, "gather", stages.timed("data", trainer.images.gather)),
        mock.patch.object(trainer.views, "training", stages.timed("views", trainer.views.training)),
        mock.patch.object(trainer.learner, "network", stages.timed("forward", trainer.learner.network)),
        mock.patch.object(trainer.learner, "losses", stages.timed("losses", trainer.learner.losses)),
        mock.patch.object(Tensor, "backward", stages.timed("backward", Tensor.backward)),
        mock.patch.object(trainer.learner.optimizer, "step", stages.timed("optimizer", trainer.learner.optimizer.step)),
    ):
        trainer.train_step(each, position % each.steps)


def measure(arguments: list[str], seconds: float) -> dict[str, Any]:
    """Both pipelines in turn until the time is up, three rounds at least; the first round is not counted."""
    config = parse([*arguments, *COMMON])
    trainer = Trainer(config, images_of(arguments), Place(), torch.device("cpu"))
    published = Published(trainer)
    times: dict[str, list[float]] = {"published": [], "ours": []}
    stages = {name: Stages() for name in times}
    end = time.perf_counter() + seconds
    rounds = -1
    while rounds < 3 or time.perf_counter() < end:
        for name, taken in times.items():
            current = stages[name] if rounds >= 0 else Stages()
            before = time.process_time()
            if name == "ours":
                our_step(trainer, rounds + 1, current)
            else:
                published.step(current)
            if rounds >= 0:
                taken.append(time.process_time() - before)
        rounds += 1
    batch = config.data.batch_size
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        "options": arguments,
        "rounds": rounds,
        "ratio": medians["published"] / medians["ours"],
        **{
            name: {
                "images_per_cpu_second": batch / medians[name],
                "step_ms": 1e3 * medians[name],
                "share": {stage: taken / sum(times[name]) for stage, taken in sorted(stages[name].seconds.items())},
            }
            for name in times
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="for each case")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "train_step_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"provenance": provenance.of("cpu"), "load_before": os.getloadavg(), "cases": {}}
    for name, arguments in CASES.items():
        results["cases"][name] = row = measure(arguments, options.seconds)
        print(f"{name}: {row['ratio']:.2f}x")
        for pipeline in ("published", "ours"):
            figures = row[pipeline]
            shares = ", ".join(f"{stage} {share:.1%}" for stage, share in figures["share"].items())
            speed = f"{figures['images_per_cpu_second']:8.1f} images/s {figures['step_ms']:8.1f} ms"
            print(f"  {pipeline:10}{speed}: {shares}")
    results["load_after"] = os.getloadavg()
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
