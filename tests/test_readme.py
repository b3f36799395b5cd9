"""README.md and docs/ keep their word: commands and Python are run; options, files, links are there; nothing twice.

`make test` runs the commands of `QUICK`; the others take some seconds each and are marked slow. What is changed to
make a command cheap stands in the tables below, and what cannot run here stands there with its reason. The worked
examples of docs/design.md are run by test_design.py.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import write_colours, write_digits

from iic_dist.config import Config

ROOT = Path(__file__).parents[1]
README = "README.md"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / README, *sorted((ROOT / "docs").glob("*.md")))
}
"""Path -> text."""

LONGEST_README = 200

PROGRAMS = ("make", "source", "torchrun", "python", "pip", "tensorboard", "sbatch", "kubectl", "docker", "launch/")
"""A command starts with one of them, after settings of the environment such as RANKS=2."""

NOT_COMMANDS = (
    "digits: 1797 images",
    "accuracy 0.",
    "run: runs/",
    "epoch 60: ",
    "runs/NAME/config.yaml ",
    "folder or named set -> data",
    "doors         train",
)
"""Starts of lines in indented blocks that show output or draw something; the rest of such a block is not looked at."""

TRAINS = "doors/test_commands.py::test_no_argument_clusters_the_digits"
CANNOT_RUN = {
    "make demo": ("installs; then it is this training", TRAINS),
    "make test": ("it is what runs this", None),
    "make demo SEED=1 PYTHON=python3.12": ("wants another interpreter and a network", TRAINS),
    "source .venv/bin/activate": ("make has made it, and a test is not run by make alone", None),
    "make gpu": ("needs a GPU", "benchmarks/test_gpu_run.py::test_without_a_gpu_it_is_one_line"),
    "make bench": ("minutes, of a quiet machine", None),
    "python -m iic_dist.train --config photos --data.name folder:photos --model.num_clusters 10": (
        "wants weights that cannot be fetched here",
        "config/test_frozen.py::test_the_preset_for_photographs_insists",
    ),
    (
        "python -m iic_dist.train --data.name folder:photos --model.num_clusters 10 "
        "--model.backbone timm/tf_efficientnet_lite0 --model.weights tf_efficientnet_lite0.safetensors"
    ): ("wants a file of weights", "config/test_frozen.py::test_a_file_of_weights_needs_no_network"),
    "python -m iic_dist.train --data.name folder:sorted/cluster-3 --data.follow_links true --model.num_clusters 4": (
        "which cluster holds images depends on the run",
        "reliability/test_odd_folders.py::test_a_cluster_is_clustered_again",
    ),
    "pip install pillow-heif": (
        "changes the environment",
        "data/test_formats.py::test_heic_is_read_where_pillow_can",
    ),
    "make lint": ("installs; .ci/run runs it", None),
    "make lint test": ("it is what runs this", None),
    "make test-all": ("it is what runs this", None),
    "pip install -e . --no-build-isolation": (
        "changes the environment; make runs it",
        "test_setup.py::test_none_is_none",
    ),
    "python benchmarks/bench_scaling.py --device cpu": (
        "minutes",
        "benchmarks/test_scaling.py::test_the_fit_finds_the_network_that_the_times_come_from",
    ),
    "HEAD=node0:29400 NODES=2 NODE_RANK=0 launch/multinode.sh --run.name mine --config cifar10": (
        "two machines",
        "launch/test_multinode.py::test_two_agents_are_one_and_one_may_be_lost_and_come_back",
    ),
    "sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 --time=12:00:00 launch/slurm.sbatch --config cifar10": (
        "four nodes with GPUs",
        "launch/test_slurm.py::test_a_preempted_job_on_two_nodes_goes_on",
    ),
    "kubectl apply -f launch/trainjob.yaml": ("a cluster", "launch/test_files.py::test_kubernetes_knows_every_field"),
    "docker build -t iic_dist -f launch/Dockerfile .": (
        "downloads gigabytes",
        "launch/test_files.py::test_the_image_copies_all_that_an_installation_needs",
    ),
}
"""Command -> why it is not run here, and the test that runs what it starts, if there is one."""

CHEAPER = {
    "--nproc_per_node=8": "--nproc_per_node=2",
    "choose --run runs/NAME": "choose --run runs/several",
    "runs/NAME": "runs/digits-1",
}
"""Parts of a command that are replaced: fewer ranks; a run for the word that stands for any."""

OPTIONS = {
    "-m iic_dist.train": "--train.epochs 1 --monitor.progress false --run.threads 1",
    "launch/local.sh": "--train.epochs 1 --monitor.progress false --run.threads 1",
    # No data set is downloaded: these presets get the small images made here.
    "--config cifar10": (
        "--data.name folder:photos --data.batch_size 24 --model.num_clusters 3 --neighbours.steps 5 --refine.epochs 1"
    ),
    "--config fashion-mnist": "--data.name folder:signs --data.batch_size 24 --model.num_clusters 3",
    "features:features.npy": "--train.epochs 0 --neighbours.steps 20",
    "tensorboard": "--port 0",
}
"""Options added to the commands that contain the key."""

SERVERS = ("tensorboard --logdir runs", "launch/tensorboard.sh")
"""Commands that run until they are stopped; they are asked for a page."""

QUICK = (
    "torchrun --nproc_per_node=2 -m iic_dist.train",
    "python -m iic_dist.evaluate --run runs/digits-1",
)

NEEDED = {
    "runs/digits-1": "",
    "runs/photos-1": "--data.name folder:photos --model.num_clusters 8",
    "runs/features-npy-1": "--data.name features:features.npy --model.num_clusters 10",
    "runs/several": "--model.num_clusters 5,8,10,12,20",
}
"""The options of the training that makes a run which a command wants, unless an earlier command has made it."""


def indented(text: str) -> list[str]:
    """The command lines of the indented blocks, comments taken off and continued lines joined."""
    lines: list[str] = []
    for block in re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE):
        if block.strip().startswith(NOT_COMMANDS):
            continue
        joined = re.sub(r"\\\n\s*", "", block)
        lines += [re.sub(r"(^|\s)#\s.*", "", line).strip() for line in joined.splitlines()]
    return [line for line in lines if line]


def inline(text: str) -> list[str]:
    """The commands between backticks in the text and its tables: a program, and what it is to do."""
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text))
    start = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{'|'.join(PROGRAMS)})\S*")
    return [span for span in spans if (found := start.match(span)) and (found.end() < len(span) or span in SERVERS)]


FENCED = re.compile(r"^```(\w*)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
PYTHON = [
    block
    for page, text in PAGES.items()
    for language, block in FENCED.findall(text)
    if language == "python" and page != "docs/design.md"
]
TEXTS = {page: FENCED.sub("\n", text) for page, text in PAGES.items()}
COMMANDS = list(dict.fromkeys(each for text in TEXTS.values() for each in [*indented(text), *inline(text)]))
TABLE_RULE = re.compile(r"\|[-| ]+\|")


def environment(folder: Path) -> dict[str, str]:
    """This interpreter and this tree behind the names that a shell has after `source .venv/bin/activate`."""
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    modules = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PATH": path, "PYTHONPATH": modules, "RANKS": "2", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to type the README's commands in: the tree's scripts, small folders of images, the programs."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("launch", "benchmarks", "iic_dist"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("photos", "new", "signs", "clothes", "cells", "bin", "docs"):
        (folder / name).mkdir()
    (folder / "docs/draw_views.py").symlink_to(ROOT / "docs/draw_views.py")  # it writes beside itself
    write_colours(folder / "photos", 24)
    write_colours(folder / "new", 3)
    write_colours(folder / "cells", 24)
    write_digits(folder / "signs", 60)
    write_digits(folder / "clothes", 60)
    np.save(folder / "features.npy", np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32))
    (folder / "names.csv").write_text("cluster,name\n0,warm\n1,cold\n", encoding="utf-8")
    for name in ("a.jpg", "b.png"):
        Image.fromarray(np.full((12, 14, 3), 99, np.uint8)).save(folder / name)
    programs = {
        "torchrun": "-m torch.distributed.run",
        "tensorboard": "-m tensorboard.main",
        "python": "",
        "python3": "",
    }
    for name, module in programs.items():
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module} "$@"\n')
        program.chmod(0o755)
    return folder


def make_needed(command: str, folder: Path) -> None:
    """Train what the command wants and no earlier command has left."""
    for run, options in NEEDED.items():
        if run in command and not (folder / run).exists():
            shell(cheaper(f"python -m iic_dist.train {options} --run.name {run.removeprefix('runs/')}"), folder)


def shell(command: str, folder: Path) -> str:
    """Run a command as a shell in `folder` would and return what it prints; fail with its words where it fails."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def serve(command: str, folder: Path) -> None:
    """Start a server, get its first page, and stop it."""
    log = folder / "server.txt"
    with log.open("w") as file:
        server = subprocess.Popen(shlex.split(command), cwd=folder, env=environment(folder), stdout=file, stderr=file)
    try:
        end = time.monotonic() + 120
        while (found := re.search(r"http://localhost:\d+/", log.read_text())) is None:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        with urllib.request.urlopen(found[0], timeout=60) as page:
            assert b"TensorBoard" in page.read()
    finally:
        server.terminate()
        server.wait()


def cheaper(command: str) -> str:
    """The command with what `CHEAPER` replaces and `OPTIONS` adds."""
    added = [options for part, options in OPTIONS.items() if part in command and "--help" not in command]
    for part, other in CHEAPER.items():
        command = command.replace(part, other)
    return " ".join([command, *added])


RUN = [command for command in COMMANDS if command not in CANNOT_RUN]


@pytest.mark.parametrize(
    "command", [pytest.param(each, id=each, marks=() if each in QUICK else pytest.mark.slow) for each in RUN]
)
def test_the_command_works(command: str, place: Path) -> None:
    make_needed(cheaper(command), place)
    if command in SERVERS:
        serve(cheaper(command), place)
    else:
        shell(cheaper(command), place)


@pytest.mark.parametrize(
    "block", [pytest.param(block, marks=pytest.mark.slow if "runs/" in block else ()) for block in PYTHON]
)
def test_the_python_works(block: str, place: Path) -> None:
    make_needed(block, place)
    assert shell(shlex.join(["python", "-W", "error::UserWarning", "-c", block]), place)


def test_what_cannot_run_is_in_the_readme_and_run_elsewhere() -> None:
    assert CANNOT_RUN.keys() <= set(COMMANDS)
    assert set(QUICK) | set(SERVERS) <= set(RUN)
    for _, test in CANNOT_RUN.values():
        if test is not None:
            file, name = test.split("::")
            assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), test


def test_every_line_of_an_indented_block_is_a_command() -> None:
    start = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{'|'.join(PROGRAMS)})")
    assert [command for command in COMMANDS if not start.match(command)] == []
    assert all(any(f"\n    {start}" in text for text in PAGES.values()) for start in NOT_COMMANDS)


def test_every_option_is_one() -> None:
    groups = {group.name: group.default_factory for group in dataclasses.fields(Config)}  # type: ignore[misc]
    known = {f"{name}.{each.name}" for name, group in groups.items() for each in dataclasses.fields(group)}
    files = "py|sh|sbatch|yaml|json|jsonl|txt|png|html"
    option = re.compile(rf"(?:--|`)((?:{'|'.join(groups)})\.(?!(?:{files})\b)[a-z_]+)")
    mentioned = {name for page, text in TEXTS.items() if page != "docs/design.md" for name in option.findall(text)}
    assert len(mentioned) > 20
    assert mentioned - known == set()


def anchors(path: str) -> set[str]:
    """What a page's headings are called in a link, as GitHub does it."""
    titles = re.findall(r"^#+ (.*)", FENCED.sub("\n", (ROOT / path).read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_is_there(page: str) -> None:
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", TEXTS[page]):
        target = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        assert (ROOT / target).exists(), target
        assert not anchor or anchor in anchors(target), f"{target}#{anchor}"


def test_the_readme_fits_one_sitting_and_links_every_page() -> None:
    assert len(PAGES[README].splitlines()) <= LONGEST_README
    linked = set(re.findall(r"\]\((docs/\w[\w-]*\.md)", PAGES[README]))
    assert linked == PAGES.keys() - {README}


def test_the_map_names_what_is_there() -> None:
    """Files and folders of the map exist, and no room of the package is left out."""
    _, tree = FENCED.findall(PAGES[README].split("\n## Map")[1])[0]
    inside, outside = re.search(r"^iic_dist/\n((?:  .*\n)+)((?:\w.*\n)+)", tree, re.MULTILINE).groups()  # type: ignore[union-attr]
    named = {name for line in inside.splitlines() for name in re.findall(r"(\w+(?:\.py|/))", line.split("    ")[0])}
    assert named == {
        f"{path.name}/" if path.is_dir() else path.name
        for path in (ROOT / "iic_dist").iterdir()
        if (path.suffix == ".py" and path.name != "__init__.py") or (path / "__init__.py").is_file()
    }
    assert all((ROOT / line.split()[0]).is_dir() for line in outside.splitlines())


def test_every_path_that_is_named_is_there() -> None:
    """Between backticks in the text: a file of the tree, from its root or from the package."""
    path = re.compile(r"`((?:iic_dist|csrc|tests|benchmarks|launch|docs|\w+)/[\w./]+\.(?:py|h|cpp|md|json))`")
    new = set(re.findall(r"^`([^`]+)`, a new file", PAGES["docs/design.md"], re.MULTILINE))
    for page, text in TEXTS.items():
        for name in set(path.findall(text)) - new:
            places = [ROOT / name, ROOT / "iic_dist" / name, ROOT / "benchmarks" / name]
            assert any(place.is_file() for place in places), f"{page}: {name}"


def table_heads(lines: list[str]) -> set[int]:
    """The places of the lines that head a table; several tables may have the same."""
    return {place - 1 for place, line in enumerate(lines) if TABLE_RULE.fullmatch(line)}


def test_no_line_stands_twice() -> None:
    """Within a page or on two, the benchmarks' page among them: what is said twice is mended once."""
    seen: dict[str, str] = {}
    twice = []
    for page, text in {**PAGES, "benchmarks/README.md": (ROOT / "benchmarks/README.md").read_text()}.items():
        lines = text.splitlines() if page != "docs/design.md" else TEXTS[page].splitlines()
        heads = table_heads(lines)
        for place, line in enumerate(map(str.strip, lines)):
            if len(line) < 30 or place in heads or TABLE_RULE.fullmatch(line):
                continue
            if line in seen:
                twice.append(f"{seen[line]} and {page}: {line}")
            seen[line] = page
    assert twice == []
