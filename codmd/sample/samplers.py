"""One video's latents from (prompt, seed): the student's few steps, or the teacher's many with guidance."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from codmd.distill.update.noise import NoiseStream
from codmd.distill.update.rollout import Transition, sample_few_step
from codmd.models.base import Condition, VideoDenoiser

Solver = Literal["unipc", "euler"]
GuidanceForm = Literal["uncond", "cond"]
TIMESTEPS = 1000


class HostNoise(NoiseStream):
    """Draws on the CPU, whatever the device: the same numbers everywhere."""

    def rows(self, sampler: Callable[..., Tensor], shape: Sequence[int], **options: Any) -> Tensor:
        """`shape` numbers of `sampler`, moved to the device asked for."""
        device = options.pop("device", "cpu")
        return sampler(tuple(shape), generator=self.generator, **options).to(device)


def noise_of(prompt: str, seed: int) -> HostNoise:
    """All randomness of one video; it depends on (prompt, seed) and on nothing else."""
    digest = hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()
    return HostNoise(torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1))


@dataclass(frozen=True)
class FewStep:
    """The student: predict x0, on to the next level, without guidance.

    Attributes:
        sigmas: the step list it was trained with.
        transition: from a prediction to the next level: noised anew, or an Euler step.
    """

    sigmas: tuple[float, ...]
    transition: Transition = "renoise"

    @property
    def evaluations(self) -> int:
        """Steps of one video, the unit of progress."""
        return len(self.sigmas)

    def __call__(
        self, model: VideoDenoiser, noise: HostNoise, cond: Condition, progress: Callable[[int], Any]
    ) -> Tensor:
        """Latents [1, F, C, H, W], float32."""
        start = noise.rows(torch.randn, (1, *model.latent_shape), device=model.device)
        latents = sample_few_step(model, start, self.sigmas, noise, cond, self.transition)
        progress(self.evaluations)
        return latents


@dataclass(frozen=True)
class Guided:
    """The teacher: diffusers' flow schedulers with classifier-free guidance.

    Attributes:
        steps: of the solver, two network evaluations each (one where guidance changes nothing).
        guidance: scale s in u + s (c - u), form "uncond", or in c + s (c - u), form "cond"; on the velocity.
        shift: of the flow-matching levels; Wan advises 3 for 480p and 5 for 720p.
        solver: UniPC as in diffusers' pipeline, or Euler.
    """

    steps: int = 50
    guidance: float = 5.0
    form: GuidanceForm = "uncond"
    shift: float = 3.0
    solver: Solver = "unipc"

    @property
    def evaluations(self) -> int:
        """Steps of one video, the unit of progress."""
        return self.steps

    def scheduler(self) -> Any:
        """A fresh scheduler, which keeps the state of one video."""
        from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

        if self.solver == "euler":
            return FlowMatchEulerDiscreteScheduler(shift=self.shift)
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=self.shift)

    @torch.no_grad()
    def __call__(
        self, model: VideoDenoiser, noise: HostNoise, cond: Condition, progress: Callable[[int], Any]
    ) -> Tensor:
        """Latents [1, F, C, H, W], float32."""
        scale = self.guidance + (self.form == "cond")
        null = None if scale == 1 else model.without_prompt(cond, 1)
        scheduler = self.scheduler()
        scheduler.set_timesteps(self.steps, device=model.device)
        x_t = noise.rows(torch.randn, (1, *model.latent_shape), device=model.device)
        for timestep in scheduler.timesteps:
            sigma = (timestep.float() / TIMESTEPS).expand(1)
            velocity = model(x_t, sigma, cond)
            if null is not None:
                uncond = model(x_t, sigma, null)
                velocity = uncond + scale * (velocity - uncond)
            x_t = scheduler.step(velocity, timestep, x_t, return_dict=False)[0]
            progress(1)
        return model.with_known_frames(x_t, cond)
