"""Heads against separate linear layers written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from iic_dist.errors import UsageError
from iic_dist.models import ProjectionHead, SubHeads

B, F, H, K = 7, 6, 3, 4


def test_sub_heads_equal_separate_linears() -> None:
    head = SubHeads(F, H, K).double()
    separate = [nn.Linear(F, K).double() for _ in range(H)]
    with torch.no_grad():
        for h, linear in enumerate(separate):
            for k in range(K):
                head.linear.weight[h * K + k] = linear.weight[k]
                head.linear.bias[h * K + k] = linear.bias[k]
    features = torch.randn(B, F, dtype=torch.float64)
    logits = head(features)
    assert logits.shape == (B, H, K)
    for h, linear in enumerate(separate):
        torch.testing.assert_close(logits[:, h], linear(features))


def test_a_sub_head_gets_gradient_from_its_own_logits_only() -> None:
    head = SubHeads(F, H, K)
    head(torch.randn(B, F))[:, 1].square().sum().backward()
    rows = head.linear.weight.grad.abs().sum(dim=1) > 0
    assert rows.tolist() == [K <= row < 2 * K for row in range(H * K)]


def test_sub_heads_start_as_published() -> None:
    torch.manual_seed(0)
    head = SubHeads(512, 5, 70)
    assert head.linear.weight.std().item() == pytest.approx(512**-0.5, rel=0.02)
    assert SubHeads(512, 5, 70, std=0.01).linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not head.linear.bias.any()


def test_linear_projection_is_a_linear() -> None:
    head = ProjectionHead(F, 5)
    features = torch.randn(B, F)
    (weight, bias) = head.parameters()
    torch.testing.assert_close(head(features), features @ weight.T + bias)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_mlp_projection_equals_its_formula(norm: str) -> None:
    torch.manual_seed(0)
    head = ProjectionHead(F, 5, hidden=32, norm=norm).double()
    features = torch.randn(B, F, dtype=torch.float64)
    first, last = (module for module in head.modules() if isinstance(module, nn.Linear))
    hidden = features @ first.weight.T
    if norm == "batch":
        hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
    elif norm == "group":  # of 16 features
        groups = hidden.view(B, 2, 16)
        groups = (groups - groups.mean(2, True)) / (groups.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        hidden = groups.view(B, 32)
    else:
        hidden = hidden + first.bias
    torch.testing.assert_close(head(features), hidden.clamp(min=0) @ last.weight.T + last.bias)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SubHeads(F, 0, 10), "0 sub-heads and 10 clusters"),
        (lambda: SubHeads(F, 5, 1), "5 sub-heads and 1 clusters"),
        (lambda: ProjectionHead(F, 0), "width 0"),
        (lambda: ProjectionHead(F, 8, hidden=0), "hidden 0"),
        (lambda: ProjectionHead(F, 8, hidden=8, norm="layer"), "norm is 'layer'"),
    ],
)
def test_misuse_is_a_usage_error(make: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
