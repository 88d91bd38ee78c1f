"""Segmentation's targets: a class for each pixel."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from search.data import Data, check_fit
from search.errors import BadData
from search.spec import ModelInfo

Read = Callable[..., Data]
Arrays = dict[str, np.ndarray[Any, Any]]
Write = Callable[[Arrays], Path]
Model = Callable[..., ModelInfo]

IMAGE = ("image", "float32", (None, 1, 16, 16))
RANDOM = np.random.default_rng(0)
X = RANDOM.integers(1, 200, (40, 1, 16, 16), dtype=np.uint8)
Y = (X[:, 0] // 50).astype(np.uint8)
"""Four classes that follow from the image, so that a map in the wrong place shows."""


def with_value(value: float, dtype: type = np.int64) -> np.ndarray[Any, Any]:
    maps = Y.astype(dtype)
    maps[7, 2, 3] = value
    return maps


def test_maps_are_read_as_they_are_and_counted_without_the_ignored(read: Read, npz: Write) -> None:
    data = read(npz({"x": X, "y": with_value(255, np.uint8)}), task="segmentation")
    assert data.info.classes == 4
    assert data.info.target is not None
    assert (data.info.target.dtype, data.info.target.shape) == ("int64", (None, 16, 16))
    (images,), maps = next(data.train.batches(40))
    assert maps is not None
    counts = maps != 255
    np.testing.assert_array_equal(maps[counts], (images[:, 0] // 50)[counts])
    assert (~counts).sum() <= 1


@pytest.mark.parametrize(
    "maps", [Y[:, None], Y[..., None], Y.astype(np.float32), Y.astype(np.int16), with_value(255, np.int32)]
)
def test_whole_numbers_of_any_dtype_with_or_without_a_channel_are_taken(
    read: Read, npz: Write, maps: np.ndarray[Any, Any]
) -> None:
    data = read(npz({"x": X, "y": maps}), task="segmentation")
    assert data.info.classes == 4
    assert torch.cat([*data.train.targets()]).shape == (32, 16, 16)


@pytest.mark.parametrize(
    ("maps", "code", "says"),
    [
        (with_value(-1), "labels_out_of_range", "holds -1 in row 7 at (2, 3)"),
        (with_value(256), "labels_out_of_range", "255 marks pixels"),
        (with_value(0.5, np.float32), "labels_out_of_range", "0.5 in row 7"),
        (with_value(np.nan, np.float32), "non_finite_data", "row 7"),
        (np.eye(4)[Y].transpose(0, 3, 1, 2), "labels_shape", "argmax"),
        (Y[:, 0], "labels_shape", "one class for each pixel"),
        (np.full_like(Y, 255), "nothing_counts", "all are 255"),
        (Y[:, :0], "nothing_counts", "there is none"),
        (Y[:30], "rows_differ", "'y': 30"),
    ],
)
def test_bad_maps_are_refused_with_where_and_what_to_do(
    read: Read, npz: Write, maps: np.ndarray[Any, Any], code: str, says: str
) -> None:
    with pytest.raises(BadData) as caught:
        read(npz({"x": X, "y": maps}), task="segmentation")
    assert caught.value.code == code
    assert says in caught.value.message


@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
def test_a_map_moves_with_its_image_and_what_comes_in_does_not_count(read: Read, npz: Write, augment: str) -> None:
    data = read(npz({"x": X, "y": Y}), task="segmentation", transform={"augment": augment})
    (plain,), _ = next(data.train.batches(32, shuffle=3))
    (images,), maps = next(data.train.batches(32, shuffle=3, augment=True))
    assert maps is not None
    outside = images[:, 0] == 0  # no stored pixel is 0
    assert outside.any()
    assert torch.equal(maps, torch.where(outside, 255, (images[:, 0] // 50).long()))
    assert not torch.equal(images, plain)


def test_without_augmentation_of_maps_of_another_size(read: Read, npz: Write) -> None:
    path = npz({"x": X, "y": Y[:, ::2, ::2]})
    assert read(path, task="segmentation").info.splits.train == 32
    with pytest.raises(BadData, match=r"the images are \(16, 16\) and the maps \(8, 8\)") as caught:
        read(path, task="segmentation", transform={"augment": "crop"})
    assert caught.value.code == "augment_moves_targets"


def test_augmentation_needs_one_image_that_the_map_is_of(read: Read, npz: Write) -> None:
    path = npz({"inputs.a": X, "inputs.b": X, "y": Y})
    assert len(read(path, task="segmentation").info.inputs) == 2
    with pytest.raises(BadData, match="with augmentation needs one input of images") as caught:
        read(path, task="segmentation", transform={"augment": "crop"})
    assert caught.value.code == "images_needed"


@pytest.mark.parametrize(
    ("output", "code", "says"),
    [
        ((None, 3, 16, 16), "labels_out_of_range", "go up to 3 but the network has 3 outputs"),
        ((None, 4, 8, 8), "wrong_target", "y has maps of (16, 16) but the network's are (8, 8)"),
        ((None, 4), "wrong_target", "(batch, classes, height, width)"),
        ((None, 1, 16, 16), "wrong_target", "two logits"),
        ((None, 300, 16, 16), "wrong_target", "2 to 255 classes"),
    ],
)
def test_maps_that_do_not_fit_the_network_are_refused(
    read: Read, npz: Write, model: Model, output: tuple[int | None, ...], code: str, says: str
) -> None:
    data = read(npz({"x": X, "y": Y}), task="segmentation")
    check_fit(data, model([IMAGE], (None, 5, None, 16)))
    with pytest.raises(BadData) as caught:
        check_fit(data, model([IMAGE], output))
    assert caught.value.code == code
    assert says in caught.value.message


def test_a_network_that_answers_with_a_map_is_told_the_task_when_labels_are_given(
    read: Read, npz: Write, model: Model
) -> None:
    data = read(npz({"x": X, "y": np.arange(40) % 4}))
    with pytest.raises(BadData, match="set task to segmentation"):
        check_fit(data, model([IMAGE], (None, 4, 16, 16)))


@pytest.mark.parametrize("task", ["segmentation", "keypoints"])
def test_formats_with_one_label_for_each_image_are_refused(read: Read, tmp_path: Path, task: str) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [b"x"], "label": [0]}), path)
    with pytest.raises(BadData, match=f"no targets for {task}; use .npz") as caught:
        read(path, task=task)
    assert caught.value.code == "labels_missing"
