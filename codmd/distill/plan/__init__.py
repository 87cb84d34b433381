"""What can be known of a run without training."""
