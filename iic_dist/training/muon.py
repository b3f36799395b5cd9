"""Muon: momentum whose matrices are made orthogonal, for the backbone; Adam for all else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

NEWTON_SCHULZ_STEPS = 3
"""Of the iteration that makes a matrix nearly orthogonal; three for kernels, as in airbench."""

ADAM_SHARE = 0.015
"""Learning rate of Adam's parameters, in learning rates of Muon."""

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.AdamW):
    """Moves matrices along the nearest orthogonal matrix to their momentum, and other parameters as Adam does.

    Each direction that a layer could learn in gets a step of the same length, where the gradient of a convolution has a
    few long ones. A kernel (out, in, h, w) is the matrix (out, in h w), and keeps the Frobenius norm that it began
    with, so that a step turns it by the same angle early and late. As the fused optimizers of torch, this one leaves
    all as it is in a step in which its attribute `found_inf` is not 0, and does not wait for the device.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; with three iterations and
    kernels of a constant norm as in their airbench for CIFAR-10.

    Args:
        matrices: Parameters of two and more dimensions, which get orthogonal steps.
        others: Groups for Adam, with `weight_decay`.
        lr: Spectral norm of a step, about, times sqrt(rows / columns) where that is above 1; Adam's is ADAM_SHARE of
            it.
        momentum: From 0 to below 1; Nesterov's.
        weight_decay: Share of a matrix, times lr, that each step takes from it; kernels get it back.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        groups = [
            {"params": list(matrices), "weight_decay": weight_decay, "orthogonal": True, "lr_share": 1.0},
            *({**group, "orthogonal": False, "lr_share": ADAM_SHARE} for group in others),
        ]
        super().__init__([group for group in groups if group["params"]], lr=lr, fused=True)
        for group in self.param_groups:
            group["momentum"] = momentum
            group["lr"] = lr * group["lr_share"]
            if group["orthogonal"]:
                for parameter in group["params"]:
                    state = self.state[parameter]
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                    if parameter.dim() > 2 and parameter.any():  # a kernel of zeros is to leave them
                        state["norm"] = parameter.detach().norm()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state; Adam's own way, for states of old torch, would look for its count of steps in every one."""
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None, "losses are computed before the step"
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        found_inf = cast("Tensor | None", getattr(self, "found_inf", None))
        for group in groups:
            if group["orthogonal"]:
                self._step_matrices(group, None if found_inf is None else found_inf > 0)

    def _step_matrices(self, group: dict[str, Any], skipped: Tensor | None) -> None:
        lr, momentum = group["lr"], group["momentum"]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            buffer = state["momentum_buffer"]
            mean = momentum * buffer + parameter.grad
            direction = orthogonal((parameter.grad + momentum * mean).flatten(1))
            rows, columns = direction.shape
            step = (lr * max(1.0, rows / columns) ** 0.5) * direction.view_as(parameter)
            new = parameter * (1 - lr * group["weight_decay"]) - step
            if "norm" in state:
                new *= state["norm"] / new.norm()
            if skipped is not None:  # what is not finite must not come through, so no product with 0
                new, mean = torch.where(skipped, parameter, new), torch.where(skipped, buffer, mean)
            parameter.copy_(new)
            buffer.copy_(mean)


def orthogonal(matrix: Tensor, steps: int = NEWTON_SCHULZ_STEPS) -> Tensor:
    """Return U V^T, nearly, of a matrix U S V^T, by Newton-Schulz iteration in its own dtype.

    Args:
        matrix: (rows, columns), floating point. Zeros give zeros.
        steps: Iterations; singular values above 1 / 3.4^steps of the Frobenius norm come near 1 (0.7 to 1.2).
    """
    a, b, c = _COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T
