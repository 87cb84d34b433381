"""The relation of whole latents (pool=None): Gram matrices and a gradient from them."""
