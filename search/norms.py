"""Batch norm in evaluation mode: a scale and shift of each channel, and where its statistics come from."""

import copy
from collections.abc import Iterable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

__all__ = ["NORMS", "affine", "blend", "recalibrate_batch_norm", "typed"]

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _Norm(Protocol):
    """A batch norm with running statistics."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor
    affine: bool
    eps: float
    momentum: float | None


def typed(module: nn.Module) -> _Norm:
    """The batch norm with the attributes that its annotations hide."""
    return cast(_Norm, module)


def affine(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift in evaluation mode: (channels,), (channels,)."""
    norm = typed(module)
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.detach()
    shift = -norm.running_mean * scale
    return scale, shift + norm.bias.detach() if norm.affine else shift


def blend(module: nn.Module, inputs: Sequence[Tensor], mixture: float) -> None:
    """Move the running statistics toward those of ``inputs`` (batch, channels, …), 0 not at all, 1 all the way."""
    norm = typed(module)
    axes = [0, *range(2, inputs[0].dim())]
    count = sum(x.numel() // x.shape[1] for x in inputs)
    mean = torch.stack([x.double().sum(axes) for x in inputs]).sum(0) / count
    square = torch.stack([x.double().square().sum(axes) for x in inputs]).sum(0) / count
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), mixture)
    norm.running_var.lerp_((square - mean.square()).clamp_min(0).to(norm.running_var.dtype), mixture)


@torch.no_grad()
def recalibrate_batch_norm(
    module: nn.Module, batches: Iterable[tuple[Tensor, ...]], *, mixture: float = 1.0
) -> nn.Module:
    """A copy whose batch norms take their running statistics from one pass over ``batches``.

    ``mixture`` 1 takes the new statistics, 0 keeps the old. A network without batch norm comes back as it is.
    """
    module = copy.deepcopy(module)
    found = [m for m in module.modules() if isinstance(m, NORMS) and m.running_mean is not None]
    if not found:
        return module
    norms = [typed(m) for m in found]
    kept = [(m.running_mean.clone(), m.running_var.clone(), m.momentum) for m in norms]
    was_training = module.training
    module.eval()
    for each in found:
        each.reset_running_stats()
        each.momentum = None  # a plain average over the batches
        each.train()
    for batch in batches:
        module(*batch)
    for norm, (mean, var, momentum) in zip(norms, kept, strict=True):
        norm.running_mean.lerp_(mean, 1 - mixture)
        norm.running_var.lerp_(var, 1 - mixture)
        norm.momentum = momentum
    return module.train(was_training)
