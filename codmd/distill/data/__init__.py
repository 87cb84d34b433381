"""What updates are conditioned on, and what a teacher learns from."""
