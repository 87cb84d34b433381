"""Sampling time per sample, measured on one thread with nothing else of the demo running."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from codmd.distill.config.recipe import DistillConfig
from codmd.distill.update.rollout import sample_euler, sample_few_step
from codmd.distill.update.schedule import sampling_sigmas
from codmd.models.toy import ToyDenoiser

from .experiment import TEACHER_STEPS


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: for networks this small the steadier choice, and the faster on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def sampling_milliseconds(
    model: ToyDenoiser, config: DistillConfig, batch: int = 256, repeats: int = 7
) -> dict[str, float | None]:
    """Milliseconds per sample of each arm's sampler in batches of `batch`, the fastest repeat; None for data.

    Both students have the teacher's network and one sampler, so they share one measurement.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch, *model.latent_shape, generator=generator)

    def measure(sampler: Callable[[], object]) -> float:
        sampler()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            sampler()
            seconds.append(time.perf_counter() - start)
        return 1e3 * min(seconds) / batch

    few = len(config.sigmas)
    student = measure(lambda: sample_few_step(model, noise, config.sigmas, generator))
    return {
        "data": None,
        "teacher": measure(lambda: sample_euler(model, noise, sampling_sigmas(TEACHER_STEPS, config.shift))),
        "teacher_few": measure(lambda: sample_euler(model, noise, sampling_sigmas(few, config.shift))),
        "dmd": student,
        "codmd": student,
    }
