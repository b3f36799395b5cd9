"""Pretrained weights from the caches of this machine or, said beforehand, from the network."""

from __future__ import annotations

import os
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import torch

from iic_dist.errors import UsageError

T = TypeVar("T")
Say = Callable[[str], None]

PATIENCE = 8.0
"""Seconds in which a server must answer; what cannot be reached is known then, whatever waits in between."""

_ANSWER = 5.0  # seconds that a client itself waits
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


class Unreachable(Exception):
    """Weights are not on this machine and cannot be fetched; says why."""


@dataclass(frozen=True)
class Offer:
    """A file of weights, and where it is.

    Attributes:
        name: What to call the weights.
        cached: Where the file lies on this machine, or None.
        where: Of whom it can be fetched.
        how_to: How somebody gets it by hand.
    """

    name: str
    cached: Path | None
    where: str
    how_to: str


def on_hub(name: str, repository: str, file: str | None) -> Offer:
    """Look for weights of a repository of the Hugging Face hub in its cache on this machine.

    Args:
        name: What to call them.
        repository: OWNER/NAME.
        file: Its name there; None for the usual ones.
    """
    found = (huggingface_hub.try_to_load_from_cache(repository, each) for each in ([file] if file else _HUB_FILES))
    cached = next((Path(each) for each in found if isinstance(each, str)), None)
    return Offer(
        name,
        cached,
        "the Hugging Face hub",
        f"on a machine with a network `hf download {repository} {file or _HUB_FILES[0]}`, then copy the file and name "
        "it with --model.weights FILE",
    )


def fetch_from_hub(offer: Offer, repository: str, file: str | None, licence: str | None, say: Say) -> Path:
    """Download a file of a repository into the hub's cache: name, size and licence first, then a progress bar.

    Raises:
        Unreachable: there is no network, no such file, or it is not for everybody.
    """
    info = ask_hub(repository)
    sizes = {each.rfilename: each.size for each in info.siblings or []}
    wanted = file or next((each for each in _HUB_FILES if each in sizes), _HUB_FILES[0])
    card = getattr(info, "card_data", None)
    _announce(offer, sizes.get(wanted), getattr(card, "license", None) or licence, say)
    try:
        return Path(huggingface_hub.hf_hub_download(repository, wanted, etag_timeout=_ANSWER))
    except Exception as error:  # of the client, of its HTTP library, of the disk
        raise Unreachable(_in_one_line(error)) from error


def ask_hub(repository: str) -> Any:
    """Ask the hub what a repository holds.

    Raises:
        Unreachable: no answer in time, or a refusal.
    """
    return _answer(
        lambda: huggingface_hub.HfApi().model_info(repository, files_metadata=True, timeout=_ANSWER),
    )


def at_url(name: str, url: str) -> Offer:
    """Look for torchvision's weights in torch's cache on this machine."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    where = f"on a machine with a network fetch {url}, then name the file with --model.weights FILE"
    return Offer(name, path if path.is_file() else None, url, where)


def fetch_from_url(offer: Offer, licence: str, say: Say) -> Path:
    """Download a file into torch's cache: name, size and licence first, then a progress bar.

    Raises:
        Unreachable: there is no network, or no such file.
    """
    size = ask_url(offer.where)
    _announce(offer, size, licence, say)
    path = Path(torch.hub.get_dir(), "checkpoints", Path(offer.where).name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(offer.where, str(path), _hash_in(path.stem), progress=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash is wrong
        raise Unreachable(_in_one_line(error)) from error
    return path


def ask_url(url: str) -> int | None:
    """Ask for the size of a file in bytes; None where the server does not say.

    Raises:
        Unreachable: no answer in time, or a refusal.
    """

    def ask() -> int | None:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_ANSWER) as answer:
            length = answer.headers.get("Content-Length")
            return None if length is None else int(length)

    return _answer(ask)


def _hash_in(stem: str) -> str | None:
    """Return the start of the SHA-256 that torchvision's file names end in: mobilenet_v2-7ebf99e0."""
    _, dash, tail = stem.rpartition("-")
    return tail if dash else None


def _announce(offer: Offer, size: int | None, licence: str | None, say: Say) -> None:
    much = "of unknown size" if size is None else f"{size / 1e6:.1f} MB"
    say(f"fetching weights of {offer.name}: {much} from {offer.where}, licence {licence or 'not stated'}")


def _answer(ask: Callable[[], T]) -> T:
    """Call `ask` in a thread, and wait for it no longer than `PATIENCE`: a resolver heeds no timeout of its caller."""
    if offline := _told_to_be_offline():
        raise Unreachable(f"{offline} is set")
    answers: list[T] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            answers.append(ask())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)  # a daemon does not keep the process from its end
    thread.start()
    thread.join(PATIENCE)
    if errors:
        raise Unreachable(_in_one_line(errors[0])) from errors[0]
    if not answers:
        raise Unreachable(f"no answer within {PATIENCE:g} s")
    return answers[0]


def _told_to_be_offline() -> str | None:
    """Name the variable that forbids the network, if there is one."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((name for name in names if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")), None)


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def missing(offer: Offer, why: Unreachable) -> UsageError:
    """Make the error of weights that are not here and cannot be fetched."""
    return UsageError(
        f"weights of {offer.name} are not on this machine and could not be fetched ({why}): {offer.how_to}"
    )
