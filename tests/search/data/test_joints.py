"""Keypoints' targets: joints in pixels of their image."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from search.data import Data, check_fit
from search.errors import BadData
from search.spec import DataSpec, ModelInfo, TensorInfo

Read = Callable[..., Data]
Array = np.ndarray[Any, Any]
Write = Callable[[dict[str, Array]], Path]
Model = Callable[..., ModelInfo]

HEIGHT, WIDTH = 24, 32
IMAGE = ("image", "float32", (None, 1, HEIGHT, WIDTH))
RANDOM = np.random.default_rng(0)
JOINTS = RANDOM.integers((8, 8), (WIDTH - 8, HEIGHT - 8), (40, 3, 2)).astype(np.float64)
"""Three joints, far enough from the edges to stay inside when the image moves."""


def pictures(joints: Array = JOINTS) -> Array:
    """Joint j is the one pixel of value j + 1."""
    images = np.zeros((len(joints), 1, HEIGHT, WIDTH), np.uint8)
    for j in reversed(range(joints.shape[1])):
        x, y = joints[:, j, :2].astype(int).T
        images[np.arange(len(joints)), 0, y.clip(0, HEIGHT - 1), x.clip(0, WIDTH - 1)] = j + 1
    return images


def first(data: Data, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    (images,), joints = next(data.train.batches(len(data.train), **how))
    assert joints is not None
    return images, joints


def changed(value: float, row: int = 7, joint: int = 1, joints: Array = JOINTS) -> Array:
    copy = joints.copy()
    copy[row, joint, 0] = value
    return copy


def unlabelled(joints: Array = JOINTS) -> Array:
    """The second joint of every row is not there, whatever its coordinates say."""
    third = np.ones((len(joints), joints.shape[1], 1))
    third[:, 1] = 0
    out = np.concatenate([joints, third], -1)
    out[:, 1, :2] = np.nan
    return out


def test_joints_become_fractions_of_the_image(read: Read, npz: Write) -> None:
    data = read(npz({"x": pictures(), "y": JOINTS}), task="keypoints")
    joints = torch.cat([*data.select.targets(), *data.verify.targets(), *data.train.targets()]).numpy()
    assert joints.shape == (40, 3, 4)
    pixels = np.sort((joints[..., :2] * (WIDTH, HEIGHT) - 0.5).reshape(-1, 2), 0)
    np.testing.assert_allclose(pixels, np.sort(JOINTS.reshape(-1, 2), 0), atol=1e-4)
    assert (joints[..., 2] == 1).all()
    np.testing.assert_allclose(joints[..., 3], 0.05)
    assert data.info.target is not None
    assert data.info.target.shape == (None, 3, 3)
    assert data.info.classes is None


def test_lengths_and_the_threshold_give_what_counts_as_found(read: Read, npz: Write) -> None:
    lengths = np.linspace(4, 12, 40)
    path = npz({"x": pictures(), "y": JOINTS, "length": lengths})
    for fields, share in (({}, 0.5), ({"pck_threshold": 0.2}, 0.2)):
        data = read(path, task="keypoints", **fields)
        found = torch.cat([*data.train.targets(), *data.select.targets(), *data.verify.targets()])[:, :, 3]
        np.testing.assert_allclose(np.sort(found[:, 0]), share * lengths / WIDTH, rtol=1e-6)
        assert (found == found[:, :1]).all()
    data = read(npz({"x": pictures(), "y": JOINTS}), task="keypoints", pck_threshold=0.1)
    assert first(data)[1][0, 0, 3] == pytest.approx(0.1)


def test_a_column_may_be_named_the_length(read: Read, npz: Write) -> None:
    path = npz({"x": pictures(), "y": JOINTS, "heads": np.full(40, 8.0)})
    data = read(path, task="keypoints", columns={"length": "heads"})
    assert first(data)[1][0, 0, 3] == pytest.approx(4 / WIDTH)


def test_a_joint_that_is_not_labelled_or_outside_does_not_count(read: Read, npz: Write) -> None:
    data = read(npz({"x": pictures(), "y": unlabelled()}), task="keypoints")
    joints = first(data)[1]
    assert torch.isfinite(joints).all()
    assert joints[..., 2].mean(0).tolist() == [1, 0, 1]
    data = read(npz({"x": pictures(), "y": changed(WIDTH + 3.0)}), task="keypoints")
    assert any("1 of 120 train joints lie outside" in note for note in data.info.notes)


@pytest.mark.parametrize(
    ("arrays", "code", "says"),
    [
        ({"y": JOINTS[..., :1]}, "keypoints_shape", "(40, 3, 1)"),
        ({"y": JOINTS[:, 0]}, "keypoints_shape", "(rows, joints, 2)"),
        ({"y": JOINTS[:, :0]}, "keypoints_shape", "(40, 0, 2)"),
        ({"y": np.zeros((40, 3, 8, 8))}, "keypoints_shape", "draws heatmaps itself"),
        ({"y": changed(np.nan)}, "non_finite_data", "row 7"),
        ({"y": changed(np.inf, 3)}, "non_finite_data", "third number, 0"),
        ({"y": JOINTS / (WIDTH, HEIGHT)}, "keypoints_not_pixels", "multiply x by the width"),
        ({"y": JOINTS + 100}, "keypoints_outside", "24×32"),
        ({"y": np.concatenate([JOINTS, np.zeros((40, 3, 1))], -1)}, "nothing_counts", "no joint"),
        ({"y": JOINTS, "length": np.zeros(40)}, "keypoints_length", "0.0"),
        ({"y": JOINTS, "length": np.ones((40, 2))}, "keypoints_length", "(40, 2)"),
        ({"y": JOINTS, "length": np.full(40, np.nan)}, "keypoints_length", "nan"),
        ({"y": JOINTS[:30]}, "rows_differ", "'y': 30"),
        ({}, "labels_missing", "keypoints"),
    ],
)
def test_bad_joints_are_refused_with_where_and_what_to_do(
    read: Read, npz: Write, arrays: dict[str, Array], code: str, says: str
) -> None:
    with pytest.raises(BadData) as caught:
        read(npz({"x": pictures(), **arrays}), task="keypoints")
    assert caught.value.code == code
    assert says in caught.value.message


def test_lengths_of_one_split_only_are_refused(read: Read, npz: Write) -> None:
    arrays = {"x_train": pictures(), "y_train": JOINTS, "x_val": pictures(), "y_val": JOINTS}
    with pytest.raises(BadData, match="only one of train and val has the array length"):
        read(npz({**arrays, "length_val": np.full(40, 8.0)}), task="keypoints")


def test_other_tasks_say_that_they_do_not_use_lengths(read: Read, npz: Write) -> None:
    data = read(npz({"x": pictures(), "length": np.full(40, 8.0)}), task="fidelity")
    assert any("length is not used" in note for note in data.info.notes)


def test_joints_need_an_image_that_they_lie_in(read: Read, npz: Write) -> None:
    with pytest.raises(BadData, match="needs one input of images") as caught:
        read(npz({"x": np.ones((40, 5), np.float32), "y": JOINTS}), task="keypoints")
    assert caught.value.code == "images_needed"


@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
def test_joints_move_with_their_image(read: Read, npz: Write, augment: str) -> None:
    """Joints 0 and 2 change places where the image was mirrored: their pixels keep their values."""
    apart = JOINTS.copy()
    apart[:, :, 0] = RANDOM.permuted(np.tile(np.arange(8, WIDTH - 8), (40, 1)), axis=1)[:, :3]  # no two on one pixel
    mirror = [[0, 2]] if augment == "crop_flip" else None
    data = read(
        npz({"x": pictures(apart), "y": apart}), task="keypoints", mirror=mirror, transform={"augment": augment}
    )
    plain, before = first(data, shuffle=3)
    images, joints = first(data, shuffle=3, augment=True)
    assert not torch.equal(plain, images)
    x, y = (joints[..., 0] * WIDTH - 0.5).round().long(), (joints[..., 1] * HEIGHT - 0.5).round().long()
    assert (joints[..., 2] == 1).all()
    values = images[torch.arange(len(images))[:, None], 0, y, x].long()
    swapped = values[:, 0] == 3
    assert torch.equal(values[~swapped], torch.tensor([1, 2, 3]).expand(int((~swapped).sum()), 3))
    assert torch.equal(values[swapped], torch.tensor([3, 2, 1]).expand(int(swapped.sum()), 3))
    assert (8 < swapped.sum() < 24) if augment == "crop_flip" else not swapped.any()
    assert torch.equal(joints[..., 3], before[..., 3])


def test_a_joint_that_a_crop_moves_out_does_not_count(read: Read, npz: Write) -> None:
    edge = JOINTS.copy()
    edge[:, 0] = 0
    data = read(npz({"x": pictures(edge), "y": edge}), task="keypoints", transform={"augment": "crop"})
    joints = first(data, shuffle=1, augment=True)[1]
    inside = ((joints[..., :2] >= 0) & (joints[..., :2] < 1)).all(-1)
    assert torch.equal(joints[..., 2] == 1, inside)
    assert 0 < inside[:, 0].sum() < len(inside)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"task": "keypoints", "transform": {"augment": "crop_flip"}}, "swaps left and right"),
        ({"task": "keypoints", "mirror": [[0, 1], [1, 2]]}, "names a joint twice"),
        ({"task": "keypoints", "mirror": [[0, -1]]}, "greater than or equal to 0"),
        ({"task": "keypoints", "pck_threshold": 0}, "greater than 0"),
        ({"task": "classification", "pck_threshold": 0.5}, "pck_threshold is for the task keypoints"),
        ({"task": "segmentation", "mirror": []}, "mirror is for the task keypoints, but the task is segmentation"),
    ],
)
def test_options_that_contradict_each_other_are_refused_before_any_upload_is_read(
    fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValidationError, match=says):
        DataSpec.model_validate(fields)


def test_a_mirrored_joint_that_is_not_there_is_named(read: Read, npz: Write) -> None:
    with pytest.raises(BadData, match="mirror names joint 3, but y has 3 joints"):
        read(npz({"x": pictures(), "y": JOINTS}), task="keypoints", mirror=[[0, 3]])


def test_the_last_of_several_outputs_must_have_a_heatmap_for_each_joint(read: Read, npz: Write, model: Model) -> None:
    data = read(npz({"x": pictures(), "y": JOINTS}), task="keypoints")
    stacked = model([IMAGE], (None, 5, 6, 8))
    last = TensorInfo(name="output_1", dtype="float32", shape=(None, 3, 6, 8))
    check_fit(data, stacked.model_copy(update={"outputs": (*stacked.outputs, last)}))
    with pytest.raises(BadData, match=r"y has 3 joints, .* last output is \(any, 5, 6, 8\)") as caught:
        check_fit(data, stacked)
    assert caught.value.code == "wrong_target"
    with pytest.raises(BadData, match=r"last output is \(any, 6\)"):
        check_fit(data, model([IMAGE], (None, 6)))
