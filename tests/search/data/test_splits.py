"""Train, select, verify."""

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

IDS = np.arange(1000, dtype=np.float32)[:, None]
"""Inputs that say which row they are."""
LABELS = np.repeat(np.arange(10), 100)
"""Sorted by class, as files often are."""


def rows(data: Data) -> dict[str, list[int]]:
    return {name: getattr(data, name).inputs[0][:, 0].astype(int).tolist() for name in ("train", "select", "verify")}


def sizes(data: Data) -> tuple[int, int, int]:
    return data.info.splits.train, data.info.splits.select, data.info.splits.verify


def test_given_splits_are_taken_as_they_are(read: Read, npz: Write) -> None:
    path = npz(
        {
            **{"x_train": IDS[:700], "y_train": LABELS[:700], "x_val": IDS[700:900], "y_val": LABELS[700:900]},
            **{"x_test": IDS[900:], "y_test": LABELS[900:]},
        }
    )
    assert rows(read(path)) == {
        "train": list(range(700)),
        "select": list(range(700, 900)),
        "verify": list(range(900, 1000)),
    }


def test_without_a_test_split_validation_is_halved(read: Read, npz: Write) -> None:
    path = npz({"x_train": IDS[:50], "y_train": LABELS[:50], "x_val": IDS, "y_val": LABELS})
    found = rows(read(path))
    assert found["train"] == list(range(50))
    assert sorted(found["select"] + found["verify"]) == list(range(1000))
    assert len(found["select"]) == 500


def test_without_validation_a_share_of_train_is_held_out_and_test_verifies(read: Read, npz: Write) -> None:
    path = npz({"x_train": IDS, "y_train": LABELS, "x_test": IDS[:30] + 5000, "y_test": LABELS[:30]})
    data = read(path, validation=0.1)
    found = rows(data)
    assert sizes(data) == (900, 100, 30)
    assert sorted(found["train"] + found["select"]) == list(range(1000))
    assert min(found["verify"]) >= 5000


def test_without_validation_half_of_test_chooses_for_the_training_rows_were_seen(read: Read, npz: Write) -> None:
    path = npz({"x_train": IDS[:700], "y_train": LABELS[:700], "x_test": IDS[700:], "y_test": LABELS[700:]})
    data = read(path)
    found = rows(data)
    assert sizes(data) == (700, 150, 150)
    assert found["train"] == list(range(700))
    assert sorted(found["select"] + found["verify"]) == list(range(700, 1000))


def test_one_array_is_split_by_the_fractions_and_never_overlaps(read: Read, npz: Write) -> None:
    path = npz({"x": IDS, "y": LABELS})
    for fields, expected in (
        ({"validation": 0.2}, (800, 100, 100)),
        ({"validation": 0.2, "test": 0.1}, (700, 200, 100)),
        ({"validation": 0.1, "test": 0.5}, (400, 100, 500)),
    ):
        data = read(path, **fields)
        found = rows(data)
        assert sizes(data) == expected
        assert sorted(found["train"] + found["select"] + found["verify"]) == list(range(1000))


def test_held_out_rows_are_stratified_and_follow_the_seed(read: Read, npz: Write) -> None:
    path = npz({"x": IDS, "y": LABELS})
    data = read(path, validation=0.2)
    for split, each in ((data.select, 10), (data.verify, 10), (data.train, 80)):
        assert np.bincount(torch.cat([*split.targets()])).tolist() == [each] * 10
    assert rows(read(path, validation=0.2)) == rows(data)
    assert rows(read(path, validation=0.2, seed=1)) != rows(data)


def test_targets_follow_their_rows(read: Read, npz: Write) -> None:
    data = read(npz({"x": IDS, "y": LABELS}))
    for split in (data.train, data.select, data.verify):
        np.testing.assert_array_equal(torch.cat([*split.targets()]), split.inputs[0][:, 0].astype(int) // 100)


@pytest.mark.parametrize(
    ("arrays", "code"),
    [
        ({"x_train": IDS, "y_train": LABELS, "x_val": IDS[:0], "y_val": LABELS[:0]}, "empty_split"),
        ({"x_train": IDS[:0], "y_train": LABELS[:0]}, "empty_split"),
        ({"x_val": IDS, "y_val": LABELS}, "empty_split"),
        ({"x": IDS[:6], "y": LABELS[:6]}, "too_few_rows"),
        ({"x_train": IDS[:50], "y_train": LABELS[:50], "x_val": IDS[:3], "y_val": LABELS[:3]}, "too_few_rows"),
    ],
)
def test_empty_and_tiny_splits_are_refused(read: Read, npz: Write, arrays: Arrays, code: str) -> None:
    with pytest.raises(BadData) as caught:
        read(npz(arrays))
    assert caught.value.code == code
