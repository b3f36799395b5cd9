"""The parameters of views: the same bits by Python's floats, on any instruction set, rank and split of a batch."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace

import draws
import pytest
import torch
from scipy import stats
from test_augment import EVERYTHING, POLICIES, build
from torch import Tensor

from iic_dist.data.sampler import Sampler
from iic_dist.ops import augment as native
from iic_dist.ops.exact import cos_sin, power
from iic_dist.ops.philox import uniforms
from iic_dist.views.draw import draw
from iic_dist.views.spec import ViewSpec

SPECS = [EVERYTHING, replace(EVERYTHING, crop_area=None, crop_sides=(9, 13), centre_probability=0.3), ViewSpec(size=9)]
SPECS += [replace(EVERYTHING, crop_area=(0.01, 0.3), crop_ratio=(0.2, 7.0), rotation=180.0, shear=60.0)]
for policy in POLICIES:
    made = build(*policy.values)  # type: ignore[arg-type]
    SPECS += [made.first, made.second]


def table(spec: ViewSpec, numbers: Tensor, height: int, width: int) -> Tensor:
    return native.table(vars(draw(spec, numbers, height, width)), len(numbers), height, width, numbers.device)


def test_cosine_and_sine() -> None:
    degrees = torch.linspace(-180, 180, 10_001, dtype=torch.float64)
    cos, sin = cos_sin(degrees)
    torch.testing.assert_close(cos, torch.cos(torch.deg2rad(degrees)), rtol=0, atol=1e-14)
    torch.testing.assert_close(sin, torch.sin(torch.deg2rad(degrees)), rtol=0, atol=1e-14)
    cos, sin = cos_sin(torch.zeros(1, dtype=torch.float64))
    assert (cos.item(), sin.item()) == (1.0, 0.0)


def test_power() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.exp(20 * torch.rand(10_000, generator=generator, dtype=torch.float64) - 10)
    exponent = torch.randint(0, 2**24, (10_000,), generator=generator) * 2.0**-24
    exponent[:2] = torch.tensor([0.0, 1 - 2.0**-24])
    exact = [math.exp(e * math.log(b)) for b, e in zip(base.tolist(), exponent.tolist(), strict=True)]
    torch.testing.assert_close(
        power(base, exponent.double()), torch.tensor(exact, dtype=torch.float64), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.size}px")
@pytest.mark.parametrize(("height", "width"), [(96, 96), (97, 131)])
def test_the_same_bits_by_pythons_floats(spec: ViewSpec, height: int, width: int) -> None:
    indices = torch.arange(60) * 71_582_788
    by_torch = table(spec, uniforms(2**40 + 7, 3, indices, 2, 21), height, width).numpy()
    for row, index in zip(by_torch, indices.tolist(), strict=True):
        by_hand = draws.table(spec, draws.uniforms(2**40 + 7, 3, index, 2), height, width)
        assert row.tobytes() == by_hand.tobytes()


def digest() -> str:
    """Of the parameters of 1000 images by every spec."""
    numbers = uniforms(5, 1, torch.arange(1000), 0, 21)
    tables = [table(spec, numbers, 97, 131) for spec in SPECS]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tables)).hexdigest()


def test_the_same_bits_without_vector_instructions() -> None:
    program = "import test_draws; print(test_draws.digest())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == digest()


@pytest.mark.parametrize("spec", SPECS[:4], ids=["area", "sides", "whole", "extreme"])
def test_ranks_and_splits_change_nothing(spec: ViewSpec) -> None:
    """What W ranks draw for their slices of an epoch is what one process draws."""
    whole = table(spec, uniforms(0, 2, torch.arange(96), 1, 21), 97, 131)
    for world_size in (1, 2, 3, 4):
        samplers = [Sampler(96, 24, 0, rank, world_size) for rank in range(world_size)]
        seen = []
        for sampler, step in itertools.product(samplers, range(samplers[0].steps_per_epoch)):
            indices = sampler.batch(2 * sampler.steps_per_epoch + step).indices
            assert torch.equal(table(spec, uniforms(0, 2, indices, 1, 21), 97, 131), whole[indices])
            seen += indices.tolist()
        assert sorted(seen) == list(range(96))


def test_parameters_are_independent() -> None:
    """Rank correlations between parameters, and of each with itself in the next image, view and epoch."""
    count = 20_000
    spec = replace(EVERYTHING, jitter_probability=1.0, affine_probability=1.0, blur=1.0, centre_probability=0.0)
    indices = torch.arange(count + 1)
    base = table(spec, uniforms(3, 0, indices, 0, 21), 40, 40).double()
    columns = [2, 5, 6, 8, 11, 12, 13, 14, 16]  # shifts, top, height, factors, hue, sigma: continuous ones
    others = {
        "image": base[1:],
        "view": table(spec, uniforms(3, 0, indices, 1, 21), 40, 40)[:-1].double(),
        "epoch": table(spec, uniforms(3, 1, indices, 0, 21), 40, 40)[:-1].double(),
    }
    base = base[:-1]
    pvalues = {
        (name, column): stats.spearmanr(base[:, column], other[:, column]).pvalue
        for name, other in others.items()
        for column in columns
    }
    free = [column for column in columns if column != 8]  # where a crop may lie depends on its height
    for one, two in itertools.combinations(free, 2):
        pvalues["parameters", one, two] = stats.spearmanr(base[:, one], base[:, two]).pvalue
    worst = min(pvalues, key=lambda key: pvalues[key])
    assert pvalues[worst] * len(pvalues) > 1e-3, worst
