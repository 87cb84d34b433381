"""Distillation without a configuration file: three networks, a recipe, and a loop whose body is yours.

`python examples/distil_from_python.py` takes half a minute on a CPU: a toy video teacher becomes a student of 4 steps.
"""

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

import codmd
from codmd.distill import DistillConfig, Distiller, cycles, sample_few_step
from codmd.models.toy import ToyConfig, ToyDenoiser

FRAMES, CHANNELS = 8, 4


def videos(count: int) -> Tensor:
    """The data, [count, F, C, 1, 1]: points that turn at a speed of their own, seen at two frequencies."""
    start, speed = 2 * torch.pi * torch.rand(count, 1), 0.3 + 0.5 * torch.rand(count, 1)
    angle = start + speed * torch.arange(FRAMES)
    return torch.stack((angle.cos(), angle.sin(), (2 * angle).cos(), (2 * angle).sin()), dim=2)[..., None, None]


def taught(updates: int, batch: int = 128) -> ToyDenoiser:
    """A teacher: any `codmd.models.VideoDenoiser`, here one that learns by flow matching."""
    teacher = ToyDenoiser(ToyConfig(FRAMES, CHANNELS, width=128, blocks=2))
    optimizer = torch.optim.Adam(teacher.parameters(), lr=2e-3)
    for _ in range(updates):
        x0, sigma = videos(batch), torch.rand(batch).clamp(0.02, 1)
        noise = torch.randn_like(x0)
        optimizer.zero_grad()
        F.mse_loss(teacher(teacher.add_noise(x0, noise, sigma), sigma), noise - x0).backward()
        optimizer.step()
    return teacher


def distil(updates: int = 200, taught_for: int = 800) -> tuple[float, float]:
    """The energy distance of the student's videos to the data, before and after."""
    teacher = taught(taught_for).requires_grad_(False)
    student, critic = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
    recipe = DistillConfig(sigmas=(1.0, 0.9, 0.75, 0.5), batch_size=64, relation_weight=0.1, batch_weight=0.0)
    distiller = Distiller(teacher, student, critic, recipe, seed=0)
    data = videos(500)

    def distance() -> float:
        noise, randomness = torch.randn(500, *student.latent_shape), torch.Generator().manual_seed(1)
        return codmd.metrics.energy_distance(sample_few_step(student, noise, recipe.sigmas, randomness), data)

    before = distance()
    for cycle in cycles(distiller, updates, measure_every=50):
        if cycle.collapse is not None:  # measured: log it to any tracker, draw a preview, stop early
            values = {name: float(value) for name, value in cycle.scalars().items()}
            print(f"{distiller.update:4d}  loss {values['loss']:.3f}  std ratio {values['std_ratio']:.2f}")
    return before, distance()


if __name__ == "__main__":
    torch.manual_seed(0)
    before, after = distil()
    print(f"energy distance of the 4-step student's videos to the data: {before:.3f}, after distillation {after:.3f}")
