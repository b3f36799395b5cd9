"""Files of pretrained weights: read without running code, told apart by their SHA-256, loaded only where they fit."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from iic_dist.errors import UsageError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")

Resampling = Literal["bilinear", "bicubic"]

_WRAPPERS = ("state_dict", "model", "model_state_dict")  # where training scripts put the weights among other things
_PREFIXES = ("_orig_mod.", "module.")  # of torch.compile and DDP
_DIGEST_CHARACTERS = 16


@dataclass(frozen=True)
class Preprocessing:
    """What pretrained weights want to see.

    Attributes:
        mean, std: Subtracted from and divided out of images in [0, 1], one number a channel.
        resampling: How images are to be resized.
        input_size: Side in pixels of the images that the weights were made for.
        crop_pct: Share of the shorter side that the evaluation of their authors keeps. Here the whole central square
            counts: what a photograph is of may stand at its edge.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resampling: Resampling
    input_size: int
    crop_pct: float


def digest(path: Path) -> str:
    """Return "sha256:" and the first 16 hexadecimal digits of that of a file; in YAML no such text is a number."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:_DIGEST_CHARACTERS]}"


def check_digest(path: Path, wanted: str | None, name: str) -> None:
    """Raise a UsageError unless a file has the digest that is wanted, if one is."""
    if wanted is not None and (found := digest(path)) != wanted:
        raise UsageError(
            f"weights of backbone {name!r} with digest {wanted} are wanted (model.weights_digest), but {str(path)!r} "
            f"has {found}: name the file that the run was made with by --model.weights"
        )


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file of weights by name, on the CPU; no code in the file is run.

    Raises:
        UsageError: there is no such file, it is damaged, of another format, or holds something else.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"weights {str(path)!r}: a name must end in {' '.join(SUFFIXES)}")
    if not path.is_file():
        raise UsageError(f"weights {str(path)!r}: {'is a folder' if path.is_dir() else 'there is no such file'}")
    content = _read(path)
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content:
        raise UsageError(f"weights {str(path)!r}: holds a {type(content).__name__}, not tensors by name")
    state = {}
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise UsageError(f"weights {str(path)!r}: {str(name)[:60]!r} is a {type(value).__name__}, not a tensor")
        if value.is_floating_point() and not value.isfinite().all():
            raise UsageError(f"weights {str(path)!r}: {str(name)[:60]!r} holds NaN or Inf: the file is damaged")
        for prefix in _PREFIXES:
            name = str(name).removeprefix(prefix)
        state[name] = value
    return state


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"weights {str(path)!r} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can raise nearly anything
        reason = " ".join(str(error).split())[:120]
        raise UsageError(
            f"weights {str(path)!r} cannot be read: cut short, or not the weights alone as {path.suffix} "
            f"({type(error).__name__}: {reason}); fetch the file again"
        ) from error


def without(state: Mapping[str, Tensor], modules: tuple[str, ...], keep: Collection[str] = ()) -> dict[str, Tensor]:
    """Leave the tensors of these modules out, but for those of the names in `keep`."""
    prefixes = tuple(f"{name}." for name in modules)
    return {name: value for name, value in state.items() if name in keep or not name.startswith(prefixes)}


def misfit(state: Mapping[str, Tensor], net: nn.Module) -> str | None:
    """Say how weights differ from what a network has; None where they fit."""
    wanted = net.state_dict()
    # Files older than this counter lack it, and torch fills it in.
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    reshaped = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    foreign = [name for name in state if name not in wanted]
    said = []
    if missing:
        said.append(f"{len(missing)} of the network's {len(wanted)} tensors are missing, as {_named(missing, wanted)}")
    if reshaped:
        there = tuple(state[reshaped[0]].shape)
        said.append(f"{len(reshaped)} have other shapes, as {_named(reshaped[:1], wanted)}, which is {there} there")
    if foreign:
        said.append(f"{len(foreign)} of the file's {len(state)} are not of this network, as {_named(foreign, state)}")
    return "; ".join(said) or None


def _named(names: list[str], tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in names[:2])


def refuse(path: Path, name: str, how: str) -> UsageError:
    """Make the error of weights that are not of the network `name`."""
    return UsageError(f"weights {str(path)!r} are not of backbone {name!r}: {how}. Is --model.backbone right?")


def load_into(net: nn.Module, path: Path, name: str, classifiers: tuple[str, ...]) -> None:
    """Load a file into a network without classifier.

    Args:
        net: The network.
        path: The file.
        name: What to call the network in an error.
        classifiers: Modules whose weights are passed over, but for what the network still has of them.

    Raises:
        UsageError: the file cannot be read or is of another network.
    """
    state = without(read_state(path), classifiers, keep=net.state_dict().keys())
    if how := misfit(state, net):
        raise refuse(path, name, how)
    net.load_state_dict(state)
