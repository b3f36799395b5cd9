"""Views: what is made of an image, and on what it depends."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import draws
import pytest
import torch
import torchvision.transforms.v2.functional as TV
from policy_cases import GENTLE, build, every_policy, pictures
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from iic_dist.errors import UsageError
from iic_dist.ops import augment as native
from iic_dist.ops.philox import uniforms
from iic_dist.views.draw import draw
from iic_dist.views.views import Views

needs_native = pytest.mark.skipif("cpu" not in native.DEVICES, reason="the extension has no kernels of views")
both = pytest.mark.parametrize("impl", [pytest.param("fused", marks=needs_native), "torch"])


def train(views: Views, images: Tensor, indices: Tensor, *arguments: Any, **more: Any) -> Tensor:
    """Training views of a batch that was copied."""
    return views.training(images, torch.arange(len(images), device=images.device), indices, *arguments, **more)


def evaluate(views: Views, images: Tensor, *arguments: Any, **more: Any) -> Tensor:
    return views.evaluation(images, torch.arange(len(images), device=images.device), *arguments, **more)


@both
def test_training_equals_torchvision_step_by_step(impl: str) -> None:
    """The whole chain, with the drawn parameters, against torchvision's calls on each image."""
    images, indices = pictures(10, 3, 20, 24), torch.arange(10) + 70
    spec = replace(GENTLE, crop_area=None, crop_sides=(9, 13), gray=0.5)
    views = Views(spec, replace(spec, blur=1.0), spec, 2, seed=5, impl=impl)
    dtype = torch.float64 if impl == "torch" else torch.float32
    made = train(views, images, indices, epoch=4, first_view=3, dtype=dtype).double()
    row = 0
    for number in (3, 4, 5):
        p = draw(views.first if number == 3 else views.second, uniforms(5, 4, indices, number, 21), 20, 24)
        for i, image in enumerate(images):
            x = image.double() / 255
            numbers = draws.uniforms(5, 4, 70 + i, number)
            angle, shear_x, shear_y, move_x, move_y, zoom = draws.motion(spec, numbers, 20, 24)
            bilinear = TV.InterpolationMode.BILINEAR
            x = TV.affine(x, angle, [move_x, move_y], zoom, [shear_x, shear_y], interpolation=bilinear)
            x = TV.resized_crop(x, *(int(side) for side in p.box[i]), [12, 12], antialias=True)
            x = TV.horizontal_flip(x) if p.flip[i] else x
            x = TV.adjust_brightness(x, p.brightness[i].item())
            x = TV.adjust_contrast(x, p.contrast[i].item())
            x = TV.adjust_saturation(x, p.saturation[i].item())
            x = TV.adjust_hue(x, p.hue[i].item())
            x = TV.rgb_to_grayscale(x, 3) if p.gray[i] else x
            x = TV.gaussian_blur(x, [3, 3], [p.sigma[i].item()] * 2) if p.sigma[i] > 0 else x
            x = TV.normalize(x, spec.mean, spec.std)
            # torchvision turns the hue in float32; normalising multiplies its error, and ours of the map, by 5.
            torch.testing.assert_close(made[row], x, rtol=0, atol=2e-5)
            row += 1
    assert row == len(made)


@both
@every_policy
def test_shapes_and_types(name: str, channels: int, side: int, options: dict[str, Any], impl: str) -> None:
    views = build(name, channels, side, options, impl=impl, repeats=3)
    images = pictures(5, channels, side)
    made = train(views, images, torch.arange(5), 0)
    assert made.shape == (20, views.channels(channels), views.size, views.size)
    assert made.dtype == torch.float32
    assert made.isfinite().all()
    seen = evaluate(views, images)
    assert seen.shape == made[:5].shape
    for dtype in (torch.float16 if impl == "fused" else torch.float64, torch.bfloat16):
        again = train(views, images, torch.arange(5), 0, dtype=dtype)
        assert again.dtype == evaluate(views, images, dtype=dtype).dtype == dtype
        close = 1e-4 if dtype == torch.float64 else 0.05
        torch.testing.assert_close(again.float(), made, rtol=close, atol=close)
        last = train(views, images, torch.arange(5), 0, dtype=dtype, channels_last=True)
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(last, again)
        seen = evaluate(views, images, dtype=dtype, channels_last=True)
        assert seen.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(train(views, images, torch.arange(5), 0), made)
    assert train(views, images[:0], torch.arange(0), 0).shape == (0, *made.shape[1:])


@both
@every_policy
def test_batch_changes_nothing(name: str, channels: int, side: int, options: dict[str, Any], impl: str) -> None:
    count = 40
    views = build(name, channels, side, options, impl=impl, repeats=2)
    images, indices = pictures(count, channels, side), torch.arange(count) + 1000
    made = train(views, images, indices, 3).unflatten(0, (3, count))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    shuffled = train(views, images[order], indices[order], 3).unflatten(0, (3, count))
    assert torch.equal(shuffled, made[:, order])
    for size in (1, 7, 33):
        for start in range(0, count, size):
            part = slice(start, start + size)
            alone = train(views, images[part], indices[part], 3).unflatten(0, (3, -1))
            assert torch.equal(alone, made[:, part])
    seen = evaluate(views, images)
    assert torch.equal(torch.cat([evaluate(views, part) for part in images.split(7)]), seen)


@both
@every_policy
def test_images_are_taken_where_they_are(
    name: str, channels: int, side: int, options: dict[str, Any], impl: str
) -> None:
    """Rows of all images, with repetitions, as where the batch was copied."""
    views = build(name, channels, side, options, impl=impl)
    images, rows, indices = pictures(9, channels, side), torch.tensor([8, 0, 3, 3, 8]), torch.arange(5)
    assert torch.equal(views.training(images, rows, indices, 0), train(views, images[rows], indices, 0))
    assert torch.equal(views.evaluation(images, rows), evaluate(views, images[rows]))


@both
@every_policy
def test_everything_else_does(name: str, channels: int, side: int, options: dict[str, Any], impl: str) -> None:
    """The same picture everywhere: only index, view, epoch and seed tell its views apart."""
    views = build(name, channels, side, options, impl=impl, repeats=4)
    images, indices = pictures(1, channels, side).expand(6, -1, -1, -1), torch.arange(6)
    first, *second = train(views, images, indices, 0).chunk(5)
    others = [
        torch.cat(second),
        train(views, images, indices, 1)[6:],
        train(views, images, indices, 0, first_view=5)[6:],
        train(build(name, channels, side, options, impl=impl, repeats=4, seed=1), images, indices, 0)[6:],
    ]
    made = torch.cat(others)
    assert len(torch.unique(made.flatten(1), dim=0)) == len(made)
    assert len(torch.unique(first.flatten(1), dim=0)) > 1  # plain square crops may coincide


def test_second_views_count_on_from_the_first() -> None:
    views = build("simclr", 3, 32, {}, repeats=3)
    images, indices = pictures(4, 3, 32), torch.arange(4)
    made = train(views, images, indices, 0).chunk(4)
    later = train(views, images, indices, 0, first_view=2).chunk(4)
    assert torch.equal(later[0], made[2])
    assert torch.equal(later[1], made[3])


def test_evaluation_is_a_centre_crop_or_the_whole_image() -> None:
    image = pictures(1, 3, 33)
    plain = image.double() / 255
    crops = build("iic", 3, 33, {"crop_sides": (16, 20, 24), "size": 24, "sobel": False})
    expected = TV.resize(TV.center_crop(plain, [20, 20]), [24, 24], antialias=True)
    torch.testing.assert_close(evaluate(crops, image, torch.float64), expected, rtol=0, atol=1e-12)
    whole = build("simclr", 3, 33, {"size": 17, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)})
    expected = TV.normalize(TV.resize(plain, [17, 17], antialias=True), [0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    torch.testing.assert_close(evaluate(whole, image, torch.float64), expected, rtol=0, atol=1e-12)
    same = build("digits", 1, 8, {})
    assert torch.equal(evaluate(same, pictures(3, 1, 8)), pictures(3, 1, 8) / 255)


class NoHostSync(TorchDispatchMode):
    """Fail at every operation that has to wait for a device to know a value or a shape."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert not name.startswith(self.FORBIDDEN), name
        assert not (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])), name
        # torch.tensor(values) on the device is a copy from the host.
        assert name not in ("lift_fresh", "lift_fresh_copy"), name
        self.seen += 1
        return func(*args, **(kwargs or {}))


@every_policy
def test_no_host_sync(name: str, channels: int, side: int, options: dict[str, Any]) -> None:
    views = build(name, channels, side, options, repeats=2)
    images, indices = pictures(4, channels, side), torch.arange(4)
    with NoHostSync() as watch:
        train(views, images, indices, 1)
        evaluate(views, images)
    assert watch.seen > 50


def test_the_watch_for_host_syncs_sees_them() -> None:
    values = torch.ones(3)
    for sync in (
        lambda: values.sum().item(),
        lambda: values[values > 0],
        lambda: values.nonzero(),
        lambda: torch.tensor([1.0, 2.0]),
        lambda: values.masked_select(values > 0),
    ):
        with pytest.raises(AssertionError), NoHostSync():
            sync()


def test_images_that_do_not_fit_the_views() -> None:
    with pytest.raises(UsageError, match=r"20 pixels.*16 x 32"):
        train(build("iic", 3, 32, {}), pictures(2, 3, 16, 32), torch.arange(2), 0)
    with pytest.raises(UsageError, match=r"1 channel.*saturation, hue, gray"):
        train(build("simclr", 3, 32, {}), pictures(2, 1, 32), torch.arange(2), 0)
    with pytest.raises(UsageError, match=r"must agree in size, .*12, 13"):
        Views(GENTLE, replace(GENTLE, size=13), GENTLE, 1, 0)
    with pytest.raises(UsageError, match=r"the evaluation view in \(sobel, mean, std\)"):
        Views(GENTLE, GENTLE, replace(GENTLE, sobel=not GENTLE.sobel), 1, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_policy
def test_gpu_makes_the_same_views(name: str, channels: int, side: int, options: dict[str, Any]) -> None:
    views = build(name, channels, side, options, repeats=2)
    images, indices = pictures(32, channels, side), torch.arange(32)
    expected = train(views, images, indices, 2)
    images, indices = images.cuda(), indices.cuda()
    for spec in (views.first, views.second):
        numbers = uniforms(0, 2, indices, 1, 21)
        assert torch.equal(numbers.cpu(), uniforms(0, 2, indices.cpu(), 1, 21))
        on_gpu, on_cpu = draw(spec, numbers, side, side), draw(spec, numbers.cpu(), side, side)
        for field in fields(on_cpu):
            value = getattr(on_cpu, field.name)
            if value is not None:
                assert torch.equal(getattr(on_gpu, field.name).cpu(), value), field.name
    train(views, images, indices, 2)  # the first call sets up the libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = train(views, images, indices, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(made.cpu(), expected, rtol=0, atol=2e-4)
