"""The page that shows the clusters: what it chooses, that names cannot harm it, its size, its looks in a browser."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cdist
from small_runs import ODD_NAMES, write_odd_names

from iic_dist.prediction import gallery
from iic_dist.prediction.clusterer import Prediction
from iic_dist.prediction.folder import FolderPrediction

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def made_up(clusters: torch.Tensor, num_clusters: int, features: int = 5) -> Prediction:
    """A prediction with embeddings around a direction of each cluster."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(num_clusters, features, generator=generator)
    embeddings = directions[clusters] + 0.3 * torch.randn(len(clusters), features, generator=generator)
    confidence = torch.rand(len(clusters), generator=generator)
    probabilities = torch.full((len(clusters), num_clusters), 1 / num_clusters)
    return Prediction(clusters, confidence, clusters[:, None].repeat(1, 2), probabilities, embeddings, 0)


class Page(html.parser.HTMLParser):
    """The tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

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
    found = odd_folder(tmp_path)
    text = gallery.page(found, torch.ones(len(found.paths)), 3, {})
    text.encode("utf-8")  # also the name that is not UTF-8
    page = Page(text)
    assert {tag for tag, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "header", "main", "nav", "section", "div", "span"),
        *("h1", "h2", "h3", "p", "ul", "li", "a", "figure", "figcaption", "img"),
    }
    images = page.named("img")
    assert len(images) == len(ODD_NAMES)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    names = {image["alt"].split(": ", 1)[1] for image in images}
    assert names == {name.decode("utf-8", "backslashreplace") for name in ODD_NAMES}
    assert "{{ 7 * 7 }}" in text
    assert "Without images: 2." in text
    assert "1 files could not be read" in text


def test_it_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    found = odd_folder(tmp_path)
    page = Page(gallery.page(found, torch.ones(len(found.paths)), 3, {}))
    assert all(image["src"].startswith("data:image/") for image in page.named("img"))
    assert all(link["href"].startswith("#") for link in page.named("a"))
    targets = {section["id"] for section in page.named("section")}
    assert {link["href"][1:] for link in page.named("a")} == targets == {"cluster-0", "cluster-1"}
    [policy] = [meta["content"] for meta in page.named("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; img-src data:;")


@pytest.mark.parametrize(("num_clusters", "most"), [(10, 24), (200, 6), pytest.param(1000, 2, marks=pytest.mark.slow)])
def test_the_page_is_bounded_for_100_000_images(
    num_clusters: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise of 96 pixels compresses worst."""
    Image.effect_noise((96, 96), 255).convert("RGB").save(tmp_path / "noise.png")
    largest = gallery.thumbnail(tmp_path / "noise.png")
    monkeypatch.setattr(gallery, "thumbnail", lambda path: largest)
    clusters = torch.arange(100_000) % num_clusters
    paths = [f"images/{number:06}.png" for number in range(100_000)]
    found = FolderPrediction(tmp_path, paths, made_up(clusters, num_clusters), [])
    text = gallery.page(found, torch.ones(100_000), num_clusters, {})
    assert text.count("<img ") == most * num_clusters <= max(gallery.MAX_THUMBNAILS, 2 * num_clusters)
    assert len(text) < 24e6


def test_thumbnails(tmp_path: Path) -> None:
    Image.effect_noise((300, 200), 60).save(tmp_path / "large.png")
    Image.effect_noise((20, 31), 60).save(tmp_path / "small.png")
    large, side = gallery.thumbnail(tmp_path / "large.png")
    assert (side, large[:22]) == (96, "data:image/jpeg;base64")
    small, side = gallery.thumbnail(tmp_path / "small.png")
    assert (side, small[:21]) == (20, "data:image/png;base64")


PROBE = """<script>
addEventListener("load", () => {
  const images = [...document.images];
  document.body.dataset.probe = JSON.stringify({
    loaded: images.filter(image => image.complete && image.naturalWidth > 0).length,
    images: images.length, scroll: document.documentElement.scrollWidth, width: innerWidth,
    rows: new Set(images.slice(0, 8).map(image => image.getBoundingClientRect().top)).size,
    ink: getComputedStyle(document.body).color, page: getComputedStyle(document.body).backgroundColor,
  });
});
</script>"""


def browse(page: Path, *options: str) -> bytes:
    """Open a page in a headless browser that reaches no network."""
    assert CHROMIUM is not None
    profile = f"--user-data-dir={page.parent / 'profile'}"
    common = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", profile]
    offline = "--host-resolver-rules=MAP * ~NOTFOUND"
    return subprocess.run(
        [*common, offline, *options, f"file://{page}"], capture_output=True, check=True, timeout=120
    ).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian's package chromium) to look at the page with")
@pytest.mark.parametrize("width", [1200, pytest.param(360, marks=pytest.mark.slow)])
def test_a_browser_shows_it(width: int, gray_images: Path, tmp_path: Path) -> None:
    images = tmp_path / "a-folder-with-a-name-that-is-long-and-has-no-place-to-break-it-anywhere"
    images.mkdir()
    for path in gray_images.rglob("*.png"):  # the names are wider than an image
        shutil.copy(path, images / f"{path.parent.name}-a-name-that-is-long-and-has-no-place-to-break-{path.name}")
    paths = sorted(path.name for path in images.iterdir())
    clusters = torch.tensor([int(path[0]) for path in paths])
    found = FolderPrediction(images, paths, made_up(clusters, 3), [])
    text = gallery.page(found, torch.ones(len(paths)), 3, {})
    page = tmp_path / "page.html"
    # The page forbids scripts; the probe gets in by lifting that, and a frame as wide as a phone stands around it,
    # because a headless window cannot be so narrow.
    page.write_text(re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</head>", PROBE + "</head>"))
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="page.html" style="width: {width}px; height: 800px; border: 0"></iframe><script>'
        'const f = document.getElementById("f"); const wait = setInterval(() => {'
        "const probe = f.contentDocument && f.contentDocument.body && f.contentDocument.body.dataset.probe;"
        "if (probe) { document.body.dataset.probe = probe; clearInterval(wait); } }, 50);</script>"
    )
    seen = browse(frame, "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom").decode()
    found_probe = re.search(r'data-probe="([^"]*)"', seen)
    assert found_probe, seen[-2000:]
    probe = json.loads(found_probe[1].replace("&quot;", '"'))
    assert probe["loaded"] == probe["images"] == 72
    assert probe["width"] == width
    assert probe["scroll"] <= width  # nothing sticks out at the side
    assert probe["rows"] == (1 if width == 1200 else 2)
    assert probe["ink"] != probe["page"]
    picture = tmp_path / "page.png"
    browse(page, f"--screenshot={picture}", f"--window-size={max(width, 500)},900")
    colours = Image.open(picture).convert("RGB").getcolors(1 << 20)
    assert colours is not None
    assert len(colours) > 50  # letters and digits, not a blank or an error page
