"""Features from a user's file: mapped, looked at once, and refused in one line where they are no good."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from iic_dist.data import cache
from iic_dist.data.features import Embedded, load_features, write_features
from iic_dist.errors import UsageError


def rows(count: int = 7, width: int = 5, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, width)).astype(dtype)


def error_line(path: Path, labels: Path | None = None) -> str:
    with pytest.raises(UsageError) as error:
        load_features(path, labels)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numbers_and_dtype_are_those_of_the_file(dtype: str, order: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.asarray(rows(dtype=dtype), order=order))
    found = load_features(tmp_path / "x.npy")
    assert found.features.dtype == getattr(torch, dtype)
    assert np.array_equal(found.features.numpy(), rows(dtype=dtype))
    assert (found.name, len(found), found.labels, found.image_shape) == (f"features:{tmp_path}/x.npy", 7, None, None)


def test_the_checksum_changes_with_any_number(tmp_path: Path) -> None:
    x = rows()
    np.save(tmp_path / "x.npy", x)
    first = load_features(tmp_path / "x.npy").checksum
    assert load_features(tmp_path / "x.npy").checksum == first
    x[6, 4] += 1e-6
    np.save(tmp_path / "x.npy", x)
    assert load_features(tmp_path / "x.npy").checksum != first


def test_labels_beside_the_file_or_named(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows())
    np.save(tmp_path / "x.labels.npy", np.array([0, 2, -1, 2, 1, 0, 0], dtype=np.int16))
    found = load_features(tmp_path / "x.npy")
    assert found.labels is not None
    assert found.labels.tolist() == [0, 2, -1, 2, 1, 0, 0]
    assert (found.labels.dtype, found.class_names, found.num_classes) == (torch.int64, ("0", "1", "2"), 3)
    np.save(tmp_path / "words.npy", np.array(["cat", "dog", "ant", "cat", "dog", "ant", "cat"]))
    found = load_features(tmp_path / "x.npy", tmp_path / "words.npy")
    assert found.labels is not None
    assert [found.class_names[label] for label in found.labels] == ["cat", "dog", "ant", "cat", "dog", "ant", "cat"]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (rows()[0], r"<f4 of shape \(5,\): must be \(N, F\)"),
        (rows()[None], r"<f4 of shape \(1, 7, 5\): must be"),
        (rows().astype(np.int64), r"<i8 of shape \(7, 5\): must be .*float16, float32, float64"),
        (rows().astype(np.complex64), "<c8"),
        (rows().astype(">f4"), ">f4"),
        (rows(1), r"1 row of 5 features: clusters need at least 2 rows"),
        (rows(2, 0), "cannot be read|of 0 features"),
        (rows(0), "cannot be read|0 rows"),
        (np.array([[{}]]), "cannot be read: not a .npy of numbers"),
        (np.where(np.arange(35).reshape(7, 5) == 17, np.nan, rows()), r"row 3 \(of 7, from 0\) holds NaN or Inf"),
        (np.where(np.arange(35).reshape(7, 5) == 34, np.inf, rows()).astype("f2"), "row 6 "),
    ],
)
def test_what_is_no_good_is_one_line(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    assert re.search(message, error_line(tmp_path / "x.npy"))


def test_a_missing_a_truncated_and_another_file_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    assert error_line(path).endswith("x.npy': there is no such file")
    np.save(path, rows())
    content = path.read_bytes()
    for length in (0, 5, 60, len(content) - 1):
        path.write_bytes(content[:length])
        assert "cannot be read: not a .npy of numbers, or cut short" in error_line(path)
    path.write_bytes(b"\x89PNG" + content)
    assert "cannot be read" in error_line(path)
    assert "pickle" not in error_line(path)  # it once told how to run what is in the file
    np.savez(tmp_path / "x.npz", rows())
    assert "must be a file .npy" in error_line(tmp_path / "x.npz")
    (tmp_path / "x.npz").rename(tmp_path / "y.npy")
    assert "holds several arrays" in error_line(tmp_path / "y.npy")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(6), r"of shape \(6,\): must be \(7,\)"),
        (np.arange(7.0), "<f8"),
        (np.full(7, -1), "from -1 to -1"),
        (np.array([0, 1, -2, 0, 0, 0, 0]), "from -2 to 1"),
        (np.array([0, 1, 10**12, 0, 0, 0, 0]), "counted from 0 on"),
    ],
)
def test_labels_that_do_not_fit(labels: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows())
    np.save(tmp_path / "l.npy", labels)
    assert re.search(message, error_line(tmp_path / "x.npy", tmp_path / "l.npy"))


ANONYMOUS = """
import json, sys, threading
from pathlib import Path
from iic_dist.data.features import load_features

def anonymous():
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon")) / 1024

peak, done = [0.0], threading.Event()
def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], anonymous())
before = anonymous()
thread = threading.Thread(target=watch); thread.start()
found = load_features(Path(sys.argv[1]))
rows = found.features[::1000].float().sum()
done.set(); thread.join()
print(json.dumps([before, peak[0], len(found)]))
"""


def test_a_large_file_stays_mapped(tmp_path: Path) -> None:
    """768 MB of features take some blocks of 64 MiB, not 768 MB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not say how much memory is a process's own")
    array = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float16, shape=(1_000_000, 384))
    array[::997] = 1
    array.flush()
    done = subprocess.run(
        [sys.executable, "-c", ANONYMOUS, str(tmp_path / "x.npy")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-1000:]
    before, peak, count = json.loads(done.stdout)
    assert count == 1_000_000
    assert peak - before < 300, f"MiB: {before} before, {peak} at most"


def test_kept_features_come_back_and_damage_is_found(tmp_path: Path) -> None:
    chunks = [
        Embedded(torch.arange(6.0).view(2, 3), ["a", "b"], [("bad", "why")]),
        Embedded(torch.empty(0, 3), [], []),
        Embedded(torch.full((1, 3), 7.5), ["c"], []),
    ]
    path = tmp_path / "kept"
    with path.open("w+b") as file:
        write_features(file, "source", 3, torch.float16, chunks)
        features, contents = cache.read(file, "source", verify=True)
    assert features.dtype == torch.float16
    assert torch.equal(features, torch.tensor([[0, 1, 2], [3, 4, 5], [7.5, 7.5, 7.5]]).half())
    assert (contents.paths, contents.malformed, contents.dtype) == (["a", "b", "c"], [["bad", "why"]], "float16")
    good = path.read_bytes()
    for damaged in (good[:-1], good[1:], bytes([good[0] ^ 1]) + good[1:], good[:20] + good[21:]):
        path.write_bytes(damaged)
        with path.open("rb") as file, pytest.raises(cache.Unusable):
            cache.read(file, "source", verify=True)
    path.write_bytes(good)
    with path.open("rb") as file, pytest.raises(cache.Unusable, match="other files"):
        cache.read(file, "another source", verify=True)
