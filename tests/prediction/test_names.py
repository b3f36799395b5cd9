"""Names of clusters: what a names.csv may hold, what is said of a bad one, and folders called by them."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iic_dist.errors import UsageError
from iic_dist.prediction import outputs
from iic_dist.prediction.names import folder_names, plain, read_names

LONG = "ü" * 300


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"cluster,name\r\n0,zebra\r\n2,horse\r\n", {0: "zebra", 2: "horse"}),
        (b"cluster,name\n2,horse\n0,zebra", {0: "zebra", 2: "horse"}),
        (b"\xef\xbb\xbfcluster,name\r\n1,a\r\n", {1: "a"}),  # the mark of byte order of a spreadsheet
        (b'cluster,name\r\n0,"a, ""b"""\r\n', {0: 'a, "b"'}),
        ("cluster,name\n0,u\u0308 日本\n".encode(), {0: "ü 日本"}),
        (b'cluster,name\n0,"  two\r\n lines\t"\n', {0: "two lines"}),
        (b"cluster,name\n0,a\n1,\n2,  \n", {0: "a"}),  # no name is no name
        (b"cluster,name\n0,a\n\n,\n1,a\n", {0: "a", 1: "a"}),  # empty lines; two of one name
        (b"note,name, cluster\n-,a,09\n", {9: "a"}),  # another order, a further column, zeros in front
        (b"cluster,name\n0,=1+1\n1,{{ 7 * 7 }}\n", {0: "=1+1", 1: "{{ 7 * 7 }}"}),
    ],
)
def test_good_files(content: bytes, names: dict[int, str], tmp_path: Path) -> None:
    (tmp_path / "names.csv").write_bytes(content)
    assert read_names(tmp_path / "names.csv", 10) == names


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty; its first line must be cluster,name"),
        (b" \r\n\n", "is empty"),
        (b"cluster,name\r\n", "it names no cluster"),
        (b"cluster,name\n3,\n", "it names no cluster"),
        (b"cluster;name\n0;a\n", "no column cluster and no column name in its first line, 'cluster;name'"),
        (b"cluster,label\n0,a\n", "no column name in its first line, 'cluster,label'"),
        (b"0,a\n", "no column cluster and no column name in its first line, '0,a'"),
        (b"cluster,name\n10,a\n", "line 2: no cluster '10'; those of this run are 0 to 9"),
        (b"cluster,name\n0,a\n-1,b\n", "line 3: no cluster '-1'"),
        (b"cluster,name\nzebra,0\n", "line 2: no cluster 'zebra'"),
        (b"cluster,name\n1.0,a\n", "line 2: no cluster '1.0'"),
        (b"cluster,name\n,a\n", "line 2: no cluster ''"),
        ("cluster,name\n٣,a\n".encode(), "line 2: no cluster '٣'"),
        (b"cluster,name\n" + b"9" * 5000 + b",a\n", f"line 2: no cluster '{'9' * 60}...'"),
        (b"cluster,name\n1,a\n2,b\n1,c\n", "line 4: cluster 1 is named twice, 'a' and 'c'"),
        (b"cluster,name\n1,a\n01,a\n", "line 3: cluster 1 is named twice, 'a' and 'a'"),
        (b"cluster,name\n1\n", "line 2: '1' has 1 of 2 columns"),
        (b"cluster,name\n1,caf\xe9\n", "not UTF-8 (byte 0xe9 at 18); save it as CSV in UTF-8"),
        (b"\xff\xfec\x00l\x00", "not UTF-8 (byte 0xff at 0)"),
        (b'cluster,name\n1,"a\n2,b\n', "not CSV: unexpected end of data"),
        (b'cluster,name\n1,"a"b\n', "line 2: not CSV"),
        (b'"clu\nster",name\n1,a\n', r"no column cluster in its first line, 'clu\nster,name'"),
        (b"\x89PNG\r\n\x1a\n", "not UTF-8"),
    ],
)
def test_a_bad_file_is_one_line(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "names.csv"
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_names(path, 10)
    assert str(error.value).startswith(f"--names {path}")
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 300


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such file"):
        read_names(tmp_path / "names.csv", 3)
    with pytest.raises(UsageError, match="is a folder, not a file"):
        read_names(tmp_path, 3)


@given(st.dictionaries(st.integers(0, 9), st.text(st.characters(codec="utf-8"), max_size=20), min_size=1))
def test_what_python_writes_is_read(tmp_path_factory: pytest.TempPathFactory, names: dict[int, str]) -> None:
    """Whatever a name is, what Python's own writer of RFC 4180 makes of it is read as that name, made plain."""
    path = tmp_path_factory.mktemp("names") / "names.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("cluster", "name"), *names.items()])
    wanted = {number: plain(name) for number, name in sorted(names.items()) if plain(name)}
    if wanted:
        assert read_names(path, 10) == wanted
        assert all(plain(name) == name for name in wanted.values())
    else:
        with pytest.raises(UsageError, match="names no cluster"):
            read_names(path, 10)


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        ({}, ["cluster-0", "cluster-1", "cluster-2"]),
        ({0: "zebra", 2: "horse"}, ["zebra", "cluster-1", "horse"]),
        ({0: "zebra", 2: "zebra"}, ["zebra", "cluster-1", "zebra"]),
        ({0: "../../etc/passwd", 1: "a\\b", 2: "/"}, ["___.._etc_passwd", "a_b", "_"]),
        ({0: ".hidden", 1: "..", 2: "..."}, ["_hidden", "__", "___"]),
        ({0: "a/b", 1: "a:b", 2: "a_b"}, ["a_b", "a_b-2", "a_b-3"]),
        ({0: "Cat", 1: "cat", 2: "CAT"}, ["Cat", "cat-2", "CAT-3"]),
        ({0: "cluster-1", 2: "Cluster-1"}, ["cluster-1-2", "cluster-1", "Cluster-1-3"]),
        ({0: "a.", 1: "a. .", 2: "a"}, ["a", "a-2", "a-3"]),
        ({0: LONG, 1: LONG + "x", 2: "ü" * 100}, ["ü" * 100, "ü" * 100 + "-2", "ü" * 100 + "-3"]),
        ({0: "0", 1: "1", 2: "日本語 🦓"}, ["0", "1", "日本語 🦓"]),
    ],
)
def test_folders(names: dict[int, str], folders: list[str]) -> None:
    assert folder_names(names, 3) == folders


@given(st.dictionaries(st.integers(0, 11), st.text(st.characters(codec="utf-8")).map(plain)))
def test_every_name_makes_a_folder_of_its_own(names: dict[int, str]) -> None:
    folders = folder_names(names, 12)
    for name in folders:
        assert name
        assert not name.startswith(".")
        assert not set(name) & set('/\\\0\r\n:*?"<>|')
        assert len(os.fsencode(name)) <= 255
    of_cluster = [names.get(number) or number for number in range(12)]
    assert len({name.casefold() for name in folders}) == len(set(of_cluster))  # also where capitals do not count
    assert all((folders[a] == folders[b]) == (of_cluster[a] == of_cluster[b]) for a in range(12) for b in range(12))


def test_tables_with_names(tmp_path: Path) -> None:
    hostile = 'a, "b" <i>=1+1'
    rows = [outputs.NamedRow("a.png", 3, 0.25, 1.0, hostile), outputs.NamedRow("b\r.png", 0, 0.5, 0.0, None)]
    for ending in ("csv", "jsonl"):
        outputs.write_table(tmp_path / f"c.{ending}", rows)
    with (tmp_path / "c.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [(row["path"], row["cluster"], row["name"]) for row in read] == [
        ("a.png", "3", hostile),
        ("b\r.png", "0", ""),
    ]
    objects = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert [each["name"] for each in objects] == [hostile, None]
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    outputs.write_table(tmp_path / "c.parquet", rows)
    read_table = parquet.read_table(tmp_path / "c.parquet")
    assert read_table.column_names == ["path", "cluster", "confidence", "agreement", "name"]
    assert read_table["name"].to_pylist() == [hostile, None]
    outputs.write_table(tmp_path / "none.parquet", rows[1:])  # no name at all: still a column of text
    assert str(parquet.read_schema(tmp_path / "none.parquet").field("name").type) == "string"
