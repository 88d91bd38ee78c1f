"""Figures to find the joints of: seeded drawings of jointed people before clutter, their keypoints and heatmaps.

    python -m benchmarks.figures --out figures.npz

The file has, for each split, images ``x``, keypoints ``y`` and head sizes ``length``: the service's task ``keypoints``.
A stand-in for a human-pose data set that needs no download: limbs of any angle, length and colour, self-occlusion,
distracting shapes, noise. A figure faces the viewer, leans by up to 40° and has its left limbs darker than its right
ones, so that left and right can be told apart. Keypoints are ``(x, y)`` in pixels; pixel ``i`` has its centre at ``i``.
"""

import argparse
import colorsys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

__all__ = ["JOINTS", "LIMBS", "Figures", "Floats", "decode", "heatmaps", "hits", "render"]

Floats = NDArray[np.float32]
Colour = tuple[int, int, int]

JOINTS = (
    "head",
    "neck",
    "right_shoulder",
    "right_elbow",
    "right_wrist",
    "left_shoulder",
    "left_elbow",
    "left_wrist",
    "right_hip",
    "right_knee",
    "right_ankle",
    "left_hip",
    "left_knee",
    "left_ankle",
)
"""The order of the keypoints; ``head`` is the top of the head."""

LIMBS = (
    *((0, 1), (2, 5), (8, 11), (2, 8), (5, 11)),  # head and trunk
    *((2, 3), (3, 4), (5, 6), (6, 7)),  # arms
    *((8, 9), (9, 10), (11, 12), (12, 13)),  # legs
)
"""Pairs of joints that a line connects: for whoever draws what was found."""

SUPERSAMPLING = 2
"""Shapes are drawn this many times larger and averaged down, so that edges carry sub-pixel positions."""

CLUTTER = (6, 13)
"""From how many shapes to how many, exclusive, lie behind a figure."""

NOISE = 12.0
"""Standard deviation of each pixel's noise, of 255."""


@dataclass(frozen=True)
class Figures:
    """One figure a row."""

    images: NDArray[np.uint8]
    """(rows, side, side, 3)."""
    keypoints: Floats
    """(rows, 14, 2): x, y in pixels, in the order of ``JOINTS``; all lie in the image."""
    heads: Floats
    """(rows,): from the top of the head to the neck, in pixels; the length that PCKh is relative to."""


def render(rows: int, *, side: int = 64, seed: int = 0) -> Figures:
    """``rows`` images of ``side`` pixels a side. Row i depends on the seed and i only, not on how many there are.

    Raises ValueError for a side that is too small to draw a figure in.
    """
    if side < 32:
        raise ValueError(f"a figure needs images of 32 pixels a side or more, got side={side}")
    drawn = [_figure(np.random.default_rng((seed, row)), side) for row in range(rows)]
    images, keypoints = np.stack([image for image, _ in drawn]), np.stack([points for _, points in drawn])
    return Figures(images, keypoints, np.linalg.norm(keypoints[:, 0] - keypoints[:, 1], axis=-1))


def heatmaps(keypoints: Floats, side: int, size: int, *, sigma: float = 1.0) -> Floats:
    """``(rows, joints, size, size)``: a Gaussian of height 1 and ``sigma`` cells around each keypoint.

    A cell of the map is ``side / size`` pixels of the image wide, so a pixel x lies at (x + ½) size / side − ½ cells.
    """
    cells = (keypoints + 0.5) * (size / side) - 0.5
    grid = np.arange(size)
    rows = np.exp(-((grid - cells[..., 1, None]) ** 2) / (2 * sigma**2))
    columns = np.exp(-((grid - cells[..., 0, None]) ** 2) / (2 * sigma**2))
    return (rows[..., :, None] * columns[..., None, :]).astype(np.float32)


def decode(maps: Floats, side: int) -> Floats:
    """The keypoints of ``(rows, joints, size, size)`` heatmaps, in pixels of images ``side`` pixels a side.

    The logarithm of a Gaussian is a parabola: with its values at the highest cell and at the two beside it, the vertex
    lies (l₊ − l₋) / 2 (2 l₀ − l₊ − l₋) cells from the highest. Exact for what ``heatmaps`` draws; at the border the
    cell itself is taken.
    """
    size = maps.shape[-1]
    rows, columns = np.divmod(maps.reshape(*maps.shape[:2], -1).argmax(-1), size)
    # What the parabola is fitted to: the profiles through the highest cell, along each axis.
    across = np.take_along_axis(maps, rows[..., None, None], 2)[..., 0, :]
    down = np.take_along_axis(maps, columns[..., None, None], 3)[..., 0]
    cells = np.stack([_vertex(across, columns), _vertex(down, rows)], -1)
    points: Floats = ((cells + 0.5) * (side / size) - 0.5).astype(np.float32)
    return points


def hits(found: Floats, figures: Figures, *, threshold: float = 0.5) -> NDArray[np.bool_]:
    """(rows, 14): which joints are within ``threshold`` head lengths of where they are.

    Their mean is PCKh@``threshold`` (Andriluka et al. 2014).
    """
    distances = np.linalg.norm(found - figures.keypoints, axis=-1)
    within: NDArray[np.bool_] = distances <= threshold * figures.heads[:, None]
    return within


def _vertex(profiles: Floats, peaks: NDArray[np.int64]) -> NDArray[np.float64]:
    """Where the parabola through the peak's logarithm and its neighbours' has its vertex, in cells."""
    last = profiles.shape[-1] - 1
    logs = np.log(np.maximum(profiles.astype(np.float64), 1e-10))
    near, peak, far = (
        np.take_along_axis(logs, (peaks.clip(1, last - 1) + step)[..., None], -1)[..., 0] for step in (-1, 0, 1)
    )
    bend = 2 * peak - near - far
    inside = (peaks > 0) & (peaks < last) & (bend > 1e-12)
    shift = np.where(inside, (far - near) / np.where(inside, 2 * bend, 1.0), 0.0)
    vertices: NDArray[np.float64] = peaks + shift.clip(-0.5, 0.5)
    return vertices


def _figure(generator: np.random.Generator, side: int) -> tuple[NDArray[np.uint8], Floats]:
    """One image and its keypoints."""
    body = _pose(generator)
    low, high = body.min(0), body.max(0)
    margin = 0.1 * side  # a limb's width: what is drawn around a joint stays inside as well
    room = side - 1 - 2 * margin
    scale = room / max(high - low) * generator.uniform(0.75, 1.0)
    corner = margin + generator.uniform(0, 1, 2) * (room - scale * (high - low))
    keypoints = (corner + scale * (body - low)).astype(np.float32)

    canvas = Image.new("RGB", (side * SUPERSAMPLING, side * SUPERSAMPLING), _colour(generator))
    pen = _Pen(ImageDraw.Draw(canvas))
    _clutter(generator, pen, side)
    _body(generator, pen, keypoints, scale)
    pixels = np.asarray(canvas, np.float32).reshape(side, SUPERSAMPLING, side, SUPERSAMPLING, 3).mean((1, 3))
    pixels += generator.normal(0, NOISE, pixels.shape)
    return pixels.round().clip(0, 255).astype(np.uint8), keypoints


def _pose(generator: np.random.Generator) -> NDArray[np.float64]:
    """(14, 2) joints in body lengths, the neck at the origin, y downwards.

    Angles are from straight down, positive to the image's right; a figure faces us, so its right limbs are on the left.
    """

    def length(mean: float) -> float:
        return mean * generator.uniform(0.85, 1.15)

    def angle(low: float, high: float) -> float:
        return float(np.deg2rad(generator.uniform(low, high)))

    def step(towards: float, far: float) -> NDArray[np.float64]:
        return far * np.array([np.sin(towards), np.cos(towards)])

    lean = angle(-40, 40)
    neck = np.zeros(2)
    pelvis = neck + step(lean, length(0.3))
    head = neck - step(lean + angle(-25, 25), length(0.2))
    limbs = []
    for start, half_width, bones, swing, bend in (
        (neck, length(0.11), (length(0.18), length(0.17)), (-15, 160), (-20, 130)),
        (pelvis, length(0.07), (length(0.25), length(0.25)), (-15, 70), (-80, 20)),
    ):
        for outwards in (-1, 1):
            joint = start + outwards * half_width * np.array([np.cos(lean), -np.sin(lean)])
            limbs.append(joint)
            towards = lean
            for bone, (low, high) in zip(bones, (swing, bend), strict=True):
                towards += outwards * angle(low, high)
                joint = joint + step(towards, bone)
                limbs.append(joint)
    return np.stack([head, neck, *limbs])


class _Pen:
    """Draws on the enlarged canvas in pixels of the image."""

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        self.draw = draw

    def blob(self, centre: NDArray[np.floating], radii: tuple[float, float], colour: Colour) -> None:
        x, y = _enlarged(centre)
        across, down = (r * SUPERSAMPLING for r in radii)
        self.draw.ellipse((x - across, y - down, x + across, y + down), fill=colour)

    def limb(self, a: NDArray[np.floating], b: NDArray[np.floating], width: float, colour: Colour) -> None:
        """A thick line with round ends."""
        self.draw.line((*_enlarged(a), *_enlarged(b)), fill=colour, width=round(width * SUPERSAMPLING))
        for end in (a, b):
            self.blob(end, (width / 2, width / 2), colour)

    def polygon(self, corners: list[NDArray[np.floating]], colour: Colour) -> None:
        self.draw.polygon([_enlarged(corner) for corner in corners], fill=colour)


def _enlarged(point: NDArray[np.floating]) -> tuple[float, float]:
    x, y = (point + 0.5) * SUPERSAMPLING - 0.5
    return float(x), float(y)


def _clutter(generator: np.random.Generator, pen: _Pen, side: int) -> None:
    """Blobs, bars as thick as limbs, and triangles, anywhere."""
    for _ in range(generator.integers(*CLUTTER)):
        centre, colour = generator.uniform(0, side, 2), _colour(generator)
        match generator.integers(3):
            case 0:
                pen.blob(centre, (side * generator.uniform(0.03, 0.15), side * generator.uniform(0.03, 0.15)), colour)
            case 1:
                other = centre + generator.normal(0, 0.25 * side, 2)
                pen.limb(centre, other, side * generator.uniform(0.03, 0.08), colour)
            case _:
                pen.polygon([centre + generator.normal(0, 0.15 * side, 2) for _ in range(3)], colour)


def _body(generator: np.random.Generator, pen: _Pen, points: Floats, scale: float) -> None:
    """Legs, torso, arms and head in their clothes, one arm perhaps behind the torso."""
    skin, shirt, trousers = (_colour(generator) for _ in range(3))
    width = scale * generator.uniform(0.06, 0.085)
    head, neck, *_ = points

    def leg(first: int, shade: float) -> None:
        hip, knee, ankle = points[first : first + 3]
        pen.limb(hip, knee, 1.1 * width, _shaded(trousers, shade))
        pen.limb(knee, ankle, 0.9 * width, _shaded(trousers, shade))

    def arm(first: int, shade: float) -> None:
        shoulder, elbow, wrist = points[first : first + 3]
        pen.limb(shoulder, elbow, width, _shaded(shirt, 0.85 * shade))
        pen.limb(elbow, wrist, 0.8 * width, _shaded(skin, shade))

    right_arm, left_arm = (2, 1.0), (5, 0.55)
    behind = right_arm if generator.random() < 0.5 else left_arm
    arm(*behind)
    leg(11, 0.55)
    leg(8, 1.0)
    pen.polygon([points[2], points[5], points[11], points[8]], shirt)
    for corner in (2, 5, 8, 11):
        pen.blob(points[corner], (width / 2, width / 2), shirt)
    arm(*(left_arm if behind is right_arm else right_arm))
    pen.limb(neck, (head + neck) / 2, 0.7 * width, skin)
    radius = 0.4 * float(np.linalg.norm(head - neck))
    pen.blob(head + 0.4 * (neck - head), (0.8 * radius, radius), skin)


def _colour(generator: np.random.Generator) -> Colour:
    hue, saturation, value = generator.uniform((0, 0.1, 0.25), (1, 0.9, 1))
    red, green, blue = (round(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def _shaded(colour: Colour, shade: float) -> Colour:
    red, green, blue = (round(shade * c) for c in colour)
    return red, green, blue


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the .npz")
    parser.add_argument("--train", type=int, default=3000, help="rows")
    parser.add_argument("--val", type=int, default=500, help="rows")
    parser.add_argument("--test", type=int, default=500, help="rows")
    parser.add_argument("--side", type=int, default=64, help="of an image, pixels")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arrays: dict[str, NDArray[np.generic]] = {}
    for offset, split in enumerate(("train", "val", "test")):
        # No split's seed is another's, whatever the seed that was asked for.
        figures = render(getattr(arguments, split), side=arguments.side, seed=3 * arguments.seed + offset)
        arrays |= {
            f"x_{split}": figures.images,
            f"y_{split}": figures.keypoints,
            f"length_{split}": figures.heads,
        }
    np.savez(arguments.out, allow_pickle=False, **arrays)
    for key, values in arrays.items():
        print(f"{key:12} {values.dtype} {values.shape}")
    print(arguments.out)


if __name__ == "__main__":
    main()
