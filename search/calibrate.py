"""Second moments of layers' inputs and outputs, streamed batch by batch.

For each group, with ``x`` the (im2col) input, channel by channel with the taps inside, and ``y`` a target for the output:

* ``second`` = E[(x - Ex)(x - Ex)']   (C in the mathematics)
* ``cross``  = E[(y - Ey)(x - Ex)']   (D)
* ``energy`` = E[(y - Ey)^2] for each output

Sums are taken about the mean of the first batch, so that a large mean does not eat the digits of a small variance; each
chunk in float32, chunks together in float64. No more than one chunk of im2col rows exists at a time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Moments", "Statistics", "collect", "patches"]

CHUNK_ELEMENTS = 1 << 24
"""im2col elements at a time: 64 MB in float32."""

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Statistics:
    """What the decompositions need to know of one layer's data; float64, on the CPU."""

    second: Tensor
    """(groups, n, n) with n = in / groups * taps."""
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
    """Spatial sizes of the layer's input; empty for a Linear."""


class Moments:
    """The running sums behind ``Statistics`` of one layer.

    ``centred=False`` gives plain second moments: right for a layer whose bias cannot take up a change of mean.
    """

    def __init__(self, layer: nn.Module, *, centred: bool = True) -> None:
        self.layer = layer
        self.groups = layer.groups if isinstance(layer, _CONVS) else 1
        self.centred = centred
        self.input_sizes: tuple[int, ...] = ()
        self._origin_x: Tensor | None = None
        self._origin_y: Tensor | None = None
        self._of_x: list[Tensor] = []
        self._of_y: list[Tensor] = []
        self._rows = [0, 0]

    def add(self, x: Tensor, y: Tensor, *, target_only: bool = False) -> None:
        """One batch: the layer's input and the output wanted of it.

        Args:
            x: as the layer takes it.
            y: shaped like the layer's output.
            target_only: ``x`` was added before; only what depends on ``y`` is summed (after ``retarget``).
        """
        if isinstance(self.layer, _CONVS):
            self.input_sizes = tuple(x.shape[2:])
        width = self.layer.weight[0].numel() * self.groups  # type: ignore[index,operator,union-attr]
        outputs = y.shape[1 if isinstance(self.layer, _CONVS) else -1]
        step = max(1, CHUNK_ELEMENTS * outputs // (width * max(1, y[0].numel())))
        for i in range(0, len(x), step):
            rows_x, rows_y = patches(self.layer, x[i : i + step]), _rows(self.layer, y[i : i + step], self.groups)
            if self._origin_x is None or self._origin_y is None:
                self._origin_x, self._origin_y = rows_x.mean(1, keepdim=True), rows_y.mean(1, keepdim=True)
            rows_x -= self._origin_x
            rows_y = rows_y - self._origin_y
            if not target_only:
                _accumulate(self._of_x, rows_x.sum(1), rows_x.transpose(1, 2) @ rows_x)
                self._rows[0] += rows_x.shape[1]
            _accumulate(self._of_y, rows_y.sum(1), rows_y.transpose(1, 2) @ rows_x, rows_y.square().sum(1))
            self._rows[1] += rows_y.shape[1]

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


def _accumulate(sums: list[Tensor], *new: Tensor) -> None:
    wide = [v.double().cpu() for v in new]
    if sums:
        for total, v in zip(sums, wide, strict=True):
            total += v
    else:
        sums.extend(wide)


@torch.no_grad()
def collect(module: nn.Module, sites: Sequence[str], batches: Iterable[tuple[Tensor, ...]]) -> dict[str, Statistics]:
    """Statistics of the named layers with their own outputs as targets, in one pass over ``batches``.

    A layer that is called several times in a pass counts all its calls. Layers without a bias that a following batch
    norm could take up are centred all the same: the error curves compare shapes of responses, not means.
    """
    moments = {site: Moments(module.get_submodule(site)) for site in sites}
    handles = []
    for site, running in moments.items():

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, running: Moments = running) -> None:
            running.add(inputs[0].detach().float(), output.detach().float())

        handles.append(module.get_submodule(site).register_forward_hook(hook))
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


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """The rows that the layer's matrix multiplies: (groups, rows, in / groups * taps)."""
    if not isinstance(layer, _CONVS):
        return x.reshape(1, -1, x.shape[-1])
    d = len(layer.kernel_size)
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    # (batch, channels, *out, *kernel) as a view: windows of the dilated extent, every dilation-th entry.
    for axis in range(d):
        extent = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        x = x.unfold(2 + axis, extent, layer.stride[axis])
    x = x[(..., *(slice(None, None, layer.dilation[axis]) for axis in range(d)))]
    x = x.unflatten(1, (layer.groups, -1))
    # to (groups, batch, *out, channels, *kernel)
    x = x.permute(1, 0, *range(3, 3 + d), 2, *range(3 + d, 3 + 2 * d))
    return x.reshape(layer.groups, -1, layer.weight[0].numel())


def _rows(layer: nn.Module, y: Tensor, groups: int) -> Tensor:
    """(groups, rows, out / groups), rows in the order of ``patches``."""
    if isinstance(layer, _CONVS):
        y = y.movedim(1, -1)
    return y.reshape(-1, groups, y.shape[-1] // groups).transpose(0, 1)
