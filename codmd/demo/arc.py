"""Arc video: short videos of a point that moves on a circle, one circle per scene, for which truth can be sampled.

A scene is a plane in R^channels (orthonormal axes) with an offset; a video is a point on the circle of that
scene, with a random phase and one of six angular speeds. Colour and layout (the plane, the offset) and motion
(the speed) are shared by the frames of a video, so a model that gets every frame right on its own can still get
the video wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ArcConfig:
    """Parameters of the arc video distribution; `seed` chooses the scenes."""

    frames: int = 8
    channels: int = 6
    scenes: int = 6
    radius: float = 1.2
    offset: float = 0.6
    speeds: tuple[float, ...] = (0.15, 0.45, 0.8)
    noise: float = 0.03
    seed: int = 0


class ArcVideo:
    """Sampler of the arc video distribution.

    Attributes:
        axes: [scenes, channels, 2], the orthonormal axes of each scene's plane.
        offset: [scenes, channels], the centre of each scene's circle.
    """

    def __init__(self, config: ArcConfig | None = None) -> None:
        self.config = config = config or ArcConfig()
        generator = torch.Generator().manual_seed(config.seed)
        normal = torch.randn(config.scenes, config.channels, 2, generator=generator, dtype=torch.float64)
        self.axes = torch.linalg.qr(normal).Q.float()
        self.offset = config.offset * torch.randn(config.scenes, config.channels, generator=generator)

    def sample(self, batch: int, generator: torch.Generator) -> Tensor:
        """Fresh videos, float32 [batch, frames, channels, 1, 1]."""
        config = self.config
        scene = torch.randint(config.scenes, (batch,), generator=generator)
        phase = 2 * torch.pi * torch.rand(batch, 1, generator=generator)
        speed = torch.tensor(config.speeds)[torch.randint(len(config.speeds), (batch, 1), generator=generator)]
        sign = 2 * torch.randint(2, (batch, 1), generator=generator) - 1
        angle = phase + sign * speed * torch.arange(config.frames)
        circle = config.radius * torch.stack((angle.cos(), angle.sin()), dim=2)
        video = torch.einsum("bfk,bck->bfc", circle, self.axes[scene]) + self.offset[scene][:, None]
        video += config.noise * torch.randn(video.shape, generator=generator)
        return video[..., None, None]

    def project(self, videos: Tensor) -> tuple[Tensor, Tensor]:
        """The scene [batch] whose plane lies nearest, and the videos' coordinates in it [batch, frames, 2]."""
        centred = videos.flatten(2)[:, None] - self.offset[None, :, None]
        inside = torch.einsum("bsfc,sck->bsfk", centred, self.axes)
        residual = centred.square().sum((2, 3)) - inside.square().sum((2, 3))
        scene = residual.argmin(dim=1)
        return scene, inside[torch.arange(len(videos)), scene]
