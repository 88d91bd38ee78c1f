"""Batches: transform, augmentation, order."""

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


@pytest.fixture
def pictures(npz: Write) -> Path:
    """Sixteen-pixel RGB images without zeros, so that padding shows; a test split of the same."""
    random = np.random.default_rng(0)
    x = random.integers(1, 256, (64, 16, 16, 3), dtype=np.uint8)
    y = np.arange(64) % 8
    return npz({"x_train": x, "y_train": y, "x_val": x[:10], "y_val": y[:10], "x_test": x[:10], "y_test": y[:10]})


def test_the_transform_is_scale_mean_std_then_channels_first(read: Read, pictures: Path) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    data = read(pictures, transform={"scale": 1 / 255, "mean": mean, "std": std, "layout": "nhwc"})
    (batch,), _ = next(data.train.batches(64))
    expected = (data.train.inputs[0] / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(batch, expected.transpose(0, 3, 1, 2), atol=1e-6)
    assert batch.dtype == torch.float32
    assert batch.is_contiguous()
    assert data.info.inputs[0].shape == (None, 3, 16, 16)


def test_one_mean_serves_all_channels_and_a_grey_image_gains_one(read: Read, npz: Write) -> None:
    x = np.arange(20 * 16, dtype=np.uint8).reshape(20, 4, 4)
    data = read(npz({"x": x}), task="fidelity", transform={"mean": (3.0,), "std": (2.0,), "layout": "nhwc"})
    (batch,), _ = next(data.train.batches(2))
    assert batch.shape == (2, 1, 4, 4)
    np.testing.assert_allclose(batch[:, 0], (data.train.inputs[0][:2].astype(float) - 3) / 2)


def test_batches_leave_the_stored_rows_as_they_were(read: Read, npz: Write) -> None:
    x = np.ones((20, 4), np.float32)
    data = read(npz({"x": x}), task="fidelity", transform={"scale": 3.0})
    for (batch,), _ in data.train.batches(4):
        assert torch.equal(batch, torch.full_like(batch, 3))
    assert (data.train.inputs[0] == 1).all()


def test_every_row_comes_once_in_any_order_and_the_seed_decides_it(read: Read, npz: Write) -> None:
    x = np.arange(100, dtype=np.float32)[:, None]
    data = read(npz({"x_train": x, "x_val": x}), task="fidelity")

    def order(**options: Any) -> list[int]:
        return [int(v) for (batch,), _ in data.train.batches(7, **options) for v in batch]

    assert order() == list(range(100))
    assert sorted(order(shuffle=1)) == list(range(100))
    assert order(shuffle=1) == order(shuffle=1) != order(shuffle=2)
    assert order(limit=5) == [0, 20, 40, 60, 80]
    assert order(shuffle=1, limit=9) == order(shuffle=1)[:9]
    assert order(limit=1000) == list(range(100))


@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
def test_augmented_images_are_shifted_crops_of_the_original(read: Read, pictures: Path, augment: str) -> None:
    data = read(pictures, transform={"layout": "nhwc", "augment": augment})
    (plain,), _ = next(data.train.batches(64, shuffle=3))
    (moved,), _ = next(data.train.batches(64, shuffle=3, augment=True))
    shifts, flips = set(), 0
    for before, after in zip(plain.numpy(), moved.numpy(), strict=True):
        padded = np.pad(before, ((0, 0), (2, 2), (2, 2)))
        windows = {(i, j): padded[:, i : i + 16, j : j + 16] for i in range(5) for j in range(5)}
        found = [key for key, window in windows.items() if np.array_equal(window, after)]
        mirrored = [key for key, window in windows.items() if np.array_equal(window[:, :, ::-1], after)]
        assert len(found) + len(mirrored) == 1
        shifts.update(found + mirrored)
        flips += len(mirrored)
    assert len(shifts) > 10
    assert (flips == 0) if augment == "crop" else (16 < flips < 48)
    (again,), _ = next(data.train.batches(64, shuffle=3, augment=True))
    assert torch.equal(moved, again)


def test_augmentation_is_only_for_those_who_ask(read: Read, pictures: Path) -> None:
    data = read(pictures, transform={"layout": "nhwc", "augment": "crop_flip"})
    (batch,), _ = next(data.train.batches(64))
    np.testing.assert_array_equal(batch, data.train.inputs[0].transpose(0, 3, 1, 2).astype(np.float32))


def test_several_inputs_come_in_order_and_tokens_stay_whole(read: Read, npz: Write) -> None:
    arrays: Arrays = {
        "inputs.ids": np.arange(200).reshape(20, 10),
        "inputs.mask": np.ones((20, 10), bool),
        "inputs.image": np.full((20, 3, 4, 4), 255, np.uint8),
        "inputs.age": np.full((20, 1), 50, np.float32),
    }
    data = read(npz(arrays), task="fidelity", transform={"scale": 1 / 255})
    (ids, mask, image, age), _ = next(data.train.batches(3))
    assert (ids.dtype, mask.dtype, image.dtype) == (torch.int64, torch.bool, torch.float32)
    assert torch.equal(image, torch.ones(3, 3, 4, 4)), "the transform is for the images"
    assert torch.equal(age, torch.full((3, 1), 50.0))
    turned = data.reordered(("age", "ids", "image", "mask"))
    assert [t.shape[1:] for t in next(turned.train.batches(3))[0]] == [(1,), (10,), (3, 4, 4), (10,)]
    assert [info.name for info in turned.info.inputs] == ["age", "ids", "image", "mask"]


@pytest.mark.parametrize(
    ("transform", "code"),
    [
        ({"mean": (0.1, 0.2, 0.3)}, "transform_channels"),
        ({"std": (1.0, 2.0), "layout": "nhwc"}, "transform_channels"),
    ],
)
def test_mean_and_std_must_match_the_channels(read: Read, pictures: Path, transform: Any, code: str) -> None:
    with pytest.raises(BadData, match="channels") as caught:
        read(pictures, transform=transform)
    assert caught.value.code == code


def test_image_options_on_plain_vectors_are_refused(read: Read, npz: Write) -> None:
    path = npz({"x": np.ones((20, 4), np.float32)})
    for transform, code in (({"layout": "nhwc"}, "layout_rank"), ({"augment": "crop"}, "augment_needs_images")):
        with pytest.raises(BadData) as caught:
            read(path, task="fidelity", transform=transform)
        assert caught.value.code == code


def test_unscaled_bytes_are_pointed_out(read: Read, pictures: Path) -> None:
    assert any("0 to 255" in note for note in read(pictures).info.notes)
    assert not any("0 to 255" in note for note in read(pictures, transform={"scale": 1 / 255}).info.notes)


def test_a_select_split_that_chooses_nothing_any_more_is_learnt_from_with_the_rest(read: Read, npz: Write) -> None:
    x = np.arange(100, dtype=np.float32)[:, None]
    y = np.arange(100)
    data = read(npz({"x_train": x[:70], "y_train": y[:70], "x_val": x[70:], "y_val": y[70:], "x_test": x, "y_test": y}))
    joined = data.learning_select()
    assert len(joined.train) == 100
    seen = []
    for (batch,), labels in joined.train.batches(7, shuffle=1):
        assert labels is not None
        assert torch.equal(batch[:, 0], labels.float())
        seen += labels.tolist()
    assert sorted(seen) == list(range(100))
    assert len({row >= 70 for row in seen[:14]}) == 2, "the rows of both are mixed"
    assert joined.select is data.select


def test_joined_splits_are_augmented_like_one(read: Read, pictures: Path) -> None:
    joined = read(pictures, transform={"layout": "nhwc", "augment": "crop_flip"}).learning_select().train
    (plain,), _ = next(joined.batches(74, shuffle=3))
    first, again = (next(joined.batches(74, shuffle=3, augment=True))[0][0] for _ in range(2))
    assert torch.equal(first, again)
    changed = (first != plain).flatten(1).any(1)
    assert changed[:64].any()
    assert changed[64:].any()
