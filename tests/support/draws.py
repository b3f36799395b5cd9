"""What `iic_dist.views.spec` draws, once more in Python's own floats: another device, as far as IEEE 754 goes."""

from __future__ import annotations

import math

import numpy as np

from iic_dist.views.spec import ViewSpec


def philox(counter: list[int], key: tuple[int, int]) -> list[int]:
    """Philox-4x32-10 on unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for turn in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        round_key0, round_key1 = (k0 + turn * 0x9E3779B9) % 2**32, (k1 + turn * 0xBB67AE85) % 2**32
        c0, c1, c2, c3 = high1 ^ c1 ^ round_key0, low1, high0 ^ c3 ^ round_key1, low0
    return [c0, c1, c2, c3]


def uniforms(seed: int, epoch: int, index: int, view: int) -> list[float]:
    key = (seed % 2**32, (seed >> 32) % 2**32)
    words = [word for block in range(6) for word in philox([index, epoch, view, block], key)]
    return [(word >> 8) * 2.0**-24 for word in words[:21]]


def cos_sin(degrees: float) -> tuple[float, float]:
    angle = degrees * (math.pi / 180 / 8)
    square = angle * angle
    cos = sin = 0.0
    for k in reversed(range(7)):
        cos = cos * square + (-1) ** k / math.factorial(2 * k)
    for k in reversed(range(6)):
        sin = sin * square + (-1) ** k / math.factorial(2 * k + 1)
    sin *= angle
    for _ in range(3):
        cos, sin = cos * cos - sin * sin, (cos + cos) * sin
    return cos, sin


def power(base: float, exponent: float) -> float:
    """base ** exponent by the 24 bits of the exponent."""
    bits = int(exponent * 2**24)
    factors = []
    for place in reversed(range(24)):
        base = math.sqrt(base)
        factors.append(base if bits >> place & 1 else 1.0)
    for half in (12, 6, 3):
        factors = [factors[i] * factors[i + half] for i in range(half)]
    return factors[0] * factors[1] * factors[2]


def between(number: float, least: float, largest: float) -> float:
    return least + number * (largest - least)


def motion(spec: ViewSpec, u: list[float], height: int, width: int) -> tuple[float, ...]:
    """Angle, shear along x and y in degrees, shift along x and y in pixels, zoom; as torchvision takes them."""
    if not u[6] < spec.affine_probability:
        return (0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    largest = (spec.rotation, spec.shear, spec.shear, spec.translation * width, spec.translation * height)
    moved = [between(u[which], -most, most) for which, most in zip((7, 11, 12, 8, 9), largest, strict=True)]
    return (*moved, between(u[10], *spec.zoom))


def inverse(angle: float, shear_x: float, shear_y: float, move_x: float, move_y: float, zoom: float) -> list[float]:
    (cos, sin), (cos_x, sin_x), (cos_y, sin_y) = (cos_sin(degrees) for degrees in (angle, shear_x, shear_y))
    tan_x, tan_y = sin_x / cos_x, sin_y / cos_y
    turned_cos, turned_sin = cos + sin * tan_y, sin - cos * tan_y
    a, b = (cos - turned_sin * tan_x) / zoom, (sin + turned_cos * tan_x) / zoom
    d, e = -turned_sin / zoom, turned_cos / zoom
    return [a, b, -(a * move_x + b * move_y), d, e, -(d * move_x + e * move_y)]


def box(spec: ViewSpec, u: list[float], height: int, width: int) -> list[float]:
    if spec.crop_sides:
        side = sorted(spec.crop_sides)[min(int(u[0] * len(spec.crop_sides)), len(spec.crop_sides) - 1)]
        if u[4] < spec.centre_probability:
            return [round((height - side) / 2), round((width - side) / 2), side, side]
        return [math.floor(u[2] * (height - side + 1)), math.floor(u[3] * (width - side + 1)), side, side]
    if spec.crop_area is None:
        return [0, 0, height, width]
    area = between(u[0], *spec.crop_area) * (height * width)
    tallest, widest = area * (1 / height**2), 1 / area * width**2
    least, largest = min(max(tallest, spec.crop_ratio[0]), widest), max(min(widest, spec.crop_ratio[1]), tallest)
    ratio = least * power(largest / least, u[1])
    box_height, box_width = math.sqrt(area / ratio), math.sqrt(area * ratio)
    return [u[2] * (height - box_height), u[3] * (width - box_width), box_height, box_width]


def table(spec: ViewSpec, u: list[float], height: int, width: int) -> np.ndarray:
    """The 17 parameters of a view in the order of csrc/augment_view.h, neutral where the spec leaves a step out."""
    strengths = (spec.brightness, spec.contrast, spec.saturation)
    jitter = u[13] < spec.jitter_probability
    factors = [
        between(u[14 + i], max(0.0, 1.0 - s), 1.0 + s) if jitter and s > 0 else 1.0 for i, s in enumerate(strengths)
    ]
    hue = between(u[17], -spec.hue, spec.hue) if jitter and spec.hue > 0 else 0.0
    sigma = between(u[20], *spec.blur_sigma) if u[19] < spec.blur else 0.0
    affine = inverse(*motion(spec, u, height, width)) if spec.moves else [1, 0, 0, 0, 1, 0]
    flip, gray = float(u[5] < spec.flip), float(u[18] < spec.gray)
    return np.array([*affine, *box(spec, u, height, width), flip, *factors, hue, gray, sigma], dtype=np.float32)
