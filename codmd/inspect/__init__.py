"""What generated videos look like in numbers: relations between frames, motion, flicker and colour."""
