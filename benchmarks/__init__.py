"""Benchmarks: every speed-up is printed only after the accuracy gate of the same case."""
