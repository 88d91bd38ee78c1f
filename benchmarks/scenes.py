"""Scenes to segment, drawn here: a square, a disc and a cross of any colours, places and sizes on noise."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["CLASSES", "SIDE", "draw"]

SIDE = 48
"""Pixels."""
CLASSES = ("background", "square", "disc", "cross")


def draw(rows: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (rows, 48, 48, 3) and the class of each pixel (rows, 48, 48)."""
    random = np.random.default_rng(seed)
    x = random.integers(0, 256, (rows, SIDE, SIDE, 3)).astype(np.float64)
    y = np.zeros((rows, SIDE, SIDE), np.uint8)
    grid = np.indices((SIDE, SIDE))
    for row in range(rows):
        for label in (1, 2, 3):
            offset = np.abs(grid - random.integers(8, SIDE - 8, 2)[:, None, None])
            size = random.integers(4, 9)
            inside = {
                1: offset.max(0) < size,
                2: np.hypot(*offset) < size,
                3: (offset.min(0) < 2) & (offset.max(0) < size),
            }[label]
            y[row][inside] = label
            x[row][inside] = 0.8 * random.integers(0, 256, 3) + 0.2 * x[row][inside]
    return x.astype(np.uint8), y
