"""Conditions of the updates, and the videos that a teacher learns from."""
