"""Predict: `python -m iic_dist.predict --run runs/NAME --images DIR --output clusters.csv` clusters a folder."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from iic_dist import distributed
from iic_dist.config.console import Parser, errors_in_one_line, log_to_console, run_option, say
from iic_dist.config.settings import DataConfig
from iic_dist.data.listing import left_out_line, listed
from iic_dist.device import NAMES, use_threads
from iic_dist.distributed import Place
from iic_dist.errors import UsageError
from iic_dist.files import write_whole
from iic_dist.prediction import clusterer, gallery, outputs
from iic_dist.prediction.folder import FolderPrediction, predict_folder, predict_rows
from iic_dist.prediction.names import folder_names, read_names
from iic_dist.wording import counted, printable

_NAMED = 10  # unreadable files that are printed


def _options() -> argparse.Namespace:
    parser = Parser(
        prog="python -m iic_dist.predict",
        description="Put each image of a folder into a cluster of a trained run; also under torchrun, with the same "
        "output. No label and none of the images that the run was trained on is needed. Ask for at least one of "
        "--output, --link-to, --embeddings and --gallery.",
    )
    run_option(parser)
    parser.add_argument(
        "--images",
        required=True,
        type=Path,
        metavar="DIR",
        help="the image folder, in any nesting; for a run on features a file FILE.npy of others",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="table of path, cluster, confidence, agreement of the sub-heads: .csv, .jsonl or .parquet (with pyarrow)",
    )
    parser.add_argument("--link-to", type=Path, metavar="DIR", help="make a folder for each cluster, of links")
    parser.add_argument("--copy", action="store_true", help="with --link-to: copies instead of links")
    parser.add_argument(
        "--embeddings", type=Path, metavar="FILE.npy", help="features of the network, a row for each image of the table"
    )
    parser.add_argument(
        "--gallery", type=Path, metavar="FILE.html", help="one page that shows every cluster, where they can be named"
    )
    parser.add_argument(
        "--names",
        type=Path,
        metavar="NAMES.csv",
        help="names of clusters, as the gallery saves them: a column of the table, folders of --link-to, the gallery's "
        "headings; clusters of one name become one",
    )
    parser.add_argument(
        "--follow-links",
        action="store_true",
        help="also take symbolic links that lead out of the image folder, as those of --link-to; without this option "
        "and the next two, images are read as in the training (data.follow_links, max_megapixels, truncated)",
    )
    parser.add_argument("--max-megapixels", type=float, metavar="N", help="pass over images of more million pixels")
    parser.add_argument(
        "--truncated", action="store_true", help="also take files that were cut short; what is missing is gray or black"
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=NAMES,
        help="where to compute; auto takes CUDA, else MPS, else the CPU",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    return parser.parse_args()


def _check(options: argparse.Namespace) -> None:
    """Find what does not fit together."""
    if not any((options.output, options.link_to, options.embeddings, options.gallery)):
        raise UsageError("nothing to do: ask for --output, --link-to, --embeddings or --gallery")
    if options.copy and not options.link_to:
        raise UsageError("--copy: copies for --link-to, which is not asked for")
    if options.names and not any((options.output, options.link_to, options.gallery)):
        raise UsageError(f"--names {options.names}: names for --output, --link-to or --gallery; none is asked for")
    if options.max_megapixels is not None and not 0 < options.max_megapixels < math.inf:
        raise UsageError(f"--max-megapixels {options.max_megapixels}: must be above 0")
    if options.output:
        outputs.check_table(options.output)
    for option, path, ending in (
        ("--embeddings", options.embeddings, ".npy"),
        ("--gallery", options.gallery, ".html"),
    ):
        if path and path.suffix != ending:
            raise UsageError(f"{option} {path}: its name must end in {ending}")


def _check_files(options: argparse.Namespace) -> str | None:
    """Say what could not be written, before the images are clustered and not after; None where all can be."""
    beside = options.output and outputs.unreadable_beside(options.output)
    try:
        for option, path in (
            ("--output", options.output),
            ("--output", beside),
            ("--embeddings", options.embeddings),
            ("--gallery", options.gallery),
        ):
            if path:
                outputs.check_file(option, path)
        if options.link_to:
            outputs.check_link_folder(options.link_to, options.images)
    except UsageError as error:
        return str(error)
    return None


def _refuse_pictures(options: argparse.Namespace) -> None:
    for option, asked in (("--gallery", options.gallery), ("--link-to", options.link_to)):
        if asked:
            raise UsageError(f"{option} {asked}: this run is on features, and there are no images to show or link")


def _read_as_asked(data: DataConfig, options: argparse.Namespace) -> None:
    """Let options win over how the run was read."""
    data.follow_links |= options.follow_links
    data.truncated |= options.truncated
    data.max_megapixels = options.max_megapixels or data.max_megapixels


def predict(options: argparse.Namespace, place: Place) -> None:
    """Cluster a folder and write what is asked for.

    Raises:
        UsageError: there is no such run or folder, or a file could not be written.

    Collective: all ranks must call; rank 0 writes.
    """
    _check(options)
    run = clusterer.load(options.run, options.device)
    _read_as_asked(run.config.data, options)
    names = read_names(options.names, run.num_clusters) if options.names else None
    use_threads(run.config.run.threads, place)
    distributed.start(place, run.device, run.config.run.start_timeout_minutes)
    if problem := distributed.broadcast(_check_files(options) if place.is_main else None):
        raise UsageError(problem)
    if run.takes_features:
        _refuse_pictures(options)
        found = predict_rows(run, options.images)
    else:
        found = predict_folder(run, options.images, progress=place.is_main and not options.no_progress)
    if not place.is_main:
        return
    agreement = found.prediction.agreement()
    noun = "row" if run.takes_features else "image"
    say(place, *_summary(found, agreement, run.num_clusters, names, noun))
    written = _write(options, found, agreement, run.num_clusters, names)
    say(place, f"written: {', '.join(map(str, written))}")


def _write(
    options: argparse.Namespace,
    found: FolderPrediction,
    agreement: Tensor,
    num_clusters: int,
    names: Mapping[int, str] | None,
) -> list[Path]:
    """Write what is asked for; return what was written."""
    prediction = found.prediction
    table = list(outputs.rows(found.paths, prediction.clusters, prediction.confidence, agreement, names))
    written: list[Path] = []
    if options.output:
        outputs.write_table(options.output, table)
        written.append(options.output)
    if options.output and found.unreadable:
        unreadable = outputs.unreadable_beside(options.output)
        write_whole(unreadable, listed(found.unreadable).encode())
        written.append(unreadable)
    if options.embeddings:
        outputs.write_embeddings(options.embeddings, prediction.embeddings)
        written.append(options.embeddings)
    if options.link_to:
        folders = folder_names(names or {}, num_clusters)
        outputs.link_images(options.link_to, options.images, table, folders, options.copy)
        written.append(options.link_to)
    if options.gallery:
        gallery.write(options.gallery, found, agreement, num_clusters, names)
        written.append(options.gallery)
    return written


def _summary(
    found: FolderPrediction, agreement: Tensor, num_clusters: int, names: Mapping[int, str] | None, noun: str
) -> Iterable[str]:
    """Say in some lines how many images, or what else `noun` says, went where, and what could not be read."""
    clusters, confidence = found.prediction.clusters, found.prediction.confidence
    used = int(clusters.unique().numel())
    others = found.prediction.sub_heads.shape[1] > 1
    agreed = f"{agreement.mean():.3f}" if others else "unknown of 1 sub-head"
    yield (
        f"{counted(len(found.paths), noun)} in {used} of {num_clusters} clusters; "
        f"mean confidence {confidence.mean():.3f}, agreement {agreed}"
    )
    sizes = torch.bincount(clusters, minlength=num_clusters).tolist()
    yield f"{noun}s of each cluster: {', '.join(f'{number}: {size}' for number, size in enumerate(sizes))}"
    if names:
        of_name = Counter[str]()
        for number, name in names.items():
            of_name[name] += sizes[number]
        yield f"{noun}s of each name: {', '.join(f'{name}: {size}' for name, size in of_name.items())}"
    if found.left_out:
        yield left_out_line(found.left_out)
    if found.unreadable:
        yield f"{counted(len(found.unreadable), 'file')} could not be read:"
    for path, reason in found.unreadable[:_NAMED]:
        yield f"  {printable(path)}: {reason}"
    if len(found.unreadable) > _NAMED:
        yield f"  and {len(found.unreadable) - _NAMED} more; --output FILE names all of them in FILE.unreadable.txt"


def main() -> None:
    """Predict and write."""
    log_to_console()
    options, place = _options(), Place.from_environment()
    with errors_in_one_line(place, system_error=2):
        predict(options, place)


if __name__ == "__main__":
    main()
