"""CoDMD's own call signature, so that its training script runs with one import changed."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from codmd.ops.checks import check_memory
from codmd.ops.relation import relation_loss


def compute_copula_aware_loss(
    student_latent: Tensor,
    real_score_latent: Tensor,
    fake_score_latent: Tensor,
    temperature: float = 0.1,
    batch_weight: float = 1.0,
    frame_weight: float = 1.0,
    *,
    batch_grad: str = "local",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The relation loss under CoDMD's name, argument order and log keys.

    The batch term is gathered over the default process group when one is initialised.

    Args:
        student_latent: ``[B, F, C, H, W]``, with gradient.
        real_score_latent: the teacher's x0 prediction, like ``student_latent``; its gradient is cut here.
        fake_score_latent: the critic's x0 prediction, likewise.
        temperature: τ of both softmaxes.
        batch_weight: weight of the batch term.
        frame_weight: weight of the frame term.
        batch_grad: ``"local"`` keeps the gradient scale of CoDMD's training, 1/world size of the global
            batch's after data-parallel averaging; ``"global"`` is the gradient of the global batch.

    Returns:
        The weighted loss, and the unweighted detached terms ``{"copula_batch_loss", "copula_frame_loss"}``,
        a key only for a term of positive weight.

    Raises:
        TypeError, ValueError: as :func:`codmd.ops.relation_loss`.
    """
    check_memory("real_score_latent", real_score_latent)
    check_memory("fake_score_latent", fake_score_latent)
    group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    terms = relation_loss(
        student_latent,
        real_score_latent.detach(),
        fake_score_latent.detach(),
        temperature,
        batch_weight,
        frame_weight,
        group=group,
        batch_grad=batch_grad,
        return_terms=True,
    )
    log = {}
    if batch_weight > 0:
        log["copula_batch_loss"] = terms.batch.detach()
    if frame_weight > 0:
        log["copula_frame_loss"] = terms.frame.detach()
    return terms.total, log
