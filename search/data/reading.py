"""An uploaded data file, whatever its format, as the three splits of the search."""

import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from search.data.archives import is_tar, list_files
from search.data.arrays import read_npz, read_safetensors
from search.data.checks import checked, count_classes
from search.data.class_maps import check_movable, moved_maps
from search.data.folders import read_folders
from search.data.joints import moved_joints, placed
from search.data.raw import Array, Raw
from search.data.split import Data, Split
from search.data.splits import Part, three_parts
from search.data.tables import read_parquet
from search.data.transform import Moves, Pipeline, pipeline
from search.errors import BadData
from search.spec import Augmentation, DataInfo, DataSpec, SplitSizes, Task, TensorInfo

__all__ = ["read_data"]

PARTS = ("train", "select", "verify")
MoveTarget = Callable[[Tensor, Moves], Tensor]


def read_data(path: Path, spec: DataSpec, *, scratch: Path) -> Data:
    """Read ``path`` as ``spec`` declares. What has to be unpacked or decoded goes to files in ``scratch``, which must
    live as long as the data.

    Raises BadData with a stable code: the file cannot be read safely, or its content cannot be used.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        raw = checked(_read(path, spec, scratch), spec.task)
    except MemoryError as error:
        raise BadData(
            "data_too_large", "reading the data ran out of memory; upload less, or give the worker more."
        ) from error
    first = next(iter(raw.splits.values())).inputs
    pipelines = {
        name: pipeline(name, array, spec.transform, images=raw.images, only=len(first) == 1)
        for name, array in first.items()
    }
    located, move_target = _located(raw, spec, pipelines)
    parts = three_parts(located, spec)
    splits = {name: _split(parts[name], pipelines, spec.task, move_target) for name in PARTS}
    return Data(**splits, info=_info(raw, located.notes, spec, splits, pipelines), task=spec.task)


def _read(path: Path, spec: DataSpec, scratch: Path) -> Raw:
    if path.stat().st_size == 0:
        raise BadData("not_a_data_file", "the file is empty; upload it again.")
    match _sniffed(path) if spec.format == "auto" else spec.format:
        case "npz":
            return read_npz(path, spec.columns, scratch)
        case "safetensors":
            return read_safetensors(path, spec.columns, scratch)
        case "parquet":
            return read_parquet(path, spec, scratch)
        case "images":
            return read_folders(path, spec, scratch)
    raise BadData(
        "not_a_data_file",
        "the file is none of .npz, .safetensors, .parquet, or a zip or tar of image folders or Parquet shards; "
        "convert it, numpy.savez is the shortest way.",
    )


def _sniffed(path: Path) -> str | None:
    """The format by content; the name is the uploader's word only."""
    with path.open("rb") as file:
        head = file.read(9)
    if head[:4] == b"PAR1":
        return "parquet"
    if head[8:] == b"{":
        return "safetensors"
    if not zipfile.is_zipfile(path) and not is_tar(path):
        return None
    endings = {PurePosixPath(name).suffix.lower() for name in list_files(path)}
    if ".parquet" in endings:
        return "parquet"
    return "npz" if endings == {".npy"} else "images"


def _located(raw: Raw, spec: DataSpec, pipelines: Mapping[str, Pipeline]) -> tuple[Raw, MoveTarget | None]:
    """``raw`` with the targets that lie in images related to them, and what augmentation does to such targets."""
    augments = spec.transform.augment is not Augmentation.NONE
    if spec.task is not Task.KEYPOINTS and not (spec.task is Task.SEGMENTATION and augments):
        return raw, None
    shapes = {name: apply.shape for name, apply in pipelines.items()}
    images = {name: shape for name, shape in shapes.items() if len(shape) == 3}
    if len(images) != 1:
        raise BadData(
            "images_needed",
            f"{spec.task.value}{' with augmentation' if augments else ''} needs one input of images that the targets "
            f"lie in, but one sample is {shapes}; store images as (rows, channels, height, width), or set layout to "
            "nhwc.",
        )
    image = next(iter(images.values()))
    if spec.task is Task.SEGMENTATION:
        check_movable(raw, image)
        return raw, moved_maps
    return placed(raw, spec, image), partial(moved_joints, image=image, mirror=spec.mirror or ())


def _split(part: Part, pipelines: Mapping[str, Pipeline], task: Task, move_target: MoveTarget | None) -> Split:
    rows, chosen = part
    kind = torch.int64 if task in (Task.CLASSIFICATION, Task.SEGMENTATION) else torch.float32
    stored = tuple(rows.inputs[name] for name in pipelines)
    return Split(stored, rows.target, chosen, tuple(pipelines.values()), kind, move_target)


def _info(
    raw: Raw, notes: tuple[str, ...], spec: DataSpec, splits: Mapping[str, Split], pipelines: Mapping[str, Pipeline]
) -> DataInfo:
    inputs = tuple(
        TensorInfo(name=name, dtype=_name(apply.dtype), shape=(None, *apply.shape)) for name, apply in pipelines.items()
    )
    stored = raw.splits["train"].target
    target = None
    if stored is not None:
        target = TensorInfo(name="y", dtype=_name(splits["train"].target_dtype), shape=(None, *stored.shape[1:]))
    return DataInfo(
        format=raw.format,
        task=spec.task,
        inputs=inputs,
        target=target,
        classes=count_classes(raw, spec.task),
        splits=SplitSizes(**{name: len(splits[name]) for name in PARTS}),
        notes=(*notes, *_advice(raw, spec, splits)),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _advice(raw: Raw, spec: DataSpec, splits: Mapping[str, Split]) -> list[str]:
    notes = []
    rows = len(splits["verify"])
    if spec.task is Task.CLASSIFICATION and rows < 1000:
        notes.append(f"verify has {rows} rows: one of them is {100 / rows:.2g} points of accuracy")
    bytes_in: list[Array] = [array for array in splits["train"].stored if array.dtype == np.uint8]
    if bytes_in and spec.transform.scale == 1.0 and not spec.transform.std:
        notes.append("bytes are given to the network as 0 to 255 (scale 1): declare the scaling it was trained with")
    return notes
