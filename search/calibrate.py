"""Second moments of layers' inputs and outputs, streamed batch by batch.

For each group, with ``x`` the (im2col) input, channel by channel with taps inside, and ``y`` a target for the output:

* ``second`` = E[(x - Ex)(x - Ex)']   (C in the mathematics)
* ``cross``  = E[(y - Ey)(x - Ex)']   (D)
* ``energy`` = E[(y - Ey)^2] for each output

Neighbouring positions of an image say nearly the same, so only as many rows are drawn (per sample, at random, seeded)
as the moments' size calls for: ``ROWS`` for each of the n columns. Sums are taken about the mean of the first rows, so
that a large mean does not eat the digits of a small variance; each batch in float32, batches together in float64.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from search.matrices import groups_of, has_windows, matrices, windows
from search.recurrent import RECURRENT, named_matrices, operands

__all__ = ["Moments", "RecurrentMoments", "Rows", "Statistics", "TokenMoments", "collect", "moments_of"]

ROWS = 256
"""Rows drawn for each column of a layer's matrix: the moments' own noise is then well below one per cent."""


@dataclass(frozen=True)
class Statistics:
    """What the decompositions need to know of one layer's data; float64, on the CPU."""

    second: Tensor
    """(groups, n, n) with n = in / groups * taps. (groups, n), its diagonal, for an Embedding: how often each token
    comes."""
    cross: Tensor
    """(groups, out / groups, n)."""
    energy: Tensor
    """(groups, out / groups)."""
    mean_input: Tensor
    """(groups, n)."""
    mean_output: Tensor
    """(out,)."""
    count: int
    """Rows (samples times output positions) behind them."""
    input_sizes: tuple[int, ...] = ()
    """Spatial sizes of a convolution's input; a Linear's axes between the samples and the features (tokens)."""
    parts: Mapping[str, "Statistics"] = field(default_factory=dict)
    """Those of each matrix of a recurrent layer (``search.recurrent``), which has nothing else to tell."""


class Moments:
    """The running sums behind ``Statistics`` of one layer.

    ``centred=False`` gives plain second moments: right for a layer whose bias cannot take up a change of mean.
    """

    def __init__(self, layer: nn.Module, *, centred: bool = True) -> None:
        self.layer = layer
        self.groups = groups_of(layer)
        self.centred = centred
        self.input_sizes: tuple[int, ...] = ()
        self.calls = 0
        self._origin_x: Tensor | None = None
        self._origin_y: Tensor | None = None
        self._of_x: list[Tensor] = []
        self._of_y: list[Tensor] = []
        self._rows = [0, 0]

    def see(self, x: Tensor) -> None:
        """Note the spatial sizes of an input that rows are drawn from."""
        self.calls += 1
        self.input_sizes = tuple(_sizes(self.layer, x))

    def add(self, x: Tensor, y: Tensor, *, target_only: bool = False) -> None:
        """Some rows: ``x`` (groups, rows, n) as ``Rows`` gives them, ``y`` (rows, out) the outputs wanted for them.

        ``target_only``: these rows of ``x`` were added before (``retarget``), only what depends on ``y`` is summed.
        """
        y = y.reshape(len(y), self.groups, -1).transpose(0, 1)
        if self._origin_x is None or self._origin_y is None:
            self._origin_x, self._origin_y = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        x, y = x - self._origin_x, y - self._origin_y
        if not target_only:
            _accumulate(self._of_x, x.sum(1), x.transpose(1, 2) @ x)
            self._rows[0] += x.shape[1]
        _accumulate(self._of_y, y.sum(1), y.transpose(1, 2) @ x, y.square().sum(1))
        self._rows[1] += y.shape[1]

    def retarget(self) -> None:
        """Forget the targets, keep the inputs' moments."""
        self._of_y = []
        self._rows[1] = 0

    def finish(self) -> Statistics:
        """The moments of what was added.

        Raises:
            ValueError: nothing was added.
        """
        if self._origin_x is None or self._origin_y is None or not self._of_y:
            raise ValueError("no calibration batch reached this layer: the network never calls it, or there were none")
        mean_x, xx = (v / self._rows[0] for v in self._of_x)
        mean_y, yx, yy = (v / self._rows[1] for v in self._of_y)
        xx = xx - mean_x[:, :, None] * mean_x[:, None, :]
        yx = yx - mean_y[:, :, None] * mean_x[:, None, :]
        yy = (yy - mean_y.square()).clamp_min(0)
        mean_x = mean_x + self._origin_x[:, 0].double().cpu()
        mean_y = mean_y + self._origin_y[:, 0].double().cpu()
        if not self.centred:
            xx = xx + mean_x[:, :, None] * mean_x[:, None, :]
            yx = yx + mean_y[:, :, None] * mean_x[:, None, :]
            yy = yy + mean_y.square()
        return Statistics(xx, yx, yy, mean_x, mean_y.flatten(), self._rows[0], self.input_sizes)


class RecurrentMoments:
    """``Moments`` of each matrix of an LSTM or a GRU, with what the matrix itself makes of its operands as target."""

    def __init__(self, layer: nn.RNNBase) -> None:
        self.layer = layer
        self.input_sizes: tuple[int, ...] = ()
        self._parts = {name: Moments(layer, centred=layer.bias) for name in named_matrices(layer)}

    def add(self, x: Tensor, *states: Tensor | tuple[Tensor, ...]) -> None:
        """A batch as the layer is called with it, each state by itself or in a tuple."""
        self.input_sizes = (x.shape[1 if self.layer.batch_first else 0],)
        flat = [t for s in states for t in (s if isinstance(s, tuple) else (s,))]
        weights = named_matrices(self.layer)
        for name, rows in operands(self.layer, x, flat).items():
            rows, weight = rows.detach().float(), weights[name].detach().float()
            self._parts[name].add(rows[None], rows @ weight.T)

    def finish(self) -> Statistics:
        """The moments of what was added.

        Raises:
            ValueError: nothing was added.
        """
        parts = {name: moments.finish() for name, moments in self._parts.items()}
        count, none = next(iter(parts.values())).count, torch.zeros(0)
        return Statistics(none, none, none, none, none, count, self.input_sizes, parts)


class TokenMoments:
    """``Moments`` of an Embedding, whose input is a unit vector for each token: C is diagonal. Never centred."""

    def __init__(self, layer: nn.Embedding) -> None:
        self.layer = layer
        self.input_sizes: tuple[int, ...] = ()
        self.calls = 0
        self._seen = torch.zeros(layer.num_embeddings, dtype=torch.float64)
        self._rows = 0
        self.retarget()

    def see(self, x: Tensor) -> None:
        """Note the sizes of the axes between the samples and the features."""
        self.calls += 1
        self.input_sizes = _sizes(self.layer, x)

    def add(self, x: Tensor, y: Tensor, *, target_only: bool = False) -> None:
        """Some rows: ``x`` (1, rows) indices, ``y`` (rows, out)."""
        tokens, wide = x[0].cpu(), y.double().cpu()
        if not target_only:
            self._seen += torch.bincount(tokens, minlength=len(self._seen))
            self._rows += len(tokens)
        self._sums.index_add_(0, tokens, wide)
        self._energy += wide.square().sum(0)
        self._targets += len(tokens)

    def retarget(self) -> None:
        """Forget the targets, keep the tokens' frequencies."""
        shape = self.layer.weight.shape
        self._sums = torch.zeros(shape, dtype=torch.float64)
        self._energy = torch.zeros(shape[1], dtype=torch.float64)
        self._targets = 0

    def finish(self) -> Statistics:
        """The moments of what was added.

        Raises:
            ValueError: nothing was added.
        """
        if not self._targets:
            raise ValueError("no calibration batch reached this layer: the network never calls it, or there were none")
        shares, cross = self._seen / self._rows, self._sums.T / self._targets
        energy = self._energy / self._targets
        mean = cross.sum(1)
        return Statistics(shares[None], cross[None], energy[None], shares[None], mean, self._rows, self.input_sizes)


def moments_of(layer: nn.Module, *, centred: bool = True) -> Moments | TokenMoments:
    """Empty sums for a layer, of its kind."""
    return TokenMoments(layer) if isinstance(layer, nn.Embedding) else Moments(layer, centred=centred)


def _sizes(layer: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Spatial sizes of an input, or its axes between samples and features."""
    if isinstance(layer, nn.Embedding):
        return tuple(x.shape[1:])
    return tuple(x.shape[2:] if has_windows(layer) else x.shape[1:-1])


def _accumulate(sums: list[Tensor], *new: Tensor) -> None:
    wide = [v.double().cpu() for v in new]
    if sums:
        for total, v in zip(sums, wide, strict=True):
            total += v
    else:
        sums.extend(wide)


class Rows:
    """Which rows of a layer's matrix product are drawn, batch by batch; the same at each call with the same seed."""

    def __init__(self, layer: nn.Module, samples: int, *, rows: int = ROWS) -> None:
        """``samples``: how many samples are expected in all."""
        self.layer = layer
        self.groups, _, self.width = matrices(layer).shape
        self.per_sample = math.ceil(rows * self.width / max(samples, 1))

    def draw(self, output: Tensor, seed: int) -> tuple[Tensor, ...] | None:
        """Indices (sample, position along each axis) into an output of the layer; None takes all of it."""
        sizes = output.shape[2:] if has_windows(self.layer) else output.shape[1:-1]
        positions = math.prod(sizes)
        if self.per_sample >= positions:
            return None
        noise = torch.rand(len(output), positions, generator=torch.Generator().manual_seed(seed))
        chosen = noise.topk(self.per_sample, dim=1, sorted=False).indices
        samples = torch.arange(len(output))[:, None].expand_as(chosen)
        return (samples.flatten(), *torch.unravel_index(chosen.flatten(), sizes))

    def inputs(self, x: Tensor, index: tuple[Tensor, ...] | None) -> Tensor:
        """(groups, rows, in / groups * taps): what the layer's matrix multiplies at the drawn rows.

        Of an Embedding (1, rows) indices, which stand for unit vectors.
        """
        if isinstance(self.layer, nn.Embedding):
            return (x if index is None else x[index]).reshape(1, -1)
        if not has_windows(self.layer):
            return (x if index is None else x[index]).reshape(1, -1, x.shape[-1])
        views = windows(self.layer, x)
        rows = views if index is None else views[index]
        return rows.reshape(-1, self.groups, self.width).transpose(0, 1).contiguous()

    def outputs(self, y: Tensor, index: tuple[Tensor, ...] | None) -> Tensor:
        """(rows, out) of something shaped like the layer's output."""
        y = y.movedim(1, -1) if has_windows(self.layer) else y
        return (y if index is None else y[index]).reshape(-1, y.shape[-1])


@torch.no_grad()
def collect(
    module: nn.Module,
    sites: Sequence[str],
    batches: Iterable[tuple[Tensor, ...]],
    *,
    samples: int = 1024,
) -> dict[str, Statistics]:
    """Statistics of the named layers with their own outputs as targets, in one pass over ``batches``.

    A layer that is called several times in a pass counts all its calls. ``samples``: how many the batches hold, about;
    it decides how many positions of each are drawn.
    """
    moments: dict[str, Moments | TokenMoments | RecurrentMoments] = {}
    handles = []
    for site in sites:
        layer = module.get_submodule(site)
        if isinstance(layer, RECURRENT):
            states = moments[site] = RecurrentMoments(layer)
            handles.append(layer.register_forward_pre_hook(lambda _, inputs, states=states: states.add(*inputs)))
        else:
            running = moments[site] = moments_of(layer)
            handles.append(layer.register_forward_hook(_adding(running, Rows(layer, samples))))
    was_training = module.training
    module.eval()
    try:
        for batch in batches:
            module(*batch)
    finally:
        for handle in handles:
            handle.remove()
        module.train(was_training)
    return {site: running.finish() for site, running in moments.items()}


def _adding(running: Moments | TokenMoments, rows: Rows) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        index = rows.draw(output, running.calls)
        running.see(inputs[0])
        x = rows.inputs(inputs[0], index)
        running.add(x.float() if x.is_floating_point() else x, rows.outputs(output, index).float())

    return hook
