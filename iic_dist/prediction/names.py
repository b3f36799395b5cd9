"""Names for clusters: the names.csv that the gallery saves, and folders called by them."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from iic_dist.errors import UsageError

COLUMNS = ("cluster", "name")

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ufeff]")
_NOT_IN_FILE_NAMES = re.compile(r'[/\\:*?"<>|]')  # of Windows too: such a folder is often carried there
_LONGEST = 200  # bytes of a folder's name; file systems end at 255, and a number may be added
_QUOTED = 60  # characters of a bad value that an error shows


def read_names(path: Path, num_clusters: int) -> dict[int, str]:
    """Read the names of clusters from a CSV file with the columns cluster and name.

    Further columns are passed over, and so are clusters whose name is empty. A mark of byte order, as spreadsheets
    write it, does no harm.

    Args:
        path: The file, in UTF-8.
        num_clusters: K of the run.

    Returns:
        The name of each cluster that has one, by number; see `plain`.

    Raises:
        UsageError: there is no such file, or it does not name clusters of this run; one line that says where and why.
    """
    lines = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        header = [cell.strip() for cell in next(lines, [])]
        if missing := [column for column in COLUMNS if column not in header]:
            raise UsageError(
                f"--names {path}: no column {' and no column '.join(missing)} in its first line, "
                f"{_quoted(','.join(header))}; it must be like cluster,name"
            )
        columns = [header.index(column) for column in COLUMNS]
        names: dict[int, str] = {}
        for cells in lines:
            if not any(cell.strip() for cell in cells):
                continue
            where = f"--names {path}, line {lines.line_num}"
            if len(cells) <= max(columns):
                raise UsageError(f"{where}: {_quoted(','.join(cells))} has {len(cells)} of {len(header)} columns")
            number, name = _cluster(where, cells[columns[0]], num_clusters), plain(cells[columns[1]])
            if number in names:
                raise UsageError(
                    f"{where}: cluster {number} is named twice, {_quoted(names[number])} and {_quoted(name)}"
                )
            names[number] = name
    except csv.Error as error:
        raise UsageError(f"--names {path}, line {lines.line_num}: not CSV: {error}") from error
    names = {number: name for number, name in sorted(names.items()) if name}
    if not names:
        raise UsageError(f"--names {path}: it names no cluster; below cluster,name it must have lines like 3,zebra")
    return names


def plain(name: str) -> str:
    """Return a name as it is compared and shown: NFC, each run of blanks and control characters one space.

    The page of the gallery does the same, so that what looks like one name is one.
    """
    return " ".join(_CONTROL.sub(" ", unicodedata.normalize("NFC", name)).split())


def folder_names(names: Mapping[int, str], num_clusters: int) -> list[str]:
    """Return what the folder of each cluster is called, in order of the clusters; those of one name share one.

    A cluster without name is cluster-3, with zeros in front. Separators, what Windows does not allow and dots at the
    ends are replaced or cut off. Where two names become one in that way, or differ in nothing but capitals, which some
    file systems do not tell apart, the later gets a number.
    """
    digits = len(str(num_clusters - 1))
    folders = {number: f"cluster-{number:0{digits}}" for number in range(num_clusters) if not names.get(number)}
    taken = set(folders.values())
    of_name: dict[str, str] = {}
    for number in range(num_clusters):
        if number in folders:
            continue
        name = names[number]
        if name not in of_name:
            of_name[name] = _free(_file_name(name), taken)
            taken.add(of_name[name].casefold())
        folders[number] = of_name[name]
    return [folders[number] for number in range(num_clusters)]


def _text(path: Path) -> str:
    if not path.is_file():
        raise UsageError(f"--names {path}: {'is a folder, not a file' if path.is_dir() else 'there is no such file'}")
    content = path.read_bytes()
    if not content.strip():
        raise UsageError(f"--names {path}: is empty; its first line must be cluster,name")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise UsageError(
            f"--names {path}: not UTF-8 (byte 0x{byte:02x} at {error.start}); save it as CSV in UTF-8"
        ) from error


def _cluster(where: str, cell: str, num_clusters: int) -> int:
    cell = cell.strip()
    if not re.fullmatch("[0-9]{1,9}", cell) or int(cell) >= num_clusters:
        raise UsageError(f"{where}: no cluster {_quoted(cell)}; those of this run are 0 to {num_clusters - 1}")
    return int(cell)


def _quoted(value: str) -> str:
    return repr(value if len(value) <= _QUOTED else f"{value[:_QUOTED]}...")


def _file_name(name: str) -> str:
    cleaned = _NOT_IN_FILE_NAMES.sub("_", name)
    cleaned = cleaned.encode()[:_LONGEST].decode(errors="ignore")
    hidden = len(cleaned) - len(cleaned.lstrip("."))
    return ("_" * hidden + cleaned[hidden:]).rstrip(". ")


def _free(wanted: str, taken: set[str]) -> str:
    """Return the name, with the first number that makes it differ from the taken ones, which are in small letters."""
    name, number = wanted, 1
    while name.casefold() in taken:
        number += 1
        name = f"{wanted}-{number}"
    return name
