"""Images with masks in archives."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from search.data import Data
from search.errors import BadData
from tests.search.data.test_images import as_tar, as_zip

Read = Callable[..., Data]
Files = dict[str, bytes]
RANDOM = np.random.default_rng(0)
MAPS = RANDOM.integers(0, 4, (20, 6, 8), dtype=np.uint8)


def stored(array: np.ndarray[Any, Any], mode: str = "L", format: str = "PNG") -> bytes:
    out = io.BytesIO()
    image = Image.fromarray(array)
    if mode == "P":
        image = image.copy()
        image.putpalette([(37 * i) % 256 for i in range(768)])
    elif mode != "L":
        image = image.convert(mode)
    image.save(out, format)
    return out.getvalue()


def pairs(image: str = "images/{}.png", mask: str = "masks/{}.png", rows: range = range(20), **how: Any) -> Files:
    """The grey value of an image is 60 times its class, pixel by pixel; masks come in another order."""
    files = {image.format(i): stored(60 * MAPS[i]) for i in rows}
    return files | {mask.format(i): stored(MAPS[i], **how) for i in reversed(rows)}


def same(data: Data) -> bool:
    for part in (data.train, data.select, data.verify):
        for (images,), maps in part.batches(7):
            assert maps is not None
            if not torch.equal(images[:, 0].long(), 60 * maps):
                return False
    return True


@pytest.mark.parametrize("mode", ["L", "P"])
@pytest.mark.parametrize("pack", [as_zip, as_tar])
def test_each_image_gets_the_mask_of_its_name(read: Read, tmp_path: Path, pack: Any, mode: str) -> None:
    data = read(pack(tmp_path / "data", pairs(mode=mode)), task="segmentation")
    assert data.info.classes == 4
    assert data.info.target is not None
    assert data.info.target.shape == (None, 6, 8)
    assert same(data)


@pytest.mark.parametrize(
    "layout", ["{split}/{kind}/{{}}.png", "{kind}/{split}/{{}}.png", "set/{kind}/{split}/{{}}.png"]
)
def test_splits_may_lie_above_or_below(read: Read, tmp_path: Path, layout: str) -> None:
    files: Files = {}
    for split, rows in (("train", range(10)), ("val", range(10, 14)), ("test", range(14, 20))):
        image, mask = (layout.format(split=split, kind=kind) for kind in ("Images", "masks"))
        files |= pairs(image, mask, rows)
    data = read(as_zip(tmp_path / "data.zip", files), task="segmentation")
    sizes = data.info.splits
    assert (sizes.train, sizes.select, sizes.verify) == (10, 4, 6)
    assert same(data)


def test_masks_are_resized_without_new_classes(read: Read, tmp_path: Path) -> None:
    files = {k: stored(np.where(MAPS[i % 20] > 1, 3, 0).astype(np.uint8)) for i, k in enumerate(pairs())}
    data = read(as_zip(tmp_path / "data.zip", files), task="segmentation", transform={"size": [12, 9]})
    maps = torch.cat([*data.train.targets()])
    assert maps.shape[1:] == (12, 9)
    assert set(maps.unique().tolist()) == {0, 3}


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (lambda f: f.pop("masks/3.png"), "labels_missing", "'images/3.png' has no mask"),
        (lambda f: f.pop("images/3.png"), "labels_missing", "'masks/3.png' has no image"),
        (lambda f: f.update({"other/1.png": f["images/1.png"]}), "labels_missing", "other/1.png"),
        (lambda f: f.update({"masks/3.bmp": f["masks/3.png"]}), "labels_missing", "second file"),
        (lambda f: f.update({"masks/3.png": stored(MAPS[3], "RGB")}), "mask_without_classes", "mode RGB"),
        (lambda f: f.update({"masks/3.png": stored(MAPS[3], format="JPEG")}), "mask_without_classes", "JPEG"),
        (lambda f: f.update({"masks/3.png": stored(MAPS[3][:4])}), "image_sizes_differ", "4×8"),
        (lambda f: f.update({"masks/3.png": f["masks/3.png"][:60]}), "image_unreadable", "masks/3.png"),
        (lambda f: f.update({"masks/3.png": b"no image"}), "image_unreadable", "masks/3.png"),
    ],
)
def test_what_does_not_fit_is_named(
    read: Read, tmp_path: Path, change: Callable[[Files], Any], code: str, says: str
) -> None:
    files = pairs()
    change(files)
    with pytest.raises(BadData) as caught:
        read(as_zip(tmp_path / "data.zip", files), task="segmentation")
    assert caught.value.code == code
    assert says in caught.value.message


def test_an_augmented_image_takes_its_mask_along(read: Read, tmp_path: Path) -> None:
    data = read(as_zip(tmp_path / "d.zip", pairs()), task="segmentation", transform={"augment": "crop_flip"})
    (images,), maps = next(data.train.batches(16, shuffle=1, augment=True))
    assert maps is not None
    counts = maps != 255
    assert torch.equal(images[:, 0].long()[counts], 60 * maps[counts])
