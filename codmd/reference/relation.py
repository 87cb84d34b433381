"""The relation loss in plain PyTorch, one equation per function (arXiv 2606.21982; derived in docs/mathematics.md).

Shapes: B samples, F frames, C channels, H x W pixels; N vectors of K features in a relation.
``valid`` masks are boolean, ``True`` marks a row that takes part. Half-precision inputs are computed in
float32, every other dtype in itself; float64 inputs give the truth that tests and benchmarks compare with.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor

from codmd.reference.motion import motion_features
from codmd.reference.scale import power_of_two

Pool = Literal["mean"] | tuple[int, int] | None

NORM_FLOOR = 1e-12
"""Lower bound of a feature norm, as in ``torch.nn.functional.normalize``."""

EXPONENT_LIMIT = 20.0
"""Above this exponent the divergence is evaluated in log space (``expm1`` would overflow float32 at 88)."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for the half-precision types, the type itself otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def to_bfchw(latents: Tensor, layout: str) -> Tensor:
    """View ``[B, C, F, H, W]`` latents (layout ``"bcfhw"``) as ``[B, F, C, H, W]``."""
    return rearrange(latents, "b c f h w -> b f c h w") if layout == "bcfhw" else latents


def region_average(size: int, regions: int, like: Tensor) -> Tensor:
    """``[regions, size]`` matrix that averages over the balanced partition i*size//regions .. (i+1)*size//regions."""
    edges = [i * size // regions for i in range(regions + 1)]
    matrix = like.new_zeros(regions, size)
    for i, (start, end) in enumerate(itertools.pairwise(edges)):
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def frame_features(latents: Tensor, layout: str = "bfchw", pool: Pool = "mean") -> Tensor:
    """φ[b, f] ∈ R^K: spatial mean (K = C), grid of regional means (K = C·gh·gw) or every pixel (K = C·H·W)."""
    latents = to_bfchw(latents, layout)
    latents = latents.to(compute_dtype(latents.dtype))
    if pool is None:
        return rearrange(latents, "b f c h w -> b f (c h w)")
    if pool == "mean":
        return reduce(latents, "b f c h w -> b f c", "mean")
    rows = region_average(latents.shape[3], pool[0], latents)
    columns = region_average(latents.shape[4], pool[1], latents)
    regions = einsum(latents, rows, columns, "b f c h w, i h, j w -> b f c i j")
    return rearrange(regions, "b f c i j -> b f (c i j)")


def batch_features(features: Tensor, frame_mask: Tensor | None = None) -> Tensor:
    """ψ[b] = mean of φ[b, f] over the valid frames, ``[B, F, K] -> [B, K]``; zero where no frame is valid."""
    if frame_mask is None:
        return features.mean(dim=1)
    kept = torch.where(frame_mask[..., None], features, 0)
    return kept.sum(dim=1) / frame_mask.sum(dim=1, keepdim=True).clamp(min=1)


def unit_vectors(features: Tensor) -> Tensor:
    """u = φ / max(‖φ‖, 1e-12), over the last axis."""
    scale = power_of_two(features, -1)
    scaled = features / scale
    return scaled / scaled.norm(dim=-1, keepdim=True).clamp(min=NORM_FLOOR / scale)


def feature_norm(features: Tensor) -> Tensor:
    """‖φ‖ over the last axis, which stays."""
    scale = power_of_two(features, -1)
    return scale * (features / scale).norm(dim=-1, keepdim=True)


def relation(features: Tensor) -> Tensor:
    """S = u uᵀ, the cosine similarities ``[..., N, N]`` of ``[..., N, K]`` features, diagonal included."""
    units = unit_vectors(features)
    return einsum(units, units, "... i k, ... j k -> ... i j")


def difference_of(real: Tensor, fake: Tensor) -> Tensor:
    """d = fake - real, :func:`kept_apart`."""
    return kept_apart(real, fake - real, fake == 0)


def kept_apart(real: Tensor, difference: Tensor, zero: Tensor) -> Tensor:
    """``difference``, which moves by 32 roundings where rounding made it -real although fake is not ``zero``.

    ‖real + difference‖ then tells a fake far under real, whose digits are lost, from a zero, also after the averages
    over pixels and frames, which round again.
    """
    hidden = (real + difference == 0) & ~zero
    return torch.where(hidden, difference * (1 - 2**5 * torch.finfo(difference.dtype).eps), difference)


def unit_difference(real: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    """(r̂, e): the unit vectors of ``real`` and how ``difference = fake - real`` changes them, e = f̂ - r̂.

    e = (d - r̂·(‖f‖ - ‖r‖)) / ‖f‖, where ‖f‖ - ‖r‖ = d·(f + r) / (‖f‖ + ‖r‖) does not cancel. Where a norm is
    below the floor, e is f̂ - r̂ as it stands. NaN where f = r + d has fewer than eleven bits left, but for a zero.
    """
    scale = power_of_two(torch.maximum(real.abs(), difference.abs()), -1)
    real, difference, floor = real / scale, difference / scale, NORM_FLOOR / scale
    fake = real + difference
    norm_real, norm_fake = real.norm(dim=-1, keepdim=True), fake.norm(dim=-1, keepdim=True)
    least = 2**11 * torch.finfo(real.dtype).eps
    norm_fake = torch.where((norm_fake > 0) & (norm_fake < least * norm_real), torch.nan, norm_fake)
    floor_real, floor_fake = norm_real.clamp(min=floor), norm_fake.clamp(min=floor)
    unit_real = real / floor_real
    growth = (difference * (fake + real)).sum(-1, keepdim=True) / (norm_real + norm_fake).clamp(min=floor)
    change = (difference - unit_real * growth) / floor_fake
    clamped = (norm_real < floor) | (norm_fake < floor)
    return unit_real, torch.where(clamped, fake / floor_fake - unit_real, change)


def score_difference_relation(real: Tensor, difference: Tensor) -> Tensor:
    """Δ = S(f) - S(r) = e f̂ᵀ + r̂ eᵀ, from ``real`` and ``difference = fake - real`` features ``[..., N, K]``.

    Δ_ii is 0 but where a norm is clamped. Rounding would leave 1e-8 of it, which the gradient of a student under the
    floor divides by 1e-12.
    """
    unit_real, change = unit_difference(real, difference)
    unit_fake = unit_real + change
    delta = einsum(change, unit_fake, "... i k, ... j k -> ... i j") + einsum(
        unit_real, change, "... i k, ... j k -> ... i j"
    )
    length = torch.minimum(feature_norm(real), feature_norm(real + difference))
    same = torch.eye(delta.shape[-1], dtype=torch.bool, device=delta.device) & (length >= NORM_FLOOR)
    return torch.where(same & ~delta.isnan(), 0, delta)


def student_log_probability(similarity: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """log q = log softmax_row(S(x)/τ) over the valid columns; -inf in the others."""
    logits = similarity / temperature
    if valid is not None:
        logits = logits.masked_fill(~valid[..., None, :], -torch.inf)
        logits = torch.where(valid[..., :, None], logits, 0)
    return logits.log_softmax(dim=-1)


def expm1_minus(x: Tensor) -> Tensor:
    """e^x - 1 - x without cancellation: a Taylor series for |x| < 0.5."""
    small = x.clamp(-0.5, 0.5)
    series = torch.ones_like(small)
    for n in range(15, 2, -1):
        series = 1 + small / n * series
    return torch.where(x.abs() < 0.5, 0.5 * small.square() * series, torch.expm1(x) - x)


def divergence(
    similarity: Tensor, score_difference: Tensor, temperature: float, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """KL(p_i ‖ q_i) of every row, and q - p, in the sound form. No gradient flows through either.

    p = softmax_row((S(x) - Δ)/τ), q = softmax_row(S(x)/τ). With δ = Δ/τ centred under q,
    x = -(δ - Σ q δ), log Z = log1p(Σ q (e^x - 1 - x)), y = x - log Z = log p - log q:
    KL = Σ (p - q)·x - log Z and p - q = q·expm1(y), as Σ q x = 0.

    Args:
        similarity: S(x), ``[..., N, N]``.
        score_difference: Δ, ``[..., N, N]``.
        temperature: τ > 0.
        valid: optional boolean ``[..., N]``.

    Returns:
        KL ``[..., N]`` (0 in invalid rows) and q - p ``[..., N, N]`` (0 in invalid rows and columns).
    """
    log_q = student_log_probability(similarity.detach(), temperature, valid)
    q = log_q.exp()
    delta = score_difference.detach() / temperature
    if valid is not None:
        pairs = valid[..., :, None] & valid[..., None, :]
        delta = torch.where(pairs, delta, 0)
    x = (q * delta).sum(-1, keepdim=True) - delta
    t = log_q + x
    t_max = t.amax(-1, keepdim=True)
    excess = torch.where(x <= EXPONENT_LIMIT, q * expm1_minus(x.clamp(max=EXPONENT_LIMIT)), t.exp() - q * (1 + x))
    beyond = t_max > EXPONENT_LIMIT
    log_z = torch.where(
        beyond, t_max + (t - t_max).exp().sum(-1, keepdim=True).log(), excess.sum(-1, keepdim=True).log1p()
    )
    y = x - log_z
    p = (t - log_z).exp()
    p_minus_q = torch.where(y < EXPONENT_LIMIT, q * torch.expm1(y.clamp(max=EXPONENT_LIMIT)), p - q)
    direct = torch.where(p > 0, p * y, 0).sum(-1)
    centred = (p_minus_q * x).sum(-1) - log_z[..., 0]
    kl = torch.where(beyond[..., 0], direct, centred)
    if valid is not None:
        kl = torch.where(valid, kl, 0)
        p_minus_q = torch.where(pairs, p_minus_q, 0)
    return kl, -p_minus_q


def target_probability(similarity: Tensor, score_difference: Tensor, temperature: float) -> Tensor:
    """p = softmax_row((S(x) - Δ)/τ), without gradient."""
    return ((similarity - score_difference).detach() / temperature).softmax(dim=-1)


def divergence_plain(similarity: Tensor, target: Tensor, temperature: float) -> Tensor:
    """KL(p_i ‖ q_i) of every row as it is usually written, Σ p (log p - log q).

    For comparison only: once Δ is small its terms cancel and no correct digit is left in float32.
    """
    log_q = (similarity / temperature).log_softmax(dim=-1)
    return torch.nn.functional.kl_div(log_q, target, reduction="none").sum(-1)


def similarity_gradient(q_minus_p: Tensor, temperature: float, rows: Tensor | int) -> Tensor:
    """G = ∂L/∂S = (q - p)/(τ n) for L = (1/n) Σ_i KL_i."""
    return q_minus_p / rows / temperature


def relation_divergence(
    student: Tensor, real: Tensor, difference: Tensor, temperature: float, valid: Tensor | None = None
) -> Tensor:
    """L = (1/n) Σ_i KL(p_i ‖ q_i) of ``[..., N, K]`` features, one value per leading index.

    ``difference`` is fake - real. The gradient reaches ``student`` alone; :func:`~codmd.reference.feature_gradient`
    writes it out. Fewer than two valid rows give exactly 0.
    """
    if student.shape[-2] < 2:
        return student.new_zeros(student.shape[:-2])
    if valid is None:
        rows: Tensor | int = student.shape[-2]
    else:
        valid = valid & (valid.sum(-1, keepdim=True) >= 2)
        student, real, difference = (torch.where(valid[..., None], v, 0) for v in (student, real, difference))
        rows = valid.sum(-1).clamp(min=1)
    similarity = relation(student)
    score_difference = score_difference_relation(real.detach(), difference.detach())
    kl, q_minus_p = divergence(similarity, score_difference, temperature, valid)
    scale = rows[..., None, None] if isinstance(rows, Tensor) else rows
    gradient = similarity_gradient(q_minus_p, temperature, scale)
    # The second summand is 0 in value and carries the gradient: the target p is a constant of the optimisation.
    return kl.sum(-1) / rows + (gradient * (similarity - similarity.detach())).sum((-2, -1))


def relation_divergence_plain(student: Tensor, real: Tensor, fake: Tensor, temperature: float) -> Tensor:
    """:func:`relation_divergence` in its plain form, from the features of ``fake`` themselves. For comparison only."""
    similarity = relation(student)
    target = target_probability(similarity, relation(fake) - relation(real), temperature)
    return divergence_plain(similarity, target, temperature).mean(-1)


def frame_term(
    student: Tensor, real: Tensor, difference: Tensor, temperature: float, frame_mask: Tensor | None = None
) -> Tensor:
    """L_frame: mean over samples of the divergence among the F frames of one sample; features ``[B, F, K]``."""
    return relation_divergence(student, real, difference, temperature, frame_mask).mean()


def batch_term(
    student: Tensor, real: Tensor, difference: Tensor, temperature: float, frame_mask: Tensor | None = None
) -> Tensor:
    """L_batch: the divergence among the B samples' time-averaged features; features ``[B, F, K]``."""
    valid = None if frame_mask is None else frame_mask.any(dim=1)
    x, r, d = (batch_features(v, frame_mask) for v in (student, real, difference))
    return relation_divergence(x, r, d, temperature, valid)


def relation_loss(
    student: Tensor,
    real: Tensor,
    fake: Tensor,
    temperature: float = 0.1,
    batch_weight: float = 1.0,
    frame_weight: float = 1.0,
    layout: str = "bfchw",
    pool: Pool = "mean",
    frame_mask: Tensor | None = None,
    relation_features: str = "level",
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, batch term, frame term) of the relation loss on one process; arguments as in ``codmd.ops``."""
    dtype = compute_dtype(student.dtype)
    real, fake = real.detach().to(dtype), fake.detach().to(dtype)
    features = (
        frame_features(student, layout, pool),
        frame_features(real, layout, pool),
        frame_features(difference_of(real, fake), layout, pool),
    )
    zero = features[0].new_zeros(())
    batch = batch_term(*features, temperature, frame_mask) if batch_weight else zero
    frame = zero
    if frame_weight:
        moved = [motion_features(feature, relation_features, frame_mask) for feature in features]
        x, r, d = (rows for rows, _ in moved)
        frame = frame_term(x, r, d, temperature, moved[0][1])
    return batch_weight * batch + frame_weight * frame, batch, frame
