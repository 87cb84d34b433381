"""A run: its processes, networks, checkpoints and log, and the loop that ties them."""
