"""Batch normalisation over ranks, held to torch's own layer on all rows in one process."""

from __future__ import annotations

import copy

import pytest
import rank_tasks
import timm
import torch
from ranks import Ranks
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn

from iic_dist.models.sync_norm import SyncBatchNorm, synchronise

CPU = torch.device("cpu")


def on_one(layer: nn.Module, rows: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """What torch makes of all rows."""
    whole = nn.Sequential(layer).train()
    rows = rows.clone().requires_grad_()
    output = whole(rows)
    (output * weights).sum().backward()
    parameters = {f"gradient of {name}": p.grad for name, p in whole.named_parameters() if p.grad is not None}
    assert rows.grad is not None
    return {"output": output.detach(), "gradient": rows.grad, **parameters, **dict(whole.named_buffers())}


def layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Layers in float64 whose weights are not one and zero, and the shape of what a row is."""
    torch.manual_seed(3)
    found: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "1d": (nn.BatchNorm1d(5), (5,)),
        "2d": (nn.BatchNorm2d(5), (5, 3, 2)),
        "cumulative": (nn.BatchNorm1d(5, momentum=None), (5,)),
        "without weights": (nn.BatchNorm2d(5, affine=False), (5, 3, 2)),
        "without statistics": (nn.BatchNorm1d(5, track_running_stats=False), (5,)),
        "of timm, with its activation": (BatchNormAct2d(5), (5, 3, 2)),
    }
    for layer, _ in found.values():
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    return {name: (layer.double(), shape) for name, (layer, shape) in found.items()}


LAYERS = layers()


@pytest.mark.parametrize("shards", [[4, 4], [1, 5], [2, 3, 4], [1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_ranks_normalise_as_one_process_does(pools: dict[int, Ranks], name: str, shards: list[int]) -> None:
    """Output, gradients and running statistics; a rank may have a single row."""
    layer, shape = LAYERS[name]
    generator = torch.Generator().manual_seed(5)
    rows, weights = torch.randn(2, sum(shards), *shape, dtype=torch.float64, generator=generator)
    expected = on_one(copy.deepcopy(layer), 3 + 2 * rows, weights)
    found = pools[len(shards)].run(len(shards), rank_tasks.normalised, layer, 3 + 2 * rows, weights, shards)
    assert found[0].keys() == expected.keys()
    for part in ("output", "gradient"):
        torch.testing.assert_close(torch.cat([each[part] for each in found]), expected[part], rtol=0, atol=1e-10)
    for part in expected.keys() - {"output", "gradient"}:
        of_all = [each[part] for each in found]
        if part.startswith("gradient"):  # each has that of its rows
            torch.testing.assert_close(torch.stack(of_all).sum(0), expected[part], rtol=0, atol=1e-10)
        else:
            for each in of_all:
                torch.testing.assert_close(each, expected[part], rtol=0, atol=1e-10)


def test_numbers_far_from_zero_keep_their_digits(pair: Ranks) -> None:
    """Of a sum of squares about 0, a mean of 3000 leaves one digit of a deviation of 1 in float32."""
    rows = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)) + 3000
    layer = nn.BatchNorm1d(5)
    expected = on_one(copy.deepcopy(layer).double(), rows.double(), rows.double())
    found = pair.run(2, rank_tasks.normalised, layer, rows, rows, [32, 32])
    output = torch.cat([each["output"] for each in found])
    torch.testing.assert_close(output.double(), expected["output"], rtol=0, atol=1e-3)
    torch.testing.assert_close(found[0]["0.running_var"].double(), expected["0.running_var"], rtol=1e-4, atol=0)


def test_half_precision_comes_back_as_it_came(pair: Ranks) -> None:
    """As under autocast: float32 weights, bfloat16 rows."""
    rows = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = on_one(nn.BatchNorm1d(5), rows.float(), rows.float())
    found = pair.run(2, rank_tasks.normalised, nn.BatchNorm1d(5), rows, rows, [4, 4])
    output, gradient = (torch.cat([each[part] for each in found]) for part in ("output", "gradient"))
    assert output.dtype == gradient.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected["output"], rtol=0, atol=0.02)
    torch.testing.assert_close(gradient.float(), expected["gradient"], rtol=0, atol=0.02)


def test_names_weights_and_evaluation_stay() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.Flatten(), nn.LazyLinear(2))
    images = torch.randn(6, 1, 5, 5)
    net(images)
    before, expected = copy.deepcopy(net.state_dict()), net.eval()(images)
    assert synchronise(net, CPU) is net
    assert isinstance(net.get_submodule("1.0"), SyncBatchNorm)
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(net(images), expected)


def test_the_activation_of_timms_layers_stays_on_cuda_too() -> None:
    """torch's own conversion drops it; no CUDA device is needed to see that."""
    net = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    layers = sum(isinstance(each, BatchNormAct2d) for each in net.modules())
    assert layers > 10
    synchronise(net, torch.device("cuda"))
    converted = [each for each in net.modules() if isinstance(each, SyncBatchNormAct)]
    assert len(converted) == layers
    assert any(isinstance(each.act, nn.ReLU6) for each in converted)
