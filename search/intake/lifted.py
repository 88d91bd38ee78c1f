"""What taking in a model gives: the lifted network and what is known of its inputs and outputs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from search.errors import BadModel
from search.spec import TensorInfo

__all__ = ["Answer", "LiftedModel", "all_outputs", "first_output", "last_output"]

Answer = Callable[[Any], Tensor]
"""Picks the tensor that counts from what a network returns."""


@dataclass(frozen=True)
class LiftedModel:
    """``module``: float32, on the CPU, in eval mode; ``train()`` and ``eval()`` work; takes ``inputs`` by position.

    >>> y = first_output(lifted.module(*lifted.example(4)))
    """

    module: fx.GraphModule
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    format: str
    skipped: tuple[str, ...] = ()
    batch: Literal["any"] | int = "any"
    """An integer when the network runs at that batch size only."""
    locked: dict[str, str] = field(default_factory=dict)
    """Layers that must stay as they are, and why (shared weights)."""
    renamed: dict[str, str] = field(default_factory=dict)
    """What is called otherwise here: its name to the last part of the user's (see ``search.intake.names``)."""
    calls: dict[str, str] = field(default_factory=dict)
    """Layers that are calls of the user's own code, and their tensors: the names of the weights that these read."""
    sizes: tuple[tuple[int, ...], ...] = ()
    """The inputs' shapes at export: what ``example`` uses where ``inputs`` says None (besides the batch)."""
    limits: tuple[int, ...] = ()
    """For integer inputs: one more than the largest value an embedding takes (0 when no embedding reads it)."""

    def given(self, name: str) -> str:
        """The user's own name of a layer or tensor of ``module``. A call has that of the weight that it reads."""
        parts = self._read(name).split(".")
        return ".".join(self.renamed.get(".".join(parts[: i + 1]), part) for i, part in enumerate(parts))

    def _read(self, name: str) -> str:
        """What a call reads, or ``name``. The bias stays the call's own where factors take its weight's place."""
        if name in self.calls or not name.endswith(".bias"):
            return self.calls.get(name, name)
        layer = name.rpartition(".")[0].rpartition(".")[0]
        return self.calls.get(f"{layer}.bias", name)

    def example(self, batch: int, *, seed: int = 0) -> tuple[Tensor, ...]:
        """Random inputs of ``batch`` samples: normal for floats, valid indices for integers, True for masks.

        Raises ``BadModel`` (``fixed_batch``) for a batch the network cannot take.
        """
        if self.batch != "any" and batch != self.batch:
            raise BadModel("fixed_batch", f"this model runs at batch size {self.batch} only, {batch} was asked for")
        generator = torch.Generator().manual_seed(seed)
        limits = self.limits or (0,) * len(self.inputs)
        return tuple(
            _random(info, tuple([batch, *size[1:]] if info.shape and info.shape[0] is None else size), limit, generator)
            for info, size, limit in zip(self.inputs, self.sizes, limits, strict=True)
        )


def _random(info: TensorInfo, shape: tuple[int, ...], limit: int, generator: torch.Generator) -> Tensor:
    dtype: torch.dtype = getattr(torch, info.dtype)
    if dtype is torch.bool:
        return torch.ones(shape, dtype=dtype)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=dtype)
    # An integer that no embedding reads is a mask or a flag, and ones are safe for both.
    return torch.randint(0, limit, shape, generator=generator, dtype=dtype) if limit else torch.ones(shape, dtype=dtype)


def all_outputs(out: Any, name: str = "output") -> list[tuple[str, Tensor]]:
    """Every tensor of a network's output with a name, in order."""
    if isinstance(out, Tensor):
        return [(name, out)]
    if isinstance(out, dict):
        return [pair for k, v in out.items() for pair in all_outputs(v, str(k) if name == "output" else f"{name}_{k}")]
    if isinstance(out, tuple | list):
        return [pair for i, v in enumerate(out) for pair in all_outputs(v, f"{name}_{i}")]
    return []


def first_output(out: Any) -> Tensor:
    """The tensor that counts: ``logits`` of a dict if there is one, else the first tensor."""
    if isinstance(out, Tensor):
        return out
    if isinstance(out, dict) and isinstance(out.get("logits"), Tensor):
        logits: Tensor = out["logits"]
        return logits
    return _found(out)[0]


def last_output(out: Any) -> Tensor:
    """The last tensor: of stacked networks that answer at each stage, the answer of the last."""
    return _found(out)[-1]


def _found(out: Any) -> list[Tensor]:
    found = [tensor for _, tensor in all_outputs(out)]
    if not found:
        raise BadModel("no_output", f"the model returns {type(out).__name__} without a tensor: return its logits")
    return found
