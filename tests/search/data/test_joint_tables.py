"""Images with a table of joints in archives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search.data import Data
from search.errors import BadData
from tests.search.data.test_images import as_tar, as_zip
from tests.search.data.test_masks import stored

Read = Callable[..., Data]
Files = dict[str, bytes]
ROWS, HEIGHT, WIDTH = 24, 20, 16
JOINTS = np.random.default_rng(0).integers((1, 1), (WIDTH - 1, HEIGHT - 1), (ROWS, 2, 2))


def picture(row: int) -> bytes:
    """Joint j of the row is the one pixel of value 100 (j + 1)."""
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    for j in (1, 0):
        x, y = JOINTS[row, j]
        pixels[y, x] = 100 * (j + 1)
    return stored(pixels)


def table(rows: range = range(ROWS), columns: str = "image,head_x,head_y,tail_x,tail_y", more: str = "") -> bytes:
    """The rows come in another order than the images."""
    lines = [f"{i}.png,{','.join(str(n) for n in JOINTS[i].ravel())}{more}" for i in reversed(rows)]
    return "\n".join([columns, *lines, ""]).encode()


def files(folder: str = "", rows: range = range(ROWS), **how: Any) -> Files:
    return {f"{folder}images/{i}.png": picture(i) for i in rows} | {f"{folder}joints.csv": table(rows, **how)}


def test_each_image_gets_the_joints_of_its_row(read: Read, tmp_path: Path) -> None:
    for pack in (as_zip, as_tar):
        data = read(pack(tmp_path / "data", files()), task="keypoints")
        assert data.info.target is not None
        assert data.info.target.shape == (None, 2, 3)
        assert any("0=head, 1=tail" in note for note in data.info.notes)
        assert pixels_match(data) == ROWS


def pixels_match(data: Data) -> int:
    """How many rows whose head lies where their image has it (all, or this fails)."""
    seen = 0
    for part in (data.train, data.select, data.verify):
        for (images,), joints in part.batches(7):
            assert joints is not None
            x, y = ((joints[..., i] * side - 0.5).round().long() for i, side in enumerate((WIDTH, HEIGHT)))
            assert (images[torch.arange(len(images)), 0, y[:, 0], x[:, 0]] == 100).all()
            seen += len(images)
    return seen


@pytest.mark.parametrize("folder", ["", "set/"])
def test_each_split_may_have_its_own_table(read: Read, tmp_path: Path, folder: str) -> None:
    packed: Files = {}
    for split, rows in (("train", range(12)), ("val", range(12, 18)), ("test", range(18, ROWS))):
        packed |= files(f"{folder}{split}/", rows)
    data = read(as_zip(tmp_path / "data.zip", packed), task="keypoints")
    assert (data.info.splits.train, data.info.splits.select, data.info.splits.verify) == (12, 6, 6)
    assert pixels_match(data) == ROWS


def test_splits_may_lie_below_the_images_of_one_table(read: Read, tmp_path: Path) -> None:
    packed, lines = {}, ["image,head_x,head_y,tail_x,tail_y"]
    for i in range(ROWS):
        name = f"{('train', 'val')[i % 2]}/{i}.png"
        packed[f"images/{name}"] = picture(i)
        lines.append(f"{name},{','.join(str(n) for n in JOINTS[i].ravel())}")
    data = read(as_zip(tmp_path / "data.zip", packed | {"joints.csv": "\n".join(lines).encode()}), task="keypoints")
    assert data.info.splits.train == 12
    assert pixels_match(data) == ROWS


def test_joints_and_lengths_move_with_a_resize_of_their_images(read: Read, tmp_path: Path) -> None:
    path = as_zip(tmp_path / "data.zip", files(columns="image,head_x,head_y,tail_x,tail_y,length", more=",6"))
    as_they_are = read(path, task="keypoints")
    resized = read(path, task="keypoints", transform={"size": [10, 32]})
    for one, other in zip(as_they_are.train.targets(), resized.train.targets(), strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(one[..., 3], torch.full_like(one[..., 3], 0.5 * 6 / HEIGHT))


def test_a_joint_with_empty_cells_is_not_there(read: Read, tmp_path: Path) -> None:
    packed = files()
    lines = packed["joints.csv"].decode().splitlines()
    packed["joints.csv"] = (
        "\ufeff".encode()
        + "\r\n".join([lines[0], *(",".join([*line.split(",")[:3], " ", ""]) for line in lines[1:]), ""]).encode()
    )
    data = read(as_zip(tmp_path / "data.zip", packed), task="keypoints", transform={"size": [9, 9]})
    counts = torch.cat([*data.train.targets()])[..., 2]
    assert counts.mean(0).tolist() == [1, 0]


def edited(change: Callable[[list[str]], Any]) -> Callable[[Files], None]:
    """``change``: of the lines of joints.csv, of which the second is image 23's."""

    def edit(packed: Files) -> None:
        lines = packed["joints.csv"].decode().splitlines()
        change(lines)
        packed["joints.csv"] = "\n".join(lines).encode()

    return edit


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (lambda f: f.pop("joints.csv"), "labels_missing", "no joints.csv"),
        (lambda f: f.pop("images/23.png"), "joints_table", "line 2: there is no image '23.png'"),
        (edited(lambda lines: lines.pop(1)), "labels_missing", "'images/23.png' has no row"),
        (lambda f: f.update({"other/1.png": f["images/1.png"]}), "labels_missing", "other/1.png"),
        (lambda f: f.update({"val/images/1.png": f["images/1.png"]}), "labels_missing", "val/images/1.png"),
        (lambda f: f.update({"val/joints.csv": b"image,a_x,a_y\n"}), "joints_table", "give both the same"),
        (edited(lambda lines: lines.append(lines[1])), "joints_table", "has a row already (joints.csv, line 2)"),
        (edited(lambda lines: lines.insert(1, "23.png,1,2,3")), "joints_table", "line 2: 4 cells under 5 columns"),
        (edited(lambda lines: lines.insert(1, "23.png,1,two,3,4")), "joints_table", "head_y is 'two'"),
        (edited(lambda lines: lines.insert(1, "23.png,1,nan,3,4")), "joints_table", "head_y is 'nan'"),
        (edited(lambda lines: lines.insert(1, "23.png,1,,3,4")), "joints_table", "x of the joint 'head' is '1'"),
        (edited(lambda lines: lines.__setitem__(1, "23.png,1,2,16,4")), "keypoints_outside", "'tail' at x 16, y 4"),
        (edited(lambda lines: lines.__setitem__(1, "23.png,1,2,-1,4")), "keypoints_outside", "20×16"),
        (edited(lambda lines: lines.pop(0)), "joints_table", "begins with the columns"),
        (edited(lambda lines: lines.__setitem__(0, "image,x0,y0,x1,y1")), "joints_table", "image,head_x,head_y"),
        (edited(lambda lines: lines.__setitem__(0, "image,a_x,a_y,a_x,a_y")), "joints_table", "begins with"),
        (edited(lambda lines: lines.__setitem__(1, '23.png,"1,2,3,4')), "joints_table", "no CSV"),
        (lambda f: f.update({"joints.csv": b"\xff\xfe"}), "joints_table", "UTF-8"),
        (lambda f: f.update({"joints.csv": b""}), "joints_table", "needs a header"),
        (
            edited(lambda lines: lines.__setitem__(slice(1, None), [f"{i}.png,,,," for i in range(ROWS)])),
            "nothing_counts",
            "cells are empty",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    read: Read, tmp_path: Path, change: Callable[[Files], Any], code: str, says: str
) -> None:
    packed = files()
    change(packed)
    with pytest.raises(BadData) as caught:
        read(as_zip(tmp_path / "data.zip", packed), task="keypoints")
    assert caught.value.code == code
    assert says in caught.value.message


def test_a_length_must_be_there_for_each_row(read: Read, tmp_path: Path) -> None:
    packed = files(columns="image,head_x,head_y,tail_x,tail_y,length", more=",")
    with pytest.raises(BadData, match="length is '', not a number of pixels"):
        read(as_zip(tmp_path / "data.zip", packed), task="keypoints")
