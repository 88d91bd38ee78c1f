"""From stored rows to the network's float32 input, a batch at a time: layout, augmentation, then scale, mean, std.

Augmentation works on the stored values (usually bytes: a quarter of the memory traffic), so crops are padded with
stored zeros, black in an image, as is usual.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from search.data.raw import Array
from search.errors import BadData
from search.spec import Augmentation, Transform

__all__ = ["Moves", "Pipeline", "moved", "pipeline"]


@dataclass(frozen=True)
class Moves:
    """How augmentation moves each image of a batch, ``(batch,)``: pixels down and right, then mirrored or not."""

    down: Tensor
    right: Tensor
    mirrored: Tensor


@dataclass(frozen=True)
class Pipeline:
    """What one input goes through. ``gain`` and ``offset`` are ``(channels, 1, …)`` or scalars: x·gain + offset is
    ``(x·scale − mean) / std``."""

    shape: tuple[int, ...]
    """Of one transformed sample."""
    dtype: torch.dtype
    channels_last: bool = False
    add_channel: bool = False
    gain: Tensor | None = None
    offset: Tensor | None = None
    augment: Augmentation = Augmentation.NONE

    def draw(self, count: int, generator: torch.Generator) -> Moves | None:
        """Random moves of up to an eighth of the side for ``count`` images, half of them mirrored where that is wanted;
        None without augmentation."""
        if self.augment is Augmentation.NONE:
            return None
        up, left = (_reach(side) for side in self.shape[1:])
        tops = torch.randint(2 * up + 1, (count,), generator=generator)
        lefts = torch.randint(2 * left + 1, (count,), generator=generator)
        mirrored = torch.zeros(count, dtype=torch.bool)
        if self.augment is Augmentation.CROP_FLIP:
            mirrored = torch.rand(count, generator=generator) < 0.5
        return Moves(up - tops, left - lefts, mirrored)

    def __call__(self, rows: Array, moves: Moves | None = None) -> Tensor:
        """``rows`` ``(batch, ...)`` as stored, owned by the caller."""
        batch = torch.from_numpy(_plain(rows))
        if self.add_channel:
            batch = batch.unsqueeze(1)
        elif self.channels_last:
            batch = batch.movedim(-1, 1)
        if moves is not None:
            batch = moved(batch, moves)
        batch = batch.to(self.dtype, memory_format=torch.contiguous_format, copy=True)
        if self.gain is not None:
            batch.mul_(self.gain)
        if self.offset is not None:
            batch.add_(self.offset)
        return batch


def pipeline(name: str, stored: Array, transform: Transform, *, images: bool, only: bool) -> Pipeline:
    """The pipeline of one input, from its stored dtype and shape.

    Integers wider than a byte (token ids) and booleans pass through unchanged, unless they are image-shaped or a
    transform is declared for them. With several inputs (``only`` false) the transform is for the image-shaped ones.
    Raises BadData where layout, augmentation or the lengths of mean and std do not fit the shape.
    """
    image_shaped = stored.ndim == 4 or (stored.ndim == 3 and transform.layout == "nhwc")
    applies = images or image_shaped or only
    declared = transform.scale != 1.0 or transform.mean or transform.std
    passes = stored.dtype.kind == "b" or (stored.dtype.kind in "iu" and stored.dtype.itemsize >= 4)
    if passes and not (applies and (image_shaped or declared)):
        kind = torch.bool if stored.dtype.kind == "b" else torch.int32 if stored.dtype == np.int32 else torch.int64
        return Pipeline(stored.shape[1:], kind)
    if not applies:
        return Pipeline(stored.shape[1:], torch.float32)
    last = images or transform.layout == "nhwc"
    if last and stored.ndim not in (3, 4):
        raise BadData(
            "layout_rank",
            f"layout nhwc needs images (rows, height, width, channels), but {name} has shape {stored.shape}; "
            "leave layout out for arrays that are not images.",
        )
    add_channel = last and stored.ndim == 3
    shape = tuple(stored.shape[1:])
    if add_channel:
        shape = (1, *shape)
    elif last:
        shape = (shape[-1], *shape[:-1])
    augment = transform.augment if len(shape) == 3 else Augmentation.NONE
    if only and augment is not transform.augment:
        raise BadData(
            "augment_needs_images",
            f"augment {transform.augment.value} needs images of four dimensions, but {name} has shape "
            f"{stored.shape}; set augment to none.",
        )
    gain, offset = _affine(name, transform, shape)
    return Pipeline(shape, torch.float32, last and not add_channel, add_channel, gain, offset, augment)


def _affine(name: str, transform: Transform, shape: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
    channels = shape[0] if shape else 1
    for label, values in (("mean", transform.mean), ("std", transform.std)):
        if len(values) not in (0, 1, channels):
            raise BadData(
                "transform_channels",
                f"{label} has {len(values)} values but {name} has {channels} channels (one sample is {shape}); "
                f"give 1 or {channels}, and layout nhwc if the stored images have channels last.",
            )
    mean = np.asarray(transform.mean or (0.0,))
    std = np.asarray(transform.std or (1.0,))
    return _spread(transform.scale / std, 1.0, shape), _spread(-mean / std, 0.0, shape)


def _spread(values: NDArray[np.float64], neutral: float, shape: tuple[int, ...]) -> Tensor | None:
    """``(channels, 1, …)`` beside a sample of ``shape``; None where it would change nothing."""
    if np.all(values == neutral):
        return None
    return torch.from_numpy(values.astype(np.float32)).reshape((-1,) + (1,) * max(len(shape) - 1, 0))


def _plain(rows: Array) -> Array:
    """Native byte order, and a dtype that torch computes with."""
    if rows.dtype.kind == "u" and rows.dtype.itemsize > 1:
        return rows.astype(np.int64)
    return np.ascontiguousarray(rows.astype(rows.dtype.newbyteorder("="), copy=False))


def moved(batch: Tensor, moves: Moves, *, fill: float = 0) -> Tensor:
    """Images ``(batch, channels, height, width)`` after ``moves``, with ``fill`` coming in from outside."""
    count, channels, height, width = batch.shape
    up, left = _reach(height), _reach(width)
    padded = batch.new_full((count, channels, height + 2 * up, width + 2 * left), fill)
    padded[:, :, up : up + height, left : left + width] = batch
    windows = padded.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)
    crops = windows[torch.arange(count), up - moves.down, left - moves.right]
    if moves.mirrored.any():
        crops = torch.where(moves.mirrored[:, None, None, None], crops.flip(3), crops)
    return crops


def _reach(side: int) -> int:
    """The furthest that an image moves along a side of so many pixels."""
    return max(side // 8, 1)
