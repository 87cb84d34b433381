"""A training loop of one's own around `codmd_loss`: a toy teacher of many steps becomes a student of one.

`python examples/training_loop.py` takes seconds on a CPU. The networks are perceptrons and the videos are 8 frames of 4
numbers; the loop is the one that a video model needs.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import codmd

FRAMES, CHANNELS = 8, 4


def videos(count: int) -> Tensor:
    """The data, [count, F, C, 1, 1]: points that turn at a speed of their own, seen at two frequencies."""
    start, speed = 2 * torch.pi * torch.rand(count, 1), 0.3 + 0.5 * torch.rand(count, 1)
    angle = start + speed * torch.arange(FRAMES)
    return torch.stack((angle.cos(), angle.sin(), (2 * angle).cos(), (2 * angle).sin()), dim=2)[..., None, None]


class Denoiser(nn.Module):
    """The x0 prediction from x_t [B, F, C, 1, 1] and its noise level sigma [B]."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        size = FRAMES * CHANNELS
        self.layers = nn.Sequential(
            nn.Linear(size + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, size)
        )

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        return self.layers(torch.cat((noisy.flatten(1), sigma[:, None]), dim=1)).view_as(noisy)


def noised(x0: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = (1 - sigma) x0 + sigma noise, and sigma, uniform in 0.02 to 0.98."""
    sigma = 0.02 + 0.96 * torch.rand(len(x0))
    level = sigma.view(-1, 1, 1, 1, 1)
    return (1 - level) * x0 + level * torch.randn_like(x0), sigma


def denoising_step(network: Denoiser, optimizer: torch.optim.Optimizer, x0: Tensor) -> None:
    """One update of a network on clean videos: how the teacher learnt, and how the critic follows the student."""
    optimizer.zero_grad()
    F.mse_loss(network(*noised(x0)), x0).backward()
    optimizer.step()


def generate(student: Denoiser, count: int) -> Tensor:
    """The student's one step, from noise."""
    return student(torch.randn(count, FRAMES, CHANNELS, 1, 1), torch.ones(count))


def distil(updates: int = 300, batch: int = 64, relation_weight: float = 0.1) -> tuple[float, float]:
    """Trains teacher and student; the energy distance of the student's videos to the data before and after."""
    teacher = Denoiser()
    optimizer = torch.optim.Adam(teacher.parameters(), lr=2e-3)
    for _ in range(4 * updates):
        denoising_step(teacher, optimizer, videos(batch))

    student, critic = Denoiser(), Denoiser()
    for network in (student, critic):
        network.load_state_dict(teacher.state_dict())
    student_optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3)
    data = videos(500)
    with torch.no_grad():
        before = codmd.metrics.energy_distance(generate(student, 500), data)

    for _ in range(updates):
        sample = generate(student, batch)
        with torch.no_grad():
            noisy, sigma = noised(sample)
            real, fake = teacher(noisy, sigma), critic(noisy, sigma)
        student_optimizer.zero_grad()
        codmd.ops.codmd_loss(sample, real=real, fake=fake, relation_weight=relation_weight).backward()
        student_optimizer.step()
        for _ in range(3):
            denoising_step(critic, critic_optimizer, generate(student, batch).detach())

    with torch.no_grad():
        return before, codmd.metrics.energy_distance(generate(student, 500), data)


if __name__ == "__main__":
    torch.manual_seed(0)
    before, after = distil()
    print(f"energy distance of the one-step student's videos to the data: {before:.3f}, after distillation {after:.3f}")
