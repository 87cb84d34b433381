"""First frames: files of images, and what makes conditions of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


class ImageEncoder(Protocol):
    """What makes a condition of first frames, on one device.

    Attributes:
        shapes: name to shape of what one image becomes.
    """

    shapes: dict[str, tuple[int, ...]]

    def __call__(self, images: Sequence[Path]) -> dict[str, Tensor]:
        """Name to [B, *shape] of image files."""
        ...


def read_image(path: Path) -> Any:
    """A file as a PIL image: RGB, turned as its EXIF says.

    Raises:
        FileNotFoundError, ValueError: it is not there, or no image; names it.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"image: {path}: no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image: {path} cannot be read as an image: {error}") from error
