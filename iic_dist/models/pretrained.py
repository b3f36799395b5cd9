"""Pretrained weights by the name of a backbone: what they want to see, where their file is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from iic_dist.errors import UsageError
from iic_dist.models import fetch
from iic_dist.models.timm_backbones import PREFIX, pretrained_cfg, timm_preprocessing
from iic_dist.models.torchvision_backbones import torchvision_names, torchvision_preprocessing, torchvision_url
from iic_dist.models.weights import Preprocessing

_TORCHVISION_LICENCE = "not stated by torchvision (trained on ImageNet)"


def preprocessing(name: str) -> Preprocessing:
    """Return what the pretrained weights of a backbone want to see.

    Raises:
        UsageError: it has no pretrained weights.
    """
    if name.startswith(PREFIX):
        return timm_preprocessing(name)
    if name not in torchvision_names():
        raise UsageError(f"backbone {name!r} has no pretrained weights: set pretrained to false")
    return torchvision_preprocessing(name)


def find_weights(
    name: str, file: str | None = None, *, download: bool = True, say: Callable[[str], None] = print
) -> Path:
    """Return the file of a backbone's pretrained weights: the one that is named, a cached one, or a fetched one.

    Args:
        name: timm/NAME or a name of torchvision.
        file: The file that the user names.
        download: Fetch what is not there. At most one process of a machine may.
        say: Gets a line before anything is fetched: name, size and licence.

    Raises:
        UsageError: the weights are not there and cannot be fetched; says what to do.
    """
    preprocessing(name)  # an error where there can be none
    if file is not None:
        path = Path(file).expanduser()
        if not path.is_file():
            raise UsageError(f"model.weights={file!r}: {'is a folder' if path.is_dir() else 'there is no such file'}")
        return path
    offer = _offer(name)
    if offer.cached is not None:
        return offer.cached
    try:
        if not download:
            raise fetch.Unreachable("another process of this machine was to fetch them")
        if not name.startswith(PREFIX):
            return fetch.fetch_from_url(offer, _TORCHVISION_LICENCE, say)
        cfg = pretrained_cfg(name)
        return fetch.fetch_from_hub(offer, cfg.hf_hub_id, cfg.hf_hub_filename, cfg.license, say)
    except fetch.Unreachable as why:
        raise fetch.missing(offer, why) from why


def what_is_missing(name: str) -> str | None:
    """Say why the pretrained weights of a backbone cannot be had, and how to get them; None where they can.

    They can where they are cached or their server answers.
    """
    offer = _offer(name)
    if offer.cached is not None:
        return None
    try:
        if name.startswith(PREFIX):
            fetch.ask_hub(pretrained_cfg(name).hf_hub_id)
        else:
            fetch.ask_url(offer.where)
    except fetch.Unreachable as why:
        return str(fetch.missing(offer, why))
    return None


def _offer(name: str) -> fetch.Offer:
    if not name.startswith(PREFIX):
        return fetch.at_url(name, torchvision_url(name))
    cfg = pretrained_cfg(name)
    if not cfg.hf_hub_id:
        raise UsageError(f"backbone {name!r}: its weights are not on the Hugging Face hub; name a file (model.weights)")
    return fetch.on_hub(name, cfg.hf_hub_id, cfg.hf_hub_filename)
