"""Wan2.1 text-to-video: its network, configurations, weights, text encoder, VAE and export."""

from .network import WanDenoiser
from .options import WanOptions

__all__ = ["WanDenoiser", "WanOptions"]
