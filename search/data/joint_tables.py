"""A zip or tar of images with a table of their joints: ``[train|val|test/]images/NAME.jpg``, ``[…/]joints.csv``.

``joints.csv`` lies beside ``images`` and has a row for each image below it: its path from there, then x and y of each
joint in pixels of the file as it is, both empty for a joint that is not there; and ``length``, if distances are
relative to one.

    image,head_x,head_y,tail_x,tail_y,length
    0001.jpg,31.5,12,,,9.2
"""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from search.data.archives import read_files
from search.data.images import IMAGE_FOLDERS, Encoded, decode, opened
from search.data.raw import Raw, Rows
from search.errors import BadData
from search.spec import DataSpec

__all__ = ["read_joints"]

TABLE = "joints.csv"
MAX_TABLE = 256 << 20
"""Bytes of one table."""
EXAMPLE = "image,head_x,head_y,tail_x,tail_y"


@dataclass(frozen=True)
class _Row:
    place: str
    """For messages: the table and the line."""
    joints: NDArray[np.float64]
    """(joints, 3), in pixels of the file."""
    length: float | None


def read_joints(
    path: Path, names: Sequence[str], images: Sequence[str], split_names: dict[str, str], spec: DataSpec, scratch: Path
) -> Raw:
    """Decode the images into ``scratch``, with their joints where a resize moves them.

    ``names``: the archive's files; ``images``: those that are images; ``split_names``: folder to split. Raises BadData
    when a table, an image or a row is missing, or a row does not hold what the header announces.
    """
    tables = [name for name in names if PurePosixPath(name).name.lower() == TABLE]
    if not tables:
        raise BadData(
            "labels_missing",
            f"the archive holds {len(images)} images and no {TABLE}; lay one beside the folder images, with a header "
            f"such as {EXAMPLE} and a row for each image, or use .npz or .safetensors arrays.",
        )
    rows, columns = _rows(path, tables, _by_place(images))
    alone = [name for name in images if name not in rows]
    if alone:
        more = f", nor have {len(alone) - 1} others" if len(alone) > 1 else ""
        raise BadData(
            "labels_missing",
            f"{alone[0]!r} has no row in a {TABLE} beside its folder images{more}; add the row (empty cells for joints "
            "that are not there), or leave the image out.",
        )
    splits = {name: _split(name, split_names) for name in images}
    targets: dict[str, list[NDArray[np.float64]]] = {}
    lengths: dict[str, list[float]] = {}
    for name, content in read_files(path, rows.__contains__):  # in the archive's order, in which decode writes
        with opened(name, content) as image:
            joints, length = _resized(rows[name], columns, (image.height, image.width), spec.transform.size)
        targets.setdefault(splits[name], []).append(joints)
        if length is not None:
            lengths.setdefault(splits[name], []).append(length)
    arrays = decode({split: partial(_files, path, splits, split) for split in targets}, spec.transform, scratch)
    found = {
        split: Rows(
            {"x": array},
            np.stack(targets[split]),
            np.asarray(lengths[split]) if split in lengths else None,
        )
        for split, array in arrays.items()
    }
    listed = ", ".join(f"{i}={joint[:40]}" for i, joint in enumerate(columns[:40]))
    return Raw("images", found, True, (), (f"{len(images)} images with joints, in the order of the columns: {listed}",))


def _by_place(images: Iterable[str]) -> dict[tuple[str, str], str]:
    """Each image by its folder of images' parent and its path from there."""
    places = {}
    for name in images:
        parts = PurePosixPath(name).parts
        at = next((i for i in range(len(parts) - 1) if parts[i].lower() in IMAGE_FOLDERS), None)
        if at is None:
            raise BadData(
                "labels_missing",
                f"{name!r} lies below no folder {IMAGE_FOLDERS[0]}; pack images/NAME.jpg beside {TABLE} (below train, "
                "val and test, if you like), or use .npz arrays.",
            )
        places["/".join(parts[:at]), "/".join(parts[at + 1 :])] = name
    return places


def _split(name: str, split_names: dict[str, str]) -> str:
    folders = (folder.lower() for folder in PurePosixPath(name).parts[:-1])
    return next((split_names[folder] for folder in folders if folder in split_names), "train")


def _files(path: Path, splits: dict[str, str], split: str) -> Iterable[Encoded]:
    return read_files(path, lambda name: splits.get(name) == split)


def _rows(
    path: Path, tables: Sequence[str], places: dict[tuple[str, str], str]
) -> tuple[dict[str, _Row], tuple[str, ...]]:
    """Image file to its row, and the joints' names."""
    found: dict[str, _Row] = {}
    first = ""
    header: list[str] = []
    for table, content in read_files(path, set(tables).__contains__):
        lines = _lines(table, content)
        own = [cell.strip() for cell in next(lines, (0, []))[1]]
        joints = _joints(table, own)
        if first and own != header:
            raise BadData(
                "joints_table", f"{table} has the columns {own} and {first} has {header}; give both the same."
            )
        first, header = table, own
        folder = str(PurePosixPath(table).parent).removeprefix(".")
        for line, cells in lines:
            place = f"{table}, line {line}"
            if len(cells) != len(own):
                raise BadData(
                    "joints_table",
                    f"{place}: {len(cells)} cells under {len(own)} columns ({', '.join(own)}); give x and y of every "
                    "joint, with empty cells for one that is not there.",
                )
            values = dict(zip(own, (cell.strip() for cell in cells), strict=True))
            image = places.get((folder, values["image"]))
            if image is None:
                raise BadData(
                    "joints_table",
                    f"{place}: there is no image {values['image']!r} in the folder images beside the table; correct "
                    "the path, add the image, or leave the row out.",
                )
            if image in found:
                raise BadData("joints_table", f"{place}: {image!r} has a row already ({found[image].place}); keep one.")
            found[image] = _row(place, values, joints)
    return found, joints


def _lines(table: str, content: bytes) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not empty with the number of their line."""
    if len(content) > MAX_TABLE:
        raise BadData(
            "joints_table", f"{table} has {len(content)} bytes; at most {MAX_TABLE} are read: use .npz arrays."
        )
    try:
        reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadData("joints_table", f"{table} is no CSV in UTF-8 ({error}); write it again.") from error


def _joints(table: str, header: Sequence[str]) -> tuple[str, ...]:
    columns = [name for name in header if name not in ("image", "length")]
    joints = tuple(name.removesuffix("_x") for name in columns[::2])
    wanted = [f"{joint}{axis}" for joint in joints for axis in ("_x", "_y")]
    if columns != wanted or not joints or len({*header}) < len(header) or "image" not in header:
        raise BadData(
            "joints_table",
            f"{table} begins with the columns {', '.join(header)[:200]!r}; it needs a header of image, x and y of each "
            f"joint, and length if there is one, separated by commas: {EXAMPLE}.",
        )
    return joints


def _row(place: str, values: dict[str, str], names: Sequence[str]) -> _Row:
    joints = np.zeros((len(names), 3))
    for i, name in enumerate(names):
        x, y = values[f"{name}_x"], values[f"{name}_y"]
        if (x == "") != (y == ""):
            raise BadData(
                "joints_table",
                f"{place}: x of the joint {name!r} is {x!r} and y is {y!r}; give both, or neither if it is not there.",
            )
        if x:
            joints[i] = _number(place, f"{name}_x", x), _number(place, f"{name}_y", y), 1
    return _Row(place, joints, _number(place, "length", values["length"]) if "length" in values else None)


def _number(place: str, column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadData("joints_table", f"{place}: {column} is {text!r}, not a number of pixels; correct it.")
    return value


def _resized(
    row: _Row, names: Sequence[str], size: tuple[int, int], target: tuple[int, int] | None
) -> tuple[NDArray[np.float64], float | None]:
    """The joints and the length where the image's resize from ``size`` to ``target`` (height, width) takes them.

    A length stays the same share of the longer side.
    """
    height, width = size
    fractions = (row.joints[:, :2] + 0.5) / (width, height)  # pixel i has its centre at i
    outside = (row.joints[:, 2] > 0) & ~((fractions >= 0) & (fractions < 1)).all(1)
    if outside.any():
        joint = int(outside.argmax())
        x, y = row.joints[joint, :2]
        raise BadData(
            "keypoints_outside",
            f"{row.place}: the joint {names[joint]!r} at x {x:g}, y {y:g} lies outside its image, which is "
            f"{height}×{width} (height×width); give pixels from 0, and empty cells for a joint that is not there.",
        )
    if target is None:
        return row.joints, row.length
    joints = row.joints.copy()
    joints[:, :2] = (fractions * target[::-1] - 0.5) * joints[:, 2:]
    return joints, None if row.length is None else row.length * max(target) / max(size)
