"""A latency model of the compiled kernels that needs no GPU: ``python -m benchmarks.latency``."""
