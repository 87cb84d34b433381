"""Context parallelism of Wan's transformer: Ulysses, as diffusers has it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch.distributed.device_mesh import DeviceMesh

from codmd.models.sharding import divisors


def token_splits(config: Any, latent_shape: Sequence[int]) -> list[int]:
    """Numbers of processes that divide both the heads and the tokens of a sample of shape (F, C, H, W)."""
    frames, _, height, width = latent_shape
    sizes = zip((frames, height, width), config.patch_size, strict=True)
    tokens = math.prod(size // patch for size, patch in sizes)
    return divisors(math.gcd(config.num_attention_heads, tokens))


def split_tokens(
    transformer: Any, latent_shape: Sequence[int], mesh: DeviceMesh, token_timesteps: bool = False
) -> None:
    """Every process of the mesh's dimension "ulysses" computes its part of the tokens, in place.

    This is the one call of diffusers' interface, which is marked experimental.

    Args:
        latent_shape: (F, C, H, W) of one sample.
        mesh: with the dimensions "ring", of size 1, and "ulysses".
        token_timesteps: whether every token has a timestep of its own, or every sample.

    Raises:
        ValueError: the processes do not divide the heads or the tokens, or the attention backend cannot be split.
    """
    from diffusers import ContextParallelConfig
    from diffusers.utils import logging

    degree, allowed = mesh["ulysses"].size(), token_splits(transformer.config, latent_shape)
    if degree not in allowed:
        raise ValueError(
            f"parallel.context: {degree} processes do not divide both the heads and the tokens of a sample; expected "
            f"one of {', '.join(map(str, allowed))}"
        )
    # With one timestep a sample the plan's split of timesteps by tokens has nothing to do, and would say so.
    plan = {name: split for name, split in transformer._cp_plan.items() if name or token_timesteps}
    parallel = ContextParallelConfig(ulysses_degree=degree, mesh=mesh["ring", "ulysses"])
    # On the CPU diffusers divides by the number of accelerators, 0, to name a device that Ulysses never asks for.
    count = max(1, torch.accelerator.device_count())
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # diffusers warns at every call that the interface may change
    try:
        with mock.patch.object(torch.accelerator, "device_count", return_value=count):
            transformer.enable_parallelism(config=parallel, cp_plan=plan)
    finally:
        logging.set_verbosity(verbosity)
