"""A stacked hourglass (Newell, Yang and Deng 2016) in which each k×k kernel is asked for, not owned.

An hourglass of depth D halves the map D times. At every level a block stays at the resolution (*skip*), one works at
half of it before the next level (*down*) and one behind it (*up*); the upsampled way back is added to the skip. So each
level has three pathways of the same kind, and with S stacks and blocks of C convolutions all kernels are one tensor
(S, D, 3, C, features, features, k, k), as T-Net (Kossaifi et al. 2019) takes it.
"""

import copy
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, max_pool2d, relu

from benchmarks.tnet.kernels import Chain, Factored, Kernels

__all__ = ["PATHWAYS", "STEM", "StackedHourglass", "compact"]

PATHWAYS = ("down", "up", "skip")

STEM = 4
"""How many pixels of the image a cell of the heatmaps is wide."""


Block = Sequence[tuple[Chain, nn.Module]]
"""A block's layers: the convolutions that make one up, and the batch norm behind them."""


class StackedHourglass(nn.Module):
    """``(rows, 3, height, width)`` → each stack's heatmaps, ``(rows, joints, height / 4, width / 4)``, the best last.

    All is convolutional: any image whose sides 4 · 2^depth divides will do.
    """

    def __init__(self, kernels: Kernels, joints: int) -> None:
        """Raises ValueError when the kernels are not those of three pathways with equal inputs and outputs."""
        super().__init__()
        stacks, depth, pathways, convs, features, inputs, *_ = kernels.shape
        if pathways != len(PATHWAYS) or features != inputs:
            raise ValueError(
                f"the network has {len(PATHWAYS)} pathways and as many inputs as outputs to a kernel; "
                f"the kernels are {kernels.shape}: (stacks, depth, {len(PATHWAYS)}, convs, features, features, k, k)"
            )
        self.kernels, self.depth, self.convs = kernels, depth, convs
        # The stem and the 1×1s between stacks have other shapes than the kernels, and stay as they are.
        self.stem = nn.Sequential(
            nn.Conv2d(3, features, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(features),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(features) for _ in range(stacks * depth * pathways * convs)])
        heads = [nn.Conv2d(features, joints, 1) for _ in range(stacks)]
        for head in heads:
            # Almost all of a heatmap is zero: from there the joints are learnt at once, from random maps much later.
            nn.init.zeros_(head.weight)
            assert head.bias is not None
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(heads)
        self.features_on = nn.ModuleList([nn.Conv2d(features, features, 1) for _ in range(stacks - 1)])
        self.maps_on = nn.ModuleList([nn.Conv2d(joints, features, 1) for _ in range(stacks - 1)])

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        side = STEM * 2**self.depth
        if images.shape[-1] % side or images.shape[-2] % side:
            raise ValueError(f"the sides of an image are multiples of {side}, got {tuple(images.shape)}")
        layers = list(zip(self.kernels.chains(), self.norms, strict=True))
        blocks = iter([layers[start : start + self.convs] for start in range(0, len(layers), self.convs)])
        x, maps = self.stem(images), list[Tensor]()
        for stack, head in enumerate(self.heads):
            found = self._hourglass(x, [tuple(next(blocks) for _ in PATHWAYS) for _ in range(self.depth)])
            maps.append(head(found))
            if stack < len(self.maps_on):
                x = x + self.features_on[stack](found) + self.maps_on[stack](maps[-1])
        return tuple(maps)

    def _hourglass(self, x: Tensor, levels: Sequence[tuple[Block, ...]]) -> Tensor:
        if not levels:
            return x
        (down, up, skip), *inner = levels
        below = _block(up, self._hourglass(_block(down, max_pool2d(x, 2)), inner))
        return _block(skip, x) + interpolate(below, scale_factor=2.0)


def _block(layers: Block, x: Tensor) -> Tensor:
    """Convolutions with their batch norms, the input added before the last ReLU (He et al. 2016)."""
    y = x
    for place, (chain, norm) in enumerate(layers):
        for link in chain:
            y = conv2d(y, link, padding=(link.shape[-2] // 2, link.shape[-1] // 2))
        y = norm(y)
        y = relu(y + x) if place == len(layers) - 1 else relu(y)
    return y


def compact(network: StackedHourglass) -> StackedHourglass:
    """A copy for inference: every layer is its chain of small convolutions, what layers share is stored once.

    Raises ValueError when the network is compact already.
    """
    if not isinstance(network.kernels, Factored):
        raise ValueError(f"only trainable kernels can be cut into chains, got {type(network.kernels).__name__}")
    copied = copy.deepcopy(network).eval()
    copied.kernels = network.kernels.links()
    return copied
