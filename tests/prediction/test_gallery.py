"""The page that shows the clusters: what it chooses, that names cannot harm it, its size."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cdist
from small_runs import ODD_NAMES, made_up, write_odd_names

from iic_dist.prediction import gallery
from iic_dist.prediction.folder import FolderPrediction
from iic_dist.wording import printable


class Page(html.parser.HTMLParser):
    """The tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data

    def named(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.tags if name == tag]


def odd_folder(tmp_path: Path, num_clusters: int = 3) -> FolderPrediction:
    write_odd_names(tmp_path)
    paths = sorted(path.name for path in tmp_path.iterdir())
    clusters = torch.arange(len(paths)) % (num_clusters - 1)  # the last one stays empty
    return FolderPrediction(tmp_path, paths, made_up(clusters, num_clusters), [("bad.png", "not an image")])


def test_typical_and_doubtful_images() -> None:
    prediction = made_up(torch.zeros(50, dtype=torch.int64), 1)
    members = torch.arange(10, 50)
    typical, doubtful = gallery.shown(prediction, members, 6)
    middle = prediction.embeddings[members].mean(0, keepdim=True)
    distances = cdist(prediction.embeddings[members].double(), middle.double(), "cosine")[:, 0]
    assert typical == [10 + int(i) for i in distances.argsort()[:6]]
    rest = [i for i in members.tolist() if i not in typical]
    assert doubtful == sorted(rest, key=lambda i: float(prediction.confidence[i]))[:6]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_small_cluster_shows_each_image_once(size: int) -> None:
    prediction = made_up(torch.zeros(size, dtype=torch.int64), 1)
    typical, doubtful = gallery.shown(prediction, torch.arange(size), 12)
    assert sorted(typical + doubtful) == list(range(size))
    assert typical


def test_alike_clusters_stand_next_to_each_other() -> None:
    """Six clusters in three pairs: 0 and 3, 1 and 4, 2 and 5."""
    directions = torch.eye(3).repeat(2, 1) + 0.05 * torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    clusters = torch.arange(6).repeat(4)
    order = gallery.by_likeness(replace(made_up(clusters, 6), embeddings=directions[clusters]))
    assert sorted(order) == list(range(6))
    assert {frozenset(order[i : i + 2]) for i in (0, 2, 4)} == {frozenset((k, k + 3)) for k in range(3)}


def test_clusters_without_direction_do_not_break_the_order() -> None:
    clusters = torch.arange(5)
    order = gallery.by_likeness(replace(made_up(clusters, 5), embeddings=torch.zeros(5, 4)))
    assert sorted(order) == list(range(5))


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    """File names and names of clusters alike, in attributes, in text and in what the script reads."""
    found = odd_folder(tmp_path)
    typed = "</script><script>alert(1)</script>\"><img src=x onerror=alert(1)>' <!-- {{ 7 * 7 }}"
    text = gallery.page(found, torch.ones(len(found.paths)), 3, {0: typed, 2: "]]>"})
    text.encode("utf-8")  # also the name that is not UTF-8
    page = Page(text)
    assert {tag for tag, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "header", "main", "nav", "section", "div", "span", "b"),
        *("h1", "h2", "h3", "p", "ul", "li", "a", "figure", "figcaption", "img", "button", "input", "label"),
        *("noscript", "script"),
    }
    images = page.named("img")
    assert len(images) == len(ODD_NAMES)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    names = {image["alt"].split(": ", 1)[1] for image in images}
    assert names == {printable(os.fsdecode(name)) for name in ODD_NAMES}
    assert "{{ 7 * 7 }}" in text
    assert "Without images: 2." in text
    assert "1 file could not be read" in text
    assert len(page.scripts) == 3  # what is known of the clusters, of the nearest images, and the page's own
    assert json.loads(page.scripts[0])["names"] == {"0": typed, "2": "]]>"}
    [first, second] = [field["value"] for field in page.named("input") if field.get("class") == "name"]
    assert {first, second} == {typed, ""}


def test_it_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    found = odd_folder(tmp_path)
    page = Page(gallery.page(found, torch.ones(len(found.paths)), 3, {}))
    assert all(image["src"].startswith("data:image/") for image in page.named("img"))
    assert not any("src" in script for script in page.named("script"))
    assert all(link["href"].startswith("#") for link in page.named("a"))
    targets = {section["id"] for section in page.named("section")}
    assert {link["href"][1:] for link in page.named("a")} == targets == {"cluster-0", "cluster-1"}
    [policy] = [meta["content"] for meta in page.named("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; img-src data:;")
    digest = base64.b64encode(hashlib.sha256(page.scripts[2].encode()).digest()).decode()
    assert policy.endswith(f"script-src 'sha256-{digest}'")  # this script and no other


def test_nearest_images_are_on_the_page(tmp_path: Path) -> None:
    """30 images of 100 are shown, and in the rest of the room the nearest ones of these that are not."""
    for number in range(100):
        Image.effect_noise((9, 9), 20 + number).save(tmp_path / f"{number:03}.png")
    clusters = torch.arange(100) % 5
    found = FolderPrediction(tmp_path, [f"{number:03}.png" for number in range(100)], made_up(clusters, 5), [])
    room = 40
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "_MOST", 3)
        patch.setattr(gallery, "MAX_THUMBNAILS", 30 + room)
        page = Page(gallery.page(found, torch.ones(100), 5, {}))
    around = json.loads(page.scripts[1])
    shown = [image["title"] for image in page.named("img")]
    assert [int(button["data-place"]) for button in page.named("button") if "data-place" in button] == list(range(30))
    assert (len(shown), len(around["further"]), around["images"]) == (30, room, 100)
    paths = shown + [path for _, path, *_ in around["further"]]
    assert len(set(paths)) == 70
    assert all(source.startswith("data:image/png;") for source, *_ in around["further"])
    assert all(cluster == int(path[:3]) % 5 for _, path, cluster, *_ in around["further"])
    centred = (embeddings := found.prediction.embeddings.double()) - embeddings.mean(0)
    distances = cdist(centred, centred, "cosine")
    for path, row, exact in zip(shown, around["nearest"], around["exact"], strict=True):
        places, cosines = row[::2], row[1::2]
        order = [other for other in distances[int(path[:3])].argsort(kind="stable") if other != int(path[:3])]
        assert [int(paths[place][:3]) for place in places[:exact]] == order[:exact]
        assert cosines == [
            pytest.approx(1 - distances[int(path[:3]), int(paths[place][:3])], abs=0.0051) for place in places
        ]
        assert cosines == sorted(cosines, reverse=True)
        assert len(places) == 12
        assert exact >= 1


def test_pages_of_other_clusters_or_names_are_told_apart(tmp_path: Path) -> None:
    """A browser keeps names by this key: those of another run's clusters must not turn up."""
    found = odd_folder(tmp_path)

    def key(found: FolderPrediction, names: dict[int, str]) -> str:
        return json.loads(Page(gallery.page(found, torch.ones(len(found.paths)), 3, names)).scripts[0])["key"]

    other = replace(found, prediction=replace(found.prediction, clusters=1 - found.prediction.clusters))
    keys = [key(found, {}), key(found, {0: "a"}), key(other, {})]
    assert len(set(keys)) == 3
    assert key(found, {}) == keys[0]


@pytest.mark.parametrize(("num_clusters", "most"), [(10, 24), (200, 6), pytest.param(1000, 2, marks=pytest.mark.slow)])
def test_the_page_is_bounded_for_100_000_images(
    num_clusters: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise of 96 pixels compresses worst."""
    Image.effect_noise((96, 96), 255).convert("RGB").save(tmp_path / "noise.png")
    largest = gallery.thumbnail(tmp_path / "noise.png")
    monkeypatch.setattr(gallery, "thumbnail", lambda path, **reading: largest)
    clusters = torch.arange(100_000) % num_clusters
    paths = [f"images/{number:06}.png" for number in range(100_000)]
    found = FolderPrediction(tmp_path, paths, made_up(clusters, num_clusters), [])
    names = dict.fromkeys(range(num_clusters), "n" * 120)
    text = gallery.page(found, torch.ones(100_000), num_clusters, names)
    assert text.count("<img ") == most * num_clusters
    assert text.count("data:image/") == max(gallery.MAX_THUMBNAILS, 2 * num_clusters)
    assert len(text) < 24e6


def test_thumbnails(tmp_path: Path) -> None:
    Image.effect_noise((300, 200), 60).save(tmp_path / "large.png")
    Image.effect_noise((20, 31), 60).save(tmp_path / "small.png")
    large, side = gallery.thumbnail(tmp_path / "large.png")
    assert (side, large[:22]) == (96, "data:image/jpeg;base64")
    small, side = gallery.thumbnail(tmp_path / "small.png")
    assert (side, small[:21]) == (20, "data:image/png;base64")
