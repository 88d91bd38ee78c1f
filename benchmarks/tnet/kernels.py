"""Where a network's kernels come from: each its own, each factorized alone, or all of them slices of one tensor.

All k×k kernels of a network with equal channels are one tensor ``(stacks, depth, pathways, convs, out, in, kh, kw)``,
whose first four modes are the architecture's. T-Net (Kossaifi et al. 2019) keeps that tensor in Tucker or MPS (tensor
train) form and trains the factors from scratch, so that layers share what they have in common.

Every form starts with the variance of He et al. (2015) in the kernels that it stands for. A form is a core of
independent entries of variance s² between matrices, so that an entry of the tensor has the variance s² ‖u₁‖² ‖u₂‖² …,
u being the rows of the matrices that it takes. A matrix (n × r) with orthonormal columns has Σ‖u‖² = r, so that its n
rows, scaled by √(n/r), have ‖u‖² = 1 on average: with s² = 2 / (in · kh · kw) the tensor's variance is He's, whatever
the ranks.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

__all__ = ["Dense", "Factored", "JointMPS", "JointTucker", "Kernels", "LayerwiseTucker", "Links", "Shape"]

Shape = tuple[int, int, int, int, int, int, int, int]
"""stacks, depth, pathways, convolutions of a block, outputs, inputs, kernel height and width."""

Chain = tuple[Tensor, ...]
"""Convolution weights ``(out, in, kh, kw)``, the first of them first, that together are one layer."""

LAYER = 4
"""How many modes of the tensor say which layer; the others are the layer's own."""


class Kernels(nn.Module, ABC):
    """What the network asks for."""

    shape: Shape

    @abstractmethod
    def chains(self) -> list[Chain]:
        """A chain for every layer, in the order of the first four modes."""


class Links(Kernels):
    """Kernels that have been cut into chains; what layers share is stored once."""

    def __init__(self, shape: Shape, chains: Sequence[Chain]) -> None:
        super().__init__()
        self.shape = shape
        unique = {id(link): link for chain in chains for link in chain}
        places = {key: place for place, key in enumerate(unique)}
        self.links = nn.ParameterList([nn.Parameter(link.detach().clone()) for link in unique.values()])
        self.places = [[places[id(link)] for link in chain] for chain in chains]

    def chains(self) -> list[Chain]:
        return [tuple(self.links[place] for place in chain) for chain in self.places]


class Factored(Kernels):
    """A trainable form of the whole tensor."""

    def __init__(self, shape: Shape, ranks: Sequence[int]) -> None:
        """Raises ValueError when a rank is not one of those that the form has for this shape."""
        super().__init__()
        most = self.largest(shape)
        if len(ranks) != len(most) or any(not 1 <= rank <= top for rank, top in zip(ranks, most, strict=False)):
            raise ValueError(
                f"{type(self).__name__} of kernels {shape} takes {len(most)} ranks of at least 1 and at most "
                f"{most}, got {tuple(ranks)}"
            )
        self.shape, self.ranks = shape, tuple(ranks)

    @abstractmethod
    def tensor(self) -> Tensor:
        """The tensor itself, of shape ``shape``."""

    @abstractmethod
    def split(self) -> list[Chain]:
        """For every layer what it does at inference: small convolutions, some of them shared with other layers."""

    @classmethod
    @abstractmethod
    def largest(cls, shape: Shape) -> tuple[int, ...]:
        """The ranks at which the form holds any tensor of this shape."""

    @classmethod
    @abstractmethod
    def parameters_of(cls, shape: Shape, ranks: Sequence[int]) -> int:
        """How many numbers the form has."""

    @classmethod
    def ranks_of(cls, shape: Shape, feature_rank: int) -> tuple[int, ...]:
        """As the paper varies them: one rank for channels, every other mode in full."""
        return tuple(min(feature_rank, most) for most in cls.largest(shape))

    @classmethod
    def at(cls, shape: Shape, ratio: float) -> Self:
        """With the feature rank whose parameters are nearest to 1 / ``ratio`` of the tensor's.

        Raises ValueError for a ratio that is not positive.
        """
        if not ratio > 0:
            raise ValueError(f"a compression ratio is above 0 (4 keeps a quarter), got {ratio}")
        target = math.prod(shape) / ratio
        candidates = [cls.ranks_of(shape, rank) for rank in range(1, max(cls.largest(shape)) + 1)]
        return cls(shape, min(candidates, key=lambda ranks: abs(cls.parameters_of(shape, ranks) - target)))

    def chains(self) -> list[Chain]:
        # One contraction for all layers costs less in training than three convolutions on every activation; in full
        # precision, since factors multiply.
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            return [(kernel,) for kernel in self.tensor().flatten(0, LAYER - 1)]

    def links(self) -> Links:
        """The same kernels for inference."""
        with torch.no_grad():
            return Links(self.shape, self.split())


class Dense(Factored):
    """Each kernel its own numbers."""

    def __init__(self, shape: Shape, ranks: Sequence[int] = ()) -> None:
        super().__init__(shape, ranks)
        self.weight = nn.Parameter(_core(shape, shape))

    def tensor(self) -> Tensor:
        return self.weight

    def split(self) -> list[Chain]:
        return self.chains()

    @classmethod
    def largest(cls, shape: Shape) -> tuple[int, ...]:
        return ()

    @classmethod
    def parameters_of(cls, shape: Shape, ranks: Sequence[int] = ()) -> int:
        return math.prod(shape)

    @classmethod
    def at(cls, shape: Shape, ratio: float = 1.0) -> Self:
        if ratio != 1:
            raise ValueError(f"dense kernels have no rank to choose: their ratio is 1, got {ratio}")
        return cls(shape)


class JointTucker(Factored):
    """W = G ×₀ U₀ … ×₇ U₇ with one rank a mode: ∏R_k + Σ I_k R_k parameters."""

    def __init__(self, shape: Shape, ranks: Sequence[int]) -> None:
        super().__init__(shape, ranks)
        self.core = nn.Parameter(_core(self.ranks, shape))
        self.factors = nn.ParameterList(
            [nn.Parameter(_rows(size, rank)) for size, rank in zip(shape, self.ranks, strict=True)]
        )

    def tensor(self) -> Tensor:
        return _expand(self.core, list(self.factors))

    def split(self) -> list[Chain]:
        """1×1 to the input rank, a core of the layer's own, 1×1 to the outputs; both 1×1s are everyone's."""
        outs, ins = self.factors[LAYER], self.factors[LAYER + 1]
        first, last = ins.T[:, :, None, None], outs[:, :, None, None]
        # The channels' modes stay at their ranks; the kernel's are expanded into the core.
        own = [outs.new_ones(1).expand(rank).diag() for rank in self.ranks[LAYER : LAYER + 2]]
        cores = _expand(self.core, [*self.factors[:LAYER], *own, *self.factors[LAYER + 2 :]])
        return [(first, core, last) for core in cores.flatten(0, LAYER - 1)]

    @classmethod
    def largest(cls, shape: Shape) -> tuple[int, ...]:
        return shape

    @classmethod
    def parameters_of(cls, shape: Shape, ranks: Sequence[int]) -> int:
        return math.prod(ranks) + sum(size * rank for size, rank in zip(shape, ranks, strict=True))

    @classmethod
    def ranks_of(cls, shape: Shape, feature_rank: int) -> tuple[int, ...]:
        outs, ins = (min(feature_rank, size) for size in shape[LAYER : LAYER + 2])
        return *shape[:LAYER], outs, ins, *shape[LAYER + 2 :]


class JointMPS(Factored):
    """W[i₀ … i₇] = G₀[i₀] ⋯ G₇[i₇], cores R_{k−1} × I_k × R_k and R_{−1} = R₇ = 1: Σ R_{k−1} I_k R_k parameters.

    ``ranks`` are the seven between the cores.
    """

    def __init__(self, shape: Shape, ranks: Sequence[int]) -> None:
        super().__init__(shape, ranks)
        bounds = (1, *self.ranks, 1)
        cores = []
        for mode, (left, size, right) in enumerate(zip(bounds, shape, bounds[1:], strict=False)):
            if right > left * size or left > size * right:
                raise ValueError(
                    f"a train's rank is at most its neighbour's times the mode between, but mode {mode} of size {size} "
                    f"lies between the ranks {left} and {right} of {self.ranks}"
                )
            # Canonical form: orthonormal columns before the outputs' core and orthonormal rows behind it. Then so are
            # the products on either side, and the scales of _rows multiply to √(layers / R) and √(taps / R).
            if mode < LAYER:
                core = _rows(left * size, right).reshape(left, size, right)
            elif mode == LAYER:
                core = _core((left, size, right), shape)
            else:
                core = _rows(size * right, left).T.reshape(left, size, right)
            cores.append(nn.Parameter(core))
        self.cores = nn.ParameterList(cores)

    def tensor(self) -> Tensor:
        return _train(list(self.cores))[0, ..., 0]

    def split(self) -> list[Chain]:
        """One k×k convolution to the rank between outputs and inputs, everyone's; then a 1×1 of the layer's own."""
        layers = _train(list(self.cores[:LAYER])).flatten(0, LAYER)
        own = torch.tensordot(layers, self.cores[LAYER], 1)
        shared = _train(list(self.cores[LAYER + 1 :]))[..., 0]
        return [(shared, last[:, :, None, None]) for last in own]

    @classmethod
    def largest(cls, shape: Shape) -> tuple[int, ...]:
        return tuple(min(math.prod(shape[:k]), math.prod(shape[k:])) for k in range(1, len(shape)))

    @classmethod
    def parameters_of(cls, shape: Shape, ranks: Sequence[int]) -> int:
        bounds = (1, *ranks, 1)
        return sum(left * size * right for left, size, right in zip(bounds, shape, bounds[1:], strict=False))


class LayerwiseTucker(Factored):
    """Each kernel by itself: 1×1 to the input rank, k×k, 1×1 to the outputs; layers share nothing.

    Kim et al. (2016). ``ranks`` are those of outputs and inputs, the same in each layer; a layer has
    R_out R_in k² + out R_out + in R_in parameters.
    """

    def __init__(self, shape: Shape, ranks: Sequence[int]) -> None:
        super().__init__(shape, ranks)
        layers, (out_rank, in_rank) = math.prod(shape[:LAYER]), self.ranks
        outs, ins = shape[LAYER : LAYER + 2]
        self.cores = nn.Parameter(_core((layers, out_rank, in_rank, *shape[LAYER + 2 :]), shape))
        self.outs = nn.Parameter(torch.stack([_rows(outs, out_rank) for _ in range(layers)]))
        self.ins = nn.Parameter(torch.stack([_rows(ins, in_rank) for _ in range(layers)]))

    def tensor(self) -> Tensor:
        return torch.einsum("lop,lpqhw,liq->loihw", self.outs, self.cores, self.ins).reshape(self.shape)

    def split(self) -> list[Chain]:
        return [
            (first.T[:, :, None, None], core, last[:, :, None, None])
            for first, core, last in zip(self.ins, self.cores, self.outs, strict=True)
        ]

    @classmethod
    def largest(cls, shape: Shape) -> tuple[int, ...]:
        return shape[LAYER : LAYER + 2]

    @classmethod
    def parameters_of(cls, shape: Shape, ranks: Sequence[int]) -> int:
        (outs, ins), (out_rank, in_rank) = shape[LAYER : LAYER + 2], ranks
        own = out_rank * in_rank * math.prod(shape[LAYER + 2 :]) + outs * out_rank + ins * in_rank
        return math.prod(shape[:LAYER]) * own


def _core(size: Sequence[int], shape: Shape) -> Tensor:
    """Independent entries with the variance 2 / (in · kh · kw) of He et al. (2015)."""
    return torch.randn(*size) * math.sqrt(2 / math.prod(shape[LAYER + 1 :]))


def _rows(size: int, rank: int) -> Tensor:
    """(size, rank): orthonormal columns, scaled so that the rows' mean square norm is 1."""
    return nn.init.orthogonal_(torch.empty(size, rank)) * math.sqrt(size / rank)


def _expand(core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """core ×₀ U₀ ×₁ U₁ …: each product takes the first mode away and puts the expanded one last."""
    for factor in factors:
        core = torch.tensordot(core, factor, ([0], [1]))
    return core


def _train(cores: Sequence[Tensor]) -> Tensor:
    """The chain's product, (R_before, I …, R_after)."""
    product, *rest = cores
    for core in rest:
        product = torch.tensordot(product, core, 1)
    return product
