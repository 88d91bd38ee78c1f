"""The data as the search uses it: three splits that yield transformed batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from search.data.raw import Array
from search.data.transform import Moves, Pipeline
from search.spec import DataInfo, Task

__all__ = ["Batch", "Data", "Split", "evenly"]

Batch = tuple[tuple[Tensor, ...], Tensor | None]
"""The network's inputs, each ``(batch, ...)``, and the targets ``(batch, ...)`` where there are any."""

BLOCK = 64
"""Rows converted at a time when all targets are wanted; maps are large."""


def evenly(count: int, wanted: int) -> NDArray[np.int64]:
    """``wanted`` of ``count`` rows, evenly spaced."""
    return np.linspace(0, count, wanted, endpoint=False).astype(np.int64)


@dataclass(frozen=True)
class Split:
    """Rows of stored arrays (memory-mapped where possible) and how each input becomes a batch."""

    stored: tuple[Array, ...]
    stored_target: Array | None
    rows: NDArray[np.int64] | None
    """Which stored rows belong to this split; None means all."""
    pipelines: tuple[Pipeline, ...]
    target_dtype: torch.dtype
    """int64 labels or float32 values."""
    move_target: Callable[[Tensor, Moves], Tensor] | None = None
    """What augmentation does to the targets; None: it leaves them as they are."""

    def __len__(self) -> int:
        return len(self.stored[0]) if self.rows is None else len(self.rows)

    @property
    def inputs(self) -> tuple[Array, ...]:
        """The stored inputs, untransformed: mapped, or a copy where the split is part of an array."""
        return self.stored if self.rows is None else tuple(array[self.rows] for array in self.stored)

    def targets(self) -> Iterator[Tensor]:
        """``(rows, ...)`` in this split's order, some rows at a time: int64 labels or float32 values; none without."""
        numbers = np.arange(len(self)) if self.rows is None else self.rows
        if self.stored_target is not None:
            for start in range(0, len(numbers), BLOCK):
                yield self._target(numbers[start : start + BLOCK])

    def batches(
        self, batch_size: int, *, shuffle: int | None = None, augment: bool = False, limit: int | None = None
    ) -> Iterator[Batch]:
        """Transformed batches; the last may be smaller. The same arguments give the same batches.

        ``shuffle``: the seed of the order, and of the augmentation. ``limit``: at most that many rows, drawn by the
        shuffle, or evenly spaced without one (files are often sorted by class).
        """
        return _batches(self, batch_size, shuffle, augment, limit)

    def take(self, chosen: NDArray[np.int64], generator: torch.Generator | None) -> Batch:
        """The rows ``chosen`` (their places in this split), augmented where there is a ``generator``."""
        numbers = chosen if self.rows is None else self.rows[chosen]
        moves = [None if generator is None else apply.draw(len(numbers), generator) for apply in self.pipelines]
        inputs = tuple(
            apply(array[numbers], move) for array, apply, move in zip(self.stored, self.pipelines, moves, strict=True)
        )
        target = None if self.stored_target is None else self._target(numbers)
        drawn = next((move for move in moves if move is not None), None)
        if target is not None and drawn is not None and self.move_target is not None:
            target = self.move_target(target, drawn)
        return inputs, target

    def _target(self, chosen: NDArray[np.int64]) -> Tensor:
        assert self.stored_target is not None  # noqa: S101 -- callers ask first
        wanted = np.int64 if self.target_dtype is torch.int64 else np.float32
        return torch.from_numpy(self.stored_target[chosen].astype(wanted))


@dataclass(frozen=True)
class Joined:
    """Two splits of the same inputs as one, to learn from."""

    first: Split
    second: Split

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def batches(
        self, batch_size: int, *, shuffle: int | None = None, augment: bool = False, limit: int | None = None
    ) -> Iterator[Batch]:
        """As of a ``Split``; within a batch, rows of the first come before those of the second."""
        return _batches(self, batch_size, shuffle, augment, limit)

    def take(self, chosen: NDArray[np.int64], generator: torch.Generator | None) -> Batch:
        edge = len(self.first)
        mine, others = chosen[chosen < edge], chosen[chosen >= edge] - edge
        (x, y), (x2, y2) = self.first.take(mine, generator), self.second.take(others, generator)
        inputs = tuple(torch.cat(pair) for pair in zip(x, x2, strict=True))
        return inputs, None if y is None or y2 is None else torch.cat((y, y2))


def _batches(
    source: Split | Joined, batch_size: int, shuffle: int | None, augment: bool, limit: int | None
) -> Iterator[Batch]:
    order = _order(len(source), shuffle, limit)
    generator = torch.Generator().manual_seed(shuffle or 0) if augment else None
    for start in range(0, len(order), batch_size):
        yield source.take(order[start : start + batch_size], generator)


def _order(count: int, shuffle: int | None, limit: int | None) -> NDArray[np.int64]:
    wanted = count if limit is None else min(limit, count)
    if shuffle is not None:
        return np.random.default_rng(shuffle).permutation(count)[:wanted]
    return evenly(count, wanted) if wanted < count else np.arange(count)


@dataclass(frozen=True)
class Data:
    """``train`` to learn, ``select`` to choose, ``verify`` to check at the end (never used for choosing)."""

    train: Split | Joined
    select: Split
    verify: Split
    info: DataInfo
    task: Task

    def learning_select(self) -> "Data":
        """The same data where nothing is chosen any more: the select split is learnt from as well."""
        assert isinstance(self.train, Split)  # noqa: S101 -- once is enough
        return replace(self, train=Joined(self.train, self.select))

    def reordered(self, names: tuple[str, ...]) -> "Data":
        """The same data with its inputs in the order of ``names``."""
        places = [[known.name for known in self.info.inputs].index(name) for name in names]
        split = {
            part: replace(
                getattr(self, part),
                stored=tuple(getattr(self, part).stored[i] for i in places),
                pipelines=tuple(getattr(self, part).pipelines[i] for i in places),
            )
            for part in ("train", "select", "verify")
        }
        info = self.info.model_copy(update={"inputs": tuple(self.info.inputs[i] for i in places)})
        return Data(info=info, task=self.task, **split)
