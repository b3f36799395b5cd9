"""Links, and what is in a folder and no file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import load_small, picture, save

from iic_dist.data.listing import list_images


@pytest.fixture
def linked(tmp_path) -> Path:
    """root/inside.png and links of every kind; outside/ holds two more images."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    save(root / "inside.png", picture(seed=0))
    save(outside / "one.png", picture(seed=1))
    save(outside / "deep" / "two.png", picture(seed=2))
    (root / "alias.png").symlink_to("inside.png")
    (root / "broken.png").symlink_to("nothing.png")
    (root / "folder").symlink_to(outside)
    (root / "out.png").symlink_to(outside / "one.png")
    (root / "self.png").symlink_to("self.png")
    (root / "up").symlink_to("..")
    (root / "sub").mkdir()
    (root / "sub" / "loop").symlink_to(root)
    return root


def test_links_out_of_the_folder_are_refused(linked):
    problems: list = []
    image_set = load_small(linked, unreadable=problems)
    assert list_images(linked, follow_links=False).paths == ["alias.png", "inside.png"]
    assert torch.equal(image_set.images[0], image_set.images[1])
    reasons = dict(problems)
    assert len(reasons) == len(problems)
    assert sorted(reasons) == ["broken.png", "folder", "out.png", "self.png", "sub/loop", "up"]
    assert (
        reasons["folder"]
        == reasons["out.png"]
        == reasons["up"]
        == ("a symbolic link out of the image folder (--data.follow_links true takes it, predict --follow-links)")
    )
    assert "leads nowhere" in reasons["broken.png"]
    assert "leads nowhere" in reasons["self.png"]
    assert "back to a folder" in reasons["sub/loop"]


def test_links_out_of_the_folder_are_followed_if_asked(linked):
    listing = list_images(linked, follow_links=True)
    paths, refused = listing.paths, listing.refused
    assert paths == ["alias.png", "folder/deep/two.png", "folder/one.png", "inside.png", "out.png"]
    assert sorted(path for path, _ in refused) == ["broken.png", "self.png", "sub/loop", "up"]
    image_set = load_small(linked, follow_links=True)
    for row, seed in enumerate((0, 2, 1, 0, 1)):
        assert np.array_equal(image_set.images[row].permute(1, 2, 0), picture(seed=seed))


def test_a_folder_given_by_a_link_is_that_folder(tmp_path):
    save(tmp_path / "real" / "a.png", picture())
    (tmp_path / "link").symlink_to("real")
    assert len(load_small(tmp_path / "link").images) == 1


def test_folders_that_link_to_each_other_end(tmp_path):
    for i in range(8):
        save(tmp_path / f"{i}" / "x.png", picture())
        for j in range(8):
            (tmp_path / f"{i}" / f"to-{j}").symlink_to(tmp_path / f"{j}")
    listing = list_images(tmp_path, follow_links=True)
    paths, refused = listing.paths, listing.refused
    assert len(paths) == 8 + 8 * 7  # each folder, and each through each other one
    assert all(len(path.split("/")) <= 3 for path in paths)
    assert len(refused) == 8 + 8 * 7 * 8


def test_a_named_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    save(tmp_path / "a.png", picture())
    problems: list = []
    assert len(load_small(tmp_path, unreadable=problems).images) == 1
    assert problems == [("pipe.png", "not a regular file")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_and_a_folder_without_permission_are_named(tmp_path):
    save(tmp_path / "a.png", picture())
    save(tmp_path / "closed" / "b.png", picture())
    save(tmp_path / "closed.png", picture()).chmod(0)
    (tmp_path / "closed").chmod(0)
    problems: list = []
    try:
        assert len(load_small(tmp_path, unreadable=problems).images) == 1
    finally:
        (tmp_path / "closed").chmod(0o700)
    assert problems == [("closed", "Permission denied"), ("closed.png", "Permission denied")]
