"""A clip against its reference: distances, and in words what differs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from codmd import metrics

from .measures import Column, Measurement

DISTANCES = {
    "cosine": Column("cosine", 4, "root mean square difference of the two cosine matrices, off the diagonal"),
    "spearman": Column("Spearman", 4, "root mean square difference of the two Spearman matrices, off the diagonal"),
    "features": Column("features", 3, "root mean square difference of the features of frames at the same time"),
    "order": Column("temporal order", 3, "temporal order minus the reference's"),
    "motion": Column("motion, ratio", 2, "motion in percent of the short side per second over the reference's"),
    "flicker": Column("flicker, ratio", 2, "flicker over the reference's"),
    "blockiness": Column("blockiness, ratio", 2, "blockiness over the reference's"),
    "saturation": Column("saturation, ratio", 2, "saturation over the reference's"),
}
"""Where two clips have different numbers of frames, the longer one's frames nearest in time are compared."""

SET_DISTANCES = {
    "relation_energy": "energy distance between the frame relation matrices of the two sets",
    "sample_relation": "Wasserstein distance between the cosines of pairs of videos (time-averaged) of the two sets",
    "motion": "Wasserstein distance between the two distributions of motion, %/s",
}
MOST_IN_SET = 500
"""Larger sets are thinned evenly for the distances between sets, which grow with the square of the count."""

FROZEN, SLOW, FAST = 0.1, 0.5, 2.0
SATURATED, PALE = 1.25, 0.8
FLICKERING, FLICKER_FLOOR = 1.5, 0.25
BLOCKY = 1.25
ORDER_LOST = 0.3


@dataclass(frozen=True)
class Pair:
    """A clip, its reference, what lies between them by the names of DISTANCES, and remarks in words."""

    clip: Measurement
    reference: Measurement
    distances: dict[str, float]
    findings: list[str]


def compare(clip: Measurement, reference: Measurement) -> Pair:
    """Distances of one clip to its reference.

    Raises:
        ValueError: their features cannot be compared (latents against pixels, or other channels).
    """
    if clip.kind != reference.kind or clip.features.shape[1] != reference.features.shape[1]:
        kinds = " and ".join(f"{m.kind} with {m.features.shape[1]} features a frame" for m in (clip, reference))
        raise ValueError(f"cannot be compared with its reference: {kinds}")
    count = min(clip.frames, reference.frames)
    chosen = [torch.linspace(0, m.frames - 1, count).round().long() for m in (clip, reference)]
    first, second = (m.features[index].double() for m, index in zip((clip, reference), chosen, strict=True))
    distances = {
        "cosine": _matrix_distance(*(_pick(m.cosine, i) for m, i in zip((clip, reference), chosen, strict=True))),
        "spearman": _matrix_distance(*(_pick(m.spearman, i) for m, i in zip((clip, reference), chosen, strict=True))),
        "features": float((first - second).square().mean().sqrt()),
        "order": clip.values["order"] - reference.values["order"],
    }
    for name in ("motion", "flicker", "blockiness", "saturation"):
        value = "speed" if name == "motion" else name
        if value in clip.values and value in reference.values:
            distances[name] = _ratio(clip.values[value], reference.values[value])
    return Pair(clip, reference, distances, _findings(clip, reference, distances))


def set_distances(pairs: Sequence[Pair]) -> dict[str, float]:
    """Distances between all clips and all references; empty for a single pair or clips of different lengths."""
    pairs = [pairs[i * len(pairs) // min(len(pairs), MOST_IN_SET)] for i in range(min(len(pairs), MOST_IN_SET))]
    if len(pairs) < 2 or len({m.features.shape for pair in pairs for m in (pair.clip, pair.reference)}) > 1:
        return {}
    clips, references = (
        torch.stack([m.features for m in side])[..., None, None]
        for side in ([p.clip for p in pairs], [p.reference for p in pairs])
    )
    found = {
        "relation_energy": metrics.relation_energy_distance(clips, references),
        "sample_relation": metrics.sample_relation_distance(clips, references),
    }
    if all("speed" in m.values for pair in pairs for m in (pair.clip, pair.reference)):
        speeds = (torch.tensor([m.values["speed"] for m in side]) for side in _sides(pairs))
        found["motion"] = metrics.wasserstein(*speeds)
    return found


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; no deviation for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _findings(clip: Measurement, reference: Measurement, distances: dict[str, float]) -> list[str]:
    found = []
    frozen = False
    if "motion" in distances:
        ratio, ours, theirs = distances["motion"], clip.values["speed"], reference.values["speed"]
        amount = f"motion {ours:.1f} against {theirs:.1f} %/s"
        frozen = ratio < FROZEN
        if frozen:
            found.append(f"frozen: {amount}")
        elif ratio < SLOW:
            found.append(f"moves less: {amount}")
        elif ratio > FAST:
            found.append(f"moves more: {amount}")
    if distances["order"] < -ORDER_LOST and not frozen:
        ours, theirs = clip.values["order"], reference.values["order"]
        found.append(f"frames out of order: temporal order {ours:.2f} against {theirs:.2f}")
    if distances.get("blockiness", 1.0) > BLOCKY:
        found.append(f"blocky: {clip.values['blockiness']:.2f} against {reference.values['blockiness']:.2f}")
    if "saturation" in distances:
        amount = f"saturation {clip.values['saturation']:.0f} against {reference.values['saturation']:.0f} %"
        if distances["saturation"] > SATURATED:
            found.append(f"over-saturated: {amount}")
        elif distances["saturation"] < PALE:
            found.append(f"pale: {amount}")
    if "flicker" in distances:
        ours, theirs = clip.values["flicker"], reference.values["flicker"]
        if distances["flicker"] > FLICKERING and ours - theirs > FLICKER_FLOOR:
            found.append(f"flickers: {ours:.2f} against {theirs:.2f} %")
    return found


def _sides(pairs: Sequence[Pair]) -> tuple[list[Measurement], list[Measurement]]:
    return [pair.clip for pair in pairs], [pair.reference for pair in pairs]


def _pick(matrix: Tensor, index: Tensor) -> Tensor:
    return matrix[index][:, index]


def _matrix_distance(a: Tensor, b: Tensor) -> float:
    size = len(a)
    squares = (a - b).square()
    return math.sqrt(float(squares.sum() - squares.diagonal().sum()) / (size * (size - 1)))


def _ratio(value: float, reference: float) -> float:
    """1 where both are 0, infinite where the reference alone is."""
    if reference == 0:
        return 1.0 if value == 0 else math.inf
    return value / reference
