"""Critic mixing: after a student update the critic's weights move a small share towards the student's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from codmd.private import lerp_all

from .ema import local


@torch.no_grad()
def mix_critic(critic: Mapping[str, Tensor], student: Mapping[str, Tensor], share: float) -> None:
    """critic <- (1 - share) critic + share student, in place, shard by shard; names and sharding are the same.

    The critic trails the student by its few updates a cycle; this takes it along where the student moves.

    Source: implicit distribution alignment of SenseFlow, arXiv 2506.00523, share 0.03.
    """
    lerp_all([local(critic[name]) for name in student], [local(w) for w in student.values()], share)
