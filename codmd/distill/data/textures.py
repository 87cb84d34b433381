"""Videos with known motion over real pixels: pans and zooms over the photographs that scikit-image ships.

A video is a small window that moves over a photograph; its caption is the photograph's name and the motion's. Latents
are pixels rearranged (space to depth), so that no autoencoder is needed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from importlib import resources

import torch
from torch import Tensor
from torch.nn import functional as F

from codmd.distill.update.noise import seeded

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "rocket.jpg", "ihc.png")
MOTIONS = {
    "still": (0.0, 0.0, 1.0),
    "pan left": (-1.0, 0.0, 1.0),
    "pan right": (1.0, 0.0, 1.0),
    "pan up": (0.0, -1.0, 1.0),
    "pan down": (0.0, 1.0, 1.0),
    "zoom in": (0.0, 0.0, 0.93),
    "zoom out": (0.0, 0.0, 1.07),
}
"""Per frame: the window's step to the right and down in its pixels, and the factor of its size."""

DEPTH = 2


class Textures:
    """Captioned videos, without end: item n is a caption, and a position in the data one video of it.

    Args:
        latent_shape: (frames, channels, height, width); channels is 3 * DEPTH^2 = 12.
        text_dim: of the captions' embeddings; 0 for an unconditional model.
        zoom: pixels of a photograph per pixel of a video.
        seed: of the windows' places.

    Attributes:
        captions: photograph and motion of every item.
    """

    images: Sequence[str] = ()
    """Of first frames: none."""

    def __init__(self, latent_shape: Sequence[int], text_dim: int, zoom: float = 4.0, seed: int = 0) -> None:
        self.frames, channels, height, width = latent_shape
        if channels != 3 * DEPTH**2:
            raise ValueError(f"data.kind: textures have {3 * DEPTH**2} latent channels; the model has {channels}")
        self.height, self.width = height * DEPTH, width * DEPTH
        self.seed = seed
        self.photographs = [_photograph(name, zoom) for name in PHOTOGRAPHS]
        smallest = min(min(photograph.shape[1:]) for photograph in self.photographs)
        if smallest < self._reach():
            raise ValueError(
                f"data.zoom: at {zoom:g} a photograph is {smallest} pixels wide; the windows reach over {self._reach()}"
            )
        pixels = torch.cat([photograph.flatten(1) for photograph in self.photographs], dim=1)
        self.mean, self.std = pixels.mean(), pixels.std()
        self.captions = [
            f"{photograph.split('.')[0]} {motion}" for photograph, motion in itertools.product(PHOTOGRAPHS, MOTIONS)
        ]
        self.embeddings = torch.stack([_caption_vector(caption, text_dim) for caption in self.captions])

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def prompts(self) -> list[str]:
        """The captions, in the order of the items."""
        return self.captions

    def condition(self, numbers: Sequence[int]) -> Tensor | None:
        """Embeddings of the captions, one token each, [len(numbers), 1, text_dim]; None for an unconditional model."""
        return self.embeddings[list(numbers)][:, None] if self.embeddings.shape[1] else None

    def videos(self, numbers: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Latents [B, F, C, H, W], normalised: the video of each item at that position of the data."""
        return self.to_latents(torch.stack([self._video(*pair) for pair in zip(numbers, positions, strict=True)]))

    def to_latents(self, pixels: Tensor) -> Tensor:
        """[B, F, 3, H * DEPTH, W * DEPTH] in [0, 1] as normalised latents [B, F, 3 * DEPTH^2, H, W]."""
        return F.pixel_unshuffle((pixels - self.mean) / self.std, DEPTH)

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of `to_latents`, clamped to [0, 1]."""
        pixels = F.pixel_shuffle(latents.float(), DEPTH)
        return (pixels * self.std.to(latents.device) + self.mean.to(latents.device)).clamp(0, 1)

    def _reach(self) -> int:
        """Pixels across that any video's windows may touch."""
        growth = max(factor for *_, factor in MOTIONS.values()) ** (self.frames - 1)
        return math.ceil(max(self.height, self.width) * growth) + 2 * self.frames

    def _video(self, number: int, position: int) -> Tensor:
        photograph = self.photographs[number // len(MOTIONS)]
        dx, dy, factor = list(MOTIONS.values())[number % len(MOTIONS)]
        size = torch.tensor([photograph.shape[2], photograph.shape[1]], dtype=torch.float32)
        margin = self._reach() / 2
        start = margin + (size - 2 * margin) * torch.rand(2, generator=seeded(self.seed, position))
        time = torch.arange(self.frames, dtype=torch.float32) - (self.frames - 1) / 2
        centre = start + time[:, None] * torch.tensor([dx, dy])
        scale = factor**time
        theta = torch.zeros(self.frames, 2, 3)
        theta[:, 0, 0] = scale * self.width / size[0]
        theta[:, 1, 1] = scale * self.height / size[1]
        theta[:, :, 2] = 2 * centre / size - 1
        grid = F.affine_grid(theta, [self.frames, 3, self.height, self.width], align_corners=False)
        return F.grid_sample(photograph.expand(self.frames, -1, -1, -1), grid, align_corners=False)


def _photograph(name: str, zoom: float) -> Tensor:
    """[3, height, width] in [0, 1], averaged down by `zoom`."""
    import imageio.v3 as imageio

    path = resources.files("skimage") / "data" / name
    pixels = torch.from_numpy(imageio.imread(path.read_bytes())[..., :3].copy())
    image = pixels.permute(2, 0, 1).float() / 255
    size = [round(side / zoom) for side in image.shape[1:]]
    return F.interpolate(image[None], size=size, mode="area")[0]


def _caption_vector(caption: str, text_dim: int) -> Tensor:
    """Unit-variance sum of one random vector for the photograph and one for the motion."""
    photograph, _, motion = caption.partition(" ")
    vectors = [torch.randn(text_dim, generator=seeded(word)) for word in (photograph, motion)]
    return (vectors[0] + vectors[1]) / math.sqrt(2)
