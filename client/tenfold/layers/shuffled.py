"""Layers whose kernel is a shuffled low-rank tensor (Li et al. 2018, RsTD)::

    vec(K) = P vec(T)          T: a tensor of order 4 with balanced modes, in one of the three ``forms``

P is the seeded permutation of ``shuffling``. The kernel of all groups is one vector, so groups need no form of their
own. Nothing of the form is left in K, so the layer convolves with the dense kernel: it takes as many multiplications
as the dense layer, and only its parameters are fewer.

The kernel is built anew at each call in training, and kept in evaluation without gradients (``keeping``); an exported
graph builds it at each call.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Conv, ConvChain, FactorizedLayer, dense_linear
from .forms import CP, TT, Form, Tucker
from .keeping import Keeping
from .shuffling import rotations, shuffle
from .tensor_train import balanced

__all__ = [
    "SEED",
    "Shuffled",
    "ShuffledCPConv",
    "ShuffledCPLinear",
    "ShuffledTTConv",
    "ShuffledTTLinear",
    "ShuffledTuckerConv",
    "ShuffledTuckerLinear",
    "tensor_modes",
]

SEED = 0
ORDER = 4
"""That of a kernel (out, in, rows, columns)."""


def tensor_modes(size: int) -> tuple[int, ...]:
    """The modes of a tensor of ``size`` entries: at most four, with the least sum: 36864 -> (12, 12, 16, 16).

    Raises:
        ValueError: the size is a prime number, or 1.
    """
    modes = tuple(n for n in balanced(size, ORDER) if n > 1)
    if len(modes) < 2:
        raise ValueError(f"a kernel of {size} weights has no two modes; leave such a layer dense")
    return modes


class Shuffled(Keeping, FactorizedLayer):
    """What all of these layers share. ``seed`` is stored with the weights; a state dict brings its own along."""

    form: ClassVar[Form]
    modes: tuple[int, ...]
    cores: nn.ParameterList
    seed: Tensor
    """int64, a scalar."""
    amounts: Tensor
    bias: nn.Parameter | None

    def reseed(self, seed: int) -> None:
        """Shuffle by another permutation.

        Raises:
            ValueError: the seed is no integer of [0, 2^63).
        """
        self.amounts = rotations(seed, math.prod(self.modes)).to(self.seed.device)
        self.seed.fill_(seed)
        self._kept = None

    def kernel(self) -> Tensor:
        """The dense layer's weight; the kept one where nothing has to be traced or differentiated."""
        (kernel,) = self.made("kernel", tuple(self.cores), lambda: (self.dense_weight(),))
        return kernel

    def dense_weight(self) -> Tensor:
        return shuffle(self.form.build(list(self.cores)), self.amounts).reshape(self._shape)

    @property
    def output_bias(self) -> Tensor | None:
        return self.bias

    @property
    def build_macs(self) -> int:
        """Multiplications that building the kernel takes: at each call of an exported network."""
        return self.form.macs(self.modes, self.ranks)

    @torch.no_grad()
    def train(self, mode: bool = True) -> "Shuffled":
        super().train(mode)
        if not mode:
            self.kernel()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)  # type: ignore[no-untyped-call]
        if f"{prefix}seed" in state_dict and not self.seed.is_meta:
            self.reseed(int(self.seed))

    def _add(self, shape: tuple[int, ...], bias: bool, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Normal cores whose kernel has entries of torch's own variance, 1 / (3 fan-in)."""
        self._shape, self.modes = shape, tensor_modes(math.prod(shape))
        wanted = self.form.count(len(self.modes))
        if len(self.ranks) != wanted:
            raise ValueError(
                f"{self.method} of a kernel {shape} as a tensor {self.modes} takes {wanted} ranks, got {self.ranks}"
            )
        shapes = self.form.shapes(self.modes, self.ranks)
        variance = 1 / (3 * math.prod(shape[1:]) * math.prod(self.ranks))
        deviation = variance ** (0.5 / len(shapes))
        self.cores = nn.ParameterList(
            nn.Parameter(torch.empty(s, device=device, dtype=dtype).normal_(0, deviation)) for s in shapes
        )
        self.bias = nn.Parameter(torch.zeros(shape[0], device=device, dtype=dtype)) if bias else None
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("amounts", torch.empty(0, dtype=torch.int32), persistent=False)
        self.reseed(SEED)


class ShuffledLinear(Shuffled):
    replaces = (nn.Linear,)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: Sequence[int],
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(ranks)
        self._add((out_features, in_features), bias, device, dtype)

    @classmethod
    def like(cls, layer: nn.Module, ranks: Sequence[int]) -> "ShuffledLinear":
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{cls.method} replaces Linear here, got {type(layer).__name__}")
        w = layer.weight
        return cls(layer.in_features, layer.out_features, ranks, layer.bias is not None, w.device, w.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.kernel(), self.bias)

    def dense(self) -> nn.Linear:
        return dense_linear(self.dense_weight(), self.bias)


class ShuffledConv(Shuffled, ConvChain):
    count = None

    def _build(self, bias: bool) -> None:
        # The dense layer's own convolution, its handling of padding modes included, without a weight.
        self.window = self._link(self.in_channels, self.out_channels, range(len(self.kernel_size)))
        shape = tuple(self.window.weight.shape)
        del self.window.weight
        self._add(shape, bias, **self._make)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.window._conv_forward(x, self.kernel(), self.bias)
        return y

    window: Conv


class ShuffledTTLinear(ShuffledLinear):
    method, form = "shuffled_tt", TT()


class ShuffledTTConv(ShuffledConv):
    method, form = "shuffled_tt", TT()


class ShuffledTuckerLinear(ShuffledLinear):
    method, form = "shuffled_tucker", Tucker()


class ShuffledTuckerConv(ShuffledConv):
    method, form = "shuffled_tucker", Tucker()


class ShuffledCPLinear(ShuffledLinear):
    method, form = "shuffled_cp", CP()


class ShuffledCPConv(ShuffledConv):
    method, form = "shuffled_cp", CP()
