"""What is wrong with the numbers themselves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search.data import Data
from search.errors import BadData

Read = Callable[..., Data]
Arrays = dict[str, np.ndarray[Any, Any]]
Write = Callable[[Arrays], Path]

X = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32)
Y = np.arange(40) % 4


def spoiled(array: np.ndarray[Any, Any], row: int, value: float) -> np.ndarray[Any, Any]:
    copy = array.astype(np.float32)
    copy[row] = value
    return copy


@pytest.mark.parametrize(
    ("arrays", "task", "code", "says"),
    [
        ({"x": spoiled(X, 17, np.nan), "y": Y}, "classification", "non_finite_data", "row 17"),
        ({"x": spoiled(X, 3, np.inf), "y": Y}, "classification", "non_finite_data", "row 3"),
        ({"x": spoiled(X, 3, np.inf)}, "fidelity", "non_finite_data", "row 3"),
        ({"x": X, "y": spoiled(Y, 5, np.nan)}, "regression", "non_finite_data", "row 5"),
        ({"x": X, "y": spoiled(Y, 5, np.nan)}, "classification", "non_finite_data", "row 5"),
        ({"x": X, "y": spoiled(Y, 6, 1.5)}, "classification", "labels_not_integers", "1.5 in row 6"),
        ({"x": X, "y": spoiled(Y, 6, -1)}, "classification", "labels_out_of_range", "-1"),
        ({"x": X, "y": np.eye(4)[Y]}, "classification", "labels_shape", "argmax"),
        ({"x": X, "y": Y[:30]}, "classification", "rows_differ", "'y': 30"),
        ({"x": X}, "classification", "labels_missing", "fidelity"),
        ({"x_train": X, "y_train": Y, "x_val": X}, "classification", "labels_missing", "y_val"),
        ({"x_train": X, "y_train": Y, "x_val": X[:, :4], "y_val": Y}, "classification", "shapes_differ", "(4,)"),
        ({"inputs.a": X, "inputs.b": X[:20], "y": Y}, "classification", "rows_differ", "'b': 20"),
        ({"inputs.a_train": X, "inputs.b_val": X}, "fidelity", "missing_array", "same inputs"),
    ],
)
def test_bad_values_are_refused_with_where_and_what_to_do(
    read: Read, npz: Write, arrays: Arrays, task: str, code: str, says: str
) -> None:
    with pytest.raises(BadData) as caught:
        read(npz(arrays), task=task)
    assert caught.value.code == code
    assert says in caught.value.message


def test_values_whose_sum_overflows_are_finite(read: Read, npz: Write) -> None:
    data = read(npz({"x": np.full((40, 5), 1.7e308), "y": Y}), transform={"scale": 1e-300})
    assert data.info.splits.train == 32


def test_whole_numbers_of_any_dtype_and_a_column_of_labels_are_taken(read: Read, npz: Write) -> None:
    for labels in (Y.astype(np.float64), Y.astype(np.uint8), Y[:, None], (Y % 2).astype(bool)):
        data = read(npz({"x": X, "y": labels}))
        targets = torch.cat([*data.train.targets()])
        assert (targets.dtype, targets.shape) == (torch.int64, (32,))
        assert data.info.classes == int(labels.max()) + 1


def test_regression_targets_keep_their_shape_as_float32(read: Read, npz: Write) -> None:
    data = read(npz({"x": X, "y": X[:, :3].astype(np.float64)}), task="regression")
    _, target = next(data.train.batches(8))
    assert target is not None
    assert (target.dtype, target.shape) == (torch.float32, (8, 3))
    assert data.info.target is not None
    assert data.info.target.shape == (None, 3)


def test_fidelity_needs_no_labels_and_ignores_those_there_are(read: Read, npz: Write) -> None:
    for arrays in ({"x": X}, {"x": X, "y": np.full(40, -7)}):
        data = read(npz(arrays), task="fidelity")
        assert next(data.verify.batches(4))[1] is None
        assert not [*data.train.targets()]
        assert data.info.target is None
