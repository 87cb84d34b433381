"""The contract between the operators and a backend: the call, the results, the functions of a backend.

A call is a NamedTuple of checked arguments. A backend is a module with the functions of :class:`Backend`; it allocates
what it returns, names dtype and device of every buffer, and neither waits for a device nor looks at a device's values.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from codmd.conventions import Convention

Grid = tuple[int, int]
"""Rows and columns of regions whose means are the features; ``(1, 1)`` is one mean over all pixels."""


class Numbers(NamedTuple):
    """The numbers of a call that a schedule may change. Guidance scales are in the cond form, k in c + k(c - u)."""

    temperature: float = 0.1
    batch_weight: float = 1.0
    frame_weight: float = 1.0
    relation_weight: float = 1.0
    real_scale: float = 0.0
    fake_scale: float = 0.0


class Relation(NamedTuple):
    """The relation term of one call.

    ``numbers`` is a :class:`Numbers`, or a float32 tensor ``[6]`` of the same order on the latents' device, which
    nobody but a kernel reads. ``batch`` and ``frame`` say which terms are computed, whatever their weights.
    """

    student: Tensor
    """``[B, F, C, H, W]`` or ``[B, C, F, H, W]`` as ``layout`` says, any strides; so are the other latents."""
    real: Tensor
    fake: Tensor
    frame_mask: Tensor | None
    """bool ``[B, F]``."""
    layout: str
    """``"bfchw"`` or ``"bcfhw"``."""
    pool: Grid | None
    """None keeps every pixel."""
    batch: bool
    frame: bool
    numbers: Numbers | Tensor


class Objective(NamedTuple):
    """The DMD loss of one call and, unless ``related`` is false, the pooled relation of its guided predictions."""

    student: Tensor
    real: Tensor
    fake: Tensor
    real_uncond: Tensor | None
    fake_uncond: Tensor | None
    noisy: Tensor | None
    """With ``sigma``: the predictions are velocities and x0 = noisy - sigma·v."""
    sigma: Tensor | None
    """``[B, F]`` in the compute dtype."""
    mask: Tensor | None
    """bool, expanded to the latents' shape: the elements that DMD counts."""
    sample_weight: Tensor | None
    """``[B]`` in the compute dtype, contiguous."""
    frame_mask: Tensor | None
    augment_real: Tensor | None
    """With ``augment_uncond`` the loss is decoupled: g = nan((f - c₁)/N(x, c₁)) - nan(k(c₂ - u₂)/N(x, c₂)).

    c₁ is ``real`` (``real_uncond`` is None), c₂ and u₂ these two, k ``real_scale``; the relation takes f and c₁.
    """
    augment_uncond: Tensor | None
    layout: str
    convention: Convention
    """A fusable one."""
    related: bool
    pool: Grid
    batch: bool
    frame: bool
    numbers: Numbers | Tensor


Call = Relation | Objective


class Attention(NamedTuple):
    """Attention with tangents of one call; all tensors have four axes, any strides, and one dtype."""

    q: Tensor
    """``[B, H, N, D]``."""
    k: Tensor
    """``[B, H, M, D]``, as ``v`` is."""
    v: Tensor
    q_dot: Tensor | None
    k_dot: Tensor | None
    v_dot: Tensor | None


class Gather(NamedTuple):
    """Whose samples form the batch relation: the name of a process group, ``""`` for this process alone."""

    group: str
    batch_grad: str


class Upstream(NamedTuple):
    """Gradients of the terms, 0-dim on the latents' device; None where none arrives."""

    total: Tensor | None
    dmd: Tensor | None
    batch: Tensor | None
    frame: Tensor | None


class Found(NamedTuple):
    """What a forward pass found, in the compute dtype. Empty ``[0]`` where a term is not computed.

    terms: ``[3]`` of a relation: total, batch, frame; ``[5]`` of an objective: total, dmd, batch, frame, mean|g|.
    norms: one value a segment: ``[B]``, ``[1]`` or ``[B, segments]`` as the convention's scope says; None without DMD.
        A decoupled loss has two sets, ``[2, ...]``: N(x, c₁), then N(x, c₂).
    factors: ``[B]``: ∂L/∂x = upstream · factor · G(f - r, norm); None without DMD.
    frame_grad: ∂(frame term)/∂φ ``[B, F, K]``, or M/B ``[B, F, F]`` for every pixel.
    batch_grad: ∂(batch term)/∂ψ ``[B, K]`` of this process's samples, or as :meth:`Backend.whole_batch_grad` says.
    """

    terms: Tensor
    norms: Tensor | None
    factors: Tensor | None
    frame_grad: Tensor
    batch_grad: Tensor


class Pending(NamedTuple):
    """A forward pass that waits for the rows of other processes."""

    rows: Tensor
    """``[B, 3K + 1]``: ψ of student, real and fake - real, then the number of valid frames."""
    partial: Found
    """What is found without the batch term; the total among ``terms`` may be missing."""
    state: object = None
    """For :meth:`Backend.gathered` of the backend that made it; None where ``partial`` holds all."""


class Backend(Protocol):
    """One implementation of the operators."""

    load_error: str | None
    """Why it cannot be used here, or None."""

    def relation(self, call: Relation) -> Found:
        """The relation term of one process."""

    def objective(self, call: Objective, separate: bool) -> Found:
        """The DMD loss, and the relation where ``related``, of one process, from one read of the latents.

        Unless ``separate``, the results may be flat, padded pieces of one allocation, for :meth:`gradient` alone.
        """

    def features(self, call: Call) -> Pending:
        """The stage before a gather: everything but the batch term."""

    def gathered(self, call: Call, pending: Pending, rows: Tensor, first: int, scale: float) -> Found:
        """The stage after a gather of all processes' ``rows``; this one's begin at ``first``.

        The batch term's gradient is multiplied by ``scale``. ``call`` is that of :meth:`features`.
        """

    def gradient(self, out: Tensor, upstream: Upstream, call: Call, found: Found) -> None:
        """Write the gradient of the student's latents into ``out``, rounded once.

        ``noisy`` and ``sample_weight`` are None; ``student``, and of a relation ``real`` and ``fake``, are ``out``
        itself and are not read.
        """

    def whole_gradient(self, out: Tensor, upstream: Upstream, call: Relation, found: Found) -> None:
        """The same for ``pool=None``, where the student is read again."""

    def attention_jvp(self, call: Attention) -> tuple[Tensor, Tensor]:
        """Attention and its tangent, in the memory of :func:`codmd.ops.shapes.empty_attention`."""

    def whole_batch_grad(self, samples: int, frames: int, features: int) -> tuple[int, ...]:
        """Shape of ``batch_grad`` for ``pool=None`` in one process: ``(B, K)``, or ``(1, B, B)`` for M."""
