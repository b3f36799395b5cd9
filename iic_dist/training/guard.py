"""What all ranks must agree on in every step: whether it counts, and whether it is the last one."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from iic_dist import distributed
from iic_dist.errors import RunError
from iic_dist.training.stop import Stopping


class Verdict(NamedTuple):
    """What the ranks agreed on: `skipped` where any of them had a NaN or Inf, `stop` where any was asked to stop."""

    skipped: bool
    stop: bool


class Verdicts:
    """Flags on their way from the device to the host, which reads them late in order not to wait.

    A host that reads the flags of step t after it has queued step t + 1 leaves the device something to do.

    Args:
        device: Where the flags are.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._coming: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def post(self, flags: Tensor) -> None:
        """Send off the flags (skipped, stop) of a step: floats, (2,), above 0 where any rank raised them."""
        event = torch.cuda.Event() if self._on_cuda else None
        self._coming.append((flags.to("cpu", non_blocking=self._on_cuda), event))
        if event is not None:
            event.record()

    def read(self, leave: int) -> list[Verdict]:
        """Return the verdicts that have not been read yet, oldest first, but for the newest `leave`.

        Sync: waits for the device to come as far as the newest one that is read.
        """
        verdicts = []
        while len(self._coming) > leave:
            flags, event = self._coming.popleft()
            if event is not None:
                event.synchronize()
            skipped, stop = flags.tolist()
            verdicts.append(Verdict(skipped > 0, stop > 0))
        return verdicts


class StepGuard:
    """Keeps a step with a NaN or Inf from doing harm, on all ranks alike, without waiting for the device.

    Between `begin` and `end` lie the forward and the backward pass. `end` averages the running statistics of batch
    normalisation over the ranks, so that these are the same everywhere and no rank has a state of its own; in the
    same collective travel two flags. Where any rank's loss or gradient is not finite, the statistics go back to
    what they were, and the optimizer, which must be a fused one, is told to leave weights and moments alone.

    Args:
        model: Its floating buffers must be of one dtype.
        optimizer: Made with `fused=True`.
        device: Of the model.
        max_skipped: Steps in a row that may be skipped.

    Attributes:
        skipped: Steps that were skipped, of those that `heed` has read.
        skipped_in_a_row: Those of them since the last one that was not.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, max_skipped: int
    ) -> None:
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self.optimizer, self.device, self.max_skipped = optimizer, device, max_skipped
        self.skipped = self.skipped_in_a_row = 0
        self._verdicts = Verdicts(device)

    def _flat_statistics(self) -> Tensor:
        empty = torch.empty(0, device=self.device)
        return torch.cat([buffer.reshape(-1) for buffer in self.statistics] or [empty])

    def begin(self) -> None:
        """Remember the running statistics before the forward pass."""
        self._before = self._flat_statistics()

    def end(self, loss: Tensor, stop: bool, clip_norm: float = 0.0) -> Tensor:
        """Judge a step after its backward pass, and prepare the optimizer for it.

        Args:
            loss: (), of this rank's step.
            stop: Whether this rank was asked to stop.
            clip_norm: Scale the gradient down to this norm where it is longer; 0 = no limit.

        Returns:
            (), bool, on the device: whether the step is skipped.

        Collective: all ranks must call; reduces the running statistics and two floats.
        """
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if clip_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, clip_norm, norm)
        bad = ~(loss.isfinite() & norm.isfinite())
        flags = torch.stack([bad, torch.full_like(bad, stop)]).to(self._before.dtype)
        sums = distributed.all_reduce_sum(torch.cat([self._flat_statistics(), flags]))
        means, flags = (sums[:-2] / distributed.world_size(), sums[-2:])
        skipped = flags[0] > 0
        if self.statistics:
            kept = torch.where(skipped, self._before, means).split([buffer.numel() for buffer in self.statistics])
            torch._foreach_copy_(
                self.statistics, [part.view_as(b) for part, b in zip(kept, self.statistics, strict=True)]
            )
        # As torch.amp.GradScaler tells a fused optimizer, which else has no way to skip without the host.
        self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self._verdicts.post(flags)
        return skipped

    def heed(self, leave: int) -> None:
        """Count the skipped steps, and end the run where the ranks agreed to, in all steps but the newest `leave`.

        Raises:
            Stopping: a rank was asked to stop.
            RunError: more than `max_skipped` steps in a row were skipped.

        Sync: waits for the device to come as far as the newest step that is read.
        """
        verdicts = self._verdicts.read(leave)
        for verdict in verdicts:
            self.skipped += verdict.skipped
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if verdict.skipped else 0
        if self.skipped_in_a_row > self.max_skipped:
            raise RunError(
                f"the loss or the gradient of {self.skipped_in_a_row} steps in a row was not finite "
                f"(train.max_skipped_steps={self.max_skipped}); the checkpoints are good: go on from there with a "
                "lower optim.lr or with optim.clip_norm=1, and look for weights or pixels that are not finite"
            )
        if any(verdict.stop for verdict in verdicts):
            raise Stopping

    def state_dict(self) -> dict[str, int]:
        """Return the counts, as far as `heed` has read."""
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on counting from where `state_dict` was taken."""
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]


class Poll:
    """Asks all ranks, in work that is no training step, whether any of them was asked to stop.

    Args:
        device: That a collective may use.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._verdicts = Verdicts(device)

    def stop(self, asked: bool) -> bool:
        """Return whether any rank was asked to stop when it last called.

        Collective: all ranks must call, equally often; reduces two floats.
        """
        flags = torch.full((2,), float(asked), device=self.device)
        flags[0] = 0
        self._verdicts.post(distributed.all_reduce_sum(flags))
        return any(verdict.stop for verdict in self._verdicts.read(leave=1))

    def heed(self, received: str | None) -> None:
        """Raise `Stopping` where any rank had received a signal when it last called.

        Collective: as `stop`.
        """
        if self.stop(received is not None):
            raise Stopping
