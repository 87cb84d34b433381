"""CoDMD: relation and distribution matching losses with fused kernels, and a thin loop around them."""

__version__ = "0.1.0"
