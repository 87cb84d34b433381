"""The comparison of recipes, with seeds and spread: `python -m benchmarks.comparison --size toy`."""
