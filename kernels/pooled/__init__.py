"""The relation of pooled features: one pass over the latents, and the small algebra that it ends with."""
