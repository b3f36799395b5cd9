"""Cluster all images of a folder, each rank its share, without holding them in memory."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from iic_dist import distributed
from iic_dist.data.decode import reason_for
from iic_dist.data.features import load_features
from iic_dist.data.folder import check_listing, passed_over
from iic_dist.data.formats import MAX_PIXELS
from iic_dist.data.listing import list_images
from iic_dist.errors import UsageError
from iic_dist.prediction.clusterer import Clusterer, Prediction
from iic_dist.wording import counted


@dataclass(frozen=True)
class FolderPrediction:
    """The clusters of the images in a folder; the same on every rank, whatever their number.

    Attributes:
        root: The folder.
        paths: Of each image that could be read, below `root`, in their order.
        prediction: A row for each of these.
        unreadable: (path, reason) of each of the others.
        left_out: Number of the files that are no images by their endings, by ending.
        max_pixels, truncated: How its files were read; see `decode_image`.
    """

    root: Path
    paths: list[str]
    prediction: Prediction
    unreadable: list[tuple[str, str]]
    left_out: Mapping[str, int] = field(default_factory=dict)
    max_pixels: int = MAX_PIXELS
    truncated: bool = False


def predict_folder(clusterer: Clusterer, root: Path, progress: bool = False) -> FolderPrediction:
    """Cluster every image under `root`, as `iic_dist.data.folder.load_folder` finds and decodes them.

    The images are cut into the same batches whatever the number of ranks, because the network may round the last bit
    differently in a batch of another size. Rank 0 lists the files.

    Args:
        clusterer: The run.
        root: Where to look.
        progress: Show a progress bar.

    Raises:
        UsageError: no such folder, or no image in it that can be read.

    Collective: all ranks must call; gathers all predictions.
    """
    if not root.is_dir():
        raise UsageError(f"the image folder {str(root)!r} {'is not a folder' if root.exists() else 'does not exist'}")
    data = clusterer.config.data
    listing = distributed.broadcast(list_images(root, data.follow_links))
    check_listing(listing, root)
    paths, unreadable = listing.paths, listing.refused
    starts = range(0, len(paths), clusterer.batch_size)
    world_size, rank = distributed.world_size(), distributed.rank()
    own = starts[len(starts) * rank // world_size : len(starts) * (rank + 1) // world_size]
    parts, kept, problems = [clusterer.predict([])], [], []
    with warnings.catch_warnings(), tqdm(total=len(own), unit="batch", disable=not progress) as bar:
        warnings.simplefilter("ignore")  # Pillow warns of oddities that it reads
        for start, images in _decoded(clusterer, root, paths, own):
            readable = [i for i, image in enumerate(images) if isinstance(image, Tensor)]
            kept += [start + i for i in readable]
            problems += [(paths[start + i], image) for i, image in enumerate(images) if isinstance(image, str)]
            if readable:
                parts.append(clusterer.predict_batch(torch.stack([images[i] for i in readable])))  # type: ignore[misc]
            bar.update()
    kept = list(itertools.chain(*distributed.gather_objects(kept)))
    unreadable += itertools.chain(*distributed.gather_objects(problems))
    read = [paths[i] for i in kept]
    problems = passed_over(root, read, unreadable)
    prediction = _gathered(Prediction.join(parts))
    return FolderPrediction(root, read, prediction, problems, listing.left_out, data.max_pixels, data.truncated)


def predict_rows(clusterer: Clusterer, file: Path) -> FolderPrediction:
    """Cluster the rows of a file of features; their paths are their numbers, from 0.

    Args:
        clusterer: A run on features.
        file: FILE.npy, (M, F).

    Raises:
        UsageError: there is no such file, or it does not hold features as the run's.
    """
    features, width = load_features(file, fewest=1).features, clusterer.model.num_features
    if features.shape[1] != width:
        raise UsageError(
            f"features {str(file)!r}: {counted(features.shape[1], 'column')}, and the run was trained on {width}: "
            "were they made by another network?"
        )
    return FolderPrediction(file, [str(row) for row in range(len(features))], clusterer.predict_features(features), [])


def _gathered(own: Prediction) -> Prediction:
    """Join the predictions of all ranks, in rank order."""
    sizes = distributed.gather_sizes(len(own))
    gathered = {name: distributed.gather_rows(column, sizes) for name, column in own.columns().items()}
    return Prediction(**gathered, selected=own.selected)


def _decoded(
    clusterer: Clusterer, root: Path, paths: list[str], starts: range
) -> Iterator[tuple[int, list[Tensor | str]]]:
    """Decode batch by batch in threads, one batch ahead of the network: an image, or why there is none."""

    def read(path: str) -> Tensor | str:
        try:
            return clusterer.read(root / path)
        except Exception as error:  # a malformed file can raise nearly anything
            return reason_for(error)

    with ThreadPoolExecutor(max(2, torch.get_num_threads())) as pool:
        ahead: tuple[int, list[Future[Tensor | str]]] | None = None
        for start in (*starts, None):
            following = None
            if start is not None:
                following = (start, [pool.submit(read, path) for path in paths[start : start + clusterer.batch_size]])
            if ahead is not None:
                yield ahead[0], [future.result() for future in ahead[1]]
            ahead = following
