"""Image folders in archives, and Parquet tables of images."""

import gzip
import io
import json
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from search.data import Data
from search.errors import BadData

Read = Callable[..., Data]
Files = dict[str, bytes]


def encoded(value: int, *, mode: str = "RGB", size: tuple[int, int] = (8, 6), format: str = "PNG") -> bytes:
    """One colour, width × height."""
    out = io.BytesIO()
    Image.new(mode, size, value if mode in ("L", "1", "I;16") else (value, 0, 255 - value)).save(out, format)
    return out.getvalue()


def folders(prefix: str = "", each: int = 6) -> Files:
    """Two classes, told apart by their red."""
    return {
        f"{prefix}{name}/{i}.png": encoded(100 * label + i)
        for label, name in enumerate(("cat", "dog"))
        for i in range(each)
    }


def as_zip(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def as_tar(path: Path, files: Files, mode: Any = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def code(read: Read, path: Path, **fields: Any) -> str:
    with pytest.raises(BadData) as caught:
        read(path, **fields)
    return caught.value.code


def check_reds(data: Data) -> None:
    """Every image carries its label in its red."""
    for split in (data.train, data.select, data.verify):
        for image, label in zip(split.inputs[0], torch.cat([*split.targets()]), strict=True):
            assert image[0, 0, 0] // 100 == int(label)
            assert image[0, 0, 2] == 255 - image[0, 0, 0]


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])
def test_class_folders_read_from_any_archive(read: Read, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "upload"
    files = folders(each=8)
    if kind == "zip":
        as_zip(path, files)
    else:
        as_tar(path, files, {"tar": "w", "tar.gz": "w:gz", "tar.xz": "w:xz"}[kind])
    data = read(path, validation=0.25, transform={"scale": 1 / 255})
    assert (data.info.format, data.info.classes) == ("images", 2)
    assert data.info.inputs[0].shape == (None, 3, 6, 8)
    assert data.train.inputs[0].dtype == np.uint8
    assert any("0=cat, 1=dog" in note for note in data.info.notes)
    check_reds(data)


def test_split_folders_are_splits_below_any_common_folder(read: Read, tmp_path: Path) -> None:
    files = folders("pets/train/", 8) | folders("pets/validation/", 2) | folders("pets/test/", 3)
    files |= {"pets/README.md": b"hello", "__MACOSX/pets/train/._0.png": b"noise", "pets/train/.DS_Store": b"noise"}
    data = read(as_zip(tmp_path / "d.zip", files))
    assert (data.info.splits.train, data.info.splits.select, data.info.splits.verify) == (16, 4, 6)
    assert any("1 files" in note for note in data.info.notes)
    check_reds(data)


def test_grey_images_have_one_channel_unless_the_mean_has_three(read: Read, tmp_path: Path) -> None:
    files = {f"{i % 2}/{i}.png": encoded(i, mode="L") for i in range(20)}
    path = as_zip(tmp_path / "d.zip", files)
    assert read(path).info.inputs[0].shape == (None, 1, 6, 8)
    assert read(path, transform={"mean": (0.1, 0.2, 0.3)}).info.inputs[0].shape == (None, 3, 6, 8)


def test_formats_and_sizes_may_mix_when_a_size_is_given(read: Read, tmp_path: Path) -> None:
    formats = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
    files = {
        f"c/{i}.{formats[i % 5].lower()}": encoded(i * 9, size=(8 + i % 3, 9), format=formats[i % 5]) for i in range(20)
    }
    path = as_zip(tmp_path / "d.zip", files)
    assert code(read, path) == "image_sizes_differ"
    data = read(path, transform={"size": (5, 7)})
    assert data.info.inputs[0].shape == (None, 3, 5, 7)
    reds = np.concatenate([split.inputs[0] for split in (data.train, data.select, data.verify)])[:, 2, 3, 0]
    assert np.abs(np.sort(reds.astype(int)) - np.arange(20) * 9).max() <= 6, "JPEG and WebP are nearly exact"


def test_flat_images_serve_fidelity_only(read: Read, tmp_path: Path) -> None:
    path = as_zip(tmp_path / "d.zip", {f"{i}.png": encoded(i) for i in range(20)})
    assert code(read, path) == "labels_missing"
    data = read(path, task="fidelity")
    assert not [*data.train.targets()]
    assert data.info.classes is None


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "a/../../evil.png", "a\\..\\evil.png"])
@pytest.mark.parametrize("pack", [as_zip, as_tar])
def test_names_that_climb_are_refused(read: Read, tmp_path: Path, pack: Any, name: str) -> None:
    assert code(read, pack(tmp_path / "d", folders() | {name: encoded(1)})) == "unsafe_archive"


def test_a_file_without_a_name_and_a_gzip_that_ends_in_its_header_are_refused(read: Read, tmp_path: Path) -> None:
    path = as_zip(tmp_path / "d.zip", folders() | {"x": encoded(1)})
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 28] = 0  # the length of the name
    path.write_bytes(content)
    assert code(read, path) in ("unsafe_archive", "not_a_data_file")
    path.write_bytes(b"\x1f\x8b\x08")
    assert code(read, path) == "not_a_data_file"


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_tar_header_of_any_size_is_refused_before_it_is_read(read: Read, tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "d.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("long")
        member.type, member.size = kind, 64 << 20
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    tracemalloc.start()
    assert code(read, path) == "unsafe_archive"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_a_sparse_file_in_a_tar_is_refused(read: Read, tmp_path: Path) -> None:
    path = tmp_path / "d.tar"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("hole")
        member.type = tarfile.GNUTYPE_SPARSE
        archive.addfile(member)
    assert code(read, path) == "unsafe_archive"


def test_links_and_devices_in_a_tar_are_passed_over(read: Read, tmp_path: Path) -> None:
    path = as_tar(tmp_path / "d.tar", folders(each=10), "w")
    with tarfile.open(path, "a") as archive:
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)):
            member = tarfile.TarInfo(f"cat/link{number}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    data = read(path)
    assert sum(data.info.splits.model_dump().values()) == 20


def test_archives_that_unpack_to_far_more_are_refused(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.data.archives.RATIO_ALLOWANCE", 1 << 20)
    zeros = bytes(8 << 20)
    assert code(read, as_zip(tmp_path / "d.zip", {"c/0.bmp": zeros})) == "archive_too_large"
    assert code(read, as_tar(tmp_path / "d.tgz", {"c/0.bmp": zeros})) == "archive_too_large"


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bad_images_are_refused_by_name(read: Read, tmp_path: Path) -> None:
    good = folders()
    tiff = io.BytesIO()
    Image.new("RGB", (8, 6)).save(tiff, "TIFF")
    for name, content, expected in (
        ("cat/huge.png", png_header(100_000, 100_000), "image_too_large"),
        ("cat/large.png", png_header(9_000, 9_000), "image_too_large"),
        ("cat/cut.png", encoded(1)[:-30], "image_unreadable"),
        ("cat/empty.png", png_header(8, 6), "image_unreadable"),
        ("cat/text.png", b"not an image", "image_unreadable"),
        ("cat/other.png", tiff.getvalue(), "image_unreadable"),
        ("cat/deep.png", encoded(1, mode="I;16"), "image_unreadable"),
    ):
        with pytest.raises(BadData, match=name) as caught:
            read(as_zip(tmp_path / "d.zip", good | {name: content}))
        assert caught.value.code == expected, name


def test_an_archive_without_images_or_cut_short_is_refused(read: Read, tmp_path: Path) -> None:
    assert code(read, as_zip(tmp_path / "d.zip", {"a/b.txt": b"x"})) == "no_images"
    tar = as_tar(tmp_path / "d.tgz", folders())
    tar.write_bytes(gzip.compress(gzip.decompress(tar.read_bytes())[:3000]))
    assert code(read, tar) == "not_a_data_file"
    assert code(read, as_zip(tmp_path / "r.zip", folders()), task="regression") == "labels_missing"


def table(rows: int = 20, *, image: str = "image", label: str = "label", names: bool = True) -> pa.Table:
    images = [{"bytes": encoded(100 * (i % 2) + i), "path": f"/nowhere/{i}.png"} for i in range(rows)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {label: {"names": ["cat", "dog"], "_type": "ClassLabel"}, image: {"_type": "Image"}}
    schema = pa.schema(
        [pa.field(image, kind), pa.field(label, pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})} if names else {"huggingface": "{"},
    )
    return pa.table([pa.array(images, kind), pa.array([i % 2 for i in range(rows)])], schema=schema)


def shard(rows: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(rows, out)
    return out.getvalue()


def test_a_parquet_table_of_images_is_read(read: Read, tmp_path: Path) -> None:
    pq.write_table(table(100), tmp_path / "d.parquet", row_group_size=30)
    data = read(tmp_path / "d.parquet")
    assert (data.info.format, data.info.classes) == ("parquet", 2)
    assert any("0=cat, 1=dog" in note for note in data.info.notes)
    assert sum(data.info.splits.model_dump().values()) == 100
    check_reds(data)


def test_shards_in_an_archive_are_splits(read: Read, tmp_path: Path) -> None:
    files = {
        "data/train-00000-of-00002.parquet": shard(table(20)),
        "data/train-00001-of-00002.parquet": shard(table(10)),
        "data/validation-00000-of-00001.parquet": shard(table(8)),
        "data/test-00000-of-00001.parquet": shard(table(6)),
        "README.md": b"card",
    }
    data = read(as_zip(tmp_path / "d.zip", files))
    assert (data.info.splits.train, data.info.splits.select, data.info.splits.verify) == (30, 8, 6)
    check_reds(data)
    assert code(read, as_zip(tmp_path / "e.zip", {"part-0.parquet": shard(table())})) == "missing_array"


def test_columns_name_what_is_called_otherwise(read: Read, tmp_path: Path) -> None:
    pq.write_table(table(image="photo", label="fine_label", names=False), tmp_path / "d.parquet")
    assert code(read, tmp_path / "d.parquet") == "missing_column"
    data = read(tmp_path / "d.parquet", columns={"image": "photo", "label": "fine_label"})
    check_reds(data)
    swapped = {"image": "fine_label", "label": "photo"}
    assert code(read, tmp_path / "d.parquet", columns=swapped) == "missing_column"
    assert code(read, tmp_path / "d.parquet", columns={"image": "photo", "label": "photo"}) == "labels_not_integers"


def test_images_that_are_only_paths_are_refused_unopened(read: Read, tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    outside = [{"bytes": None, "path": "/etc/passwd"}] * 20
    rows = pa.table({"image": pa.array(outside, kind), "label": pa.array([0] * 20)})
    pq.write_table(rows, tmp_path / "d.parquet")
    with pytest.raises(BadData, match="row 0 has no image bytes"):
        read(tmp_path / "d.parquet")


def test_damaged_parquet_and_missing_labels_are_refused(read: Read, tmp_path: Path) -> None:
    content = bytearray(shard(table()))
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    assert code(read, tmp_path / "cut.parquet") == "not_a_data_file"
    content[100:2000] = bytes(1900)
    (tmp_path / "zeroed.parquet").write_bytes(content)
    assert code(read, tmp_path / "zeroed.parquet") in ("not_a_data_file", "image_unreadable")
    images = table().column("image")
    pq.write_table(pa.table({"image": images, "label": pa.array([0, None] * 10)}), tmp_path / "null.parquet")
    assert code(read, tmp_path / "null.parquet") == "labels_not_integers"
    pq.write_table(table(0), tmp_path / "none.parquet")
    assert code(read, tmp_path / "none.parquet") == "empty_split"
