"""Common checks of a model's options, for every model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self


class ModelOptions:
    """What the commands ask of every adapter's options, a frozen dataclass: the `model:` section of a configuration.

    Attributes:
        weights: a file or folder that the adapter reads, or "random".
    """

    weights: str

    default_video: ClassVar[Mapping[str, int]] = {}
    """"frames", "height" and "width" in pixels of a sample where nobody says."""

    def for_inference(self) -> Self:
        """The same network without what only training needs, its weights stored as it computes."""
        return self

    def for_video(self, frames: int | None, height: int | None, width: int | None) -> Self:
        """The same options for a video of that many frames and pixels; None keeps what they say.

        Raises:
            ValueError: naming a number that no latents decode to.
        """
        if (frames, height, width) == (None, None, None):
            return self
        raise ValueError(f"frames, height, width: {type(self).__name__} describes no video that can be decoded")

    def content(self, prompts: bool, guided: bool, pixels: bool) -> dict[str, tuple[str, str]]:
        """The files beside weights that the options name: name to (path, fingerprint).

        Args:
            prompts, guided, pixels: of those that encode prompts, make the unconditional branch, decode.
        """
        return {}

    def record(self, guided: bool) -> dict[str, Any]:
        """What a sample depends on beside weights, prompt and sampler; `guided` with the unconditional branch."""
        return {}
