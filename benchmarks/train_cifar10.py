"""CIFAR-10 from scratch on one GPU, from files, in pieces: the same command goes on where it was stopped.

    python benchmarks/train_cifar10.py --data cifar10-jpeg.tar.xz --seconds 540 --root work [-- --train.epochs 200]

DATA is a folder or a tar archive with `train/CLASS/` and `test/CLASS/` (or CLASS/ alone). After SECONDS the training
is asked to stop, saves, and the exit code is 75; 0 when it has ended, with the run's result.json printed last. The
preset is cifar10; what stands behind `--` are options of `iic_dist.train`.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

UNFINISHED = 75
"""Exit code of a training that is to be gone on with (EX_TEMPFAIL)."""


def unpack(data: Path, root: Path) -> Path:
    """Return a folder with one sub-folder a class, made under `root` where it has to be."""
    classes = root / "cifar10"
    if classes.is_dir():
        return classes
    source = data
    if data.is_file():
        source = root / "unpacked"
        with tarfile.open(data) as archive:
            archive.extractall(source, filter="data")
    splits = [source / name for name in ("train", "test") if (source / name).is_dir()]
    if not splits:
        return source
    unfinished = root / "cifar10.tmp"
    for split in splits:
        for folder in split.iterdir():
            (unfinished / folder.name).mkdir(parents=True, exist_ok=True)
            shutil.copytree(folder, unfinished / folder.name / split.name)
    return unfinished.rename(classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--root", type=Path, required=True, help="folder of the unpacked images and of the run")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="-- --GROUP.FIELD VALUE")
    options = parser.parse_args()
    options.root.mkdir(parents=True, exist_ok=True)
    images = unpack(options.data, options.root)
    command = [sys.executable, "-m", "iic_dist.train", "--config", "cifar10", "--data.name", f"folder:{images}"]
    command += ["--data.folder_labels", "true", "--model.num_clusters", "10", "--data.root", str(options.root / "data")]
    command += ["--run.root", str(options.root / "runs"), "--run.name", "cifar10", "--monitor.progress", "false"]
    command += options.rest[1:] if options.rest[:1] == ["--"] else options.rest
    training = subprocess.Popen(command)
    try:
        code = training.wait(options.seconds)
    except subprocess.TimeoutExpired:
        training.send_signal(signal.SIGTERM)
        code = training.wait()
    run = options.root / "runs" / "cifar10"
    if code == 0 and (run / "PREEMPTED").exists():
        sys.exit(UNFINISHED)
    if code == 0:
        print((run / "result.json").read_text())
    sys.exit(code)


if __name__ == "__main__":
    main()
