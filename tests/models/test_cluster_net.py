"""ClusterNet: which heads run, one pass of the backbone, and a backbone that is frozen."""

from __future__ import annotations

import copy

import pytest
import torch

from iic_dist.errors import UsageError
from iic_dist.models import ClusterNet, ProjectionHead, SubHeads, build_backbone


def _net(freeze_backbone: bool = False) -> ClusterNet:
    torch.manual_seed(0)
    backbone = build_backbone("small_cnn", in_channels=1, image_size=8, width=4)
    heads = {
        "clustering": SubHeads(backbone.num_features, 2, 10),
        "overclustering": SubHeads(backbone.num_features, 3, 20),
        "contrastive": ProjectionHead(backbone.num_features, 8),
    }
    return ClusterNet(backbone, heads, freeze_backbone)


def test_all_heads_by_default_and_some_on_demand() -> None:
    net = _net().eval()
    images = torch.rand(5, 1, 8, 8)
    outputs = net(images)
    assert {name: tuple(output.shape) for name, output in outputs.items()} == {
        "clustering": (5, 2, 10),
        "overclustering": (5, 3, 20),
        "contrastive": (5, 8),
    }
    some = net(images, ["contrastive", "clustering"])
    assert list(some) == ["contrastive", "clustering"]
    for name, output in some.items():
        assert torch.equal(output, outputs[name])
        assert torch.equal(output, net.heads[name](net.backbone(images)))


def test_the_backbone_runs_once() -> None:
    net = _net()
    calls = []
    net.backbone.register_forward_hook(lambda *args: calls.append(args))
    net(torch.rand(5, 1, 8, 8))
    assert len(calls) == 1


def test_all_parameters_learn_in_a_joint_step() -> None:
    net = _net()
    sum(output.square().sum() for output in net(torch.rand(5, 1, 8, 8)).values()).backward()
    assert [path for path, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_frozen_backbone_stays_as_it_is() -> None:
    net = _net(freeze_backbone=True).train()
    before = copy.deepcopy(net.backbone.state_dict())
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0, weight_decay=0.1)
    head_before = net.heads["clustering"].linear.weight.clone()
    outputs = net(torch.rand(5, 1, 8, 8))
    outputs["clustering"].square().sum().backward()
    optimizer.step()
    assert not any(module.training for module in net.backbone.modules())
    assert net.heads["clustering"].training
    assert all(p.grad is None and not p.requires_grad for p in net.backbone.parameters())
    for path, value in net.backbone.state_dict().items():  # running statistics too
        assert torch.equal(value, before[path]), path
    assert not torch.equal(net.heads["clustering"].linear.weight, head_before)


def test_a_backbone_that_is_not_frozen_follows_the_mode() -> None:
    net = _net()
    assert net.train().backbone.training
    assert not net.eval().backbone.training


def test_unknown_and_missing_heads_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="no head 'cluster': this network has clustering, overclustering"):
        _net()(torch.rand(1, 1, 8, 8), ["cluster"])
    with pytest.raises(UsageError, match="without heads"):
        ClusterNet(build_backbone("small_cnn", in_channels=1, image_size=8), {})
