"""Which layers a taken-in model has: names as the user wrote them, shapes, parameters, MACs, and what may change."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from search import cost
from search.decompose import METHODS, group_of, joint_method_of, same_weight
from search.intake import LiftedModel
from search.recurrent import RECURRENT
from search.spec import LayerInfo, ModelInfo

__all__ = ["describe", "layer_table"]

_Options = dict[str, str | int | tuple[int, ...]]
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def layer_table(lifted: LiftedModel) -> tuple[LayerInfo, ...]:
    """One row for each module with weights, in the order they run. MACs and shapes come from running one sample (or the
    fixed batch), with hooks on the real modules. Parameters that layers share count at the first of them."""
    batch = 1 if lifted.batch == "any" else lifted.batch
    layers = {n: m for n, m in lifted.module.named_modules() if n and _has_weights(m)}
    outputs: dict[str, tuple[int, ...]] = {}
    macs: dict[str, int] = {}
    look_ups: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            y = out[0] if isinstance(out, tuple) else out
            outputs.setdefault(name, _of_one(tuple(y.shape), batch))
            macs[name] = macs.get(name, 0) + _macs(module, args[0], y) // batch
            if isinstance(module, nn.Embedding):
                look_ups[name] = look_ups.get(name, 0) + args[0].numel() // batch

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in layers.items()]
    training = lifted.module.training
    lifted.module.eval()
    try:
        with torch.no_grad():
            lifted.module(*lifted.example(batch))
    finally:
        lifted.module.train(training)
        for h in handles:
            h.remove()
    reasons = {n: lifted.locked.get(n) or _reason(layers[n]) for n in outputs}
    for tie in same_weight(lifted.module, list(outputs)):
        why = next((f"{n} cannot: {reasons[n]}" for n in tie if reasons[n]), "") or _reason_of_tied(lifted.module, tie)
        for n in tie if why else ():
            reasons[n] = reasons[n] or f"its weight is shared with {', '.join(o for o in tie if o != n)}, and {why}"
    rows, counted = [], set[int]()
    for name in outputs:
        options = _options(layers[name]) | ({"look_ups": look_ups[name]} if name in look_ups else {})
        own = {id(p): p.numel() for p in layers[name].parameters(recurse=False) if id(p) not in counted}
        counted.update(own)
        rows.append(_row(name, layers[name], outputs[name], sum(own.values()), macs[name], reasons[name], options))
    return tuple(rows)


def describe(lifted: LiftedModel) -> ModelInfo:
    """What inspection tells of a model."""
    costs = cost.count(lifted.module, lifted.example(1 if lifted.batch == "any" else lifted.batch))
    return ModelInfo(
        format=lifted.format,
        inputs=lifted.inputs,
        outputs=lifted.outputs,
        layers=layer_table(lifted),
        parameters=costs.parameters,
        macs=costs.macs,
        bytes=costs.bytes,
        skipped=lifted.skipped,
        batch=lifted.batch,
    )


def _has_weights(module: nn.Module) -> bool:
    """Layers, not the containers that hold a raw parameter (a class token) next to their children."""
    return type(module) is not nn.Module and any(True for _ in module.parameters(recurse=False))


def _row(
    name: str, module: nn.Module, output: tuple[int, ...], parameters: int, macs: int, reason: str, options: _Options
) -> LayerInfo:
    weight = next((p for n, p in module.named_parameters(recurse=False) if n.startswith("weight")), None)
    return LayerInfo(
        name=name,
        kind=type(module).__name__.removeprefix("Flat"),
        weight=tuple(weight.shape) if weight is not None else (),
        output=output,
        parameters=parameters,
        macs=macs,
        compressible=not reason,
        reason=reason,
        options=options,
    )


def _reason(module: nn.Module) -> str:
    """Why nothing can replace the layer; empty when some method can."""
    if isinstance(module, _NORMS):
        return "a normalisation has no matrix to decompose"
    reasons = [m.applies_to(module) for m in METHODS.values()]
    if any(r is None for r in reasons):
        return ""
    kind = type(module).__name__.removeprefix("Flat")
    if not isinstance(module, (nn.Linear, nn.Embedding, *_CONVS, *_TRANSPOSED, *RECURRENT)):
        return f"no method replaces {kind} yet"
    return next((r for r in reasons if r), f"no method replaces {kind}")


def _reason_of_tied(network: nn.Module, names: Sequence[str]) -> str:
    """Why nothing can replace layers that hold one weight; empty when some method can."""
    group = group_of(network, {name: (position,) for position, name in enumerate(names)})
    reasons = [joint_method_of(name, {}).applies_to(group) for name in METHODS]
    return "" if any(r is None for r in reasons) else next(r for r in reasons if r)


def _options(module: nn.Module) -> _Options:
    if isinstance(module, (*_CONVS, *_TRANSPOSED)):
        padding: str | tuple[int, ...] = module.padding if isinstance(module.padding, str) else tuple(module.padding)
        return {
            "stride": tuple(module.stride),
            "padding": padding,
            "dilation": tuple(module.dilation),
            "groups": module.groups,
        }
    if isinstance(module, nn.GroupNorm):
        return {"groups": module.num_groups}
    if isinstance(module, nn.RNNBase):
        return {"layers": module.num_layers, "directions": 2 if module.bidirectional else 1}
    return {}


def _of_one(shape: tuple[int, ...], batch: int) -> tuple[int, ...]:
    """One sample's share: attention inside torch puts the batch second, or folds it into the first dimension."""
    if shape and shape[0] == batch:
        return shape[1:]
    if len(shape) > 1 and shape[1] == batch:
        return (shape[0], *shape[2:])
    return (shape[0] // batch, *shape[1:]) if shape and shape[0] % batch == 0 else shape


def _macs(module: nn.Module, x: Tensor, y: Tensor) -> int:
    """Multiply-accumulates of one call, as convention counts them: norms and look-ups are free."""
    if isinstance(module, nn.Linear):
        return y.numel() * module.in_features
    if isinstance(module, _CONVS):
        return y.numel() * prod(module.weight.shape[1:])
    if isinstance(module, _TRANSPOSED):
        return x.numel() * prod(module.weight.shape[1:])
    if isinstance(module, nn.RNNBase):
        steps = x.shape[:-1].numel()  # batch times time
        return steps * sum(p.numel() for n, p in module.named_parameters() if n.startswith("weight"))
    return 0
