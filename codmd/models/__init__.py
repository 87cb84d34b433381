"""Video models behind one contract: `codmd.models.base.VideoDenoiser`."""

from .base import VideoDenoiser

__all__ = ["VideoDenoiser"]
