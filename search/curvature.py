"""What errors in a layer's outputs do to the network's answer, to second order: one matrix for each layer.

With ``g`` the gradient of the loss at one position of a layer's output, the Gauss-Newton matrix ``G = E[g g^T]`` is
the curvature of the loss between the network's own answer and that of a network that errs there (for logits, of the
Kullback-Leibler divergence: ``G`` is the Fisher information; Martens 2020, "New insights and perspectives on the
natural gradient method"). ``E||Q (y - y^)||^2`` with ``Q^T Q = G`` is then what an error costs, where the plain error
counts all outputs alike. No labels are read: a loss whose gradients have that second moment is drawn by random signs.

It holds for small errors only, and those of a compressed layer are not small. So its square root is taken, by which no
output counts for nothing (docs/decisions/0022).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from search.chains import follow
from search.metrics import class_last

__all__ = ["output_curvature", "tempered"]

LARGEST, BYTES = 1024, 1 << 30
"""Outputs beyond which only the diagonal is kept, for square roots of larger matrices take seconds; fewer where all
layers' matrices would take more than so many bytes."""
DRAWS = 2
"""Random losses for each sample."""
POWER = 0.5
FLOOR = 0.01
"""Of the mean, added to each output's share: what calibration never sees may still count."""


def output_curvature(
    network: fx.GraphModule,
    batches: Iterable[tuple[Tensor, ...]],
    answered: Callable[[nn.Module, tuple[Tensor, ...]], Tensor],
    sites: Sequence[str],
    *,
    classes: bool,
    seed: int,
) -> dict[str, Tensor]:
    """``tempered`` Gauss-Newton matrices of each site's outputs, behind the batch norm that follows it if one does.

    (out, out), or the diagonal (out,) of large ones. Sites that no gradient reaches are left out, and all of them where
    gradients cannot be had.

    Args:
        network: in evaluation mode; it is not changed.
        answered: the answer that counts.
        classes: whether answers are logits; else the loss is the squared error.
    """
    summed: dict[str, Tensor] = {}
    largest = min(LARGEST, math.isqrt(BYTES // (8 * max(1, len(sites)))))
    places = _places(network, sites)
    handles = [place.register_forward_hook(_watch(site, axis, largest, summed)) for site, place, axis in places]
    frozen = [p for p in network.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    try:
        for p in frozen:
            p.requires_grad_(False)
        with torch.enable_grad():
            for inputs in batches:
                answer = answered(network, inputs)
                if answer.requires_grad:
                    _draw(answer, classes, generator)
    except RuntimeError:  # an operation without a derivative, one that overwrites what it needs, or too little memory
        return {}
    finally:
        for handle in handles:
            handle.remove()
        for p in frozen:
            p.requires_grad_(True)
    return {site: tempered(found) for site, found in summed.items() if bool(found.isfinite().all())}


def tempered(matrix: Tensor) -> Tensor:
    """The matrix, or diagonal, to the power of a half, with a mean diagonal of 1."""
    scaled = matrix / (matrix if matrix.dim() == 1 else matrix.diagonal()).mean().clamp_min(1e-300)
    if matrix.dim() == 1:
        root = (scaled + FLOOR) ** POWER
        return root / root.mean()
    values, vectors = torch.linalg.eigh(scaled)
    whole: Tensor = (vectors * (values.clamp_min(0) + FLOOR) ** POWER) @ vectors.T
    return whole / whole.diagonal().mean()


def _places(network: fx.GraphModule, sites: Sequence[str]) -> Iterable[tuple[str, nn.Module, int]]:
    """Where each site's outputs are seen, and the axis that they have there."""
    modules = dict(network.named_modules())
    seen = set[str]()
    for node in network.graph.nodes:
        site = str(node.target)
        if node.op != "call_module" or site not in sites or site in seen:
            continue
        seen.add(site)
        axis = -1 if isinstance(modules[site], nn.Linear | nn.Embedding) else 1
        yield site, modules[follow(node, modules).norm or site], axis


def _watch(site: str, axis: int, largest: int, summed: dict[str, Tensor]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def add(gradient: Tensor) -> None:
        g = gradient.detach().movedim(axis, -1).flatten(0, -2).float()
        own = g.T @ g if g.shape[1] <= largest else g.square().sum(0)
        summed[site] = summed.get(site, 0.0) + own.double()

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        # A copy, for what follows may write in place.
        output = (output if output.requires_grad else output.detach().requires_grad_()).clone()
        output.register_hook(add)  # type: ignore[no-untyped-call]
        return output

    return hook


def _draw(answer: Tensor, classes: bool, generator: torch.Generator) -> None:
    """Gradients of random losses whose second moment is the Gauss-Newton matrix."""
    for draw in range(DRAWS):
        if classes:
            log = class_last(answer).log_softmax(-1)
            each = log.detach().exp().sqrt() * log
        else:
            each = answer
        signs = torch.randint(0, 2, each.shape, generator=generator).to(each.dtype) * 2 - 1
        torch.autograd.backward((signs * each).sum(), retain_graph=draw + 1 < DRAWS)
