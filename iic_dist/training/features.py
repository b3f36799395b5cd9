"""The features that a run clusters as they are: of a file, or of images by a frozen pretrained backbone, kept."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from iic_dist import distributed
from iic_dist.config import Config
from iic_dist.config.arithmetic import for_device
from iic_dist.config.build import build_views, load_data
from iic_dist.data import cache
from iic_dist.data.decode import DECODER, count_workers
from iic_dist.data.features import PREFIX, Embedded, FeatureSet, load_features, write_features
from iic_dist.data.folder import class_names_of, find_images, kept_under, labels_of, passed_over
from iic_dist.data.image_set import ImageSet
from iic_dist.data.listing import Listing, left_out_line
from iic_dist.data.source import place_images
from iic_dist.device import exact_device
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.files import sync_folder
from iic_dist.models import build_backbone
from iic_dist.training.extract import Embedder, embed_files, extract_images
from iic_dist.wording import printable

_log = logging.getLogger(__name__)
_ROWS = 2**25  # bytes of features that go from one rank to the others at a time


@dataclass
class RunFeatures:
    """The features of a run.

    Attributes:
        train: What the heads train on.
        evaluation: What the clusters are judged on; may be the same object.
        unreadable: Files of an image folder that were passed over, with the reason.
    """

    train: FeatureSet
    evaluation: FeatureSet
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def load_run_features(
    config: Config, place: Place, device: torch.device, after_each: Callable[[], None] | None = None
) -> RunFeatures:
    """Load or make the features that `config.data` and `config.model` name; see `Config.of_features`.

    Args:
        config: As `with_weights` returns it.
        place: This rank.
        device: Where the backbone computes.
        after_each: Called after each of its batches, equally often on all ranks; may raise to end it here.

    Raises:
        UsageError: features or images cannot be loaded, or are not the same on all ranks.

    Collective: all ranks must call.
    """
    config = for_device(config, device)
    data = config.data
    if data.name.startswith(PREFIX):
        labels = None if data.labels is None else Path(data.labels)
        found = RunFeatures(features := load_features(Path(data.name.removeprefix(PREFIX)), labels), features)
    elif data.name.startswith("folder:"):
        found = _of_folder(config, place, device, after_each)
    else:
        found = _of_named_set(config, place, device, after_each)
    everywhere = distributed.gather_objects(found.train.checksum)
    if len(set(everywhere)) > 1:
        other = next(rank for rank, checksum in enumerate(everywhere) if checksum != everywhere[0])
        raise UsageError(f"{data.name}: rank {other} has other features than rank 0: give all machines the same")
    return found


def frozen_embedder(config: Config, device: torch.device) -> Embedder:
    """Build the frozen backbone of a config on its device, as a function of images.

    On CUDA it computes in bfloat16, unless in float64. Convolutions are faster with channels last, on CPUs too
    (EfficientNet-lite0: 14 ms of one core an image instead of 20).
    """
    channels, _ = config.image_shape
    views = build_views(config, device)
    backbone = build_backbone(
        config.model.backbone,
        in_channels=views.channels(channels),
        image_size=views.size,
        norm=config.model.norm,
        pretrained=True,
        weights=config.model.weights,
        weights_digest=config.model.weights_digest,
    )
    backbone.requires_grad_(False)
    precision = for_device(config, device).train.precision
    assert precision != "auto"
    if device.type == "cuda" and precision == "float32":
        precision = "bfloat16"
    embedder = Embedder(backbone, views, device, precision, channels_last=True)
    backbone.to(device, embedder.dtype).to(memory_format=torch.channels_last)
    return embedder


def _of_named_set(
    config: Config, place: Place, device: torch.device, after_each: Callable[[], None] | None
) -> RunFeatures:
    images = load_data(config, place)
    config = copy.deepcopy(config)
    channels, config.data.image_size = images.train.images.shape[1:3]
    config.data.channels = 1 if channels == 1 else 3
    embed = frozen_embedder(config, device)

    def features_of(loaded: ImageSet) -> FeatureSet:
        source = place_images(loaded.images, exact_device(device), config.data.device_budget_gib)
        progress = config.monitor.progress and place.is_main
        made = extract_images(embed, source, progress=progress, after_each=after_each).to(_kept_as(config))
        channels, height, width = loaded.images.shape[1:]
        return FeatureSet(loaded.name, made, loaded.labels, loaded.class_names, image_shape=(channels, height, width))

    train = features_of(images.train)
    same = images.evaluation is images.train
    return RunFeatures(train, train if same else features_of(images.evaluation))


def _of_folder(
    config: Config, place: Place, device: torch.device, after_each: Callable[[], None] | None
) -> RunFeatures:
    """Take what is kept of a folder, or make it: rank 0 lists the files, and all ranks share them."""
    data = config.data
    folder = Path(data.name.removeprefix("folder:"))
    kept = kept_under(Path(data.cache or f"{data.root}/decoded"), folder.expanduser())
    listing = distributed.broadcast(
        find_images(folder, data.follow_links, kept, data.relist) if place.is_main else Listing([], [], "")
    )
    if place.is_main and listing.left_out:
        _log.info("%s: %s", folder, left_out_line(listing.left_out))
    if data.folder_labels:
        class_names_of(listing.paths, folder)  # an error now rather than after the work
    network = _network(config, device)
    source = json.dumps([network, listing.digest])
    path = Path(f"{kept}-{_slug(config.model.backbone)}-{hashlib.sha256(network.encode()).hexdigest()[:8]}.features")
    found = _read(path, source, place)
    if found is None:
        embed = frozen_embedder(config, device)
        with _embedded(embed, folder.expanduser(), listing, config, place, path.parent, after_each) as chunks:
            found = _keep(
                path, source, embed.backbone.num_features, _kept_as(config), len(listing.paths), chunks, place
            )
    elif place.is_main:
        _log.info("features of %s by %s: taken from %s", data.name, config.model.backbone, path)
    features, contents = found
    problems = passed_over(folder, contents.paths, listing.refused + contents.malformed)
    classes = class_names_of(contents.paths, folder) if data.folder_labels else []
    channels, size = config.image_shape
    made = FeatureSet(
        f"folder:{folder}",
        features,
        labels_of(contents.paths, classes) if data.folder_labels else None,
        tuple(map(printable, classes)),
        tuple(contents.paths),
        contents.checksum,
        image_shape=(channels, size, size),
    )
    return RunFeatures(made, made, problems)


def _network(config: Config, device: torch.device) -> str:
    """Name all that the features of a file depend on but the file; the same for a new run and one that goes on."""
    model, data, views = config.model, config.data, config.views
    own_size = None if views.size == data.image_size else views.size  # the config that a run keeps names both
    evaluated = [] if views.evaluate_size in (None, views.size or data.image_size) else [views.evaluate_size]
    return json.dumps(
        [
            *(model.backbone, model.weights_digest, data.image_size, data.channels, data.resampling),
            *(views.policy, own_size, views.crop_sides, views.sobel, views.mean, views.std),
            *(config.train.precision, device.type, str(_kept_as(config)), data.max_pixels, DECODER),
            *(["truncated"] if data.truncated else []),  # what was kept before stays good
            *evaluated,
        ]
    )


def _kept_as(config: Config) -> torch.dtype:
    kept: torch.dtype = getattr(torch, "float64" if config.train.precision == "float64" else config.data.keep_features)
    return kept


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name)[:60]


def _read(path: Path, source: str, place: Place) -> tuple[Tensor, cache.Contents] | None:
    """Map what is kept, if every rank can and finds the same."""
    found = cache.read_if_usable(path, source, verify=place.local_rank == 0, progress=False)
    checksums = distributed.gather_objects(None if found is None else found[1].checksum)
    return found if len(set(checksums)) == 1 else None


@contextlib.contextmanager
def _embedded(
    embed: Embedder,
    root: Path,
    listing: Listing,
    config: Config,
    place: Place,
    room: Path,
    after_each: Callable[[], None] | None,
) -> Iterator[Iterable[Embedded]]:
    """Embed the files of a listing: what all ranks make of them, in order, on every rank.

    Each rank keeps its own part in a nameless file until all are ready, which may take long.
    """
    image_size = config.image_shape[1]
    own = embed_files(
        embed,
        root,
        listing.paths,
        image_size=image_size,
        resampling=config.data.resampling or "bilinear",
        max_pixels=config.data.max_pixels,
        truncated=config.data.truncated,
        workers=count_workers(config.data.workers, place.local_world_size),
        progress=config.monitor.progress and place.is_main,
        after_each=after_each,
    )
    with contextlib.closing(own):
        if place.world_size == 1:
            yield own
            return
        with cache.disk_errors(room, "features"), tempfile.TemporaryFile(dir=room if room.is_dir() else None) as file:
            mine = Embedded(torch.empty(0, embed.backbone.num_features, dtype=embed.dtype), [], [])
            for part in own:
                file.write(part.features.numpy().tobytes())
                mine.paths.extend(part.paths)
                mine.malformed.extend(part.malformed)
            distributed.wait_patiently()
            yield _exchanged(file, mine)


def _exchanged(file: BinaryIO, mine: Embedded) -> Iterator[Embedded]:
    """Hand on what each rank has made, rank after rank.

    Args:
        file: Features of this rank.
        mine: Its paths; how its features are, and none of them.

    Collective: all ranks must take all of it.
    """
    width, dtype = mine.features.shape[1], mine.features.dtype
    rows = max(1, _ROWS // (width * dtype.itemsize))
    file.seek(0)
    for rank, (paths, malformed) in enumerate(distributed.gather_objects((mine.paths, mine.malformed))):
        for start in range(0, len(paths), rows):
            block = torch.empty(min(rows, len(paths) - start), width, dtype=dtype)
            if rank == distributed.rank():
                block.view(torch.uint8).numpy()[:] = np.frombuffer(file.read(block.nbytes), np.uint8).reshape(
                    len(block), -1
                )
            yield Embedded(distributed.broadcast_tensor(block, rank), paths[start : start + rows], [])
        yield Embedded(torch.empty(0, width, dtype=dtype), [], malformed)


def _keep(
    path: Path,
    source: str,
    num_features: int,
    dtype: torch.dtype,
    count: int,
    chunks: Iterable[Embedded],
    place: Place,
) -> tuple[Tensor, cache.Contents]:
    """Write features and map them: local rank 0 of each machine for all, or where it cannot, each rank for itself.

    The file gets its name when it is complete. Another run that makes it at the same time keeps its own.

    Collective: all ranks must call.
    """
    part = path.with_name(f"{path.name}.part")
    with contextlib.ExitStack() as stack:
        file = None
        if place.local_rank == 0:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(cache.locked(part, wait=False))
            except OSError as error:
                _log.warning(
                    "features cannot be kept in %s (%s): each process of this run keeps its own; another folder: "
                    "--data.cache",
                    path.parent,
                    "another run makes them" if isinstance(error, BlockingIOError) else error.strerror,
                )
        named = distributed.gather_objects(file is not None)[place.rank - place.local_rank]
        if named and place.local_rank != 0:
            for _ in chunks:
                pass
        else:
            room = path.parent if named else Path(tempfile.gettempdir())
            stack.enter_context(cache.disk_errors(room, "features"))
            out = file or stack.enter_context(tempfile.TemporaryFile())
            try:
                _check_room(out, count * num_features * dtype.itemsize)
                write_features(out, source, num_features, dtype, chunks)
                if named:
                    os.replace(part, path)
                    sync_folder(path.parent)
            except BaseException:
                if named:
                    part.unlink(missing_ok=True)
                raise
            found = cache.read(out, source, verify=False)
        distributed.wait_patiently()
        if named and place.local_rank != 0:
            with path.open("rb") as complete:
                found = cache.read(complete, source, verify=False)
    return found


def _check_room(file: BinaryIO, needed: int) -> None:
    """Raise a UsageError where the features cannot fit the disk of `file`."""
    disk = os.fstatvfs(file.fileno())
    free = disk.f_bavail * disk.f_frsize
    if needed > free:
        raise UsageError(
            f"the features need {needed / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free: keep them as "
            "--data.keep_features float16, or elsewhere with --data.cache"
        )
