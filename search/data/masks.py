"""A zip or tar of images with a mask for each: ``[train|val|test/]images/NAME.jpg`` and ``…/masks/NAME.png``.

A mask's pixels are the classes themselves: grey values, or the numbers behind a palette's colours.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from search.data.archives import read_files
from search.data.images import IMAGE_FOLDERS, Encoded, decode, opened, sizes_differ
from search.data.raw import Array, Raw, Rows
from search.data.safety import check_room
from search.errors import BadData
from search.spec import DataSpec

__all__ = ["read_masks"]

MASKS = ("masks", "mask", "labels", "annotations", "segmentation")
MODES = ("1", "L", "P")
EXACT = ("PNG", "BMP", "GIF")
"""Formats that keep every number; JPEG and WebP may not."""

Places = dict[str, tuple[str, str]]
"""File to its split and what its image and mask have in common."""


def read_masks(path: Path, images: Sequence[str], split_names: dict[str, str], spec: DataSpec, scratch: Path) -> Raw:
    """Decode the images and their masks into ``scratch``, the masks resized (nearest) where the images are.

    ``images``: the archive's image files; ``split_names``: folder to split. Raises BadData when a file is neither
    below an images nor a masks folder, when one of a pair is missing, or when a mask holds no class numbers.
    """
    places, masks = _paired(images, split_names)
    rows: dict[str, dict[str, int]] = {}
    for split, key in places.values():  # in the archive's order, in which decode writes
        of_split = rows.setdefault(split, {})
        of_split[key] = len(of_split)
    arrays = decode({split: partial(_files, path, places, split) for split in rows}, spec.transform, scratch)
    splits = {
        split: Rows({"x": array}, _decode(path, masks, split, rows[split], spec.transform.size, scratch))
        for split, array in arrays.items()
    }
    return Raw("images", splits, True, (), (f"{len(places)} images with a mask each",))


def _paired(names: Sequence[str], split_names: dict[str, str]) -> tuple[Places, Places]:
    places: Places = {}
    masks: Places = {}
    for name in names:
        folders = PurePosixPath(name).parts[:-1]
        lower = [folder.lower() for folder in folders]
        kind = next((i for i in reversed(range(len(lower))) if lower[i] in (*IMAGE_FOLDERS, *MASKS)), None)
        if kind is None:
            raise BadData(
                "labels_missing",
                f"{name!r} lies below none of the folders {IMAGE_FOLDERS[0]} and {MASKS[0]}; pack images/NAME.jpg and "
                "masks/NAME.png (below train, val and test, if you like), or use .npz arrays.",
            )
        rest = [folder for i, folder in enumerate(lower) if i != kind]
        split = next((split_names[folder] for folder in rest if folder in split_names), "train")
        key = "/".join([*rest, PurePosixPath(name).stem])
        of_kind = places if lower[kind] in IMAGE_FOLDERS else masks
        if (split, key) in of_kind.values():
            raise BadData(
                "labels_missing", f"{name!r} is the second file for {key!r}; keep one image and one mask each."
            )
        of_kind[name] = (split, key)
    for one, others, what in ((places, masks, "mask"), (masks, places, "image")):
        there = set(others.values())
        alone = [name for name, place in one.items() if place not in there]
        if alone:
            more = f", nor have {len(alone) - 1} others" if len(alone) > 1 else ""
            raise BadData(
                "labels_missing",
                f"{alone[0]!r} has no {what} of the same name{more}; add what is missing, or leave these files out.",
            )
    return places, masks


def _files(path: Path, places: Places, split: str) -> Iterable[Encoded]:
    return read_files(path, lambda name: name in places and places[name][0] == split)


def _decode(
    path: Path, masks: Places, split: str, rows: dict[str, int], size: tuple[int, int] | None, scratch: Path
) -> Array:
    """``(rows, height, width)`` bytes, mapped, each in its image's row. Headers are read first, as of images."""
    shape = size
    first = ""
    for name, content in _files(path, masks, split):
        with opened(name, content) as mask:
            _check(name, mask)
            if shape is None:
                shape, first = (mask.height, mask.width), name
            elif size is None and shape != (mask.height, mask.width):
                raise sizes_differ(first, shape, name, (mask.height, mask.width))
    assert shape is not None  # noqa: S101 - each image has a mask
    check_room(len(rows) * shape[0] * shape[1], scratch, "decoded, the masks")
    target = scratch / f"masks-{split}.npy"
    out = np.lib.format.open_memmap(target, "w+", np.uint8, (len(rows), *shape))
    for name, content in _files(path, masks, split):
        out[rows[masks[name][1]]] = _numbers(name, content, shape)
    out.flush()
    decoded: Array = np.load(target, mmap_mode="r", allow_pickle=False)
    return decoded


def _check(name: str, mask: Image.Image) -> None:
    if mask.mode not in MODES or mask.format not in EXACT:
        raise BadData(
            "mask_without_classes",
            f"{name} is {mask.format} in mode {mask.mode}; a mask's pixels are class numbers, 255 where none counts: "
            f"store grey or palette images (mode {' or '.join(MODES)}) as {' or '.join(EXACT)}.",
        )


def _numbers(name: str, content: bytes, shape: tuple[int, int]) -> Array:
    with opened(name, content) as mask:
        try:
            mask.load()
        except (OSError, ValueError, SyntaxError, OverflowError, EOFError, IndexError) as error:
            raise BadData("image_unreadable", f"{name} is damaged ({error}); replace it, or leave it out.") from error
        _check(name, mask)  # loading may change the mode (an animation's frame)
        if mask.size != shape[::-1]:
            mask = mask.resize(shape[::-1], Image.Resampling.NEAREST)
        return np.asarray(mask).astype(np.uint8)
