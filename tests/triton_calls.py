"""Calls of the operators' contract, for tests that ask a backend directly."""

from __future__ import annotations

import torch
from torch import Tensor

from codmd import conventions
from codmd.conventions import Convention
from codmd.kernels.plans import Plans
from codmd.ops.contract import Backend, Call, Found, Grid, Numbers, Objective, Relation, Upstream


def fresh_plans(monkeypatch) -> Plans:
    """An empty plan cache for one test: its plans may be of changed constants."""
    cache = Plans()
    for passes in ("pooled.passes", "dmd.passes", "whole.passes", "whole.together"):
        monkeypatch.setattr(f"codmd.kernels.{passes}.PLANS", cache)
    return cache


def grid(pool: str | Grid | None) -> Grid | None:
    return (1, 1) if pool == "mean" else pool


def relation_call(
    latents: tuple[Tensor, ...] | list[Tensor],
    pool: str | Grid | None = "mean",
    mask: Tensor | None = None,
    layout: str = "bfchw",
    weights: tuple[float, float] = (1.0, 1.0),
    temperature: float = 0.1,
) -> Relation:
    """The relation of student, real and fake; ``weights`` of batch and frame term, 0 leaves one out."""
    batch, frame = weights
    numbers = Numbers(temperature, batch, frame)
    return Relation(*latents, mask, layout, grid(pool), batch != 0, frame != 0, numbers)


def objective_call(
    student: Tensor,
    arguments: dict[str, Tensor | None],
    convention: str | Convention = "self_forcing",
    *,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    frame_mask: Tensor | None = None,
    layout: str = "bfchw",
    related: bool = True,
    pool: str | Grid = "mean",
    batch: bool = True,
    frame: bool = True,
    numbers: Numbers | Tensor | None = None,
) -> Objective:
    """The DMD loss of named predictions and, unless ``related`` is false, their relation."""
    names = "real", "fake", "real_uncond", "fake_uncond", "noisy", "sigma"
    rule = conventions.resolve(convention) if isinstance(convention, str) else convention
    numbers = Numbers(real_scale=3.5, fake_scale=0.5) if numbers is None else numbers
    return Objective(
        student, *(arguments.get(name) for name in names), mask, sample_weight, frame_mask, None, None, layout, rule,
        related, grid(pool), batch, frame, numbers,
    )  # fmt: skip


def gradient(
    backend: Backend, call: Call, found: Found, out: Tensor | None = None, **upstream: float | Tensor | None
) -> Tensor:
    """What ``backend`` writes into ``out``, or into fresh memory, for ``upstream`` gradients by term."""
    out = torch.empty_like(call.student) if out is None else out
    given = {name: value if value is None else torch.as_tensor(value) for name, value in upstream.items()}
    write = backend.whole_gradient if call.pool is None else backend.gradient
    write(out, Upstream(*(given.get(name) for name in Upstream._fields)), call, found)
    return out
