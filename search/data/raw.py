"""What a reader of one file format hands on: arrays by split and input name, nothing checked yet but safety."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Raw", "Rows", "in_blocks"]

BLOCK_BYTES = 64 << 20

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Rows:
    """One split as stored: ``inputs`` by name, each ``(rows, ...)``; ``target`` ``(rows, ...)`` where there is one;
    ``length`` ``(rows,)``, in pixels, what keypoints' distances are relative to."""

    inputs: dict[str, Array]
    target: Array | None
    length: Array | None = None


@dataclass(frozen=True)
class Raw:
    """A file's content. ``splits`` holds any of ``train``, ``val``, ``test``; ``images`` means decoded image files,
    which are ``(rows, height, width, channels)`` bytes whatever the declared layout.
    """

    format: str
    splits: dict[str, Rows]
    images: bool = False
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


def in_blocks(array: Array) -> Iterator[tuple[int, Array]]:
    """Some rows at a time of an array that may be larger than memory, with the number of the first."""
    step = max(BLOCK_BYTES * len(array) // max(array.nbytes, 1), 1)
    for start in range(0, len(array), step):
        yield start, array[start : start + step]
