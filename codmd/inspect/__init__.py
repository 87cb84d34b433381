"""Measures of generated videos: relations between frames, motion, flicker and colour."""
