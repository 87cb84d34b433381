"""Which weights of a network training changes, and under which names."""

from __future__ import annotations

from torch import nn

from codmd.models.base import VideoDenoiser


def trainable_weights(model: VideoDenoiser) -> dict[str, nn.Parameter]:
    """Name to parameter of what an optimizer updates, in the order of `model.named_parameters()`."""
    trained = {id(weight) for weight in model.trainable_parameters()}
    return {name: weight for name, weight in model.named_parameters() if id(weight) in trained}
