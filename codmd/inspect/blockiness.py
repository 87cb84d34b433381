"""Blockiness: how much steeper pictures are across the lines of an 8 x 8 grid than between them."""

from __future__ import annotations

import math

import cv2
import numpy as np

BLOCK = 8
"""Pixels: the transforms of JPEG and of older video codecs, and the stride of the VAEs of Wan and of its kin."""


def blockiness(pixels: np.ndarray) -> float:
    """The mean over frames of (B + 1) / (A + 1).

    B is the mean absolute grey difference of neighbouring pixels across the grid's lines (columns and rows 7|8, 15|16,
    ...), A that of all other neighbours; both in levels of 255. Without a grid, a line is a place like any other, so
    that B = A and the value is 1; a picture of flat blocks has A = 0. The level added to both keeps what nobody sees
    from counting: a grid of a tenth of a level in a flat picture is 1.1. Lines of blocks of 16 lie on this grid, too;
    a picture scaled after it was made has its blocks elsewhere.

    Args:
        pixels: [F, H, W, 3] uint8 RGB, of 16 or more pixels on each side.

    Source: B and A are the blockiness and the activity of Wang, Sheikh and Bovik, "No-reference perceptual quality
    assessment of JPEG compressed images", ICIP 2002, rows and columns taken together.
    """
    return math.fsum(_of_frame(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)) for image in pixels) / len(pixels)


def _of_frame(grey: np.ndarray) -> float:
    steps = [np.abs(np.diff(grey.astype(np.int16), axis=axis)).mean(axis=1 - axis) for axis in (0, 1)]
    across = np.concatenate([step[BLOCK - 1 :: BLOCK] for step in steps])
    between = np.concatenate([np.delete(step, np.s_[BLOCK - 1 :: BLOCK]) for step in steps])
    return float((across.mean() + 1) / (between.mean() + 1))
