"""One page that shows every cluster, where they can be named: its most typical and most doubtful images."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jinja2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iic_dist.data.decode import decode_image, header_size
from iic_dist.data.formats import MAX_PIXELS
from iic_dist.files import write_whole
from iic_dist.prediction.clusterer import Prediction
from iic_dist.prediction.folder import FolderPrediction
from iic_dist.prediction.nearest import surroundings
from iic_dist.wording import printable

THUMBNAIL = 96
"""Side of the images on the page, pixels; one of a smaller image has its own size."""

MAX_THUMBNAILS = 1200
"""On a page, however many images and clusters there are; at some 10 kB each at most. A cluster shows one at least."""

_MOST = 12  # images of one kind that a cluster shows
_SMALL = 48  # pixels; below, an image is enlarged without smoothing
_OPTIMAL_ORDER = 300  # clusters; the best order of the leaves takes the square of their number, and time


@dataclass(frozen=True)
class Picture:
    """An image on the page.

    Attributes:
        source: Its thumbnail as a data URI.
        path: Below the image folder, as text.
        name: The last part of the path.
        cluster: Its cluster.
        confidence: Of its cluster.
        small: Whether it is to be enlarged pixel by pixel.
        place: Its number on the page, by which the nearest images are given.
    """

    source: str
    path: str
    name: str
    cluster: int
    confidence: float
    small: bool
    place: int


@dataclass(frozen=True)
class Card:
    """A cluster on the page, of no name or one; confidence and agreement are means over its images.

    The agreement is None where there is one sub-head.
    """

    cluster: int
    name: str
    size: int
    confidence: float
    agreement: float | None
    typical: list[Picture]
    doubtful: list[Picture]


def write(
    path: Path, found: FolderPrediction, agreement: Tensor, num_clusters: int, names: Mapping[int, str] | None = None
) -> None:
    """Write the page of a prediction, whole or not at all.

    It holds all that it shows and asks for nothing from elsewhere. Its size is bounded by `MAX_THUMBNAILS`.

    Args:
        path: The file.
        found: The images and their clusters.
        agreement: (M,) of the sub-heads on each image.
        num_clusters: K.
        names: Of the clusters that have one already.
    """
    write_whole(path, page(found, agreement, num_clusters, names or {}).encode())


def page(found: FolderPrediction, agreement: Tensor, num_clusters: int, names: Mapping[int, str]) -> str:
    """Return the page as HTML; see `write`."""
    prediction = found.prediction
    order = by_likeness(prediction)
    each = max(1, min(_MOST, MAX_THUMBNAILS // (2 * len(order))))
    members = {cluster: torch.nonzero(prediction.clusters == cluster).flatten() for cluster in order}
    chosen = {cluster: shown(prediction, members[cluster], each) for cluster in order}
    on_page = [image for kinds in chosen.values() for kind in kinds for image in kind]
    around = surroundings(prediction.embeddings, on_page, MAX_THUMBNAILS - len(on_page))
    pictures = _pictures(found, on_page + around.further)
    of_image = dict(zip(on_page + around.further, pictures, strict=True))
    cards = []
    for cluster in order:
        typical, doubtful = ([of_image[image] for image in kind] for kind in chosen[cluster])
        confidence, agreed = (_mean(of[members[cluster]]) for of in (prediction.confidence, agreement))
        assert confidence is not None
        cards.append(
            Card(cluster, names.get(cluster, ""), len(members[cluster]), confidence, agreed, typical, doubtful)
        )
    return _render(
        folder=printable(str(found.root)),
        num_images=len(found.paths),
        num_clusters=num_clusters,
        num_unreadable=len(found.unreadable),
        confidence=float(prediction.confidence.mean()),
        agreement=_mean(agreement),
        empty=sorted(set(range(num_clusters)) - set(order)),
        largest=max(card.size for card in cards),
        cards=cards,
        about={"clusters": num_clusters, "names": dict(names), "key": _fingerprint(found, names)},
        nearest=[[(of_image[image].place, cosine) for image, cosine in row] for row in around.nearest],
        exact=around.exact,
        further=[(p.source, p.path, p.cluster, p.confidence, int(p.small)) for p in pictures[len(on_page) :]],
    )


def _render(**values: object) -> str:
    """Fill the template, with the style and the script that stand beside it.

    The page allows this one script by its digest and no other, so that nothing that a name smuggles in could run.
    """
    loader = jinja2.PackageLoader("iic_dist.prediction")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    style, script = (loader.get_source(environment, name)[0] for name in ("gallery.css", "gallery.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("gallery.html").render(style=style, script=script, digest=digest, **values)


def _fingerprint(found: FolderPrediction, names: Mapping[int, str]) -> str:
    """Name the page, so that a browser that keeps typed names gives them to no other page."""
    digest = hashlib.sha256(repr((found.paths, sorted(names.items()))).encode("utf-8", "surrogateescape"))
    digest.update(found.prediction.clusters.numpy().tobytes())
    return digest.hexdigest()[:16]


def by_likeness(prediction: Prediction) -> list[int]:
    """Order the clusters that have images so that alike ones stand next to each other.

    The order is that of the leaves of a tree: average linkage of the cosine distances between the clusters' mean
    embeddings.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage  # half a second to import, and only this needs it

    clusters = [int(cluster) for cluster in prediction.clusters.unique()]
    if len(clusters) < 3:
        return clusters
    means = np.stack([_unit(prediction.embeddings[prediction.clusters == k].double().mean(0)) for k in clusters])
    tree = linkage(means, "average", metric="cosine", optimal_ordering=len(clusters) <= _OPTIMAL_ORDER)
    return [clusters[leaf] for leaf in leaves_list(tree)]


def shown(prediction: Prediction, members: Tensor, each: int) -> tuple[list[int], list[int]]:
    """Choose the images of a cluster that are shown, none twice.

    Args:
        prediction: Of all M images.
        members: (m,) int64, those of the cluster.
        each: How many of a kind at most.

    Returns:
        The typical ones, nearest by angle to the mean embedding first, and the doubtful ones, least sure first.
    """
    embeddings = prediction.embeddings[members].double().numpy()
    lengths = np.linalg.norm(embeddings, axis=1)
    nearness = embeddings @ _unit(torch.from_numpy(embeddings.mean(0))) / np.maximum(lengths, 1e-12)
    nearest = np.argsort(-nearness, kind="stable")[: min(each, (len(members) + 1) // 2)]
    rest = np.setdiff1d(np.arange(len(members)), nearest)
    least_sure = rest[np.argsort(prediction.confidence[members].numpy()[rest], kind="stable")][:each]
    return members[torch.from_numpy(nearest)].tolist(), members[torch.from_numpy(least_sure)].tolist()


def thumbnail(path: Path, max_pixels: int = MAX_PIXELS, truncated: bool = False) -> tuple[str, int]:
    """Return an image as a data URI, the part of it that the network sees, and its side in pixels.

    Args:
        path: Its file.
        max_pixels, truncated: See `decode_image`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        side = min(THUMBNAIL, *header_size(path, max_pixels))
        pixels = decode_image(path, side, max_pixels, truncated=truncated).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    kind = "png" if side < _SMALL else "jpeg"
    Image.fromarray(pixels).save(buffer, kind, optimize=True, **({"quality": 80} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", side


def _pictures(found: FolderPrediction, images: Sequence[int]) -> list[Picture]:
    with (
        warnings.catch_warnings(),  # puts back what the threads, which turn warnings off and on, leave behind
        ThreadPoolExecutor(max(2, torch.get_num_threads())) as pool,
    ):
        read = partial(thumbnail, max_pixels=found.max_pixels, truncated=found.truncated)
        thumbnails = list(pool.map(read, (found.root / found.paths[image] for image in images)))
    pictures = []
    for place, (image, (source, side)) in enumerate(zip(images, thumbnails, strict=True)):
        path = printable(found.paths[image])
        cluster, confidence = int(found.prediction.clusters[image]), float(found.prediction.confidence[image])
        pictures.append(Picture(source, path, path.rsplit("/", 1)[-1], cluster, confidence, side < _SMALL, place))
    return pictures


def _mean(values: Tensor) -> float | None:
    """Return the mean; None where it is unknown."""
    mean = float(values.mean())
    return None if math.isnan(mean) else mean


def _unit(vector: Tensor) -> np.ndarray:
    length = float(vector.norm())
    return (vector / length if length else torch.ones_like(vector)).numpy()
