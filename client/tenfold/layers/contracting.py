"""Products of a tensor train with an input, from its first core or from its last, some cores multiplied out before.

A state between two cores has the axes (batch, groups, one side's digits, the digit and rank that come next, the other
side's digits and positions): each core is then a batch of matrix products, and nothing ever changes its place.
Neighbouring cores can be multiplied out to one larger core. There are fewer and larger products then, and often fewer
multiplications, too; all cores together are the whole matrix. Which cores are joined and where the contraction begins
follows from sizes, by ``planning``.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from .planning import Work, convolution, copy, product, quickest

__all__ = ["TTShape", "Way", "build", "conv_way", "from_first", "from_last", "joined", "linear_way", "train_way"]


@dataclass(frozen=True)
class Way:
    """How a train meets its input. ``begin``: with which core. ``parts``: how many neighbours make up each core."""

    begin: Literal["first", "last"]
    parts: tuple[int, ...]
    is_dense: bool = False
    """Of a convolution: with the whole kernel, the spatial core included."""


@dataclass(frozen=True)
class TTShape:
    """The shapes of a train's cores; ``ranks``: r_1 .. r_d."""

    out_modes: tuple[int, ...]
    in_modes: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.out_modes) == len(self.in_modes) == len(self.ranks) >= 1:
            raise ValueError(
                f"a tensor train needs an out mode, an in mode and a rank for each core, got out modes "
                f"{self.out_modes}, in modes {self.in_modes} and ranks {self.ranks}"
            )

    @property
    def out(self) -> int:
        return math.prod(self.out_modes)

    @property
    def in_(self) -> int:
        return math.prod(self.in_modes)

    @property
    def cores(self) -> tuple[tuple[int, int, int, int], ...]:
        """(r_{k-1}, o_k, i_k, r_k) of each core."""
        return tuple(zip((1, *self.ranks[:-1]), self.out_modes, self.in_modes, self.ranks, strict=True))

    @property
    def parameters(self) -> int:
        return sum(math.prod(core) for core in self.cores)

    def joined(self, parts: Sequence[int]) -> "TTShape":
        """Of the train whose cores are the products of so many neighbours."""
        spans = list(itertools.pairwise(itertools.accumulate(parts, initial=0)))
        return TTShape(
            tuple(math.prod(self.out_modes[a:b]) for a, b in spans),
            tuple(math.prod(self.in_modes[a:b]) for a, b in spans),
            tuple(self.ranks[b - 1] for _, b in spans),
        )

    def ways(self) -> tuple[Way, ...]:
        """Every choice of neighbours to be joined, from either end."""
        ends = range(1, len(self.ranks))
        cuts = [(0, *some, len(self.ranks)) for n in range(len(self.ranks)) for some in itertools.combinations(ends, n)]
        parts = [tuple(b - a for a, b in itertools.pairwise(cut)) for cut in cuts]
        return tuple(Way(begin, sizes) for begin in ("first", "last") for sizes in parts)

    def contraction(self, way: Way, batch: int, positions: int, groups: int = 1) -> Work:
        """The work of ``from_first`` or ``from_last`` with the joined cores."""
        shape, work = self.joined(way.parts), Work()
        done, todo = 1, shape.in_
        for r, o, i, s in shape.cores if way.begin == "first" else reversed(shape.cores):
            todo //= i
            if way.begin == "first":
                m, k, items, n = o * s, r * i, done, todo * positions
            else:
                m, k, items, n = r * o, i * s, todo, done * positions
            # A vector each is one product with them all.
            items, n = (groups, batch * items) if n == 1 else (batch * groups * items, n)
            work += product(m, k, n, items)
            done *= o
        return work

    def joining(self, parts: Sequence[int], groups: int = 1) -> Work:
        """The work of ``joined``."""
        work, start = Work(), 0
        for size in parts:
            (r, o, i, s), *others = self.cores[start : start + size]
            for _, o_next, i_next, s_next in others:
                work += product(r * o * i, s, o_next * i_next * s_next, groups)
                o, i, s = o * o_next, i * i_next, s_next
                work += copy(groups * r * o * i * s)
            start += size
        return work


@lru_cache(maxsize=4096)
def linear_way(shape: TTShape, rows: int) -> tuple[Way, Work]:
    """The quickest way for a Linear on so many rows, and its work without that of joining cores."""
    ways = {way: (shape.contraction(way, rows, 1), shape.joining(way.parts)) for way in shape.ways()}
    way = quickest(ways, shape.out * shape.in_ * rows)
    return way, ways[way][0]


def train_way(shape: TTShape, batch: int, positions: int, groups: int) -> tuple[Way, Work, Work]:
    """The quickest way for a train alone, its work, and that of joining cores."""
    ways = {
        way: (shape.contraction(way, batch, positions, groups), shape.joining(way.parts, groups))
        for way in shape.ways()
    }
    way = quickest(ways, max(run.macs for run, _ in ways.values()))
    return way, *ways[way]


@lru_cache(maxsize=4096)
def conv_way(
    shape: TTShape, kernel: tuple[int, ...], groups: int, batch: int, positions: tuple[int, int]
) -> tuple[Way, Work]:
    """The quickest way for a convolution with ``positions`` of its input and of its output, and its work.

    From the first core it convolves at the end, one channel from r_d; from the last one at the beginning, one to r_d.
    """
    before, behind = positions
    r, out, in_ = shape.ranks[-1], shape.out, shape.in_
    ways = {}
    for way in shape.ways():
        if way.begin == "first":
            spatial = convolution(1, r, kernel, positions, batch * out, groups)
            work = shape.contraction(way, batch, before, groups) + spatial
        else:
            spatial = convolution(r, 1, kernel, positions, batch * in_, groups)
            work = spatial + shape.contraction(way, batch, behind, groups)
        if groups > 1:  # which the spatial core wants side by side
            work += copy(batch * groups * in_ * before) + copy(batch * groups * out * behind)
        ways[way] = work, shape.joining(way.parts, groups)
    whole = (len(shape.ranks),)
    dense = convolution(out, in_, kernel, positions, batch, groups)
    ways[Way("first", whole, is_dense=True)] = (
        dense,
        shape.joining(whole, groups) + product(out * in_, r, math.prod(kernel), groups),
    )
    way = quickest(ways, dense.macs)
    return way, ways[way][0]


def from_first(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """(batch, groups, in, positions) to (batch, groups, out, r_d, positions), beginning with the first core."""
    batch, groups, todo, positions = x.shape
    y, done, s = x, 1, 1
    for core in cores:
        r, o, i, s = core.shape[0] // groups, *core.shape[1:]
        todo //= i
        matrix = core.reshape(groups, r, o, i, s).permute(0, 2, 4, 1, 3).reshape(groups, o * s, r * i)
        y = _times(matrix, y.reshape(batch, groups, done, r * i, todo * positions))
        done *= o
    return y.reshape(batch, groups, done, s, positions)


def from_last(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """(batch, groups, in, r_d, positions) to (batch, groups, out, positions), beginning with the last core."""
    batch, groups, todo, _, positions = x.shape
    y, done = x, 1
    for core in reversed(cores):
        r, o, i, s = core.shape[0] // groups, *core.shape[1:]
        todo //= i
        y = _times(core.reshape(groups, r * o, i * s), y.reshape(batch, groups, todo, i * s, done * positions))
        done *= o
    return y.reshape(batch, groups, done, positions)


def _times(matrix: Tensor, y: Tensor) -> Tensor:
    """(groups, m, k) by (batch, groups, items, k, n): (batch, groups, items, m, n) in memory, whatever its shape."""
    groups, (batch, _, items, k, n) = matrix.shape[0], y.shape
    if n == 1:
        if groups == 1:
            return torch.matmul(y.reshape(batch * items, k), matrix[0].T)
        return torch.matmul(y.reshape(batch, groups, items, k), matrix.mT)
    # A matrix without axes before is folded into one product with all of y, which turns y and the result: for gradients
    # alone, which would else be made item by item.
    alone = groups == 1 and torch.is_grad_enabled() and not torch.compiler.is_exporting()
    return torch.matmul(matrix[0] if alone else matrix[:, None], y)


def joined(cores: Sequence[Tensor], parts: Sequence[int], groups: int = 1) -> tuple[Tensor, ...]:
    """The train whose cores (groups * r_{k-1}, o_k, i_k, r_k) are the products of so many neighbours of ``cores``."""
    found, start = [], 0
    for size in parts:
        y, *others = cores[start : start + size]
        for core in others:
            (rows, out, in_, r), (_, o, i, s) = y.shape, core.shape
            y = torch.bmm(y.reshape(groups, -1, r), core.reshape(groups, r, o * i * s))
            y = y.reshape(rows, out, in_, o, i, s).permute(0, 1, 3, 2, 4, 5).reshape(rows, out * o, in_ * i, s)
        found.append(y)
        start += size
    return tuple(found)


def build(cores: Sequence[Tensor], groups: int = 1) -> Tensor:
    """The product of the cores: (groups, out, in, r_d)."""
    return joined(cores, (len(cores),), groups)[0]
