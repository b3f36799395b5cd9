"""Weights over the network: said beforehand, from a server of the test's own; and that being offline is known soon."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import torchvision.models
from safetensors.torch import save_file

from iic_dist.errors import UsageError
from iic_dist.models import build_backbone, fetch, pretrained
from iic_dist.models.pretrained import find_weights, what_is_missing

NAME, REPOSITORY = "timm/test_resnet", "timm/test_resnet.r160_in1k"


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as its own client asks for a file; and a plain file server beside it."""

    file: bytes = b""
    asked: list[str] = []  # noqa: RUF012 - one list of the whole class

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{REPOSITORY}"):
            sha = "a" * 40
            sibling = {
                "rfilename": "model.safetensors",
                "size": len(self.file),
                "lfs": {"sha256": hashlib.sha256(self.file).hexdigest(), "size": len(self.file), "pointerSize": 134},
            }
            about = {"id": REPOSITORY, "sha": sha, "siblings": [sibling], "cardData": {"license": "apache-2.0"}}
            self._answer(json.dumps(about).encode(), {"Content-Type": "application/json"})
        elif path.endswith("/model.safetensors") or path.endswith(".pth"):
            etag = {"ETag": f'"{hashlib.sha256(self.file).hexdigest()}"', "X-Repo-Commit": "a" * 40}
            self._answer(self.file, etag)
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def _answer(self, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of the hub's client and of torch."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a hub that holds weights of `NAME`."""
    torch.manual_seed(1)
    save_file(timm.create_model("test_resnet").state_dict(), cache / "source.safetensors")
    _Hub.file, _Hub.asked = (cache / "source.safetensors").read_bytes(), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    real = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: real(endpoint=address))
    yield address
    server.shutdown()


def test_size_and_licence_come_first_and_the_cache_answers_then(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    before: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        before.extend(_Hub.asked)

    file = find_weights(NAME, say=say)
    size = f"{len(_Hub.file) / 1e6:.1f} MB"
    assert lines == [f"fetching weights of {NAME}: {size} from the Hugging Face hub, licence apache-2.0"]
    assert before, "it asked"
    assert not [request for request in before if "resolve" in request], "it fetched before it said so"
    assert file.read_bytes() == _Hub.file
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    requests = len(_Hub.asked)
    assert find_weights(NAME, download=False) == file
    assert what_is_missing(NAME) is None
    backbone = build_backbone(NAME, in_channels=3, image_size=64, pretrained=True)
    assert torch.equal(backbone.net.conv1[0].weight, timm_weight())
    assert len(_Hub.asked) == requests


def timm_weight() -> torch.Tensor:
    torch.manual_seed(1)
    weight: torch.Tensor = timm.create_model("test_resnet").conv1[0].weight
    return weight


def test_the_hub_can_be_asked_without_fetching(hub: str) -> None:
    assert what_is_missing(NAME) is None
    assert all(REPOSITORY in request and "/api/" in request for request in _Hub.asked)
    message = what_is_missing("timm/test_vit")  # of which this hub has nothing
    assert message is not None
    assert "404" in message or "NotFound" in message


def test_one_line_says_how_to_get_what_the_network_does_not_give(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", _no_name)
    started = time.monotonic()
    with pytest.raises(UsageError) as error:
        find_weights(NAME)
    assert time.monotonic() - started < 10
    line = str(error.value)
    assert "\n" not in line
    assert f"weights of {NAME} are not on this machine and could not be fetched" in line
    assert f"`hf download {REPOSITORY} model.safetensors`" in line
    assert "--model.weights FILE" in line


def _no_name(*arguments: object, **options: object) -> None:
    raise socket.gaierror(-2, "Name or service not known")


@pytest.mark.parametrize("name", [NAME, "mobilenet_v2"])
def test_a_network_that_swallows_everything_is_known_in_time(
    name: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolver or a firewall that never answers held the client for minutes."""
    monkeypatch.setattr(fetch, "PATIENCE", 0.5)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: time.sleep(20))
    started = time.monotonic()
    message = what_is_missing(name)
    assert time.monotonic() - started < 5
    assert message is not None
    assert "no answer within 0.5 s" in message


def test_patience_is_below_ten_seconds() -> None:
    assert fetch.PATIENCE < 10


@pytest.mark.parametrize("name", [NAME, "mobilenet_v2"])
@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_being_told_to_stay_offline_is_heeded_at_once(
    name: str, variable: str, hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(UsageError, match=f"could not be fetched \\({variable} is set\\)"):
        find_weights(name)
    assert _Hub.asked == []


def test_who_must_not_fetch_does_not(hub: str) -> None:
    with pytest.raises(UsageError, match="another process of this machine was to fetch them"):
        find_weights(NAME, download=False)
    assert _Hub.asked == []


def test_torchvision_too(hub: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    torch.manual_seed(2)
    source = torchvision.models.mobilenet_v2()
    torch.save(source.state_dict(), "/dev/null")
    file = Path(torch.hub.get_dir(), "source.pth")
    file.parent.mkdir(parents=True)
    torch.save(source.state_dict(), file)
    _Hub.file = file.read_bytes()
    url = f"{hub}/mobilenet_v2-{hashlib.sha256(_Hub.file).hexdigest()[:8]}.pth"
    monkeypatch.setattr(pretrained, "torchvision_url", lambda name: url)
    lines: list[str] = []
    found = find_weights("mobilenet_v2", say=lines.append)
    assert lines == [
        f"fetching weights of mobilenet_v2: {len(_Hub.file) / 1e6:.1f} MB from {url}, "
        "licence not stated by torchvision (trained on ImageNet)"
    ]
    assert "100%" in capsys.readouterr().err
    assert found.read_bytes() == _Hub.file
    _Hub.file = b"cut"
    found.unlink()
    with pytest.raises(UsageError, match="could not be fetched .*invalid hash"):
        find_weights("mobilenet_v2", say=lines.append)
    assert not found.exists()
