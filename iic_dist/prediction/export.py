"""A trained run for use without this package: ONNX and safetensors."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from iic_dist.errors import UsageError
from iic_dist.files import whole, write_whole
from iic_dist.models import SubHeads
from iic_dist.ops import images as ops
from iic_dist.prediction.clusterer import Clusterer
from iic_dist.views.draw import NUM_UNIFORMS, draw
from iic_dist.views.spec import ViewSpec

_NEEDS = {"onnx": ("onnx", "onnxscript"), "safetensors": ("safetensors",)}


class EvaluationView(nn.Module):
    """The view that is evaluated, in operations that every runtime has: uint8 (B, C, S, S) to (B, C', size, size).

    Equals `Views.evaluation` up to the rounding of float32: the central crop and its resize are two matrix products.

    Args:
        spec: The distribution of the view; chance in it is left out.
        image_size: S.
    """

    rows: Tensor
    gray: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, spec: ViewSpec, image_size: int) -> None:
        super().__init__()
        centred = spec.centred()
        self.sobel = centred.sobel
        # Channel h of this picture is 1 in row h and 0 elsewhere; what becomes of it are the weights of row h.
        basis = torch.eye(image_size, dtype=torch.float64)[None, :, :, None].repeat(1, 1, 1, image_size)
        box = draw(centred, torch.zeros(1, NUM_UNIFORMS), image_size, image_size).box
        self.resizes = box is not None
        weights = basis if box is None else ops.resized_crop(basis, box, centred.size)
        self.register_buffer("rows", weights[0, :, :, 0].T.float())
        self.register_buffer("gray", torch.tensor(ops.LUMA).view(1, 3, 1, 1))
        for name, values in (("mean", centred.mean or (0.0,)), ("std", centred.std or (1.0,))):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the views of uint8 images."""
        views = images.to(self.rows.dtype) / 255.0
        if self.resizes:
            views = self.rows @ views @ self.rows.T
        if self.sobel:
            views = self._gradients(views)
        return (views - self.mean) / self.std

    def _gradients(self, views: Tensor) -> Tensor:
        if views.shape[1] == 3:
            views = (views * self.gray).sum(1, keepdim=True)
        across = torch.tensor(ops.SOBEL, dtype=views.dtype)
        kernels = torch.stack([across, across.T]).unsqueeze(1).to(views.device)
        return nn.functional.conv2d(views, kernels, padding=1)


class Probabilities(nn.Module):
    """From what a run clusters to the probabilities of the selected sub-head, (B, K) float32.

    From uint8 images (B, C, S, S), or of a run on features of a file from float32 rows (B, F).
    """

    def __init__(self, run: Clusterer) -> None:
        super().__init__()
        self.view = nn.Identity() if run.takes_features else EvaluationView(run.views.seen, run.image_size)
        self.backbone = copy.deepcopy(run.model.backbone)
        head = run.model.heads[run.head]
        assert isinstance(head, SubHeads)
        self.classifier = copy.deepcopy(head.alone(run.selected))

    def forward(self, batch: Tensor) -> Tensor:
        """Return the probability of each cluster."""
        return torch.softmax(self.classifier(self.backbone(self.view(batch)))[:, 0], -1)


def export_onnx(run: Clusterer, path: Path) -> None:
    """Write the run as ONNX: input "images" uint8 (batch, C, S, S), output "probabilities" float32 (batch, K).

    The preprocessing is inside, but for the resize to S x S: `data.image_size` of the run. It is in float32, also
    where the run is in float64. A run on features of a file has the input "features" instead, float32 (batch, F).

    Raises:
        UsageError: onnx or onnxscript is not installed.
        OSError: it could not be written; nothing is left of it. Above 2 GB a second file, FILE.data, holds the weights.
    """
    _require("onnx")
    network = Probabilities(run).float().cpu().eval()
    name, example = "images", torch.zeros(2, *run.input_shape, dtype=torch.uint8)
    if run.takes_features:
        name, example = "features", example.float()
    program = torch.onnx.export(
        network,
        (example,),
        input_names=[name],
        output_names=["probabilities"],
        dynamic_shapes={"batch": {0: torch.export.Dim("batch")}},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props["iic_dist"] = json.dumps(_about(run))
    with whole(path) as part:
        program.save(part)


def export_safetensors(run: Clusterer, path: Path) -> None:
    """Write all weights under the names of the network, with the config and the selected sub-head as metadata.

    Raises:
        UsageError: safetensors is not installed.
        OSError: it could not be written; nothing is left of it.
    """
    _require("safetensors")
    from safetensors.torch import save

    weights = {name: value.contiguous().cpu() for name, value in run.model.state_dict().items()}
    about = {name: str(value) for name, value in _about(run).items()}
    # Not by save_file, whose errors are no OSError and whose files have modes of their own.
    write_whole(path, save(weights, metadata={**about, "config": run.config.to_yaml()}))


def _about(run: Clusterer) -> dict[str, int]:
    if run.takes_features:
        takes = {"num_features": run.model.num_features}
    else:
        takes = {"image_size": run.image_size, "channels": run.channels}
    return {**takes, "num_clusters": run.num_clusters, "selected_sub_head": run.selected}


def _require(kind: str) -> None:
    missing = [name for name in _NEEDS[kind] if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"--format {kind} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


FORMATS = {"onnx": export_onnx, "safetensors": export_safetensors}
"""What writes a run, by the name of the format."""
