from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest

from iic_dist.data import named


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        pytest.fail("a test asked the network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def no_debian_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(named, "DEBIAN_FASHION_MNIST", tmp_path / "no-such-package")
