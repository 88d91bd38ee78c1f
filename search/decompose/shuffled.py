"""``shuffled_tt``, ``shuffled_tucker``, ``shuffled_cp`` (Li et al. 2018, RsTD): vec(K) = P vec(T), T of low rank.

The dense kernels of all groups are one vector; P^-1 of it is a tensor T with balanced modes (``tensor_modes``). In the
norm of the weights P does nothing, so T has the usual starts: TT-SVD, HOSVD, or CP by alternating least squares. In the
norm of C the permutation leaves no structure to whiten by, but T is still linear in each core: with J the map from one
core to the kernel, J'(M^2 J(x) C) = J'(M^2 B C) is solved by conjugate gradients, core after core, which never raise
the error. C has few strong directions, so that this gains much over the start.

A layer takes as many multiplications as the dense one, so only a cost that counts parameters can choose these methods.
"""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from search.calibrate import Statistics
from search.decompose.base import (
    Fit,
    Problem,
    bias_parameters,
    conv_reason,
    fill,
    geometry,
    problems,
    ranks_between,
    relative,
    thin,
)
from search.decompose.tensor_train import equal_norms, tt_round, tt_svd, tt_unfolding
from search.spec import CurvePoint
from search.vbmf import evbmf_rank
from tenfold.layers import factorized_like
from tenfold.layers.forms import CP, TT, Form, Tucker, khatri_rao
from tenfold.layers.shuffled import SEED, Shuffled, tensor_modes
from tenfold.layers.shuffling import rotations, shuffle, unshuffle

__all__ = ["ShuffledCP", "ShuffledMethod", "ShuffledTT", "ShuffledTucker"]

Cores = list[Tensor]

POINTS, FEW = 16, 6
"""Of a lattice, at most; a large layer has fewer: each point's true error is a product with C."""
ERROR_MACS = 3e11
CURVE_MACS = 1e10
"""Multiplications that fitting may take for a whole curve."""
FIT_MACS = 4e10
"""And for one fit, after what it takes on the curve."""
STEPS = 8
"""Conjugate-gradient steps for one core, at most."""
SWEEPS = 6
WARM_SWEEPS = 2
CP_SWEEPS = 20
"""Of the alternation that gives CP its start, at most."""
TOLERANCE = 1e-3
"""A sweep that gains less, of the error it began with, is the last."""


class ShuffledMethod:
    name: ClassVar[str]
    form: ClassVar[Form]

    def applies_to(self, layer: nn.Module) -> str | None:
        if not isinstance(layer, nn.Linear):
            reason = conv_reason(layer)
            if reason is not None:
                return reason
        elif min(layer.weight.shape) < 2:
            return "a Linear with one input or output has too few weights to shuffle"
        return None if self.ranks(layer) else "no rank makes it smaller"

    def ranks(self, layer: nn.Module) -> tuple[tuple[int, ...], ...]:
        """Ranks that all rise together, so that each tensor of the lattice is one of every later rank too."""
        weight = geometry(layer)[1]
        size = weight.numel()
        modes = tensor_modes(size)
        every = [r for r in self._rising(modes) if self._size(modes, r) < size]
        count = max(FEW, min(POINTS, int(ERROR_MACS / (size * weight.shape[2]))))
        return tuple(every[i] for i in ranks_between(0, len(every) - 1, count))

    def full_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        return self._full(tensor_modes(geometry(layer)[1].numel()))

    def cost(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        output_positions: int,
        *,
        input_sizes: Sequence[int] | None = None,
    ) -> tuple[int, int]:
        """The MACs are the dense layer's; building the kernel, once after the cores change, is not counted."""
        size = geometry(layer)[1].numel()
        return self._size(tensor_modes(size), ranks) + bias_parameters(layer), size * output_positions

    def factorize(
        self,
        layer: nn.Module,
        ranks: Sequence[int],
        statistics: Statistics | None = None,
        *,
        metric: Tensor | None = None,
        start: nn.Module | None = None,
    ) -> Fit:
        new = factorized_like(layer, self.name, ranks)
        task = _Task(self.form, layer, statistics, metric)
        if start is None:
            # As on the curve, then on from there: so that a fit is never worse than its point.
            cores = self._point(task, self._starts(task, ranks), ranks, self._point_macs(layer))[0]
        elif isinstance(start, Shuffled) and start.plan() == new.plan():
            cores = [core.detach().to("cpu", torch.float64) for core in start.cores]
        else:
            raise ValueError(f"{self.name} of ranks {tuple(ranks)} cannot start from {start}")
        cores, error = task.refit(cores, ranks, SWEEPS if start is None else WARM_SWEEPS, FIT_MACS)
        links = {f"cores.{k}": core for k, core in enumerate(equal_norms(cores))}
        return Fit(fill(layer, new, **links), relative(task.parts, [error]))

    def curve(
        self,
        layer: nn.Module,
        statistics: Statistics | None,
        output_positions: int,
        *,
        metric: Tensor | None = None,
    ) -> tuple[CurvePoint, ...]:
        """``thin`` keeps a point only if it is better than all cheaper ones: with nested ranks it is monotone."""
        task, lattice = _Task(self.form, layer, statistics, metric), self.ranks(layer)
        starts, budget = self._starts(task, lattice[-1]), self._point_macs(layer)
        points = []
        for ranks in lattice:
            error = self._point(task, starts, ranks, budget)[1]
            parameters, macs = self.cost(layer, ranks, output_positions)
            points.append(
                CurvePoint(ranks=ranks, parameters=parameters, macs=macs, error=relative(task.parts, [error]))
            )
        size = geometry(layer)[1].numel()
        return thin(points, (size + bias_parameters(layer), size * output_positions))

    def variational_ranks(self, layer: nn.Module) -> tuple[int, ...]:
        """The EVBMF ranks of the unfoldings that the form cuts, of the tensor before it is shuffled."""
        size = geometry(layer)[1].numel()
        vector = geometry(layer)[1].detach().to("cpu", torch.float64).flatten()
        tensor = unshuffle(vector, rotations(SEED, size)).reshape(tensor_modes(size))
        return self._variational(tensor)

    def _size(self, modes: Sequence[int], ranks: Sequence[int]) -> int:
        return sum(map(math.prod, self.form.shapes(modes, ranks)))

    def _point_macs(self, layer: nn.Module) -> float:
        """What fitting one point of a curve may take."""
        return CURVE_MACS / len(self.ranks(layer))

    def _point(
        self, task: "_Task", starts: Callable[[Sequence[int]], Cores], ranks: Sequence[int], macs: float
    ) -> tuple[Cores, float]:
        cores = _padded(starts(ranks), self.form.shapes(task.modes, ranks))
        cores = task.refit(cores, ranks, 1, macs / 2, plain=True)[0]
        return task.refit(cores, ranks, 1, macs / 2)

    def _rising(self, modes: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Nested ranks, least first, up to where the form is exact or larger than the tensor."""
        raise NotImplementedError

    def _full(self, modes: tuple[int, ...]) -> tuple[int, ...]:
        """Where the form is exact."""
        raise NotImplementedError

    def _starts(self, task: "_Task", highest: Sequence[int]) -> Callable[[Sequence[int]], Cores]:
        """Cores for any ranks up to ``highest``, near the task's own tensor."""
        raise NotImplementedError

    def _variational(self, tensor: Tensor) -> tuple[int, ...]:
        raise NotImplementedError


class ShuffledTT(ShuffledMethod):
    name, form = "shuffled_tt", TT()

    def _rising(self, modes: tuple[int, ...]) -> list[tuple[int, ...]]:
        exact = self._full(modes)
        return [tuple(min(rank, most) for most in exact) for rank in range(1, max(exact) + 1)]

    def _full(self, modes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(min(math.prod(modes[:k]), math.prod(modes[k:])) for k in range(1, len(modes)))

    def _starts(self, task: "_Task", highest: Sequence[int]) -> Callable[[Sequence[int]], Cores]:
        train = tt_svd(task.tensor.reshape(-1, 1), task.modes, (1,) * len(task.modes), highest)
        return lambda ranks: [core.squeeze(2) for core in tt_round(train, ranks)]

    def _variational(self, tensor: Tensor) -> tuple[int, ...]:
        vector, ones = tensor.reshape(-1, 1), (1,) * tensor.dim()
        unfoldings = (tt_unfolding(vector, tensor.shape, ones, k) for k in range(1, tensor.dim()))
        return tuple(max(1, evbmf_rank(matrix.numpy())) for matrix in unfoldings)


class ShuffledTucker(ShuffledMethod):
    name, form = "shuffled_tucker", Tucker()

    def _rising(self, modes: tuple[int, ...]) -> list[tuple[int, ...]]:
        ranks = [1] * len(modes)
        rising = [tuple(ranks)]
        while rising[-1] != modes:
            # The mode of which the least part is kept is the next to rise.
            k = min(range(len(modes)), key=lambda k: ranks[k] / modes[k])
            ranks[k] += 1
            rising.append(tuple(ranks))
        return rising

    def _full(self, modes: tuple[int, ...]) -> tuple[int, ...]:
        return modes

    def _starts(self, task: "_Task", highest: Sequence[int]) -> Callable[[Sequence[int]], Cores]:
        """HOSVD (De Lathauwer et al. 2000): all lower ranks are corners of the whole one."""
        factors = [_leading(_unfolding(task.tensor, k)) for k in range(len(task.modes))]
        core = self.form.build([task.tensor, *(factor.T for factor in factors)]).reshape(task.modes)

        def corner(ranks: Sequence[int]) -> Cores:
            return [core[tuple(map(slice, ranks))], *(f[:, :r] for f, r in zip(factors, ranks, strict=True))]

        return corner

    def _variational(self, tensor: Tensor) -> tuple[int, ...]:
        return tuple(max(1, evbmf_rank(_unfolding(tensor, k).numpy())) for k in range(tensor.dim()))


class ShuffledCP(ShuffledMethod):
    name, form = "shuffled_cp", CP()

    def _rising(self, modes: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [(rank,) for rank in range(1, math.prod(modes) // sum(modes) + 1)]

    def _full(self, modes: tuple[int, ...]) -> tuple[int, ...]:
        return (math.prod(modes) // max(modes),)

    def _starts(self, task: "_Task", highest: Sequence[int]) -> Callable[[Sequence[int]], Cores]:
        """Leading singular vectors of each unfolding, random ones beyond those, and then the usual alternation."""
        generator = torch.Generator().manual_seed(0)
        factors = []
        for k, n in enumerate(task.modes):
            more = torch.randn(n, max(0, highest[0] - n), generator=generator, dtype=torch.float64)
            factors.append(torch.cat([_leading(_unfolding(task.tensor, k)), more / more.norm(dim=0)], 1))
        return lambda ranks: _alternate(task.tensor, [f[:, : ranks[0]] for f in factors])

    def _variational(self, tensor: Tensor) -> tuple[int, ...]:
        """No sum of fewer terms has the ranks of all unfoldings."""
        return (max(1, *(evbmf_rank(_unfolding(tensor, k).numpy()) for k in range(tensor.dim()))),)


class _Task:
    """The layer's least squares (``base.Problem``, all groups) as a function of a tensor's cores, in float64."""

    def __init__(self, form: Form, layer: nn.Module, statistics: Statistics | None, metric: Tensor | None) -> None:
        self.form = form
        self.parts: list[Problem] = problems(layer, statistics, metric)
        target = torch.stack([p.target for p in self.parts])
        self.modes = tensor_modes(target.numel())
        self.amounts = rotations(SEED, target.numel())
        self.floor = sum(p.floor for p in self.parts)
        self._shape = target.shape
        self._metric = torch.stack([p.rows.square() for p in self.parts])[..., None]
        self._moments = None if statistics is None else torch.stack([p.full for p in self.parts])
        self._target = unshuffle(target.flatten(), self.amounts)

    @property
    def tensor(self) -> Tensor:
        """P^-1 vec(B), in its modes."""
        return self._target.reshape(self.modes)

    def refit(
        self, cores: Cores, ranks: Sequence[int], sweeps: int, macs: float, *, plain: bool = False
    ) -> tuple[Cores, float]:
        """``sweeps`` rounds of least squares over all cores with ``macs`` multiplications at most: never worse.

        ``plain``: in the norm of the weights. Returns the cores and that norm's error, with the floor.
        """
        image = (lambda vector: vector) if plain else self._image
        gap = self._target - self.form.build(cores)
        pull = image(gap)  # P^-1 M^2 (B - V) C: minus half the gradient with respect to the tensor
        error = float(gap @ pull)
        # A step builds a tensor and takes its derivative, about as dear, besides the product with C.
        step = 2 * self.form.macs(self.modes, ranks) + (0 if plain else len(gap) * self._shape[2])
        products = int(macs / (len(cores) * step))
        sweeps = min(sweeps, max(1, products // STEPS))
        steps = min(STEPS, products // sweeps)
        for _ in range(sweeps if steps else 0):
            cores = equal_norms(cores)
            for k in range(len(cores)):
                cores[k], pull = self._better_core(cores, k, pull, image, steps)
            found = float((self._target - self.form.build(cores)) @ pull)
            gain, error = error - found, found
            if gain < TOLERANCE * error:
                break
        return cores, self.floor + max(error, 0.0)

    def _image(self, vector: Tensor) -> Tensor:
        """P^-1 M^2 (P vector) C."""
        kernel = self._metric * shuffle(vector, self.amounts).reshape(self._shape)
        return unshuffle((kernel if self._moments is None else kernel @ self._moments).flatten(), self.amounts)

    def _better_core(
        self, cores: Cores, k: int, pull: Tensor, image: Callable[[Tensor], Tensor], steps: int
    ) -> tuple[Tensor, Tensor]:
        """Conjugate gradients on core ``k``, the others fixed; and the pull that is left."""
        with torch.enable_grad():
            core = cores[k].detach().requires_grad_()
            tensor = self.form.build([*cores[:k], core, *cores[k + 1 :]])

        def gather(vector: Tensor) -> Tensor:
            # Linear in the core: the derivative anywhere is the adjoint.
            adjoint: Tensor = torch.autograd.grad(tensor, core, vector, retain_graph=True)[0]
            return adjoint

        core_now, residual = core.detach(), gather(pull)
        direction, rho = residual, float(residual.square().sum())
        enough = 1e-20 * rho
        for _ in range(steps):
            seen = image(self.form.build([*cores[:k], direction, *cores[k + 1 :]]))
            along = gather(seen)
            curvature = float((direction * along).sum())
            if rho <= enough or curvature <= 0:
                break
            size = rho / curvature
            core_now, residual, pull = core_now + size * direction, residual - size * along, pull - size * seen
            rho, previous = float(residual.square().sum()), rho
            direction = residual + (rho / previous) * direction
        return core_now, pull


def _unfolding(tensor: Tensor, k: int) -> Tensor:
    """Mode ``k`` against all others."""
    return tensor.movedim(k, 0).flatten(1)


def _leading(matrix: Tensor) -> Tensor:
    """All left singular vectors, largest first."""
    vectors: Tensor = torch.linalg.eigh(matrix @ matrix.T).eigenvectors
    return vectors.flip(1)


def _alternate(tensor: Tensor, factors: Cores) -> Cores:
    """CP by alternating least squares (Carroll and Chang 1970; Harshman 1970) in the norm of the weights."""
    rank = factors[0].shape[1]
    sweeps = max(2, min(CP_SWEEPS, int(CURVE_MACS / POINTS / (len(factors) * tensor.numel() * rank))))
    eye = torch.eye(rank, dtype=tensor.dtype)
    for _ in range(sweeps):
        for k in range(len(factors)):
            others = factors[:k] + factors[k + 1 :]
            gram = math.prod((f.T @ f for f in others), start=torch.ones_like(eye))
            right = _unfolding(tensor, k) @ khatri_rao(others)
            # Terms that cancel leave the Gram matrix near-singular: the ridge keeps them from growing.
            factors[k] = torch.linalg.solve(gram + 1e-9 * gram.diagonal().mean() * eye, right.T).T
        factors = equal_norms(factors)
    return factors


def _padded(cores: Cores, shapes: Sequence[Sequence[int]]) -> Cores:
    """Zeros where a rank asked for is more than a start has."""
    padded = []
    for core, shape in zip(cores, shapes, strict=True):
        new = core.new_zeros(*shape)
        new[tuple(map(slice, core.shape))] = core
        padded.append(new)
    return padded
