"""A zip or tar of class folders: ``[train|val|test/]class/image``, labels in the alphabetical order of the classes;
of images with masks or joints, see ``masks`` and ``joint_tables``."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from search.data.archives import list_files, read_files
from search.data.images import Encoded, decode, is_image_name
from search.data.joint_tables import read_joints
from search.data.masks import read_masks
from search.data.raw import Raw, Rows
from search.errors import BadData
from search.spec import DataSpec, Task

__all__ = ["SPLIT_FOLDERS", "read_folders"]

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


def read_folders(path: Path, spec: DataSpec, scratch: Path) -> Raw:
    """Decode the archive's images into ``scratch``. Without class folders only the fidelity task can use them.

    Raises BadData when there are no images, or no classes where labels are needed.
    """
    names = list_files(path)
    images = [name for name in names if is_image_name(name)]
    if not images:
        raise BadData(
            "no_images",
            f"the archive holds {len(names)} files and no image among them (PNG, JPEG, WebP, BMP, GIF); "
            "pack folders of images, one for each class.",
        )
    if spec.task is Task.SEGMENTATION:
        return read_masks(path, images, SPLIT_FOLDERS, spec, scratch)
    if spec.task is Task.KEYPOINTS:
        return read_joints(path, names, images, SPLIT_FOLDERS, spec, scratch)
    if spec.task not in (Task.CLASSIFICATION, Task.FIDELITY):
        raise BadData(
            "labels_missing",
            f"image folders carry classes, no targets for {spec.task.value}; use .npz or .safetensors arrays.",
        )
    places = _places(images)
    classes = sorted({place[1] for place in places.values() if place[1]})
    if spec.task is Task.CLASSIFICATION and any(not label for _, label in places.values()):
        stray = next(name for name, (_, label) in places.items() if not label)
        raise BadData(
            "labels_missing",
            f"{stray!r} lies in no class folder; pack class/image (or train/class/image), or set task to fidelity.",
        )
    number = {label: i for i, label in enumerate(classes)}
    labels: dict[str, list[int]] = {}
    for split, label in places.values():
        labels.setdefault(split, []).append(number.get(label, 0))
    arrays = decode({split: partial(_files, path, places, split) for split in labels}, spec.transform, scratch)
    labelled = spec.task is Task.CLASSIFICATION
    splits = {
        split: Rows({"x": array}, np.asarray(labels[split]) if labelled else None) for split, array in arrays.items()
    }
    return Raw("images", splits, True, tuple(classes) if labelled else (), _notes(len(names) - len(images), classes))


def _files(path: Path, places: dict[str, tuple[str, str]], split: str) -> Iterable[Encoded]:
    return read_files(path, lambda name: name in places and places[name][0] == split)


def _places(images: list[str]) -> dict[str, tuple[str, str]]:
    """Each image's split and class ("" without one), below any folders that hold everything."""
    parts = {name: [part for part in name.split("/") if part not in ("", ".")] for name in images}
    depth = 0
    while True:
        tops = {folders[depth] if depth < len(folders) - 1 else "" for folders in parts.values()}
        holds_all = len(tops) == 1 and next(iter(tops)).lower() not in SPLIT_FOLDERS
        if not holds_all or any(len(folders) <= depth + 2 for folders in parts.values()):
            break
        depth += 1
    split_folders = all(top.lower() in SPLIT_FOLDERS for top in tops)
    places = {}
    for name, folders in parts.items():
        split = SPLIT_FOLDERS[folders[depth].lower()] if split_folders else "train"
        below = folders[depth + split_folders : -1]
        places[name] = (split, below[0] if below else "")
    return places


def _notes(passed_over: int, classes: list[str]) -> tuple[str, ...]:
    notes = []
    if classes:
        listed = ", ".join(f"{i}={label}" for i, label in enumerate(classes[:20]))
        notes.append(f"labels in alphabetical order of the folders: {listed}{', …' if len(classes) > 20 else ''}")
    if passed_over:
        notes.append(f"{passed_over} files that are no images were passed over")
    return tuple(notes)
