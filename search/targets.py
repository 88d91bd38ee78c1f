"""What is wanted of one layer's output, seen through what follows it (``chains``).

With ``a, b`` the scale and shift of a batch norm behind the layer, ``s`` the other operand of an addition behind that,
and a tilde for the compressed network, the output wanted is

* plain: ``y``
* through the norm and the addition: ``(a y + b + s - b~ - s~) / a~``, errors weighed by ``a~^2`` for each channel, so
  that the layer makes up for the error that its sibling brings;
* before a ReLU, only what passes it counts. Where the original is cut off (``z <= 0``), any value that is cut off
  too is right: aim at ``min(z~, 0)`` for the present ``z~``, refit, repeat. Each round majorises the error behind
  the ReLU and touches it at the present point, so the error falls (after Zhang et al. 2015, "Accelerating very deep
  convolutional networks", who solve the same problem by penalties).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from search.calibrate import ROWS, Rows
from search.chains import Chain
from search.matrices import matrices, weight_of
from search.norms import affine, typed
from tenfold.layers import FactorizedLayer

__all__ = ["Options", "Target", "bias_of", "dense_weight"]

KEEP_BYTES = 1 << 30
"""im2col rows of one layer are kept between its refits up to here; beyond, they are made again."""


@dataclass(frozen=True)
class Options:
    """How a layer's target is made.

    On ResNet-20 at ÷4 (one draw, held-out KL before losses were measured, 0.642 with the defaults): 4 ReLU sweeps 0.628
    for more time, none 0.657, none and no ``residual`` 0.647, ``batch_norm`` 0.5 0.638 and 1.0 0.687, ``refit`` of the
    head 0.675. One draw: the smaller differences
    may be chance.
    """

    residual: bool = True
    """Before an addition, also make up for the other operand's error."""
    relu_sweeps: int = 2
    """Refits toward what passes a following ReLU; 0 matches its input as it is."""
    refit: tuple[str, ...] = ()
    """Dense layers outside the plan that may be refitted too (their size stays)."""
    batch_norm: float = 0.0
    """0 keeps the original's running statistics, 1 takes the compressed network's own, between: a mixture."""
    curvature: Mapping[str, Tensor] = field(default_factory=dict)
    """Site to the weights of its outputs' errors, (out, out) or (out,), behind a batch norm that follows it."""
    rows: int = ROWS
    """Rows drawn for each column of a layer's matrix."""
    memory_bytes: int = 4 << 30
    """For the live values of both networks; calibration batches beyond what fits are left out."""


class Values(Protocol):
    """What a target reads of the walk over both networks: nodes' values, one for each batch."""

    original: fx.GraphModule
    network: nn.Module
    options: Options
    chains: dict[fx.Node, Chain]
    wanted: dict[fx.Node, list[Any]]
    got: dict[fx.Node, list[Any]]


class Target:
    """The outputs wanted of one site at the rows drawn for it.

    ``metric``: weights of the outputs' errors, (out, out), or of their squares, (out,), or None. ``takes_mean``:
    whether a bias or a batch norm takes up the mean. ``shift``: what a layer without bias lacks in the mean, set at
    each fit.
    """

    def __init__(self, values: Values, node: fx.Node, site: str, layer: nn.Module) -> None:
        chain, options = values.chains[node], values.options
        y: list[Tensor] = values.wanted[node]
        if chain.norm is not None and isinstance(layer, nn.Linear) and y[0].dim() > 2:
            chain = Chain()  # a batch norm over tokens, not over the layer's outputs
        if isinstance(layer, nn.Embedding):
            chain = Chain(other=chain.other)  # without a bias it can take up no mean
        other = chain.other if chain.other is not None and options.residual and _alike(values, chain.other, y) else None
        self.relu = chain.relu and other is chain.other
        self.shift: Tensor | None = None
        self._norm = chain.norm
        self._norms: tuple[nn.Module, nn.Module] | None = None
        if chain.norm is not None:
            self._norms = values.original.get_submodule(chain.norm), values.network.get_submodule(chain.norm)
        self.takes_mean = bias_of(layer) is not None or self._norms is not None
        self.metric = self._metric(options.curvature.get(site))
        self._layer = layer
        self._rows = Rows(layer, sum(len(v) for v in y), rows=options.rows)
        self._index = [self._rows.draw(v, seed) for seed, v in enumerate(y)]
        self._raw = self._pick(y)
        self._inputs: list[Tensor] | None = None
        self._look_through(None if other is None else (values.wanted[other], values.got[other]))

    def _look_through(self, other: tuple[list[Tensor], list[Tensor]] | None) -> None:
        """Set ``z`` (the original behind the chain), and the scale and offset that lead there in the network."""
        self._z = self._raw
        self._offset: list[Tensor] | None = None
        self._scale = torch.ones(self._raw[0].shape[1], dtype=self._raw[0].dtype)
        if self._norms is not None:
            (scale, shift), (self._scale, own) = (affine(n) for n in self._norms)
            self._z = [scale * v + shift for v in self._raw]
            self._offset = [own.expand_as(v) for v in self._raw]
        if other is not None:
            wanted, got = self._pick(other[0]), self._pick(other[1])
            self._z = [v + s for v, s in zip(self._z, wanted, strict=True)]
            before = self._offset or [torch.zeros_like(v) for v in got]
            self._offset = [v + s for v, s in zip(before, got, strict=True)]
        # A channel that batch norm scales to nothing has no say: its target stays the original's.
        self._dead = self._scale.abs() < 1e-6
        self._safe = torch.where(self._dead, 1.0, self._scale)

    def _metric(self, curvature: Tensor | None) -> Tensor | None:
        """``curvature`` behind the norm as it is before it."""
        if self._norms is None:
            return curvature
        scale = affine(self._norms[1])[0].double()
        if curvature is None:
            return scale.square()
        if curvature.dim() == 1:
            return scale.square() * curvature
        # Of these only the proportions count. One of zero would leave its output undetermined, as all of them might be.
        scale = scale / scale.abs().max().clamp_min(1e-30)
        scale = torch.copysign(scale.abs().clamp_min(1e-3), scale)
        return scale[:, None] * curvature * scale

    def _pick(self, values: Sequence[Tensor]) -> list[Tensor]:
        return [self._rows.outputs(v, i) for v, i in zip(values, self._index, strict=True)]

    def rows(self, source: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Batch number and (groups, rows, n), the layer's input at the drawn rows; kept when that is affordable."""
        if self._inputs is not None:
            yield from enumerate(self._inputs)
            return
        keep = 4 * self._rows.width * sum(len(v) for v in self._raw) <= KEEP_BYTES
        kept = []
        for b, (x, index) in enumerate(zip(source, self._index, strict=True)):
            rows = self._rows.inputs(x, index)
            if keep:
                kept.append(rows)
            yield b, rows
        self._inputs = kept if keep else None

    def values(self, b: int, *, present: Tensor | None = None) -> Tensor:
        """(rows, out) wanted in batch ``b``; ``present``: the layer's outputs now, to look through the ReLU."""
        if self._offset is None and present is None:
            return self._raw[b]
        z, offset = self._z[b], 0.0 if self._offset is None else self._offset[b]
        if present is not None:
            z = torch.where(z > 0, z, (self._scale * present + offset).clamp_max(0))
        return torch.where(self._dead, self._raw[b], (z - offset) / self._safe)

    def present(self, module: nn.Module, x: Tensor) -> Tensor:
        """The fitted layer's outputs at the rows ``x``: (rows, out)."""
        weight = matrices(self._layer, dense_weight(module))
        y = (x @ weight.transpose(1, 2)).transpose(0, 1).flatten(1)
        bias = bias_of(module) if self.shift is None else self.shift
        return y + bias if isinstance(bias, Tensor) else y

    def settle(self) -> str | None:
        """Give the mean that a layer without bias cannot take to the batch norm behind it; its name if it changed."""
        if self.shift is None or self._norms is None:
            return None
        norm = typed(self._norms[1])
        norm.running_mean = norm.running_mean - self.shift
        return self._norm


def _alike(values: Values, other: fx.Node, y: Sequence[Tensor]) -> bool:
    """Whether the other operand is known in both networks, and is no broadcast one."""
    both = (values.wanted.get(other), values.got.get(other))
    return all(
        known is not None and all(isinstance(s, Tensor) and s.shape == v.shape for s, v in zip(known, y, strict=True))
        for known in both
    )


def dense_weight(module: nn.Module) -> Tensor:
    """The weight that a layer, factorized or not, applies."""
    return module.dense_weight().detach() if isinstance(module, FactorizedLayer) else weight_of(module).detach()


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of a layer, factorized or not."""
    bias = module.output_bias if isinstance(module, FactorizedLayer) else getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None
