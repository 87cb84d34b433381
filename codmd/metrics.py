"""Distances of generated videos from real ones: in relations, ranks, motion and spread.

Every function takes latents [N, F, C, H, W], N samples of each distribution, on any device; the arithmetic is
float64. Distances between two finite samples of one distribution are not exactly 0: read them beside the distance
between two fresh samples of the data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from codmd import reference

Scores = Literal["spearman", "normal"]


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| over flattened samples, unbiased (X and X' distinct).

    Unbiased means that equal distributions give 0 on average, and hence a small negative number now and then.

    Args:
        a, b: [N, ...] and [M, ...], N and M at least 2.

    Source: Szekely and Rizzo, Energy statistics, 2013.
    """
    a, b = _flat_pair(a, b)
    n, m = len(a), len(b)
    exact = "donot_use_mm_for_euclid_dist"  # the matrix-product form loses small distances to cancellation
    cross = torch.cdist(a, b, compute_mode=exact).mean()
    within_a = torch.cdist(a, a, compute_mode=exact).sum() / (n * (n - 1))
    within_b = torch.cdist(b, b, compute_mode=exact).sum() / (m * (m - 1))
    return float(2 * cross - within_a - within_b)


def frame_relations(latents: Tensor) -> Tensor:
    """Cosine similarities between the frames of each video, [N, F, F] float64 (paper: the frame relation)."""
    return reference.relation(reference.frame_features(latents.double()))


def relation_energy_distance(a: Tensor, b: Tensor) -> float:
    """Energy distance between the frame relation matrices of two sets of videos."""
    return energy_distance(frame_relations(a), frame_relations(b))


def sample_relation_distance(a: Tensor, b: Tensor) -> float:
    """Wasserstein distance between the cosines of pairs of videos (their time-averaged features), 0 to 2."""
    cosines = []
    for latents in (a, b):
        features = reference.batch_features(reference.frame_features(latents.double()))
        row, column = torch.triu_indices(len(latents), len(latents), offset=1, device=latents.device)
        cosines.append(reference.relation(features)[row, column])
    return wasserstein(*cosines)


def rank_correlation(samples: Tensor, scores: Scores = "spearman") -> Tensor:
    """Correlation over samples between the ranks of every two coordinates, [D, D] float64.

    Ranks know nothing of the marginals, so this describes the copula alone. For Gaussians of correlation r it is
    (6 / pi) asin(r / 2) with Spearman's ranks and r with normal scores.

    Args:
        samples: [N, ...], flattened to D coordinates; continuous, so that ties do not matter.
        scores: "spearman" correlates ranks, "normal" their normal quantiles (van der Waerden).
    """
    if scores not in ("spearman", "normal"):
        raise ValueError(f"scores: got {scores!r}; expected 'spearman' or 'normal'")
    samples = samples.flatten(1)
    count = len(samples)
    ranks = samples.argsort(dim=0).argsort(dim=0).double()
    if scores == "normal":
        ranks = torch.special.ndtri((ranks + 1) / (count + 1))
    centred = ranks - ranks.mean(dim=0)
    unit = centred / centred.norm(dim=0)
    return unit.T @ unit


def frame_rank_relations(features: Tensor) -> Tensor:
    """Spearman's correlation between every two frames, over their features; [..., F, F] float64.

    It does not change under an increasing function of a frame's features, such as brightness or contrast.
    A frame of constant features correlates with nothing: its row is 0.

    Args:
        features: [..., F, K]; equal features of a frame share their mean rank.
    """
    features = features.double().contiguous()
    ordered = features.sort(dim=-1).values
    below, through = (torch.searchsorted(ordered, features, right=right) for right in (False, True))
    ranks = (below + through).double() / 2
    return reference.relation(ranks - ranks.mean(dim=-1, keepdim=True))


def rank_relation_distance(a: Tensor, b: Tensor, scores: Scores = "spearman") -> float:
    """Root mean square difference of the rank correlations of all frame features, over pairs of coordinates."""
    first, second = (rank_correlation(reference.frame_features(x.double()), scores) for x in (a, b))
    size = len(first)
    return math.sqrt(float((first - second).square().sum()) / (size * (size - 1)))


def speeds(latents: Tensor) -> Tensor:
    """Mean distance between neighbouring frames of each video (root mean square over pixels), [N] float64."""
    steps = latents.double().diff(dim=1).flatten(2)
    return steps.square().mean(dim=2).sqrt().mean(dim=1)


def wasserstein(a: Tensor, b: Tensor) -> float:
    """Wasserstein-1 distance between two sets of numbers, [N] and [M]: the area between their quantiles."""
    a, b = a.double().flatten().sort().values, b.double().flatten().sort().values
    grid = torch.cat((a, b)).sort().values
    below_a = torch.searchsorted(a, grid[:-1].contiguous(), right=True) / len(a)
    below_b = torch.searchsorted(b, grid[:-1].contiguous(), right=True) / len(b)
    return float(((below_a - below_b).abs() * grid.diff()).sum())


def speed_distance(a: Tensor, b: Tensor) -> float:
    """Wasserstein distance between the speed distributions of two sets of videos, in latent units per frame."""
    return wasserstein(speeds(a), speeds(b))


def std_ratio(generated: Tensor, real: Tensor) -> float:
    """Standard deviation over all values of `generated`, divided by that of `real`."""
    return float(generated.double().std() / real.double().std())


def static_share(generated: Tensor, real: Tensor) -> float:
    """Share of videos slower than a tenth of the median speed of `real`; 0 for the data unless it stands still."""
    return float((speeds(generated) < 0.1 * speeds(real).median()).double().mean())


def temporal_order(latents: Tensor) -> float:
    """Mean over videos of Spearman's correlation between |i - j| and 1 - S_ij over pairs of frames.

    1 where frames grow more unlike with time, near 0 for frames in random order; a video whose relation is constant
    counts as 0.
    """
    relation = frame_relations(latents)
    row, column = torch.triu_indices(relation.shape[-1], relation.shape[-1], offset=1, device=latents.device)
    unlike = 1 - relation[:, row, column]
    lag = (column - row).double().expand_as(unlike)
    return float(frame_rank_relations(torch.stack((lag, unlike), dim=1))[:, 0, 1].mean())


def diversity_ratio(generated: Tensor, real: Tensor) -> float:
    """Mean distance between two samples of `generated`, divided by that of `real`; below 1 samples agree too much."""
    spread = [float(torch.pdist(x.flatten(1).double()).mean()) for x in (generated, real)]
    return spread[0] / spread[1]


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, drawn with replacement; with few values too narrow.

    Source: Efron, Bootstrap methods: another look at the jackknife, 1979.
    """
    sample = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = sample[torch.randint(len(sample), (draws, len(sample)), generator=generator)].mean(dim=1)
    low, high = means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


@dataclass(frozen=True)
class PairedDifference:
    """b - a over paired runs: its mean, the standard error of that mean, and how many pairs have b below a."""

    mean: float
    standard_error: float
    lower: int
    pairs: int


def paired_difference(a: Sequence[float], b: Sequence[float]) -> PairedDifference:
    """Compares two arms run with the same seeds; one pair has a standard error of NaN.

    Args:
        a, b: one value per seed, in the same order.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"a, b: got {len(a)} and {len(b)} values; expected as many of each, at least one")
    difference = torch.tensor([y - x for x, y in zip(a, b, strict=True)], dtype=torch.float64)
    error = float(difference.std() / math.sqrt(len(a))) if len(a) > 1 else math.nan
    return PairedDifference(float(difference.mean()), error, int((difference < 0).sum()), len(a))


def _flat_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape[1:] != b.shape[1:] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"a, b: shapes {tuple(a.shape)} and {tuple(b.shape)}; expected two or more samples each, of one shape"
        )
    return a.flatten(1).double(), b.flatten(1).double()
