"""Keypoints' targets: from coordinates in pixels to what ``search.heatmaps`` describes."""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from search.data.raw import Raw, Rows
from search.data.transform import Moves
from search.errors import BadData
from search.spec import DataSpec

__all__ = ["checked_joints", "moved_joints", "placed"]

Floats = NDArray[np.float32]

LENGTH_SHARE, SIDE_SHARE = 0.5, 0.05
"""What counts as found: PCKh's half of the row's length, or so much of the image's longer side."""


def checked_joints(name: str, rows: Rows) -> Rows:
    """``rows`` with a target ``(rows, joints, 3)`` of x, y and whether the joint is labelled, and lengths ``(rows,)``.

    Raises BadData when the shapes are others, or a number that counts is not finite.
    """
    target, lengths = rows.target, rows.length
    assert target is not None  # noqa: S101 -- callers ask first
    if target.ndim != 3 or target.shape[1] == 0 or target.shape[2] not in (2, 3):
        advice = "; the service draws heatmaps itself" if target.ndim == 4 else ""
        raise BadData(
            "keypoints_shape",
            f"y of the {name} split has shape {target.shape}, not (rows, joints, 2): give x and y in pixels of the "
            f"image, and as a third number 0 for a joint that is not there{advice}.",
        )
    joints = np.concatenate([target, np.ones_like(target[..., :1])], -1)[..., :3].astype(np.float32)
    labelled = joints[..., 2] > 0
    if not np.isfinite(joints[..., 2]).all() or not np.isfinite(joints[labelled]).all():
        row = int(np.argmax(~np.isfinite(joints).all((1, 2))))
        raise BadData(
            "non_finite_data",
            f"{name} y holds NaN or infinity, first in row {row}; give a joint that is not there a third number, 0.",
        )
    if lengths is not None:
        if lengths.size != len(target) or not (np.isfinite(lengths).all() and np.greater(lengths, 0).all()):
            raise BadData(
                "keypoints_length",
                f"length of the {name} split has shape {lengths.shape} for {len(target)} rows, its smallest is "
                f"{lengths.min() if lengths.size else 'none'}; give one positive number of pixels for each row.",
            )
        lengths = lengths.reshape(-1)
    return Rows(rows.inputs, np.where(labelled[..., None], joints, np.float32(0)), lengths)


def placed(raw: Raw, spec: DataSpec, image: tuple[int, ...]) -> Raw:
    """``raw``, as ``checked_joints`` left it, with targets ``(rows, joints, 4)``, for images ``(channels, height,
    width)``.

    Pixel i has its centre at i. A joint outside its image does not count. Raises BadData when the coordinates cannot be
    pixels of these images, or ``spec.mirror`` names a joint that there is not.
    """
    splits, notes = {}, list(raw.notes)
    for name, rows in raw.splits.items():
        assert rows.target is not None  # noqa: S101 -- checked
        _check_mirror(spec, rows.target.shape[1])
        joints = rows.target.astype(np.float32)
        target = _fractions(joints, image)
        labelled, counts = int((joints[..., 2] > 0).sum()), int(target[..., 2].sum())
        _check_places(name, joints, labelled, counts, image)
        if counts < labelled:
            notes.append(f"{labelled - counts} of {labelled} {name} joints lie outside their image and do not count")
        target[..., 3] = _tolerance(rows, spec, max(image[1:]))[:, None]
        splits[name] = replace(rows, target=target)
    return replace(raw, splits=splits, notes=tuple(notes))


def moved_joints(
    joints: Tensor, moves: Moves, *, image: tuple[int, ...], mirror: tuple[tuple[int, int], ...]
) -> Tensor:
    """``(batch, joints, 4)`` as their images ``(channels, height, width)`` were moved. In a mirrored one the joints of
    ``mirror`` change places; a joint that left its image does not count."""
    height, width = image[1:]
    joints = joints.clone()
    joints[..., 0] += moves.right[:, None] / width
    joints[..., 1] += moves.down[:, None] / height
    order = torch.arange(joints.shape[1])
    for one, other in mirror:
        order[one], order[other] = other, one
    mirrored = joints[:, order]
    mirrored[..., 0] = 1 - mirrored[..., 0]
    joints = torch.where(moves.mirrored[:, None, None], mirrored, joints)
    joints[..., 2] *= ((joints[..., :2] >= 0) & (joints[..., :2] < 1)).all(-1)
    return joints


def _fractions(joints: Floats, image: tuple[int, ...]) -> Floats:
    """x and y as fractions of the width and height, whether the joint counts, and room for its tolerance."""
    height, width = image[1:]
    out = np.zeros((*joints.shape[:2], 4), np.float32)
    out[..., :2] = (joints[..., :2] + 0.5) / (width, height)
    out[..., 2] = (joints[..., 2] > 0) & ((out[..., :2] >= 0) & (out[..., :2] < 1)).all(-1)
    return out


def _tolerance(rows: Rows, spec: DataSpec, side: int) -> Floats:
    """(rows,) how far from its place a joint counts as found, as a fraction of the image's longer side."""
    if rows.length is None:
        share = SIDE_SHARE if spec.pck_threshold is None else spec.pck_threshold
        return np.full(len(next(iter(rows.inputs.values()))), share, np.float32)
    share = LENGTH_SHARE if spec.pck_threshold is None else spec.pck_threshold
    return rows.length.astype(np.float32) * np.float32(share / side)


def _check_mirror(spec: DataSpec, joints: int) -> None:
    named = [joint for pair in spec.mirror or () for joint in pair]
    if named and max(named) >= joints:
        raise BadData(
            "mirror_joints",
            f"mirror names joint {max(named)}, but y has {joints} joints, 0 to {joints - 1}; correct it.",
        )


def _check_places(name: str, joints: Floats, labelled: int, counts: int, image: tuple[int, ...]) -> None:
    size = f"{image[1]}×{image[2]} (height×width)"
    if labelled == 0:
        raise BadData(
            "nothing_counts",
            f"no joint of the {name} split is labelled: the third number of each is 0, or its cells are empty.",
        )
    if joints[..., :2].min() >= 0 and joints[..., :2].max() <= 1 and min(image[1:]) > 4:
        raise BadData(
            "keypoints_not_pixels",
            f"no coordinate in y of the {name} split is above 1, though the images are {size}: they seem to be "
            "fractions; multiply x by the width and y by the height.",
        )
    if counts < labelled / 2:
        raise BadData(
            "keypoints_outside",
            f"{labelled - counts} of {labelled} joints of the {name} split lie outside the images, which are {size}; "
            "give x before y, in pixels of the stored image, and a third number, 0, for a joint that is not there.",
        )
