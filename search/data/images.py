"""Image files to one array on disk: ``(rows, height, width, channels)`` bytes.

Two passes over the files: the first reads only headers (size, mode), so that everything is known, and refused, before
a pixel is decoded or a byte allocated.
"""

import io
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from search.data.raw import Array
from search.data.safety import check_room
from search.errors import BadData
from search.spec import Transform

__all__ = ["IMAGE_FOLDERS", "Encoded", "decode", "is_image_name", "opened", "sizes_differ"]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
IMAGE_FOLDERS = ("images", "image", "imgs", "img")
"""What the folder of images is called where their targets lie beside it; the first in messages."""
MAX_PIXELS = 50_000_000
"""Of one image."""
GREY = ("1", "L", "LA", "La")
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
"""Modes of more than a byte a channel, which a conversion would clip."""

Encoded = tuple[str, bytes]
"""A name for messages, and the file's bytes."""
Files = Callable[[], Iterable[Encoded]]
"""Starts a pass over the files of one split, always in the same order."""


def is_image_name(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def decode(splits: dict[str, Files], transform: Transform, scratch: Path) -> dict[str, Array]:
    """One mapped array for each split, all of one size and channel count.

    Grey only if every image is (and ``mean`` is not given for three channels), else RGB. ``transform.size`` resizes
    (antialiased bilinear, the aspect ratio is not kept); without it all images must agree. The first frame of an
    animation counts; transparency is dropped. Raises BadData.
    """
    seen = {split: _survey(files(), resized=transform.size is not None) for split, files in splits.items()}
    sizes = {survey.size: survey.first for survey in seen.values()}
    if transform.size is None and len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        raise sizes_differ(first, one, second, other)
    height, width = transform.size or next(iter(sizes))
    grey = all(survey.grey for survey in seen.values()) and len(transform.mean) != 3
    shape = (height, width, 1 if grey else 3)
    check_room(sum(s.count for s in seen.values()) * int(np.prod(shape)), scratch, "decoded, the images")
    arrays: dict[str, Array] = {}
    for split, files in splits.items():
        path = scratch / f"images-{split}.npy"
        out = np.lib.format.open_memmap(path, "w+", np.uint8, (seen[split].count, *shape))
        for row, encoded in enumerate(files()):
            out[row] = _pixels(encoded, height, width, grey)
        out.flush()
        arrays[split] = np.load(path, mmap_mode="r", allow_pickle=False)
    return arrays


@dataclass(frozen=True)
class _Survey:
    count: int
    size: tuple[int, int]
    """Height and width of the first image (and, unless resized, of all)."""
    first: str
    grey: bool


def _survey(files: Iterable[Encoded], *, resized: bool) -> _Survey:
    count, grey, size, first = 0, True, (0, 0), ""
    for name, content in files:
        with opened(name, content) as image:
            width, height = image.size
            grey = grey and image.mode in GREY
        if count == 0:
            size, first = (height, width), name
        elif not resized and size != (height, width):
            raise sizes_differ(first, size, name, (height, width))
        count += 1
    return _Survey(count, size, first, grey)


def sizes_differ(first: str, one: Sequence[int], second: str, other: Sequence[int]) -> BadData:
    return BadData(
        "image_sizes_differ",
        f"{first} is {one[0]}×{one[1]} and {second} is {other[0]}×{other[1]} pixels (height×width); "
        "set transform.size to resize them all.",
    )


def opened(name: str, content: bytes) -> Image.Image:
    """The image, its header read and its declared size within bounds; nothing decoded yet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own, lower bound follows
            image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(name, str(error)) from error
    except (OSError, ValueError, SyntaxError, OverflowError) as error:
        raise BadData(
            "image_unreadable", f"{name} is none of {', '.join(FORMATS)}; convert it, or leave it out."
        ) from error
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name, f"{image.width}×{image.height} pixels")
    if image.mode in DEEP:
        raise BadData("image_unreadable", f"{name} has mode {image.mode}; store 8 bits a channel, or use .npz arrays.")
    return image


def _too_large(name: str, what: str) -> BadData:
    return BadData("image_too_large", f"{name}: {what}; at most {MAX_PIXELS} pixels: resize it before uploading.")


def _pixels(encoded: Encoded, height: int, width: int, grey: bool) -> Array:
    """``(height, width, channels)`` bytes of one image."""
    name, content = encoded
    with opened(name, content) as image:
        try:
            converted = image.convert("L" if grey else "RGB")
        except (OSError, ValueError, SyntaxError, OverflowError, EOFError, IndexError) as error:
            raise BadData("image_unreadable", f"{name} is damaged ({error}); replace it, or leave it out.") from error
    if converted.size != (width, height):
        converted = converted.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(converted, np.uint8).reshape(height, width, -1)
