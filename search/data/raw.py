"""What a reader of one file format hands on: arrays by split and input name, nothing checked yet but safety."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Raw", "Rows"]

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Rows:
    """One split as stored: ``inputs`` by name, each ``(rows, ...)``; ``target`` ``(rows, ...)`` where there is one."""

    inputs: dict[str, Array]
    target: Array | None


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
