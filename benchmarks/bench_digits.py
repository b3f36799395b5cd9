"""What restarts of stuck sub-heads, several K, and a prior of the cluster sizes change on digits, over seeds.

    python benchmarks/bench_digits.py restarts|choose|prior [--seeds 10] [--output FILE.json] [--GROUP.FIELD VALUE ...]

Each training is one process with one thread. `prior` trains on a folder of PNGs with classes of unequal size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CASES = {
    "restarts": {"never": ["--train.restart_after", "0"], "after 15": ["--train.restart_after", "15"]},
    "choose": {"5 to 20": ["--model.num_clusters", "5,8,10,12,20"]},
    "prior": {
        "uniform": ["--loss.prior", "uniform"],
        "free": ["--loss.prior", "free"],
        "file": ["--loss.prior", "sizes.txt"],
    },
}
ONE_TO_TEN = [round(174 * 10 ** (-digit / 9)) for digit in range(10)]
"""Images of each digit in the unbalanced folder: from 174 zeros down to 17 nines."""


def write_unbalanced(folder: Path) -> list[str]:
    """Write the first images of each digit as PNGs, one sub-folder a class; return the options that train on them."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for digit, count in enumerate(ONE_TO_TEN):
        (folder / "images" / str(digit)).mkdir(parents=True)
        for number, image in enumerate(digits.images[digits.target == digit][:count]):
            pixels = np.round(image * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / str(digit) / f"{number}.png")
    (folder / "sizes.txt").write_text("\n".join(map(str, ONE_TO_TEN)) + "\n")
    # 150 epochs of 5 steps are nearly the 840 steps of 60 epochs of all 1797 images.
    data = ["--data.name", "folder:images", "--data.folder_labels", "true", "--data.image_size", "8"]
    return [*data, "--model.num_clusters", "10", "--train.epochs", "150"]


def train(folder: Path, name: str, seed: int, options: list[str]) -> dict[str, Any]:
    """Train once; return result.json."""
    quiet = ["--monitor.progress", "false", "--monitor.kmeans", "false", "--train.evaluate_every", "0"]
    place = ["--run.name", name, "--run.seed", str(seed), "--run.threads", "1", "--run.device", "cpu"]
    command = [sys.executable, "-m", "iic_dist.train", *quiet, *place, *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads((folder / "runs" / name / "result.json").read_text())
    return result


def line(case: str, seed: int, result: dict[str, Any]) -> str:
    """Say what one training came to."""
    accuracy = result["accuracy"]
    choices = ", ".join(
        f"K={each['num_clusters']} {each['agreement'] or float('nan'):.3f}±{each['agreement_error'] or 0:.3f}"
        for each in result["choices"]
    )
    sizes = next(each["sizes"] for each in result["choices"] if each["recommended"])
    return (
        f"{case:10s} seed {seed}: selected {accuracy['selected']:.4f}, mean {accuracy['mean']:.4f} ± "
        f"{accuracy['std']:.4f}, best {accuracy['best']:.4f}, NMI {result['nmi']:.4f}, ARI {result['ari']:.4f}, "
        f"K = {result['num_clusters']} of [{choices}], sizes {sizes}"
    )


def main() -> None:
    """Train all cases of an experiment over all seeds; print a line each, then the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=CASES)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--output", type=Path)
    asked, rest = parser.parse_known_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shared = write_unbalanced(folder) if asked.experiment == "prior" else []
        for seed in range(asked.seeds):
            for number, (case, options) in enumerate(CASES[asked.experiment].items()):
                result = train(folder, f"{number}-{seed}", seed, [*shared, *options, *rest])
                results.append({"case": case, **result})
                print(line(case, seed, result), flush=True)
    for case in CASES[asked.experiment]:
        accuracies = [result["accuracy"] for result in results if result["case"] == case]
        means = (f"{key} {np.mean([each[key] for each in accuracies]):.4f}" for key in ("selected", "mean", "std"))
        print(f"{case:10s} mean of {len(accuracies)} seeds: {', '.join(means)}")
    if asked.output:
        asked.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
