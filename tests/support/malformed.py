"""Files that are called images and are none, of every kind that we know, as many as wanted."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

NOISE = np.random.default_rng(0).integers(0, 256, size=(48, 48, 3), dtype=np.uint8)


def encoded(kind: str, **options: object) -> bytes:
    """A whole file of noise, which no format can make small."""
    buffer = io.BytesIO()
    image = Image.fromarray(NOISE)
    (image.quantize(256) if kind == "GIF" else image).save(buffer, kind, **options)
    return buffer.getvalue()


WHOLE = {
    "png": encoded("PNG"),
    "jpg": encoded("JPEG"),
    "gif": encoded("GIF"),
    "tif": encoded("TIFF"),
    "webp": encoded("WEBP", lossless=True),
    "bmp": encoded("BMP"),
    "ppm": encoded("PPM"),
    "jp2": encoded("JPEG2000"),
}


def png_header(width: int, height: int, depth: int = 1, colour: int = 0, data: bytes = b"") -> bytes:
    """A PNG that claims a size, whatever its data."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def bombs() -> dict[str, bytes]:
    """Small files that decode, or claim to decode, to 150 MB and more."""
    jpeg = bytearray(WHOLE["jpg"])
    size = jpeg.index(b"\xff\xc0") + 5  # height and width in the frame header
    jpeg[size : size + 4] = struct.pack(">HH", 65_000, 65_000)
    bmp = bytearray(WHOLE["bmp"])
    bmp[18:26] = struct.pack("<ii", 100_000, 100_000)
    return {
        "claims.png": png_header(100_000, 100_000),
        "real.png": png_header(20_000, 20_000, data=bytes(2501 * 20_000)),  # 1 bit a pixel: 50 kB, 400 Mpx
        "frame.jpg": bytes(jpeg),
        "header.bmp": bytes(bmp),
    }


def _flipped(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for place in rng.integers(0, len(changed), 30):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: int(rng.integers(1, max(2, len(content) // 2)))]


Kind = Callable[[bytes, np.random.Generator], bytes]
HOPELESS: dict[str, Kind] = {
    "empty": lambda content, rng: b"",
    "text": lambda content, rng: b"<!doctype html><title>404 not found</title>" * int(rng.integers(1, 50)),
    "cut": _cut,
    "random": lambda content, rng: rng.bytes(int(rng.integers(1, 5000))),
    "no-start": lambda content, rng: bytes(16) + content[16:],
    "magic-alone": lambda content, rng: content[:12],
    "magic-and-random": lambda content, rng: content[:12] + rng.bytes(500),
    "zeros": lambda content, rng: bytes(len(content)),
    "other-program": lambda content, rng: b"\x7fELF\x02\x01\x01" + rng.bytes(300),
    "archive": lambda content, rng: b"PK\x03\x04" + rng.bytes(300),
}
"""Nothing can be read from these."""
DAMAGED: dict[str, Kind] = {"flipped": _flipped}
"""Some of these still decode."""


def malformed(count: int) -> Iterator[tuple[str, bytes, bool]]:
    """`count` files in turn of each kind and each format: name, content, whether it may be readable all the same."""
    rng = np.random.default_rng(count)
    kinds = {**HOPELESS, **DAMAGED}
    for number in range(count):
        kind = list(kinds)[number % len(kinds)]
        ending = list(WHOLE)[number // len(kinds) % len(WHOLE)]
        yield f"{kind}-{number}.{ending}", kinds[kind](WHOLE[ending], rng), kind in DAMAGED
