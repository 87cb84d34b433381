"""What docs/conventions.md says of data parallelism, on two processes: per rank, 1/W, or that of one process."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from workers import run_processes

from codmd import ops
from codmd.conventions import NAMED, Convention

BUILDER = Path(__file__).parents[1] / "docs" / "build_conventions.py"
LOCAL, SHAPE = 2, (6, 3, 4, 5)


def after_averaging(convention: Convention, masked: bool) -> str:
    """The page's own claim."""
    spec = importlib.util.spec_from_file_location("build_conventions", BUILDER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.after_averaging(convention, masked)


def gradient(convention: Convention, weights, samples: slice, mask) -> torch.Tensor:
    """∂L/∂weights of the loss of ``samples``, students of which are weights · noise."""
    generator = torch.Generator().manual_seed(0)
    shape = 2 * LOCAL, *SHAPE
    noise, real, change, other = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    scale = torch.arange(1.0, 2 * LOCAL + 1, dtype=torch.float64).reshape(-1, 1, 1, 1, 1)  # no two samples alike
    student, real = (scale * v for v in (noise, real))
    leaf = weights.clone().requires_grad_()
    loss = ops.dmd_loss(
        (leaf * student)[samples], real=real[samples], fake=(real + 0.3 * change)[samples],
        real_uncond=(real + 0.2 * other)[samples], guidance=2.5, convention=convention,
        mask=None if mask is None else mask[samples],
    )  # fmt: skip
    return torch.autograd.grad(loss, leaf)[0]


def every_convention(rank: int, world: int) -> None:
    weights = torch.linspace(0.5, 1.5, SHAPE[0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    own, everything = slice(rank * LOCAL, (rank + 1) * LOCAL), slice(None)
    unequal = torch.rand(2 * LOCAL, *SHAPE, generator=torch.Generator().manual_seed(1)) > 0.3
    unequal[:LOCAL, 1:] = False
    for name, convention in NAMED.items():
        convention = replace(convention, arithmetic="float64", layout="bfchw")
        for mask in (None, unequal):
            claim = after_averaging(convention, mask is not None)
            mine = gradient(convention, weights, own, mask)
            averaged = mine.clone()
            dist.all_reduce(averaged)
            averaged /= world
            whole = gradient(convention, weights, everything, mask)
            where = f"{name}, {'masked' if mask is not None else 'no mask'}, rank {rank}: {claim}"
            if claim == "per rank":
                assert (averaged - whole).norm() > 0.02 * whole.norm(), where
            else:
                expected = whole / world if claim == "1/W of one process" else whole
                torch.testing.assert_close(averaged, expected, rtol=1e-9, atol=1e-12, msg=where)
            if claim == "per rank" and convention.norm_scope != "batch":
                counts = torch.stack([part.sum() for part in mask.split(LOCAL)]).double()
                weighed = mine * counts[rank] / counts.mean()
                dist.all_reduce(weighed)
                torch.testing.assert_close(weighed / world, whole, rtol=1e-9, atol=1e-12, msg=where)


def test_what_averaging_over_ranks_makes_of_every_convention_is_what_the_page_says():
    run_processes(every_convention, 2)
