"""What a prediction leaves: a table of the images, a folder for each cluster, the embeddings."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from torch import Tensor

from iic_dist.errors import UsageError
from iic_dist.files import check_writable, temporary_of, whole


@dataclass(frozen=True)
class Row:
    """One image of the table.

    Attributes:
        path: Below the image folder; bytes that are not UTF-8 as surrogates, as Python reads file names.
        cluster: In [0, K).
        confidence: Its probability, in (0, 1].
        agreement: Share of the other sub-heads that agree, in [0, 1]; None where there are no others.
    """

    path: str
    cluster: int
    confidence: float
    agreement: float | None


@dataclass(frozen=True)
class NamedRow(Row):
    """One image of the table, with the name of its cluster, if that has one."""

    name: str | None


def rows(
    paths: Iterable[str],
    clusters: Tensor,
    confidence: Tensor,
    agreement: Tensor,
    names: Mapping[int, str] | None = None,
) -> Iterator[Row]:
    """Yield the table's rows, with the names of their clusters where there are names; the floats with six digits."""
    columns = (clusters.tolist(), confidence.tolist(), agreement.tolist())
    for path, cluster, sure, agreed in zip(paths, *columns, strict=True):
        values = path, cluster, round(sure, 6), None if math.isnan(agreed) else round(agreed, 6)
        yield Row(*values) if names is None else NamedRow(*values, names.get(cluster))


def check_table(path: Path) -> None:
    """Raise a UsageError unless `write_table` can write a file of this name."""
    if path.suffix not in _WRITERS:
        raise UsageError(f"--output {path}: its name must end in {', '.join(_WRITERS)}")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UsageError(f"--output {path}: .parquet needs pyarrow (pip install pyarrow); .csv and .jsonl need nothing")


def unreadable_beside(table: Path) -> Path:
    """Return the file that names what could not be read beside a table."""
    return table.with_name(f"{table.name}.unreadable.txt")


def check_file(option: str, path: Path) -> None:
    """Raise a UsageError unless a file can be written, by trying."""
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.parent}")
    try:
        check_writable(path)
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be written ({error.strerror})") from error


def check_link_folder(target: Path, images: Path) -> None:
    """Raise a UsageError unless `link_images` can write to `target`: new or empty, and not among the images."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(f"--link-to {target}: is there already and nothing is overwritten; name a new folder")
    if target.resolve().is_relative_to(images.resolve()):
        raise UsageError(f"--link-to {target}: lies in the image folder {images}, where it would count as images")
    try:
        if target.exists():
            check_writable(target / "cluster-0")
        else:
            target.mkdir(parents=True)
            target.rmdir()
    except OSError as error:
        raise UsageError(f"--link-to {target}: cannot be written ({error.strerror})") from error


def write_table(path: Path, table: Sequence[Row]) -> None:
    """Write the rows to a file, whole or not at all; its ending says how.

    .csv: UTF-8 with a header, quoted where it must be. .jsonl: an object a line. .parquet: zstd-compressed columns.
    A path that is not UTF-8 keeps its bytes in .csv (read it with errors="surrogateescape") and .jsonl; Parquet has
    no such strings, there it gets \\xNN in their place. No name, or no agreement,
    is empty in .csv, null in the others.

    Args:
        path: The file.
        table: At least one row, all of one kind.
    """
    with whole(path) as part:
        _WRITERS[path.suffix](part, table)


def _columns(table: Sequence[Row]) -> list[str]:
    return [field.name for field in fields(table[0])]


def _write_csv(path: Path, table: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        plain = csv.writer(file, lineterminator="\n")
        quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        plain.writerow(_columns(table))
        for row in table:
            writer = quoted if "\r" in row.path else plain  # before Python 3.13 a lone \r got no quotes
            name = (row.name or "",) if isinstance(row, NamedRow) else ()
            agreement = "" if row.agreement is None else f"{row.agreement:.6f}"
            writer.writerow((row.path, row.cluster, f"{row.confidence:.6f}", agreement, *name))


def _write_jsonl(path: Path, table: Sequence[Row]) -> None:
    with path.open("w", encoding="ascii") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in table)


def _write_parquet(path: Path, table: Sequence[Row]) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {name: [getattr(row, name) for row in table] for name in _columns(table)}
    columns["path"] = [os.fsencode(path).decode("utf-8", "backslashreplace") for path in columns["path"]]
    types = (pyarrow.string(), pyarrow.int32(), pyarrow.float32(), pyarrow.float32(), pyarrow.string())
    schema = pyarrow.schema(list(zip(columns, types, strict=False)))  # without names the last type is left over
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), path, compression="zstd")


_WRITERS: dict[str, Callable[[Path, Sequence[Row]], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}


def write_embeddings(path: Path, embeddings: Tensor) -> None:
    """Write (M, F) float32 as .npy, a row for each row of the table, whole or not at all."""
    with whole(path) as part:
        np.save(part, embeddings.numpy())


def link_images(target: Path, root: Path, table: Iterable[Row], folders: Sequence[str], copy: bool) -> None:
    """Make a folder for each cluster, which holds links to its images, or copies, under their paths below `root`.

    All of it is there in the end, or nothing.

    Args:
        target: New or empty.
        root: The image folder; the links name it from the root of the file system.
        table: The images.
        folders: What the folder of each cluster is called: `names.folder_names`; clusters may share one.
        copy: Copy the files, with their times.
    """
    # One that is there may be a disk of its own, which nothing can be moved to.
    there = target.is_dir()
    part = target if there else temporary_of(target)
    if not there:
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    try:
        for folder in folders:
            (part / folder).mkdir(parents=True, exist_ok=True)
        for row in table:
            # The whole path below the root, so that no two images fall together.
            place, source = part / folders[row.cluster] / row.path, root.absolute() / row.path
            place.parent.mkdir(parents=True, exist_ok=True)
            if copy:
                shutil.copy2(source, place)
            else:
                place.symlink_to(source)
        if not there:
            part.rename(target)
    except OSError:
        for each in list(part.iterdir()) if part.is_dir() else ():
            shutil.rmtree(each, ignore_errors=True)
        if not there:
            shutil.rmtree(part, ignore_errors=True)
        raise
