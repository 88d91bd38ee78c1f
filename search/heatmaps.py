"""Joints and the heatmaps that show them.

A joint travels as four numbers, ``(…, joints, 4)``: x and y as fractions of the image's width and height; 1 if it
counts and 0 if not; and how far from its place it still counts as found, as a fraction of the image's longer side. So
nothing here needs to know the image's size: the heatmap's cells are the unit, and a fraction f of a side of n cells is
at f·n − ½ cells, for the centre of cell 0 is half a cell from the edge.
"""

import torch
from torch import Tensor

__all__ = ["distances", "gaussians", "peaks"]


def gaussians(joints: Tensor, height: int, width: int, sigma: float) -> Tensor:
    """``(n, joints, height, width)``: a Gaussian of height 1 and ``sigma`` cells at each joint.

    As Tompson et al. (2014) and Newell et al. (2016) train on, but centred on the joint itself, not on the nearest
    cell (Zhang et al. 2020, "Distribution-aware coordinate representation").
    """
    rows, columns = (torch.arange(n, device=joints.device, dtype=joints.dtype) for n in (height, width))
    x, y = joints[..., 0, None] * width - 0.5, joints[..., 1, None] * height - 0.5
    across, down = (torch.exp(-(offset.square()) / (2 * sigma**2)) for offset in (columns - x, rows - y))
    return down[..., :, None] * across[..., None, :]


def peaks(maps: Tensor) -> Tensor:
    """``(n, joints, 2)``: x and y in cells of the highest cell of each ``(n, joints, height, width)`` heatmap, moved
    by a quarter of a cell towards the higher neighbour along each axis (Newell et al. 2016, section 3.2)."""
    height, width = maps.shape[-2:]
    flat = maps.flatten(-2)
    best = flat.argmax(-1)
    row, column = best // width, best % width

    def towards(place: Tensor, size: int, step: int) -> Tensor:
        inside = (place > 0) & (place < size - 1)
        near, far = (flat.gather(-1, torch.where(inside, best + s, best)[..., None])[..., 0] for s in (-step, step))
        return place + 0.25 * torch.sign(far - near)

    return torch.stack([towards(column, width, 1), towards(row, height, width)], -1)


def distances(maps: Tensor, joints: Tensor) -> Tensor:
    """``(n, joints)``: from each heatmap's peak to its joint, as a fraction of the heatmap's longer side."""
    height, width = maps.shape[-2:]
    cells = joints[..., :2] * joints.new_tensor([width, height]) - 0.5
    far: Tensor = torch.linalg.vector_norm(peaks(maps) - cells, dim=-1)
    return far / max(height, width)
