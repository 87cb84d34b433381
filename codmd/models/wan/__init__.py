"""Wan2.1 text-to-video: its network, configurations, weights, text encoder, VAE and export."""
