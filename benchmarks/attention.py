"""One forward, and one forward and backward, of a network with each of diffusers' attention backends."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks import whole_network as network
from codmd.distill.config.sections import ModelSettings

NAMES = ("native", "_native_flash", "_native_cudnn", "flash", "_flash_3", "sage", "xformers")
"""By the names of the model's option: torch's own choice, two of its kernels, and packages that bring their own."""

COLUMNS = (("forward_s", 3), ("forward_tflop_s", 1), ("train_s", 3))


def row(
    model: ModelSettings, name: str, text: Tensor, device: torch.device, flops: int, deadline: float
) -> dict[str, Any]:
    """One forward, and one forward and backward, of the network with this backend; `reason` where there is none."""
    found: dict[str, Any] = {"attention": name}
    if time.monotonic() > deadline:
        return found | {"reason": "out of time"}
    try:
        denoiser = network.build(model, device, attention=name)
        x_t = torch.randn(1, *denoiser.latent_shape, device=device)
        sigma = torch.full((1,), 0.9, device=device)

        def forward() -> Tensor:
            with torch.no_grad():
                return denoiser(x_t, sigma, text)

        def train() -> None:
            denoiser(x_t, sigma, text).square().mean().backward()

        found["forward_s"] = statistics.median(network.seconds(forward, device, repeats=2))
        found["forward_tflop_s"] = flops / found["forward_s"] * 1e-12
        list(denoiser.trainable_parameters())  # refuses a backend without a backward pass
        found["train_s"] = statistics.median(network.seconds(train, device, repeats=2))
    except Exception as error:
        found["reason"] = network.reason_of(error)
    denoiser = None
    network.free_memory(device)
    return found


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown; a missing backend has its reason in the last column."""
    lines = ["| attention | forward s | TFLOP/s | forward and backward s | |", "|---|---:|---:|---:|---|"]
    for found in rows:
        cells = [f"{found[key]:.{digits}f}" if key in found else "" for key, digits in COLUMNS]
        lines.append(f"| {found['attention']} | {' | '.join(cells)} | {found.get('reason', '')} |")
    return lines
