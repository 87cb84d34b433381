"""Calls of the contract for tests that talk to a backend itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType

import cuda_simulation
import pytest
import torch
from cases import frame_mask, latents
from torch import Tensor

from codmd.conventions import Convention, self_forcing
from codmd.ops.backends import cpp, cuda
from codmd.ops.contract import Call, Found, Grid, Numbers, Objective, Relation, Upstream

EXTENSIONS = [
    pytest.param(cpp, id="cpp", marks=pytest.mark.skipif(cpp.load_error is not None, reason=str(cpp.load_error))),
    pytest.param(cuda, id="cuda", marks=pytest.mark.skipif(not cuda_simulation.COMPILER, reason="no C++ compiler")),
]
ONE = Upstream(*(torch.ones(()) for _ in range(4)))
BLOCKS = replace(self_forcing, norm_scope="block", norm_block=2, independent_first_frame=True)


@contextmanager
def simulated(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """``run``, with simulated kernels where it is the CUDA backend."""
    if run is cuda:
        monkeypatch.setattr(cuda, "_C", cuda_simulation.module())
        monkeypatch.setattr(cuda, "_tickets", {})
    yield run


def relation_call(
    pool: Grid | None = (1, 1), shape: tuple[int, ...] = (3, 5, 4, 6, 7), dtype: torch.dtype = torch.float32,
    scale: float = 1.0, masked: bool = True, temperature: float = 0.1,
) -> Relation:  # fmt: skip
    student, real, fake = (scaled(v, scale, dtype) for v in latents(shape, perturbation=0.3))
    mask = frame_mask(*shape[:2]) if masked else None
    return Relation(student, real, fake, mask, "bfchw", pool, True, True, Numbers(temperature, 0.6, 1.3))


def objective_call(
    convention: Convention = BLOCKS, related: bool = True, shape: tuple[int, ...] = (3, 5, 4, 6, 7),
    dtype: torch.dtype = torch.float32, scale: float = 1.0, pool: Grid = (2, 3), plain: bool = False,
    decoupled: bool = False,
) -> Objective:  # fmt: skip
    """With every optional tensor that goes with it, or, where ``plain``, with unguided predictions alone."""
    generator = torch.Generator().manual_seed(1)
    student, real, fake = (scaled(v, scale, dtype) for v in latents(shape, perturbation=0.3))
    others = [scaled(torch.randn(shape, generator=generator), scale, dtype) for _ in range(3)]
    sigma = torch.rand(shape[:2], generator=generator)
    mask = torch.rand(shape, generator=generator) > 0.3
    weight = torch.rand(shape[0], generator=generator) + 0.5
    optional = (None,) * 6 if plain else (*others, sigma, mask, weight)
    valid = None if plain else frame_mask(*shape[:2])
    augment: tuple[Tensor | None, Tensor | None] = (None, None)
    if decoupled:
        optional, augment = (None, others[1], None, None, mask, weight), (others[0], others[2])
    numbers = Numbers(0.1, 0.6, 1.3, 0.2, 2.5, 0.5)
    return Objective(
        student, real, fake, *optional, valid, *augment, "bfchw", convention, related, pool, True, True, numbers
    )


def scaled(latents: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return (latents.detach().double() * scale).to(dtype)


def forward(run: ModuleType, call: Call, separate: bool = True) -> Found:
    return run.relation(call) if isinstance(call, Relation) else run.objective(call, separate)


def gradient(run: ModuleType, call: Call, found: Found, upstream: Upstream = ONE) -> Tensor:
    """What the operators' backward pass asks for."""
    out = torch.full_like(call.student, torch.nan)
    if isinstance(call, Relation) and call.pool is None:
        run.whole_gradient(out, upstream, call._replace(real=out, fake=out), found)
    elif isinstance(call, Relation):
        run.gradient(out, upstream, call._replace(student=out, real=out, fake=out), found)
    else:
        run.gradient(out, upstream, call._replace(student=out, noisy=None, sample_weight=None), found)
    return out


def widened(call: Call) -> Call:
    """The call in float64, for the reference."""
    wide = {name: getattr(call, name) for name in call._fields}
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in wide.items()}
    return type(call)(**wide)
