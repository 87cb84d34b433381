"""The launches that :mod:`benchmarks.static` compiles: every operator on every shape, and what the shapes leave out.

The operators run on meta tensors and their launches are recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import SHAPES
from codmd import conventions
from codmd.kernels import backend
from codmd.kernels.launch import Launch, recording
from codmd.kernels.limits import MOST_WHOLE
from codmd.ops.contract import Attention, Call, Found, Grid, Numbers, Objective, Relation, Upstream

MEAN = (1, 1)
NUMBERS = Numbers(real_scale=3.5, fake_scale=3.5, relation_weight=0.1)


def numbers(scheduled: bool) -> Numbers | Tensor:
    return torch.empty(len(NUMBERS), device="meta") if scheduled else NUMBERS


def latents(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """(student, real, fake) without memory."""
    student, real, fake = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(3))
    return student, real, fake


def gradient_launches(call: Call, found: Found) -> None:
    total = torch.empty((), device="meta")
    write = backend.whole_gradient if call.pool is None else backend.gradient
    write(torch.empty_like(call.student), Upstream(total, None, None, None), call, found)


def relation_launches(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    pool: Grid | None = MEAN,
    layout: str = "bfchw",
    masked: bool = False,
    frame: bool = True,
    scheduled: bool = False,
) -> list[Launch]:
    """The launches of the relation loss, forward and backward."""
    samples, frames = shape[0], shape[1] if layout == "bfchw" else shape[2]
    mask = torch.empty((samples, frames), dtype=torch.bool, device="meta") if masked else None
    call = Relation(*latents(shape, dtype), mask, layout, pool, True, frame, numbers(scheduled))
    with recording() as launches:
        gradient_launches(call, backend.relation(call))
    return launches


def gathered_launches(rows: int, features: int) -> list[Launch]:
    """The launches of the batch relation after a gather of ``rows`` vectors."""
    call = Relation(*latents((1, 1, features, 1, 1)), None, "bfchw", MEAN, True, False, NUMBERS)
    with recording() as launches:
        pending = backend.features(call)
        gathered = torch.empty((rows, 3 * features + 1), device="meta")
        backend.gathered(call, pending, gathered, 0, 1.0)
    return launches[1:]


def before_gather_launches(shape: tuple[int, ...], pool: Grid | None = MEAN) -> list[Launch]:
    """The launches of the relation loss on one of several processes, before their gather."""
    with recording() as launches:
        backend.features(Relation(*latents(shape), None, "bfchw", pool, True, True, NUMBERS))
    return launches


def objective(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    convention: str = "self_forcing",
    flow: bool = False,
    pool: Grid = MEAN,
    relation: bool = True,
    scheduled: bool = False,
    decoupled: bool = False,
) -> Objective:
    """The CoDMD loss with teacher guidance, of a second level if ``decoupled``; the DMD loss unless ``relation``."""
    student, real, fake = latents(shape, dtype)
    uncond, noisy = torch.empty_like(student), torch.empty_like(student) if flow else None
    sigma = torch.empty(shape[:2], device="meta") if flow else None
    guidance = (None, uncond, None) if decoupled else (uncond, None, noisy)
    second = (torch.empty_like(student), torch.empty_like(student)) if decoupled else (None, None)
    return Objective(
        student, real, fake, *guidance, sigma, None, None, None, *second, "bfchw",
        conventions.resolve(convention), relation, pool, True, True, numbers(scheduled),
    )  # fmt: skip


def codmd_gathered_launches(shape: tuple[int, ...], ranks: int) -> list[Launch]:
    """The forward launches of ``codmd_loss`` on one of ``ranks`` processes."""
    call = objective(shape)
    with recording() as launches:
        pending = backend.features(call)
        gathered = pending.rows.new_empty(ranks * shape[0], pending.rows.shape[1])
        backend.gathered(call, pending, gathered, 0, 1.0)
    return launches


def codmd_launches(shape: tuple[int, ...], *arguments: Any, **options: Any) -> list[Launch]:
    """The launches of :func:`objective`, forward and backward."""
    call = objective(shape, *arguments, **options)
    with recording() as launches:
        gradient_launches(call, backend.objective(call, True))
    return launches


def attention_launches(
    queries: int,
    keys: int,
    head: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    tangents: str = "qkv",
    heads: int = 12,
) -> list[Launch]:
    """The launch of ``attention_jvp`` in the memory order of Wan's network; ``tangents`` names those that there are."""
    q, k, v = (torch.empty(1, n, heads, head, dtype=dtype, device="meta") for n in (queries, keys, keys))
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    dots = (tensor if name in tangents else None for name, tensor in zip("qkv", (q, k, v), strict=True))
    with recording() as launches:
        backend.attention_jvp(Attention(q, k, v, *dots))
    return launches


def _on_every_shape() -> dict[str, Callable[[], list[Launch]]]:
    found: dict[str, Callable[[], list[Launch]]] = {}
    for name, shape in SHAPES.items():
        found[f"relation, {name}"] = partial(relation_launches, shape)
        if max(shape[:2]) <= MOST_WHOLE:
            found[f"every pixel, {name}"] = partial(relation_launches, shape, pool=None)
        found[f"dmd, {name}"] = partial(codmd_launches, shape, relation=False)
        found[f"codmd, {name}"] = partial(codmd_launches, shape)
    return found


def _of_every_convention() -> dict[str, Callable[[], list[Launch]]]:
    shape = SHAPES["wan-480p-b2"]
    return {
        f"dmd, {name}": partial(codmd_launches, shape, convention=name, relation=False)
        for name, convention in conventions.NAMED.items()
        if convention.fusable
    }


TOKENS, TEXT = 32760, 512
"""Of Wan's self attention at 480p and 81 frames, and of its prompts."""

HALF, SINGLE = torch.float16, torch.float32
CASES: dict[str, Callable[[], list[Launch]]] = (
    _on_every_shape()
    | _of_every_convention()
    | {
        "480p float32, batch 8": lambda: relation_launches((8, 21, 16, 60, 104), SINGLE),
        "480p float16, bcfhw, masked": lambda: relation_launches((2, 16, 21, 60, 104), HALF, MEAN, "bcfhw", True),
        "480p, 4 x 4 regions": lambda: relation_launches((2, 21, 16, 60, 104), pool=(4, 4)),
        "720p, 161 frames, batch 8": lambda: relation_launches((8, 41, 16, 90, 160)),
        "240 latent frames, batch 2": lambda: relation_launches((2, 240, 16, 60, 104)),
        "odd sizes": lambda: relation_launches((2, 5, 3, 7, 13), SINGLE),
        "before a gather": lambda: before_gather_launches((1, 21, 16, 60, 104)),
        "gathered, 128 samples": lambda: gathered_launches(128, 16),
        "every pixel float32, batch 8": lambda: relation_launches((8, 21, 16, 60, 104), SINGLE, None),
        "every pixel float16, bcfhw, batch 4, masked": lambda: relation_launches(
            (4, 16, 21, 60, 104), HALF, None, "bcfhw", True
        ),
        "every pixel, batch 8, samples alone": lambda: relation_launches((8, 21, 16, 60, 104), pool=None, frame=False),
        "every pixel, odd sizes, batch 8": lambda: relation_launches((8, 21, 3, 7, 13), pool=None),
        "every pixel, pairs of elements, batch 8": lambda: relation_launches((8, 21, 3, 7, 14), pool=None),
        "every pixel, 16 frames, batch 16": lambda: relation_launches((16, 16, 16, 60, 104), pool=None),
        "every pixel, 161 frames, batch 2": lambda: relation_launches((2, 41, 16, 60, 104), pool=None),
        "every pixel, 161 frames, batch 8": lambda: relation_launches((8, 41, 16, 60, 104), pool=None),
        "every pixel, 120 frames": lambda: relation_launches((1, 120, 16, 60, 104), SINGLE, None),
        "every pixel, before a gather": lambda: before_gather_launches((1, 21, 16, 60, 104), None),
        "every pixel, gathered, 32 samples": lambda: gathered_launches(32, 99840),
        "codmd, 480p float32, flow, batch 2, 2 x 2 regions": lambda: codmd_launches(
            (2, 21, 16, 60, 104), SINGLE, flow=True, pool=(2, 2)
        ),
        "codmd, 161 frames, 16 processes": lambda: codmd_gathered_launches((1, 41, 16, 60, 104), 16),
        "relation, scheduled numbers": lambda: relation_launches((1, 21, 16, 60, 104), scheduled=True),
        "every pixel, scheduled numbers": lambda: relation_launches((2, 21, 16, 60, 104), pool=None, scheduled=True),
        "codmd, scheduled numbers": lambda: codmd_launches((2, 41, 16, 60, 104), scheduled=True),
        "dmd, decoupled": lambda: codmd_launches((2, 21, 16, 60, 104), relation=False, decoupled=True),
        "codmd, decoupled": lambda: codmd_launches((2, 21, 16, 60, 104), decoupled=True),
        "codmd, decoupled, blocks, float32, 2 x 2 regions, scheduled numbers": lambda: codmd_launches(
            (2, 21, 16, 60, 104), SINGLE, "longlive", pool=(2, 2), scheduled=True, decoupled=True
        ),
        "attention_jvp, 480p": lambda: attention_launches(TOKENS, TOKENS),
        "attention_jvp, 480p, text": lambda: attention_launches(TOKENS, TEXT, tangents="q"),
        "attention_jvp, float16, heads of 64": lambda: attention_launches(4096, 4096, 64, HALF),
        "attention_jvp, heads of 72": lambda: attention_launches(256, 256, 72),
        "attention_jvp, float32": lambda: attention_launches(4096, 4096, dtype=SINGLE),
        "dmd, rcm, flow": lambda: codmd_launches((2, 21, 16, 60, 104), convention="rcm", flow=True, relation=False),
    }
)
"""What records the launches of each case, by its name."""
