"""What every upload must satisfy, whatever its format: agreeing shapes, finite values, whole labels."""

from dataclasses import replace

import numpy as np

from search.data.class_maps import checked_maps, largest_class
from search.data.joints import checked_joints
from search.data.raw import Array, Raw, Rows, in_blocks
from search.errors import BadData
from search.spec import Task

__all__ = ["checked", "count_classes"]

MAX_LABEL = 1 << 24
"""No network here has that many outputs; floats count exactly up to it."""


def checked(raw: Raw, task: Task) -> Raw:
    """``raw`` with targets in the task's form (labels 1-D whole numbers, class maps, joints of three numbers; none for
    fidelity). Raises BadData."""
    splits = {name: _checked_split(name, rows, task) for name, rows in raw.splits.items()}
    first_name, first = next(iter(splits.items()))
    for name, rows in splits.items():
        if rows.inputs.keys() != first.inputs.keys():
            raise BadData(
                "missing_array",
                f"{first_name} has the inputs {sorted(first.inputs)} and {name} has {sorted(rows.inputs)}; "
                "give every split the same inputs.",
            )
        for key, array in rows.inputs.items():
            _same_sample(f"input {key}", first_name, first.inputs[key], name, array)
        if rows.target is not None and first.target is not None:
            _same_sample("target y", first_name, first.target, name, rows.target)
        if (rows.length is None) != (first.length is None):
            raise BadData(
                "missing_array", f"only one of {first_name} and {name} has the array length; give it for every split."
            )
    unused = task is not Task.KEYPOINTS and any(rows.length is not None for rows in raw.splits.values())
    notes = ("length is not used: only keypoints have lengths",) if unused else ()
    return replace(raw, splits=splits, notes=(*raw.notes, *notes))


def _checked_split(name: str, rows: Rows, task: Task) -> Rows:
    target = None if task is Task.FIDELITY else rows.target
    if task is not Task.FIDELITY and target is None:
        raise BadData(
            "labels_missing",
            f"the {name} split has no targets y, which {task.value} needs; add y_{name}, or set task to fidelity.",
        )
    counts = {key: len(array) for key, array in rows.inputs.items()}
    if target is not None:
        counts["y"] = len(target)
    if len(set(counts.values())) > 1:
        raise BadData("rows_differ", f"the {name} split has {counts} rows; x and y need one row for each sample.")
    for key, array in rows.inputs.items():
        _check_finite(f"{name} input {key}", array)
    if task is Task.KEYPOINTS:
        return checked_joints(name, rows)
    if target is not None:
        if task is Task.CLASSIFICATION:
            target = _labels(name, target)
        else:
            _check_finite(f"{name} y", target)
        if task is Task.SEGMENTATION:
            target = checked_maps(name, target)
    return Rows(rows.inputs, target)


def _check_finite(what: str, array: Array) -> None:
    if array.dtype.kind != "f" or not array.size:
        return
    for start, block in in_blocks(array):
        # a sum is finite unless a value is not (or it overflows, which the second look sorts out)
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(block.sum(dtype=np.float64)):
                continue
        bad = ~np.isfinite(block.reshape(len(block), -1)).all(axis=1)
        if bad.any():
            row = start + int(np.argmax(bad))
            raise BadData(
                "non_finite_data",
                f"{what} holds NaN or infinity, first in row {row}; clean it, for example with numpy.nan_to_num, "
                "and upload again.",
            )


def _labels(name: str, target: Array) -> Array:
    """1-D int64 labels from whole numbers of any dtype."""
    if target.ndim == 2 and target.shape[1] == 1:
        target = target[:, 0]
    if target.ndim != 1:
        advice = "take numpy.argmax(y, axis=1)" if target.ndim == 2 else "give one label for each sample"
        raise BadData("labels_shape", f"y of the {name} split has shape {target.shape}; {advice}.")
    _check_finite(f"{name} y", target)
    if target.dtype.kind == "f" and not np.array_equal(target, np.trunc(target)):
        row = int(np.argmax(target != np.trunc(target)))
        raise BadData(
            "labels_not_integers",
            f"y of the {name} split holds {target[row]} in row {row}; labels are whole numbers from 0, "
            "or set task to regression.",
        )
    if target.size and (target.min() < 0 or target.max() >= MAX_LABEL):
        bad = target.min() if target.min() < 0 else target.max()
        raise BadData(
            "labels_out_of_range",
            f"y of the {name} split holds the label {bad}; labels count from 0 to the number of classes less one.",
        )
    return target.astype(np.int64)


def _same_sample(what: str, first_name: str, first: Array, name: str, array: Array) -> None:
    if array.shape[1:] != first.shape[1:] or array.dtype.kind != first.dtype.kind:
        raise BadData(
            "shapes_differ",
            f"{what} is {first.dtype} {first.shape[1:]} a row in {first_name} but {array.dtype} {array.shape[1:]} "
            f"in {name}; store every split alike.",
        )


def count_classes(raw: Raw, task: Task) -> int | None:
    """Classes by name, or one more than the largest label; None for tasks without classes."""
    if task not in (Task.CLASSIFICATION, Task.SEGMENTATION):
        return None
    if raw.classes:
        return len(raw.classes)
    targets = [rows.target for rows in raw.splits.values() if rows.target is not None and rows.target.size]
    tops = [largest_class(t) if task is Task.SEGMENTATION else int(t.max()) for t in targets]
    return max((top for top in tops if top is not None), default=-1) + 1 or None
