"""The speed of a run: samples and network forwards a second, the share of the device's arithmetic, peak memory."""

from __future__ import annotations

import resource
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from codmd.distill.config.sections import ModelSettings
from codmd.private import fake_tensors

PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "B200": 2250, "4090": 165}
"""Part of a CUDA device's name to its dense bfloat16 rate by NVIDIA's data sheets, TFLOP/s."""


class Speed:
    """Counts the samples that pass the networks of a run.

    A forward pass whose gradient is wanted counts three times in the model's arithmetic, because its backward pass
    costs two forwards; recomputation does not count.

    Args:
        networks: of the run.
        samples: of one update, over all processes.
        processes: over which samples are spread alike.
        flops: of this process's part of the forward pass of one sample, and
        peak: of the device, TFLOP/s; MFU is told where both are known.
    """

    def __init__(
        self,
        networks: Iterable[nn.Module],
        samples: int,
        processes: int,
        device: torch.device,
        flops: float | None = None,
        peak: float | None = None,
    ) -> None:
        self.samples, self.processes, self.device, self.flops, self.peak = samples, processes, device, flops, peak
        self.forwards = self.equivalent = 0
        for network in networks:
            network.register_forward_hook(self._count)

    def _count(self, network: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        count = len(inputs[0])
        self.forwards += count
        self.equivalent += count * (3 if output.requires_grad else 1)

    def scalars(self, seconds: float, updates: int) -> dict[str, float]:
        """Rates since the last call, which was `updates` ago, `seconds` each."""
        elapsed = max(seconds * updates, 1e-9)
        found = {
            "seconds_per_update": seconds,
            "samples_per_second": self.samples * updates / elapsed,
            "forwards_per_second": self.processes * self.forwards / elapsed,
            "peak_memory_gb": peak_memory(self.device) / 1e9,
        }
        if self.flops and self.peak:
            found["mfu"] = self.flops * self.equivalent / elapsed / (self.peak * 1e12)
        self.forwards = self.equivalent = 0
        return found


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that PyTorch held on a GPU, or that this process held of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_tflops(device: torch.device) -> float | None:
    """Of a device that is known; None for any other, CPUs included."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(rate) for part, rate in PEAK_TFLOPS.items() if part in name), None)


def forward_flops(settings: ModelSettings) -> float:
    """Floating-point operations of the forward pass of one sample, counted on shapes alone."""
    from torch.func import functional_call

    from codmd import models

    options = {**vars(settings.options), "weights": "random", "compile": False, "gradient_checkpointing": False}
    known = vars(settings.options)
    with torch.device("meta"):
        model = models.build(settings.name, **{name: value for name, value in options.items() if name in known})
    # In its parts, because the counter knows the products and not every fused attention.
    unfused = sdpa_kernel(SDPBackend.MATH)
    with fake_tensors(), FlopCounterMode(display=False) as counter, torch.no_grad(), unfused:
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        weights = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in state.items()}
        inputs = torch.empty(1, *model.latent_shape), torch.empty(1), model.empty_cond(1)
        functional_call(model, weights, inputs)
    return float(counter.get_total_flops())
