"""The gallery in a real browser, by typing and clicking: naming clusters, names.csv, the nearest images, its looks."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, NO_CHROMIUM, Browser, browser
from PIL import Image
from scipy.spatial.distance import cdist
from small_runs import ODD_NAMES, made_up, write_odd_names

from iic_dist import predict
from iic_dist.prediction import gallery
from iic_dist.prediction.folder import FolderPrediction
from iic_dist.prediction.names import plain, read_names

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)

HOSTILE = "</b><img src=x onerror=\"window.hurt=1\">, 'x' {{ 7 * 7 }}"
NO_STORAGE = (
    "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } });"
)
TEXTS = "[...document.querySelectorAll('{}')].map(each => each.textContent)"
VALUES = "[...document.querySelectorAll('input.name')].map(each => each.value)"
FOCUS = "document.activeElement.id || document.activeElement.dataset.cluster || document.activeElement.dataset.place"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def tab(chromium: Browser) -> Iterator[Browser]:
    """The browser, on a desktop; at the end the page must have had no complaint and asked for itself alone."""
    chromium.show(1200, 900)
    chromium.problems.clear()
    chromium.requests.clear()
    yield chromium
    assert chromium.problems == []
    assert all(address.startswith("file://") and address.endswith(".html") for address in chromium.requests)
    chromium.run("localStorage.clear()")


@pytest.fixture(scope="module")
def digits(gray_images: Path) -> FolderPrediction:
    """The 90 gray digits in three clusters, with features that have nothing to do with them."""
    paths = sorted(path.relative_to(gray_images).as_posix() for path in gray_images.rglob("*.png"))
    return FolderPrediction(gray_images, paths, made_up(torch.arange(90) % 3, 3), [])


def write(path: Path, found: FolderPrediction, names: dict[int, str] | None = None) -> str:
    gallery.write(path, found, torch.ones(len(found.paths)), found.prediction.probabilities.shape[1], names)
    return f"file://{path}"


def field(cluster: int) -> str:
    return f'input.name[data-cluster="{cluster}"]'


def test_from_typing_to_folders_and_back(
    tab: Browser, gray_run: Path, gray_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way: predict, look, type names, save, predict with them, look again, load them into a fresh page."""

    def call(*arguments: object) -> None:
        common = ["--run", gray_run, "--images", gray_images, "--device", "cpu", "--no-progress"]
        monkeypatch.setattr(sys, "argv", ["predict", *map(str, [*common, *arguments])])
        predict.main()

    call("--gallery", tmp_path / "first.html")
    tab.open(f"file://{tmp_path / 'first.html'}")
    order = [int(cluster) for cluster in tab.run("[...fields.keys()]")]
    assert tab.run("document.getElementById('count').textContent") == "0 of 3 named"
    tab.click("#save")
    assert tab.run("document.getElementById('status').textContent").startswith("No cluster has a name yet")
    tab.click(field(order[0]))
    for text in ('  round, "0" ', "one", 'round, "0"'):
        tab.type(text)
        tab.press("Enter")  # on to the next cluster
    assert tab.run(FOCUS) == "save"
    assert tab.run("document.getElementById('status').textContent") == ""  # and not saved by the same key
    typed = dict(zip(order, ('round, "0"', "one", 'round, "0"'), strict=True))
    assert tab.run("document.getElementById('count').textContent") == "3 of 3 named, 2 names"
    assert tab.run(TEXTS.format("nav b")) == [typed[cluster] for cluster in order]
    notes = tab.run(TEXTS.format("p.note:not([hidden])"))
    assert notes == [f"The same name as cluster {order[i]}: with these names they become one." for i in (2, 0)]
    with tab.download(tmp_path):
        tab.press("Enter")
    saved = (tmp_path / "names.csv").read_bytes()
    quoted = {'round, "0"': '"round, ""0"""', "one": "one"}
    lines = ["cluster,name", *(f"{cluster},{quoted[typed[cluster]]}" for cluster in range(3))]
    assert saved == "".join(line + "\r\n" for line in lines).encode()

    outputs = ["--output", tmp_path / "c.csv", "--link-to", tmp_path / "sorted", "--gallery", tmp_path / "second.html"]
    call("--names", tmp_path / "names.csv", *outputs)
    with (tmp_path / "c.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all(row["name"] == typed[int(row["cluster"])] for row in rows)
    assert sorted(path.name for path in (tmp_path / "sorted").iterdir()) == ["one", "round, _0_"]
    for row in rows:
        assert (tmp_path / "sorted" / row["name"].replace('"', "_") / row["path"]).is_symlink()

    tab.open(f"file://{tmp_path / 'second.html'}")
    assert tab.run(VALUES) == [typed[cluster] for cluster in order]
    assert len(tab.run(TEXTS.format("p.note:not([hidden])"))) == 2
    tab.open(f"file://{tmp_path / 'first.html'}")
    assert tab.run(VALUES) == [typed[cluster] for cluster in order]  # the browser kept them
    tab.run("localStorage.clear()")
    tab.open(f"file://{tmp_path / 'first.html'}")
    assert tab.run(VALUES) == ["", "", ""]
    tab.choose("#load", tmp_path / "names.csv")
    assert tab.until("document.getElementById('status').textContent") == "3 names loaded from names.csv."
    assert tab.run(VALUES) == [typed[cluster] for cluster in order]
    (tmp_path / "names.csv").rename(tmp_path / "before.csv")
    with tab.download(tmp_path):
        tab.click("#save")
    assert (tmp_path / "names.csv").read_bytes() == saved


def test_names_that_were_given_win_over_none(tab: Browser, digits: FolderPrediction, tmp_path: Path) -> None:
    """A name may be taken away; what is kept is that there is none, and clusters without images keep theirs."""
    found = FolderPrediction(digits.root, digits.paths, made_up(torch.arange(90) % 3, 5), [])
    tab.open(page := write(tmp_path / "g.html", found, {0: "a", 1: "b", 4: "no image here"}))
    tab.click(field(0))
    tab.run("document.activeElement.select()")
    tab.type(" ")
    tab.open(page)
    assert sorted(tab.run(VALUES)) == ["", "", "b"]
    with tab.download(tmp_path):
        tab.click("#save")
    assert read_names(tmp_path / "names.csv", 5) == {1: "b", 4: "no image here"}


def test_a_browser_that_keeps_nothing(chromium: Browser, digits: FolderPrediction, tmp_path: Path) -> None:
    script = chromium.call("Page.addScriptToEvaluateOnNewDocument", source=NO_STORAGE)["identifier"]
    try:
        chromium.problems.clear()
        chromium.open(write(tmp_path / "g.html", digits))
        chromium.click(field(1))
        chromium.type("horse")
        assert "keeps no names" in chromium.run("document.getElementById('status').textContent")
        with chromium.download(tmp_path):
            chromium.click("#save")
        assert read_names(tmp_path / "names.csv", 3) == {1: "horse"}
        assert chromium.problems == []
    finally:
        chromium.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "its first line must be cluster,name"),
        (b"cluster;name\r\n0;a\r\n", "its first line must be cluster,name, and is cluster;name."),
        (b"cluster,name\r\n0,a\r\n3,b\r\n", "there is no cluster 3; they are 0 to 2."),
        (b"cluster,name\r\n0,a\r\nx,b\r\n", "there is no cluster x;"),
        (b"cluster,name\r\n0,a\r\n0,b\r\n", "cluster 0 is named twice."),
        (b"cluster,name\r\n0,caf\xe9\r\n", "it is not UTF-8."),
        (b'cluster,name\r\n0,"a"b\r\n', "record 2 is not CSV."),
    ],
)
def test_a_bad_file_changes_nothing(
    content: bytes, says: str, tab: Browser, digits: FolderPrediction, tmp_path: Path
) -> None:
    (tmp_path / "bad.csv").write_bytes(content)
    tab.open(write(tmp_path / "g.html", digits, {0: "zebra"}))
    tab.choose("#load", tmp_path / "bad.csv")
    status = tab.until("document.getElementById('status').textContent")
    assert status.startswith("bad.csv was not loaded: ")
    assert says in status
    assert sorted(tab.run(VALUES)) == ["", "", "zebra"]


def test_the_page_reads_what_python_writes(tab: Browser, digits: FolderPrediction, tmp_path: Path) -> None:
    """Python's own writer, every way of quoting and of ending lines, a mark of byte order, and columns in any order."""
    names = {0: 'a "b", c', 1: "日本 ü\u00a0x", 2: "line\nfeed"}
    tab.open(write(tmp_path / "g.html", digits))
    for end, quoting, start in (("\n", csv.QUOTE_ALL, ""), ("\r\n", csv.QUOTE_MINIMAL, "\ufeff"), ("\r", 1, "")):
        with (tmp_path / "names.csv").open("w", newline="", encoding="utf-8") as file:
            file.write(start)
            writer = csv.writer(file, lineterminator=end, quoting=quoting)
            writer.writerows([("note", "name", "cluster"), *(("-", name, number) for number, name in names.items())])
        tab.run("for (const f of fields.values()) f.value = ''; names.clear(); say('')")
        tab.choose("#load", tmp_path / "names.csv")
        assert tab.until("document.getElementById('status').textContent") == "3 names loaded from names.csv."
        assert tab.run("[0, 1, 2].map(cluster => names.get(cluster))") == [plain(names[number]) for number in range(3)]
        assert read_names(tmp_path / "names.csv", 3) == {number: plain(name) for number, name in names.items()}


def test_page_and_python_agree_on_what_is_one_name(tab: Browser, digits: FolderPrediction, tmp_path: Path) -> None:
    tab.open(write(tmp_path / "g.html", digits))
    texts = [f" a{chr(code)}{chr(code)} b{chr(code)}" for code in (*range(0x3100), *range(0xFE00, 0x10000), 0x1F993)]
    assert tab.run(f"{json.dumps(texts)}.map(plain)") == [plain(text) for text in texts]


def test_hostile_names_do_nothing(tab: Browser, tmp_path: Path) -> None:
    """File names and a typed name that would run a script, were any of them taken for HTML."""
    images = write_odd_names(tmp_path)
    paths = sorted(path.name for path in images.iterdir())
    found = FolderPrediction(images, paths, made_up(torch.arange(len(paths)) % 2, 2), [])
    page = write(tmp_path / "g.html", found, {0: HOSTILE})
    tab.open(page)
    for field_ in (0, 1):
        tab.run(f"document.querySelector('{field(field_)}').value = ''")
        tab.click(field(field_))
        tab.type(HOSTILE)
    for place in range(len(ODD_NAMES)):
        tab.click(f'.picture[data-place="{place}"]')
        path = tab.run(f"document.querySelector('.picture[data-place=\"{place}\"] img').title")
        assert tab.run("document.getElementById('strip-title').textContent") == f"Nearest to {path}"
        labels = tab.run(TEXTS.format("#strip a"))
        assert sorted(set(labels)) == [f"0 {HOSTILE}", f"1 {HOSTILE}"]
    assert tab.run(TEXTS.format("nav b")) == [HOSTILE, HOSTILE]
    assert tab.run("[typeof window.hurt, document.scripts.length, document.querySelectorAll('img[src=x]').length]") == [
        *("undefined", 3, 0)
    ]
    with tab.download(tmp_path):
        tab.click("#save")
    assert read_names(tmp_path / "names.csv", 2) == {0: HOSTILE, 1: HOSTILE}


def test_a_click_shows_the_nearest_images(tab: Browser, digits: FolderPrediction, tmp_path: Path) -> None:
    tab.open(write(tmp_path / "g.html", digits))
    centred = (embeddings := digits.prediction.embeddings.double()) - embeddings.mean(0)
    distances = cdist(centred, centred, "cosine")
    for section in (1, 3):
        button = f"section:nth-of-type({section}) .grid:last-of-type li:nth-child(4) .picture"
        tab.click(button)
        path = tab.run(f"document.querySelector('{button} img').title")
        assert tab.run(TEXTS.format("#strip h4")) == [f"Nearest to {path}"]
        order = [other for other in distances[digits.paths.index(path)].argsort() if digits.paths[other] != path][:12]
        seen = tab.run("[...document.querySelectorAll('#strip img')].map(each => each.title)")
        assert seen == [digits.paths[other] for other in order]
        own = digits.paths.index(path) % 3
        assert tab.run(TEXTS.format("#strip figcaption")) == [
            f"{1 - distances[digits.paths.index(path), other]:.2f} cluster {other % 3}" for other in order
        ]
        others = tab.run(TEXTS.format("#strip a.other"))
        assert others == [f"cluster {other % 3}" for other in order if other % 3 != own]
        assert "The nearest of all 90 images" in tab.run(TEXTS.format("#strip p"))[0]
        tab.until("[...document.querySelectorAll('#strip img')].every(each => each.naturalWidth > 0)")
        assert tab.run("document.querySelectorAll('[aria-expanded=true]').length") == 1  # one strip at a time
        below = f"document.querySelector('{button}').getBoundingClientRect().bottom"
        assert tab.run(f"document.getElementById('strip').getBoundingClientRect().top >= {below}")
    tab.click(button)  # once more closes it
    assert tab.run("document.getElementById('strip') === null && !document.querySelector('[aria-expanded=true]')")


def test_the_strip_says_what_is_exact(tab: Browser, digits: FolderPrediction, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "MAX_THUMBNAILS", 40)  # of 90; 36 are shown
        patch.setattr(gallery, "_MOST", 6)
        tab.open(write(tmp_path / "some.html", digits))
        patch.setattr(gallery, "MAX_THUMBNAILS", 36)
        page = write(tmp_path / "none.html", digits)
    exact = tab.run("JSON.parse(document.getElementById('surroundings').textContent).exact")
    place = next(i for i, number in enumerate(exact) if 0 < number < 12)
    tab.click(f'.picture[data-place="{place}"]')
    assert f"The first {exact[place]} are the nearest of all 90 images" in tab.run(TEXTS.format("#strip p"))[0]
    assert tab.run("document.querySelectorAll('#strip .rest').length") == 12 - exact[place]
    tab.open(page)
    tab.click('.picture[data-place="0"]')
    assert "The nearest of the images on this page" in tab.run(TEXTS.format("#strip p"))[0]


def test_keys_alone(tab: Browser, digits: FolderPrediction, tmp_path: Path) -> None:
    """Tab goes from grid to grid, arrows from image to image, Enter or a blank opens, Escape closes and goes back."""
    tab.open(write(tmp_path / "g.html", digits))
    tab.run("document.querySelector('input.name').focus()")
    tab.press("Tab")
    assert tab.run(FOCUS) == "0"
    for key, place in (("ArrowRight", "1"), ("ArrowRight", "2"), ("ArrowLeft", "1"), ("End", "11"), ("Home", "0")):
        tab.press(key)
        assert tab.run(FOCUS) == place, key
    tab.press("ArrowLeft")  # there is nothing
    assert tab.run(FOCUS) == "0"
    tab.press("Enter")
    assert tab.run("document.querySelectorAll('#strip img').length") == 12
    tab.press("ArrowRight")
    tab.press(" ")
    assert tab.run("opened.dataset.place") == "1"
    tab.press("Tab")
    assert tab.run("document.activeElement.textContent") == "Close"
    tab.press("Escape")
    assert tab.run(FOCUS) == "1"
    assert tab.run("document.getElementById('strip')") is None
    tab.press("Tab")
    assert tab.run(FOCUS) == "12"  # the doubtful ones
    tab.show(360, 800)
    tab.press("ArrowDown")  # four in a row there
    assert tab.run(FOCUS) == "16"
    assert tab.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_all_that_can_be_used_has_a_name(tab: Browser, digits: FolderPrediction, tmp_path: Path) -> None:
    """What a screen reader is told, from the browser's own tree of accessibility."""
    tab.open(write(tmp_path / "g.html", digits))
    tab.click('.picture[data-place="5"]')
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    told: dict[str, list[str]] = {}
    for node in nodes:
        if not node["ignored"]:
            told.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    assert all(name for role in ("button", "textbox", "link", "image") for name in told[role])
    assert {f"Name of cluster {number}" for number in range(3)} <= set(told["textbox"])
    assert {"Save names", "Close"} <= set(told["button"])
    assert any("Load names" in name for names in told.values() for name in names)
    title = tab.run("document.getElementById('strip-title').textContent")
    assert title in told["region"]
    assert "status" in told


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1200, 360])
def test_looks(width: int, dark: bool, tab: Browser, gray_images: Path, tmp_path: Path) -> None:
    images = tmp_path / "a-folder-with-a-name-that-is-long-and-has-no-place-to-break-it-anywhere"
    images.mkdir()
    for path in gray_images.rglob("*.png"):  # the names are wider than an image
        shutil.copy(path, images / f"{path.parent.name}-a-name-that-is-long-and-has-no-place-to-break-{path.name}")
    paths = sorted(path.name for path in images.iterdir())
    found = FolderPrediction(images, paths, made_up(torch.tensor([int(path[0]) for path in paths]), 3), [])
    tab.show(width, 900, dark)
    tab.open(write(tmp_path / "page.html", found, {0: "m" * 120, 1: "m" * 120, 2: "word " * 24}))
    tab.click('.picture[data-place="30"]')
    loaded = tab.run("[...document.images].filter(each => each.complete && each.naturalWidth > 0).length")
    assert loaded == tab.run("document.images.length") == 72 + 12
    assert tab.run("innerWidth") == width
    assert tab.run("document.documentElement.scrollWidth") <= width  # nothing sticks out at the side
    tops = "[...document.images].slice(0, 8).map(each => each.getBoundingClientRect().top)"
    assert len(set(tab.run(tops))) == (1 if width == 1200 else 2)
    page = tab.run("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, page.removeprefix("rgb(").removesuffix(")").split(",")))
    assert (light < 150) is dark
    tab.run("scrollTo(0, 0)")
    tab.screenshot(tmp_path / "page.png")
    colours = Image.open(tmp_path / "page.png").convert("RGB").getcolors(1 << 20)
    assert colours is not None
    assert len(colours) > 50  # letters and digits, not a blank or an error page


def test_a_page_of_one_image(tab: Browser, gray_images: Path, tmp_path: Path) -> None:
    only = next(gray_images.rglob("*.png"))
    found = FolderPrediction(only.parent, [only.name], made_up(torch.tensor([0]), 1), [])
    tab.open(write(tmp_path / "g.html", found))
    tab.click(".picture")
    assert tab.run(TEXTS.format("#strip p")) == ["There is no other image."]
