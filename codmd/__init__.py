"""CoDMD: relation and distribution matching losses with fused kernels, and a thin loop around them."""

from codmd import ops

__version__ = "0.1.0"
__all__ = ["__version__", "ops"]
