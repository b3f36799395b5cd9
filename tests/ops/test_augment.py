"""The native op that makes views against its twin in PyTorch, `iic_dist.views.apply.apply`, in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from view_cases import allowed, arguments, make, smooth
from view_specs import EVERYTHING, GRAY

from iic_dist.ops import augment as native
from iic_dist.views.spec import ViewSpec

pytestmark = pytest.mark.skipif("cpu" not in native.DEVICES, reason="the extension has no kernels of views")


def assert_equal_twin(spec: ViewSpec, images: Tensor) -> None:
    made, expected = make(spec, images, "fused"), make(spec, images, "torch", torch.float64)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), expected, rtol=0, atol=allowed(spec))


@pytest.mark.parametrize("size", [2, 8, 17, 32, 96])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 32), (28, 45), (97, 64)])
@pytest.mark.parametrize("sobel", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_everything_at_once(channels: int, sobel: bool, height: int, width: int, size: int) -> None:
    spec = replace(EVERYTHING if channels == 3 else GRAY, size=size, sobel=sobel)
    assert_equal_twin(replace(spec, mean=(), std=()) if sobel else spec, smooth(13, channels, height, width))


@pytest.mark.parametrize(
    "alone",
    [
        {},
        {"rotation": 180.0},
        {"shear": 60.0},
        {"zoom": (0.05, 20.0)},
        {"translation": 1.0},
        {"crop_area": (0.001, 0.01)},
        {"crop_area": (1.0, 1.0)},
        {"crop_sides": (1, 33), "centre_probability": 0.5},
        {"flip": 1.0},
        {"brightness": 3.0},
        {"contrast": 3.0},
        {"saturation": 3.0},
        {"hue": 0.5},
        {"gray": 1.0},
        {"blur": 1.0, "blur_sigma": (1e-6, 50.0)},
        {"sobel": True},
        {"mean": (0.5,), "std": (0.25,)},
    ],
    ids=lambda alone: ",".join(alone) or "nothing",
)
@pytest.mark.parametrize("size", [33, 50])
def test_one_thing_at_a_time(alone: dict[str, Any], size: int) -> None:
    assert_equal_twin(ViewSpec(size=size, **alone), smooth(9, 3, 33, 33))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_spec(data: st.DataObject) -> None:
    channels = data.draw(st.sampled_from([1, 3]))
    share, side = st.floats(0, 1), st.integers(2, 70)
    height, width = data.draw(side), data.draw(side)
    options: dict[str, Any] = {name: data.draw(share) for name in ("flip", "affine_probability", "blur")}
    options |= {name: data.draw(share) for name in ("brightness", "contrast")}
    if channels == 3:
        options |= {"saturation": data.draw(share), "hue": data.draw(share) / 2, "gray": data.draw(share)}
    if data.draw(st.booleans()):
        options |= {"rotation": 180 * data.draw(share), "shear": 60 * data.draw(share), "zoom": (0.5, 2.0)}
    if data.draw(st.booleans()):
        options |= {"crop_area": (0.05 + 0.9 * data.draw(share), 1.0), "sobel": data.draw(st.booleans())}
    spec = ViewSpec(size=data.draw(side), **options)
    assert_equal_twin(spec, smooth(5, channels, height, width, seed=height))


def test_types_and_layouts_round_the_same_views() -> None:
    for spec, channels in ((EVERYTHING, 3), (GRAY, 1), (replace(EVERYTHING, sobel=True, mean=(), std=()), 3)):
        spec = replace(spec, size=19)
        images = smooth(7, channels, 25, 31)
        exact = make(spec, images, "fused")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for channels_last in (False, True):
                made = make(spec, images, "fused", dtype, channels_last=channels_last)
                layout = torch.channels_last if channels_last else torch.contiguous_format
                assert made.is_contiguous(memory_format=layout)
                assert torch.equal(made, exact.to(dtype))


def test_images_of_any_layout() -> None:
    images = smooth(12, 3, 20, 30)
    expected = make(EVERYTHING, images[::2].contiguous(), "fused")
    assert torch.equal(make(EVERYTHING, images[::2], "fused"), expected)
    last = images[::2].contiguous(memory_format=torch.channels_last)
    assert torch.equal(make(EVERYTHING, last, "fused"), expected)
    assert make(EVERYTHING, images[:1].expand(4, -1, -1, -1), "fused").isfinite().all()


def test_reading_stays_within_the_images() -> None:
    """The last image ends where a page ends that nobody may read beyond; vectors would."""
    program = """
import ctypes, mmap, torch
from iic_dist.views.spec import ViewSpec
from iic_dist.views.views import Views
page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
memory = mmap.mmap(-1, 3 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
for place in (0, 2 * page):
    assert libc.mprotect(ctypes.c_void_p(start + place), page, 0) == 0
for side in (5, 8, 17):
    for first, count in ((page, 2), (2 * page - 2 * side * side, 2)):
        images = torch.frombuffer(memory, dtype=torch.uint8, offset=first, count=count * side * side)
        spec = ViewSpec(size=9, crop_area=(0.3, 1.0), rotation=20.0, affine_probability=0.5)
        views = Views(spec, spec, spec, 20, seed=0, impl="fused")
        rows = torch.arange(2)
        views.training(images.view(2, 1, side, side), rows, rows, 0)
        views.evaluation(images.view(2, 1, side, side), rows)
print("within")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "within", run.stderr[-2000:]


def test_threads_change_nothing() -> None:
    images = smooth(40, 3, 40, 40)
    before = torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made.append(make(EVERYTHING, images, "fused"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(made[0], again) for again in made[1:])


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability: str) -> None:
    program = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
import torch, test_augment as t
from dataclasses import replace
assert torch.backends.cpu.get_cpu_capability() != "AVX512"
for size in (7, 32, 40):
    t.assert_equal_twin(replace(t.EVERYTHING, size=size), t.smooth(9, 3, 33, 35))
    t.assert_equal_twin(replace(t.GRAY, size=size, sobel=True, mean=(), std=()), t.smooth(9, 1, 33, 35))
print("equal")
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "equal", run.stderr[-2000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    op = torch.ops.iic_dist.augment_views.default
    for changed in ({}, {"sobel": True, "channels_last": True}, {"mean": [], "std": []}):
        torch.library.opcheck(op, arguments(dtype, **changed))


@pytest.mark.parametrize(
    ("changed", "quoted"),
    [
        ({"images": torch.zeros(3, 2, 9, 9, dtype=torch.uint8)}, r"\[3, 2, 9, 9\].*C = 1 or 3"),
        ({"images": torch.zeros(3, 3, 9, 9)}, "uint8"),
        ({"rows": torch.zeros(2)}, "rows.*int64"),
        ({"rows": torch.tensor([0, 1, 2])}, "whole views"),
        ({"parameters": torch.zeros(4, 16)}, r"\[4, 16\].*17"),
        ({"size": 0}, "size=0"),
        ({"blur_kernel": 4}, "blur_kernel=4"),
        ({"blur_kernel": 17}, "blur_kernel=17"),
        ({"mean": [0.5, 0.5], "std": [1.0, 1.0]}, "none, 1 or 3"),
        ({"dtype": torch.float64}, "float32, bfloat16 or float16"),
    ],
)
def test_what_callers_get_wrong(changed: dict[str, Any], quoted: str) -> None:
    with pytest.raises(ValueError, match=quoted):
        torch.ops.iic_dist.augment_views(*arguments(**changed))


@pytest.mark.parametrize("row", [-1, 3])
def test_a_row_that_is_not_there(row: int) -> None:
    with pytest.raises(IndexError, match=f"row {row} of 3 images"):
        torch.ops.iic_dist.augment_views(*arguments(rows=torch.tensor([0, row])))


def test_no_image_no_view() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    made = torch.ops.iic_dist.augment_views(*arguments(rows=empty, parameters=torch.zeros(0, 17)))
    assert made.shape == (0, 3, 8, 8)


def test_which_implementation() -> None:
    cpu = torch.device("cpu")
    assert native.supported("auto", cpu, torch.float32)
    assert native.supported("fused", cpu, torch.bfloat16)
    assert not native.supported("torch", cpu, torch.float32)
    assert not native.supported("auto", cpu, torch.float64)
    with pytest.raises(RuntimeError, match="float64"):
        native.supported("fused", cpu, torch.float64)
    with pytest.raises(ValueError, match="'best'"):
        native.supported("best", cpu, torch.float32)
    with pytest.raises(RuntimeError, match="not meta"):
        native.supported("fused", torch.device("meta"), torch.float32)
