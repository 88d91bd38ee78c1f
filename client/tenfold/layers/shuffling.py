"""A seeded permutation that is held as a few short vectors.

A vector of N entries is written as a near-square grid. Each row is rotated by an amount of its own, then each column by
one of its own, and both again. That is a Feistel network of four rounds with random round functions, which Luby and
Rackoff (1988) proved hard to tell from a random permutation; it takes about 4 sqrt(N) small integers where a list of N
indices would outweigh the N numbers that it permutes.

The amounts come from SplitMix64 (Steele, Lea, Flood 2014) in integer arithmetic, one output each, modulo the length of
the row or column: the same on every machine and in every version, whatever the global random state.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .tensor_train import balanced

__all__ = ["rotations", "shuffle", "splitmix64", "unshuffle"]

ROUNDS = 2
_WORD = (1 << 64) - 1


def splitmix64(seed: int) -> Iterator[int]:
    """Integers in [0, 2^64)."""
    state = seed & _WORD
    while True:
        state = (state + 0x9E3779B97F4A7C15) & _WORD
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
        yield z ^ (z >> 31)


def rotations(seed: int, size: int) -> Tensor:
    """The amounts for ``size`` entries, int32: in each round one for each row, then one for each column.

    Raises:
        ValueError: the seed is no integer of [0, 2^63).
    """
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"a shuffle's seed is an integer of [0, 2^63), got {seed}")
    rows, columns = balanced(size, 2)
    numbers = splitmix64(seed)
    amounts = [next(numbers) % n for _ in range(ROUNDS) for n in [columns] * rows + [rows] * columns]
    return torch.tensor(amounts, dtype=torch.int32)


def shuffle(vector: Tensor, amounts: Tensor) -> Tensor:
    """``P vector``, for ``vector``: (N,)."""
    rows, columns = balanced(len(vector), 2)
    grid = vector.reshape(rows, columns)
    for both in amounts.long().chunk(ROUNDS):
        grid = _rotate_columns(_rotate_rows(grid, both[:rows]), both[rows:])
    return grid.flatten()


def unshuffle(vector: Tensor, amounts: Tensor) -> Tensor:
    """``P^-1 vector``, for ``vector``: (N,)."""
    rows, columns = balanced(len(vector), 2)
    grid = vector.reshape(rows, columns)
    for both in reversed(amounts.long().chunk(ROUNDS)):
        grid = _rotate_rows(_rotate_columns(grid, -both[rows:]), -both[:rows])
    return grid.flatten()


def _rotate_rows(grid: Tensor, by: Tensor) -> Tensor:
    columns = grid.shape[1]
    return grid.gather(1, (torch.arange(columns, device=grid.device) + by[:, None]) % columns)


def _rotate_columns(grid: Tensor, by: Tensor) -> Tensor:
    rows = grid.shape[0]
    return grid.gather(0, (torch.arange(rows, device=grid.device)[:, None] + by) % rows)
