"""Three low-rank forms of a tensor of order d with modes n_1 .. n_d, each linear in every one of its cores::

    tt      T[i_1 .. i_d] = G_1[i_1] G_2[i_2] .. G_d[i_d]                  G_k: (r_{k-1}, n_k, r_k), r_0 = r_d = 1
    tucker  T[i_1 .. i_d] = sum_a G[a_1 .. a_d] U_1[i_1, a_1] .. U_d[i_d, a_d]    G: (r_1 .. r_d), U_k: (n_k, r_k)
    cp      T[i_1 .. i_d] = sum_r A_1[i_1, r] .. A_d[i_d, r]                                      A_k: (n_k, r)

A tensor is given back as a vector, its last index running fastest.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor

__all__ = ["CP", "TT", "Form", "Tucker", "khatri_rao"]

Shapes = tuple[tuple[int, ...], ...]


class Form(Protocol):
    """What a rank tuple means, and the tensor that cores stand for."""

    @property
    def name(self) -> str: ...

    def count(self, order: int) -> int:
        """How many ranks a tensor of this order takes."""

    def shapes(self, modes: Sequence[int], ranks: Sequence[int]) -> Shapes:
        """The cores' shapes."""

    def build(self, cores: Sequence[Tensor]) -> Tensor:
        """The tensor, (n_1 .. n_d) as one vector."""

    def macs(self, modes: Sequence[int], ranks: Sequence[int]) -> int:
        """Multiplications of ``build`` in matrix products."""


class TT:
    name: ClassVar[str] = "tt"

    def count(self, order: int) -> int:
        return order - 1

    def shapes(self, modes: Sequence[int], ranks: Sequence[int]) -> Shapes:
        return tuple(zip((1, *ranks), modes, (*ranks, 1), strict=True))

    def build(self, cores: Sequence[Tensor]) -> Tensor:
        # Both halves first: the one product of full size is then their rank long.
        half = _half(len(cores))
        left, right = cores[0], cores[-1]
        for core in cores[1:half]:
            left = left.reshape(-1, core.shape[0]) @ core.flatten(1)
        for core in reversed(cores[half:-1]):
            right = core.flatten(0, 1) @ right.reshape(core.shape[2], -1)
        r = cores[half].shape[0]
        return (left.reshape(-1, r) @ right.reshape(r, -1)).flatten()

    def macs(self, modes: Sequence[int], ranks: Sequence[int]) -> int:
        half, d = _half(len(modes)), len(modes)
        left = sum(math.prod(modes[: k + 1]) * math.prod((*ranks, 1)[k - 1 : k + 1]) for k in range(1, half))
        right = sum(math.prod(modes[k:]) * math.prod((1, *ranks)[k : k + 2]) for k in range(half, d - 1))
        return left + right + math.prod(modes) * ranks[half - 1]


class Tucker:
    name: ClassVar[str] = "tucker"

    def count(self, order: int) -> int:
        return order

    def shapes(self, modes: Sequence[int], ranks: Sequence[int]) -> Shapes:
        return (tuple(ranks), *zip(modes, ranks, strict=True))

    def build(self, cores: Sequence[Tensor]) -> Tensor:
        y, *factors = cores
        for factor in factors:
            # The mode in front is multiplied and goes to the end: after all of them the order is the first again.
            y = y.reshape(factor.shape[1], -1).T @ factor.T
        return y.flatten()

    def macs(self, modes: Sequence[int], ranks: Sequence[int]) -> int:
        return sum(math.prod(modes[: k + 1]) * math.prod(ranks[k:]) for k in range(len(modes)))


class CP:
    name: ClassVar[str] = "cp"

    def count(self, order: int) -> int:
        return 1

    def shapes(self, modes: Sequence[int], ranks: Sequence[int]) -> Shapes:
        (rank,) = ranks
        return tuple((n, rank) for n in modes)

    def build(self, cores: Sequence[Tensor]) -> Tensor:
        half = _half(len(cores))
        return (khatri_rao(cores[:half]) @ khatri_rao(cores[half:]).T).flatten()

    def macs(self, modes: Sequence[int], ranks: Sequence[int]) -> int:
        return math.prod(modes) * ranks[0]


def _half(order: int) -> int:
    """How many modes are on the left: as many as on the right, or one more."""
    return (order + 1) // 2


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """(n_1 .. n_m, r) as a matrix: each column the Kronecker product of the factors' columns."""
    y = factors[0]
    for factor in factors[1:]:
        y = (y[:, None] * factor).flatten(0, 1)
    return y
