"""Self-Forcing's training step with `codmd_loss` in it, on stand-in networks.

The shape is that of causal video distillation (Self-Forcing, arXiv 2506.08009): a student writes a video block by
block, each block in a few steps from noise and from the blocks before it; one step, the same for all blocks, is taken
with gradient; teacher and critic look at the whole video. Where the networks of a real run go is marked: everything
else stays. `python examples/self_forcing_style.py` runs in seconds on a CPU.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import codmd

FRAMES, BLOCK, CHANNELS, HEIGHT, WIDTH, TEXT = 6, 3, 4, 6, 8, 16
STEPS = (1.0, 0.9375, 0.8333, 0.625)  # noise levels of the student
GUIDANCE, RELATION_WEIGHT, CRITIC_UPDATES = 3.0, 0.1, 5


class StandIn(nn.Module):
    """In the place of a video transformer: the velocity of x_t [B, F, C, H, W] at sigma [B], given text and context."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.condition = nn.Linear(TEXT + 1, width)
        self.inner = nn.Conv3d(2 * CHANNELS, width, 3, padding=1)
        self.outer = nn.Conv3d(width, CHANNELS, 3, padding=1)

    def forward(self, noisy: Tensor, sigma: Tensor, text: Tensor, context: Tensor | None = None) -> Tensor:
        context = noisy.new_zeros(noisy.shape) if context is None else context.expand_as(noisy)
        hidden = self.inner(torch.cat((noisy, context), dim=2).transpose(1, 2))
        condition = self.condition(torch.cat((text, sigma[:, None]), dim=1))
        return self.outer(F.silu(hidden + condition[:, :, None, None, None])).transpose(1, 2)


def renoise(x0: Tensor, sigma: Tensor) -> Tensor:
    sigma = sigma.view(-1, 1, 1, 1, 1)
    return (1 - sigma) * x0 + sigma * torch.randn_like(x0)


def rollout(student: nn.Module, text: Tensor) -> Tensor:
    """A video, block after block. The exit step is drawn once; gradient flows through that step of every block."""
    count, exit_step = len(text), int(torch.randint(len(STEPS), ()))
    blocks: list[Tensor] = []
    context = None
    for _ in range(FRAMES // BLOCK):
        x = torch.randn(count, BLOCK, CHANNELS, HEIGHT, WIDTH)
        for step, level in enumerate(STEPS[: exit_step + 1]):
            sigma = torch.full((count,), level)
            with torch.set_grad_enabled(step == exit_step):
                x0 = x - level * student(x, sigma, text, context)
            if step < exit_step:
                x = renoise(x0, torch.full((count,), STEPS[step + 1]))
        blocks.append(x0)
        context = x0.detach().mean(dim=1, keepdim=True)  # a real student has its key-value cache here
    return torch.cat(blocks, dim=1)


def noise_levels(count: int, shift: float = 5.0) -> Tensor:
    t = 0.02 + 0.96 * torch.rand(count)
    return shift * t / (1 + (shift - 1) * t)


def student_loss(student: nn.Module, teacher: nn.Module, critic: nn.Module, text: Tensor, empty: Tensor) -> Tensor:
    video = rollout(student, text)
    sigma = noise_levels(len(video))
    with torch.no_grad():
        noisy = renoise(video, sigma)
        real, real_uncond = teacher(noisy, sigma, text), teacher(noisy, sigma, empty)
        fake = critic(noisy, sigma, text)
    return codmd.ops.codmd_loss(
        video, real=real, real_uncond=real_uncond, fake=fake, guidance=GUIDANCE, convention="self_forcing",
        relation_weight=RELATION_WEIGHT, prediction="flow", noisy=noisy, sigma=sigma,
    )  # fmt: skip


def critic_loss(student: nn.Module, critic: nn.Module, text: Tensor) -> Tensor:
    """Flow matching on the student's videos."""
    with torch.no_grad():
        video = rollout(student, text)
    sigma, noise = noise_levels(len(video)), torch.randn_like(video)
    level = sigma.view(-1, 1, 1, 1, 1)
    return F.mse_loss(critic((1 - level) * video + level * noise, sigma, text), noise - video)


def train(cycles: int = 4, batch: int = 2) -> list[float]:
    """The student's loss of every cycle."""
    teacher = StandIn().requires_grad_(False)  # the many-step model
    student, critic = StandIn(), StandIn()  # both start as the teacher
    for network in (student, critic):
        network.load_state_dict(teacher.state_dict())
    optimizers = {network: torch.optim.AdamW(network.parameters(), lr=2e-4) for network in (student, critic)}
    losses = []
    for _ in range(cycles):
        text, empty = torch.randn(batch, TEXT), torch.zeros(batch, TEXT)
        loss = student_loss(student, teacher, critic, text, empty)
        losses.append(loss.item())
        step(student, optimizers[student], loss)
        for _ in range(CRITIC_UPDATES):
            step(critic, optimizers[critic], critic_loss(student, critic, torch.randn(batch, TEXT)))
    return losses


def step(network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 10.0)
    optimizer.step()


if __name__ == "__main__":
    torch.manual_seed(0)
    print("loss of the student by cycle:", ", ".join(f"{loss:.4f}" for loss in train()))
