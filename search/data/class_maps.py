"""Segmentation's targets: a whole number for each pixel, ``(rows, height, width)``, 255 where none counts."""

import numpy as np
import torch

from search.data.raw import Array, Raw, in_blocks
from search.data.transform import Moves, moved
from search.errors import BadData
from search.spec import IGNORED_CLASS

__all__ = ["check_movable", "checked_maps", "largest_class", "moved_maps"]


def checked_maps(name: str, target: Array) -> Array:
    """``target`` as ``(rows, height, width)``, in its own dtype (the maps may be large). Raises BadData."""
    if target.ndim == 4 and 1 in (target.shape[1], target.shape[3]):
        target = target[:, 0] if target.shape[1] == 1 else target[..., 0]
    if target.ndim != 3:
        advice = "take numpy.argmax(y, axis=1)" if target.ndim == 4 else "give one class for each pixel"
        raise BadData(
            "labels_shape", f"y of the {name} split has shape {target.shape}, not (rows, height, width); {advice}."
        )
    for start, block in in_blocks(target):
        wrong = np.less(block, 0) | np.greater(block, IGNORED_CLASS)
        if block.dtype.kind == "f":
            wrong |= block != np.trunc(block)
        if wrong.any():
            row, y, x = (int(i) for i in np.argwhere(wrong)[0])
            raise BadData(
                "labels_out_of_range",
                f"y of the {name} split holds {block[row, y, x]} in row {start + row} at ({y}, {x}); classes are whole "
                f"numbers from 0 to {IGNORED_CLASS - 1}, and {IGNORED_CLASS} marks pixels that do not count.",
            )
    if largest_class(target) is None:
        raise BadData(
            "nothing_counts", f"no pixel of the {name} split counts: all are {IGNORED_CLASS}, or there is none."
        )
    return target


def largest_class(target: Array) -> int | None:
    """The largest class of any pixel; None when none counts."""
    tops = [int(block[counts].max()) for _, block in in_blocks(target) if (counts := block != IGNORED_CLASS).any()]
    return max(tops, default=None)


def check_movable(raw: Raw, image: tuple[int, ...]) -> None:
    """Raise BadData unless an augmented image ``(channels, height, width)`` can take its map along."""
    for rows in raw.splits.values():
        if rows.target is not None and rows.target.shape[1:] != image[1:]:
            raise BadData(
                "augment_moves_targets",
                f"augmentation moves each image with its class map, but the images are {image[1:]} and the maps "
                f"{rows.target.shape[1:]}; store maps of the images' size, or set augment to none.",
            )


def moved_maps(maps: torch.Tensor, moves: Moves) -> torch.Tensor:
    """``(batch, height, width)`` as their images were moved; what comes in from outside does not count."""
    return moved(maps[:, None], moves, fill=IGNORED_CLASS)[:, 0]
