"""Clusterings of the same features side by side: accuracy, NMI, ARI, how far seeds agree, and CPU seconds.

    python benchmarks/bench_clusters.py [NAME=FILE.npz ...] [--seeds 5] [--methods ours,k-means] [--output FILE.json]

A file holds features `x` (N, F) and labels `y` (N,), or `features` and `labels`; scikit-learn's digits, wine and breast
cancer (columns scaled) come without a file: digits=, wine=, cancer=. Labels are used for the figures alone. SCAN and
TEMI are the losses of these papers on linear heads, with 20 neighbours, 600 steps and 8 heads, of which that of lowest
loss counts. UMAP needs the package umap-learn; without it its row says so.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import provenance
import torch
from sklearn import datasets
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor
from torch.nn import functional

from iic_dist import IICClustering
from iic_dist.evaluation.metrics import accuracy
from iic_dist.ops.nearest import nearest

NEIGHBOURS, HEADS, STEPS, BATCH = 20, 8, 600, 1024


def directions(x: np.ndarray) -> Tensor:
    """Return features from their mean, of length 1, (N, F) float32."""
    return functional.normalize(torch.from_numpy(x - x.mean(0, keepdims=True)).float(), dim=1)


def k_means(x: np.ndarray, k: int, seed: int) -> np.ndarray:
    """k-means of ten starts on the features as they are."""
    return KMeans(k, n_init=10, random_state=seed).fit_predict(x)


def spherical_k_means(x: np.ndarray, k: int, seed: int) -> np.ndarray:
    """k-means of ten starts on directions, with centres that are directions (Dhillon and Modha, 2001)."""
    z, best = directions(x), (-math.inf, np.zeros(len(x), np.int64))
    for start in range(10):
        first = KMeans(k, n_init=1, max_iter=1, random_state=10 * seed + start).fit(z.numpy())
        centres = torch.from_numpy(first.cluster_centers_).float()
        for _ in range(100):
            scores, clusters = (z @ functional.normalize(centres, dim=1).T).max(1)
            sums = torch.zeros(k, z.shape[1]).index_add_(0, clusters, z)
            if torch.allclose(sums, centres):
                break
            centres = sums
        best = max(best, (float(scores.sum()), clusters.numpy()), key=lambda found: found[0])
    return best[1]


def umap_k_means(x: np.ndarray, k: int, seed: int) -> np.ndarray:
    """UMAP of directions to ten dimensions, 15 neighbours, then k-means of ten starts."""
    import umap

    embedding = umap.UMAP(n_neighbors=15, n_components=10, min_dist=0.0, random_state=seed, n_jobs=1)
    return KMeans(k, n_init=10, random_state=seed).fit_predict(embedding.fit_transform(directions(x).numpy()))


def ours(x: np.ndarray, k: int, seed: int) -> np.ndarray:
    """`IICClustering` with its defaults."""
    return IICClustering(k, random_state=seed).fit(x.astype(np.float32)).labels_


def scan_loss(first: Tensor, second: Tensor) -> Tensor:
    """-mean log <p, p'> - 5 H(mean p), of logits (B, H, K), (H,); Van Gansbeke et al., arXiv:2005.12320, equation 2."""
    p, q = first.softmax(2), second.softmax(2)
    mean = p.mean(0)
    return -(p * q).sum(2).clamp_min(1e-8).log().mean(0) + 5 * (mean * mean.clamp_min(1e-8).log()).sum(1)


class Temi:
    """The loss of TEMI, with its teacher and the running marginal; Adaloglou et al., BMVC 2023, beta = 0.6."""

    def __init__(self, heads: torch.nn.Linear, k: int) -> None:
        self.student, self.teacher, self.k = heads, copy.deepcopy(heads).requires_grad_(False), k
        self.marginal = torch.full((HEADS, k), 1 / k)

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the loss of each head for vectors (B, D) of both ends, (H,)."""
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                old.lerp_(new, 1 - 0.996)
            t, u = ((self.teacher(z).view(len(z), HEADS, self.k) / 0.1).softmax(2) for z in (first, second))
            self.marginal.lerp_((t.mean(0) + u.mean(0)) / 2, 0.1)
            weight = (t * u).sum(2).mean(1, keepdim=True)
        p, q = ((self.student(z).view(len(z), HEADS, self.k) / 0.1).softmax(2) for z in (first, second))
        both = [
            -(((a * b).clamp_min(1e-12) ** 0.6 / self.marginal).sum(2).log() * weight).mean(0)
            for a, b in ((p, u), (q, t))
        ]
        return (both[0] + both[1]) / 2


def heads_by(loss: str) -> Callable[[np.ndarray, int, int], np.ndarray]:
    """Return a clustering by linear heads on directions, of one of these losses."""

    def cluster(x: np.ndarray, k: int, seed: int) -> np.ndarray:
        torch.manual_seed(seed)
        z = directions(x)
        near = torch.cat([nearest(z[i : i + 1024], i, z, min(NEIGHBOURS, len(z) - 1)) for i in range(0, len(z), 1024)])
        z = 5 * z
        heads = torch.nn.Linear(z.shape[1], HEADS * k)
        temi = Temi(heads, k)

        def value(i: Tensor, j: Tensor) -> Tensor:
            if loss == "TEMI":
                return temi(z[i], z[j])
            return scan_loss(heads(z[i]).view(-1, HEADS, k), heads(z[j]).view(-1, HEADS, k))

        optimizer = torch.optim.AdamW(heads.parameters(), lr=5e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        last = torch.zeros(HEADS)
        for step in range(STEPS):
            i = torch.randperm(len(z))[:BATCH]
            terms = value(i, near[i, torch.randint(near.shape[1], (len(i),))])
            optimizer.zero_grad()
            terms.sum().backward()
            optimizer.step()
            schedule.step()
            if step >= STEPS - 50:
                last += terms.detach()
        with torch.no_grad():
            return heads(z).view(-1, HEADS, k)[:, int(last.argmin())].argmax(1).numpy()

    return cluster


METHODS: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
    "k-means": k_means,
    "spherical k-means": spherical_k_means,
    "UMAP + k-means": umap_k_means,
    "SCAN loss": heads_by("SCAN"),
    "TEMI loss": heads_by("TEMI"),
    "ours": ours,
}


def read(name: str, file: str) -> tuple[np.ndarray, np.ndarray]:
    """Return features (N, F) and classes (N,) from 0 without gaps."""
    if file:
        with np.load(file) as held:
            x, y = (held["x"], held["y"]) if "x" in held else (held["features"], held["labels"])
    else:
        load = {"digits": datasets.load_digits, "wine": datasets.load_wine, "cancer": datasets.load_breast_cancer}
        x, y = load[name](return_X_y=True)
        if name != "digits":
            x = (x - x.mean(0)) / x.std(0)
    return x.astype(np.float32), np.unique(y, return_inverse=True)[1]


def table_of(clusters: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Count images of each cluster and class, (K, C)."""
    counts = np.zeros((max(clusters.max(), y.max()) + 1, y.max() + 1), np.int64)
    np.add.at(counts, (clusters, y), 1)
    return counts


def measure(method: str, x: np.ndarray, y: np.ndarray, seeds: int) -> dict[str, Any]:
    """Cluster once for each seed; return the figures."""
    if method.startswith("UMAP") and importlib.util.find_spec("umap") is None:
        return {"why_not": "umap-learn is not installed"}
    found, seconds = [], []
    for seed in range(seeds):
        started = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(METHODS[method](x, int(y.max()) + 1, seed))
        seconds.append(time.process_time() - started)
    agreement = [adjusted_rand_score(a, b) for a, b in itertools.combinations(found, 2)]
    return {
        "accuracy": [round(float(accuracy(table_of(each, y))), 4) for each in found],
        "nmi": round(float(np.mean([normalized_mutual_info_score(y, each) for each in found])), 4),
        "ari": round(float(np.mean([adjusted_rand_score(y, each) for each in found])), 4),
        "seeds_ari": round(float(np.mean(agreement)), 4) if agreement else None,
        "cpu_seconds": round(float(np.median(seconds)), 1),
    }


def line(name: str, method: str, figures: dict[str, Any]) -> str:
    """Return a row of the table that is printed."""
    if "why_not" in figures:
        return f"| {name} | {method} | {figures['why_not']} | | | | |"
    values = figures["accuracy"]
    spread = f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
    agreement = "-" if figures["seeds_ari"] is None else f"{figures['seeds_ari']:.3f}"
    return (
        f"| {name} | {method} | {spread} | {figures['nmi']:.3f} | {figures['ari']:.3f} | {agreement} "
        f"| {figures['cpu_seconds']:.1f} |"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=["digits=", "wine=", "cancer="], metavar="NAME=FILE.npz")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", default=",".join(METHODS), help="of these: %(default)s")
    parser.add_argument("--output", type=Path, help="JSON file that is written after each row")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"provenance": provenance.of("cpu"), "sets": {}}
    print("| set | method | accuracy, mean and range | NMI | ARI | ARI between seeds | CPU seconds |\n|" + "---|" * 7)
    for name, _, file in (each.partition("=") for each in asked.sets):
        x, y = read(name, file)
        rows = result["sets"].setdefault(name, {"images": len(y), "features": x.shape[1], "classes": int(y.max()) + 1})
        for method in asked.methods.split(","):
            rows[method] = measure(method, x, y, asked.seeds)
            print(line(name, method, rows[method]), flush=True)
            if asked.output:
                asked.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
