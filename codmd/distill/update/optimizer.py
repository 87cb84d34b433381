"""One network's optimizer behind a guard: an update that is not finite changes nothing, on any process."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from codmd.models.base import VideoDenoiser


class NonFiniteRun(FloatingPointError):
    """Too many updates of one network in a row had a loss or a gradient that is not finite."""


class Step(NamedTuple):
    """What one update did: gradient norm before clipping (0-dim), and whether the update was skipped."""

    grad_norm: Tensor
    skipped: bool


class GuardedAdamW:
    """AdamW with clipping; skips, counts, and in the end refuses updates that are not finite.

    The state of every parameter exists from the start (zeros, as AdamW itself would begin), so that a checkpoint
    has one layout at every update.

    Args:
        name: of the network, for messages.
        weights: name to trained parameter.
        grad_clip: largest norm of an update's gradient; None leaves it as it is.
        max_nonfinite: skipped updates in a row at which the run ends.
        group: the processes that must agree; None for this one alone.

    Attributes:
        skipped: updates skipped so far.
        in_a_row: updates skipped since the last one that was made.
    """

    def __init__(
        self,
        name: str,
        weights: dict[str, nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        grad_clip: float | None,
        max_nonfinite: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if not weights:
            raise ValueError(f"{name}: has no trainable parameters")
        self.name, self.weights, self.grad_clip = name, weights, grad_clip
        self.max_nonfinite, self.group = max_nonfinite, group
        self.skipped = self.in_a_row = 0
        self.adamw = torch.optim.AdamW(
            list(weights.values()), lr=lr, betas=betas, weight_decay=weight_decay, fused=True
        )
        for weight in weights.values():
            self.adamw.state[weight] = {
                "step": torch.zeros((), dtype=torch.float32, device=weight.device),
                "exp_avg": torch.zeros_like(weight, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(weight, memory_format=torch.preserve_format),
            }

    def step(self, loss: Tensor) -> Step:
        """One update from the gradients that are there; clears them.

        Args:
            loss: 0-dim, this process's; decides, with the gradients of all processes, whether the update is made.

        Raises:
            NonFiniteRun: on every process alike, after `max_nonfinite` skipped updates in a row.
        """
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        finite = torch.isfinite(loss.detach()) & torch.isfinite(norm).to(loss.device)
        if self.group is not None:
            flag = finite.to(torch.int32)
            dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.group)
            finite = flag.bool()
        if finite:
            if self.grad_clip is not None:
                torch.nn.utils.clip_grads_with_norm_(list(self.weights.values()), self.grad_clip, norm)
            self.adamw.step()
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += 1
        self.adamw.zero_grad(set_to_none=True)
        if self.in_a_row >= self.max_nonfinite:
            raise NonFiniteRun(
                f"{self.in_a_row} updates of the {self.name} in a row were not finite (loss {float(loss):.4g}, "
                f"gradient norm {float(norm):.4g}). Continue from before them with a lower learning rate, a smaller "
                "relation_weight or a larger temperature"
            )
        return Step(norm.detach(), not finite)

    def state(self) -> dict[str, Tensor]:
        """Name to tensor of the optimizer's state, in place: what is loaded into them takes effect."""
        return {
            f"{name}.{key}": value
            for name, weight in self.weights.items()
            for key, value in self.adamw.state[weight].items()
        }


def trainable_weights(model: VideoDenoiser) -> dict[str, nn.Parameter]:
    """Name to parameter of what an optimizer updates, in the order of `model.named_parameters()`."""
    trained = {id(weight) for weight in model.trainable_parameters()}
    return {name: weight for name, weight in model.named_parameters() if id(weight) in trained}
