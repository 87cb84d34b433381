"""The few-step student's sampler as a diffusers scheduler: predict x0, renoise to the next level of its own list."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from codmd.distill.update.noise import NoiseStream
from codmd.distill.update.rollout import Transition
from codmd.distill.update.schedule import check_step_list

FOLDER = "few_step_scheduler"
"""Of `FewStepScheduler` inside a student's pipeline; the stock one that stands in for it is in `scheduler`."""


class FewStepScheduler(SchedulerMixin, ConfigMixin):
    """The student's sampler of `codmd sample` for diffusers' pipelines of flow-matching video models.

    The levels are the student's own, whatever number of steps a pipeline asks for. The noise comes from a stream of
    its own, on the CPU, so that it is the same on every device; latents stay float32.

        pipe = WanPipeline.from_pretrained(student)
        pipe.scheduler = codmd.scheduler.FewStepScheduler.from_pretrained(student, subfolder="few_step_scheduler")
        start = pipe.scheduler.begin(prompt, seed=0, shape=(21, 16, 60, 104))
        pipe(prompt, latents=start, guidance_scale=1.0, num_inference_steps=4)

    Args:
        sigmas: the step list, noise levels from 1 downwards.
        num_train_timesteps: the timestep of sigma = 1.
        seed: of the noise where `begin` is not called.
        transition: from x0 to the next level: "renoise", or "euler", an Euler step, which draws no noise.
    """

    config_name = "scheduler_config.json"
    order = 1

    @register_to_config
    def __init__(
        self,
        sigmas: Sequence[float] = (1.0, 0.9, 0.75, 0.5),
        num_train_timesteps: int = 1000,
        seed: int = 0,
        transition: Transition = "renoise",
    ) -> None:
        levels = check_step_list(sigmas)
        self.sigmas = torch.tensor([*levels, 0.0])
        self.timesteps = self.sigmas[:-1] * num_train_timesteps
        self.noise: NoiseStream | torch.Generator = torch.Generator().manual_seed(seed)
        self._euler = transition == "euler"
        self._step = 0

    def begin(self, prompt: str, seed: int, shape: Sequence[int]) -> Tensor:
        """The noise that `codmd sample` starts from for that prompt and seed, [1, C, F, H, W], float32 on the CPU.

        The noise of the steps that follow is that video's, too.

        Args:
            shape: (F, C, H, W) of the latents.
        """
        from codmd.sample.samplers import noise_of

        self.noise = noise_of(prompt, seed)
        return self._draw((1, shape[1], shape[0], *shape[2:]))

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None, **_: Any
    ) -> None:
        """Starts a video; the number of steps is the list's."""
        self.sigmas, self.timesteps = self.sigmas.to(device), self.timesteps.to(device)
        self._step = 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The step that comes next."""
        self._step = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """x0 = x_t - sigma v, renoised to the next level (or an Euler step to it); x0 itself at the last one.

        Args:
            model_output: the velocity v [B, C, F, H, W].
            timestep: of the pipeline's loop; the scheduler counts by itself.
            sample: x_t, as `model_output`.
            generator: of the noise, in the place of the scheduler's own.

        Returns:
            A tuple of the next x_t in float32, or with `return_dict` an object that has it as `prev_sample`.
        """
        sigma, following = self.sigmas[self._step], self.sigmas[self._step + 1]
        x0 = sample.float() - sigma * model_output.float()
        self._step += 1
        if self._step < len(self.timesteps) and self._euler:
            x0 = sample.float() + (following - sigma) * model_output.float()
        elif self._step < len(self.timesteps):
            noise = self._draw(tuple(x0.shape), generator).to(x0.device)
            x0 = (1 - following) * x0 + following * noise
        if not return_dict:
            return (x0,)
        from diffusers.schedulers.scheduling_utils import SchedulerOutput

        return SchedulerOutput(prev_sample=x0)

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Normal noise [B, C, F, H, W], drawn in the order [B, F, C, H, W] of `codmd sample`."""
        stream = generator or self.noise
        source = stream.generator if isinstance(stream, NoiseStream) else stream
        batch, channels, frames, *picture = shape
        drawn = torch.randn((batch, frames, channels, *picture), generator=source, device=source.device)
        return drawn.transpose(1, 2)

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])


def nearest_stock(sigmas: Sequence[float], transition: Transition = "renoise") -> tuple[Any, float]:
    """The scheduler of diffusers that comes nearest to a step list, and its largest error in sigma.

    A `FlowMatchEulerDiscreteScheduler`, stochastic unless the steps are Euler's, takes the student's steps; its levels
    are a shifted line stretched to the last level of the list, with the shift that fits best.
    """
    levels = torch.tensor(check_step_list(sigmas))

    def stock(shift: float) -> tuple[Any, float]:
        terminal = float(levels[-1]) if len(levels) > 1 else None
        scheduler: Any = FlowMatchEulerDiscreteScheduler(
            shift=shift, shift_terminal=terminal, stochastic_sampling=transition == "renoise"
        )
        scheduler.set_timesteps(len(levels))
        return scheduler, float((scheduler.sigmas[:-1] - levels).abs().max())

    low, high = -3.0, 3.0  # of log shift; the error has one minimum between
    for _ in range(40):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if stock(math.exp(left))[1] <= stock(math.exp(right))[1]:
            high = right
        else:
            low = left
    return stock(round(math.exp((low + high) / 2), 6))


def read_sigmas(folder: str | os.PathLike[str]) -> tuple[float, ...]:
    """The step list of a student's pipeline; empty where the folder has none."""
    if not (Path(folder) / FOLDER / FewStepScheduler.config_name).is_file():
        return ()
    config = FewStepScheduler.load_config(folder, subfolder=FOLDER)
    return check_step_list(config["sigmas"])


def read_transition(folder: str | os.PathLike[str]) -> Transition:
    """How the student of a pipeline that has a step list goes from one level to the next."""
    found: Transition = FewStepScheduler.load_config(folder, subfolder=FOLDER).get("transition", "renoise")
    return found
