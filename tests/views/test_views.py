"""Policies and views: what is drawn, on what it depends, what is made of it, and what users get wrong."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import draws
import pytest
import torch
import torchvision.transforms.v2.functional as TV
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from iic_dist.errors import UsageError
from iic_dist.ops import augment as native
from iic_dist.ops.philox import uniforms
from iic_dist.views.draw import draw
from iic_dist.views.policies import policy
from iic_dist.views.spec import ViewSpec
from iic_dist.views.views import Views

EVERYTHING = ViewSpec(
    size=12,
    crop_area=(0.3, 1.0),
    rotation=20.0,
    translation=0.1,
    zoom=(0.9, 1.1),
    shear=5.0,
    affine_probability=0.7,
    flip=0.5,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    jitter_probability=0.8,
    gray=0.2,
    blur=0.5,
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.25, 0.3),
)
POLICIES = [
    pytest.param("digits", 1, 8, {}, id="digits"),
    pytest.param("iic", 1, 28, {}, id="iic-mnist"),
    pytest.param("iic", 3, 32, {}, id="iic-cifar"),
    pytest.param("iic", 3, 96, {}, id="iic-stl10"),
    pytest.param("simclr", 3, 32, {"blur": 0.5}, id="simclr"),
    pytest.param("simclr", 3, 96, {"size": 64}, id="simclr-stl10"),
    pytest.param("simclr", 1, 28, {"rotation": 10}, id="simclr-gray"),
]
every_policy = pytest.mark.parametrize(("name", "channels", "side", "options"), POLICIES)
needs_native = pytest.mark.skipif("cpu" not in native.DEVICES, reason="the extension has no kernels of views")
both = pytest.mark.parametrize("impl", [pytest.param("fused", marks=needs_native), "torch"])


def pictures(batch: int, channels: int, height: int, width: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, channels, height, width or height)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def build(name: str, channels: int, side: int, options: dict[str, Any], **more: Any) -> Views:
    return policy(name, image_size=side, channels=channels, **({"seed": 0} | options | more))


def train(views: Views, images: Tensor, indices: Tensor, *arguments: Any, **more: Any) -> Tensor:
    """Training views of a batch that was copied."""
    return views.training(images, torch.arange(len(images), device=images.device), indices, *arguments, **more)


def evaluate(views: Views, images: Tensor, *arguments: Any, **more: Any) -> Tensor:
    return views.evaluation(images, torch.arange(len(images), device=images.device), *arguments, **more)


def drawn(spec: ViewSpec, height: int = 30, width: int = 40, count: int = 20_000) -> dict[str, Tensor]:
    parameters = draw(spec, uniforms(11, 0, torch.arange(count), 0, 21), height, width)
    return {field.name: getattr(parameters, field.name) for field in fields(parameters)}


def assert_uniform(values: Tensor, least: float, largest: float) -> None:
    assert stats.kstest(values.double().numpy(), "uniform", (least, largest - least)).pvalue > 1e-3


def assert_share(chosen: Tensor, probability: float) -> None:
    assert stats.binomtest(int(chosen.sum()), chosen.numel(), probability).pvalue > 1e-3


# What is drawn


def test_off_by_default() -> None:
    assert all(value is None for value in drawn(ViewSpec(size=30), 30, 30).values())


def test_jitter_parameters() -> None:
    parameters = drawn(EVERYTHING)
    for name, neutral, least, largest in (
        ("brightness", 1.0, 0.6, 1.4),
        ("contrast", 1.0, 0.6, 1.4),
        ("saturation", 1.0, 0.6, 1.4),
        ("hue", 0.0, -0.1, 0.1),
    ):
        values = parameters[name]
        assert values.dtype == torch.float32
        applied = values != neutral
        assert_share(applied, 0.8)
        assert_uniform(values[applied], least, largest)
    assert torch.equal(parameters["hue"] != 0, parameters["brightness"] != 1)  # all four of an image or none
    assert drawn(replace(EVERYTHING, brightness=1.5))["brightness"].min() >= 0


def test_probabilities() -> None:
    parameters = drawn(EVERYTHING)
    assert_share(parameters["flip"], 0.5)
    assert_share(parameters["gray"], 0.2)
    assert_share(parameters["sigma"] > 0, 0.5)
    assert_uniform(parameters["sigma"][parameters["sigma"] > 0], 0.1, 2.0)


def test_affine_parameters() -> None:
    a, b, c, d, e, f = drawn(EVERYTHING)["affine"].double().unbind(1)
    applied = a != 1
    assert_share(applied, 0.7)
    for values, neutral in ((a, 1), (b, 0), (c, 0), (d, 0), (e, 1), (f, 0)):
        assert (values[~applied] == neutral).all()
    # Back from the inverse map to the drawn numbers: shears change no area and d, e hold no shear along x.
    a, b, c, d, e, f = (values[applied] for values in (a, b, c, d, e, f))
    area = a * e - b * d
    zoom, move_x, move_y = area.rsqrt(), (b * f - c * e) / area, (c * d - a * f) / area
    assert_uniform(zoom, 0.9, 1.1)
    assert_uniform(move_x, -4, 4)
    assert_uniform(move_y, -3, 3)
    for spec, column, largest in (({"rotation": 20.0}, 1, 20), ({"shear": 5.0}, 3, 5)):
        alone = drawn(ViewSpec(size=30, **spec), 30, 40)["affine"].double()
        degrees = torch.rad2deg(torch.atan2(alone[:, column], alone[:, 4 if column == 3 else 0]))
        assert_uniform(degrees, -largest, largest)
    assert (torch.corrcoef(torch.stack((zoom, move_x, move_y, d / e))) - torch.eye(4)).abs().max() < 0.05


@pytest.mark.parametrize(("height", "width"), [(32, 32), (30, 40), (10, 40)])
def test_area_crop(height: int, width: int) -> None:
    top, left, box_height, box_width = drawn(EVERYTHING, height, width)["box"].double().unbind(1)
    for start, length, side in ((top, box_height, height), (left, box_width, width)):
        assert start.min() >= 0
        assert length.min() >= 1
        assert (start + length).max() <= side + 1e-4
    area, ratio = box_height * box_width / (height * width), box_width / box_height
    assert_uniform(area, 0.3, 1.0)
    if height == width:
        assert ratio.min() >= 3 / 4 - 1e-6
        assert ratio.max() <= 4 / 3 + 1e-6
        small = area < 0.5  # where the whole range of ratios fits
        assert_uniform(ratio[small].log(), math.log(3 / 4), math.log(4 / 3))
        assert_uniform((left / (width - box_width))[small], 0.0, 1.0)


def test_square_crops() -> None:
    spec = ViewSpec(size=24, crop_sides=(24, 16, 20), centre_probability=0.25)
    top, left, height, width = drawn(spec, 28, 29)["box"].unbind(1)
    assert torch.equal(height, width)
    for side in (16, 20, 24):
        chosen = height == side
        assert_share(chosen, 1 / 3)
        centred = (top == (28 - side) // 2) & (left == round((29 - side) / 2))
        by_chance = 1 / ((28 - side + 1) * (29 - side + 1))
        assert_share(centred[chosen], 0.25 + 0.75 * by_chance)
        assert (top == top.round()).all()
        assert set(left[chosen].tolist()) == set(range(29 - side + 1))
        assert set(top[chosen].tolist()) == set(range(28 - side + 1))


def test_switching_one_thing_off_leaves_the_others() -> None:
    less = drawn(replace(EVERYTHING, flip=0.0, hue=0.0, crop_area=None, translation=0.0))
    for name, values in drawn(EVERYTHING).items():
        if name not in ("flip", "hue", "box", "affine"):
            assert torch.equal(less[name], values), name


# What is made of it


@both
def test_training_equals_torchvision_step_by_step(impl: str) -> None:
    """The whole chain, with the drawn parameters, against torchvision's calls on each image."""
    images, indices = pictures(10, 3, 20, 24), torch.arange(10) + 70
    spec = replace(EVERYTHING, crop_area=None, crop_sides=(9, 13), gray=0.5)
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


# The policies


def test_iic_policies_are_the_published_ones() -> None:
    cifar, stl10, mnist = build("iic", 3, 32, {}), build("iic", 3, 96, {}), build("iic", 1, 28, {})
    assert cifar.first == ViewSpec(size=32, crop_sides=(20,), sobel=True)
    strong = {"flip": 0.5, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.125}
    assert cifar.second == replace(cifar.first, **strong)
    assert stl10.first == ViewSpec(size=64, crop_sides=(64,), sobel=True)
    assert stl10.second == replace(stl10.first, **strong)
    assert mnist.first == ViewSpec(size=24, crop_sides=(20,), centre_probability=0.5)
    assert mnist.second == ViewSpec(
        size=24,
        crop_sides=(16, 20, 24),
        rotation=25.0,
        affine_probability=0.5,
        brightness=0.4,
        contrast=0.4,
    )
    assert [views.channels(c) for views, c in ((cifar, 3), (stl10, 3), (mnist, 1))] == [2, 2, 1]


def test_choices_replace_the_policy() -> None:
    views = build("iic", 3, 32, {"crop_sides": [12, 28, 16], "flip": 0.1, "jitter": 0.5, "gray": 0.3})
    assert views.first == ViewSpec(size=32, crop_sides=(16,), sobel=True)
    assert views.second.crop_sides == (12, 28, 16)
    assert (views.second.flip, views.second.gray) == (0.1, 0.3)
    assert (views.second.brightness, views.second.hue) == (0.2, 0.0625)
    area = build("iic", 3, 32, {"crop_area": (0.5, 1), "mean": [0, 0], "std": [1, 2], "rotation": 5})
    assert area.first == ViewSpec(size=32, crop_area=(0.5, 1), sobel=True, mean=(0, 0), std=(1, 2))
    assert (area.second.crop_area, area.second.rotation) == ((0.5, 1), 5)
    plain = build("simclr", 3, 32, {"jitter": 0, "gray": 0, "flip": 0, "blur": 0.5, "sobel": True})
    assert plain.first == plain.second
    assert plain.second == ViewSpec(size=32, crop_area=(0.2, 1.0), blur=0.5, jitter_probability=0.8, sobel=True)


@pytest.mark.parametrize(
    ("channels", "options", "quoted"),
    [
        (3, {"name": "byol"}, "'byol'.*iic, simclr, digits"),
        (1, {"gray": 0.2}, "gray=0.2.*1 channel"),
        (3, {"crop_sides": (20, 40)}, "40 pixels.*32 x 32"),
        (3, {"crop_sides": (0,)}, r"crop_sides.*\(0,\)"),
        (3, {"crop_sides": (20,), "crop_area": (0.5, 1)}, r"\(0.5, 1\).*\(20,\).*exclude"),
        (3, {"crop_area": (0.0, 1)}, r"crop_area.*\(0.0, 1\)"),
        (3, {"crop_area": (0.9, 0.5)}, r"crop_area.*\(0.9, 0.5\)"),
        (3, {"crop_area": (0.5,)}, r"crop_area.*\(0.5,\)"),
        (3, {"flip": 1.5}, "flip.*1.5"),
        (3, {"blur": -0.1}, "blur.*-0.1"),
        (3, {"jitter": -1}, "jitter.*-1"),
        (3, {"jitter": 10}, "hue.*1.0"),
        (3, {"rotation": 200}, "rotation.*200"),
        (3, {"size": 1}, "size.*1"),
        (3, {"repeats": 0}, "repeats.*0"),
        (3, {"mean": (0.5,) * 3}, "mean.*std"),
        (3, {"mean": (0.5,) * 3, "std": (1.0, 0.0, 1.0)}, "std.*0.0"),
        (3, {"mean": (0.5,) * 2, "std": (1.0,) * 2}, "1 number or 3"),
        (3, {"mean": (0.5,) * 3, "std": (1.0,) * 3, "sobel": True}, "1 number or 2.*Sobel"),
        (4, {}, "1 or 3 channels, not 4"),
    ],
)
def test_what_users_get_wrong(channels: int, options: dict[str, Any], quoted: str) -> None:
    with pytest.raises(UsageError, match=quoted) as error:
        policy(**({"name": "simclr", "image_size": 32, "channels": channels, "seed": 0} | options))
    assert "\n" not in str(error.value)


def test_images_that_do_not_fit_the_views() -> None:
    with pytest.raises(UsageError, match=r"20 pixels.*16 x 32"):
        train(build("iic", 3, 32, {}), pictures(2, 3, 16, 32), torch.arange(2), 0)
    with pytest.raises(UsageError, match=r"1 channel.*saturation, hue, gray"):
        train(build("simclr", 3, 32, {}), pictures(2, 1, 32), torch.arange(2), 0)
    with pytest.raises(UsageError, match=r"agree in \(size, sobel, mean, std\).*12.*13"):
        Views(EVERYTHING, EVERYTHING, replace(EVERYTHING, size=13), 1, 0)


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
