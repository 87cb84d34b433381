"""Checks and estimates of a run without training."""
