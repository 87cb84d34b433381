"""Attention that carries tangents: flash attention with its Jacobian-vector product, forward only."""
