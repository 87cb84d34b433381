"""Implementations of :class:`codmd.ops.contract.Backend` beside the Triton kernels."""
