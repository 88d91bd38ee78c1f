"""``.npz`` and ``.safetensors`` uploads."""

import contextlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

from search.data import Data, read_data
from search.errors import BadData
from search.spec import DataSpec

Read = Callable[..., Data]
Arrays = dict[str, np.ndarray[Any, Any]]
Write = Callable[[Arrays], Path]


def code(read: Read, path: Path, **fields: Any) -> str:
    with pytest.raises(BadData) as caught:
        read(path, **fields)
    assert caught.value.message.endswith((".", ").")), "a sentence"
    return caught.value.code


def npy(array: np.ndarray[Any, Any], *, pickled: bool = False) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=pickled)
    return out.getvalue()


def zipped(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_stored_arrays_are_mapped_not_copied(read: Read, npz: Write, digits: Arrays) -> None:
    data = read(npz(digits), transform={"layout": "nhwc"})
    assert isinstance(data.train.inputs[0], np.memmap)
    assert data.train.inputs[0].dtype == np.uint8
    np.testing.assert_array_equal(data.train.inputs[0], digits["x_train"])
    assert data.info.format == "npz"
    assert (data.info.splits.train, data.info.splits.select, data.info.splits.verify) == (200, 60, 40)


def test_compressed_fortran_and_big_endian_arrays_read_the_same(read: Read, digits: Arrays, tmp_path: Path) -> None:
    odd = {name: np.asfortranarray(array.astype(">f8" if name[0] == "x" else ">i4")) for name, array in digits.items()}
    path = tmp_path / "odd.npz"
    np.savez_compressed(path, **odd)
    data = read(path, transform={"layout": "nhwc"})
    (batch,), labels = next(data.train.batches(200))
    np.testing.assert_array_equal(batch.numpy(), digits["x_train"].transpose(0, 3, 1, 2).astype(np.float32))
    np.testing.assert_array_equal(labels, digits["y_train"])


def test_safetensors_reads_like_npz(read: Read, digits: Arrays, tmp_path: Path) -> None:
    path = tmp_path / "data.safetensors"
    save_file(digits, path)
    data = read(path, transform={"layout": "nhwc"})
    assert data.info.format == "safetensors"
    assert isinstance(data.train.inputs[0], np.memmap)
    np.testing.assert_array_equal(data.verify.inputs[0], digits["x_test"])


def test_bfloat16_is_widened(read: Read, tmp_path: Path) -> None:
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_tensors({"x": x, "y": torch.arange(100) % 5}, tmp_path / "d.safetensors")
    data = read(tmp_path / "d.safetensors")
    rows = data.train.rows
    assert rows is not None
    (batch,), _ = next(data.train.batches(1000))
    assert torch.equal(batch, x.float()[torch.from_numpy(rows)])


def test_columns_rename_arrays_and_unknown_ones_are_noted(read: Read, npz: Write, digits: Arrays) -> None:
    path = npz({"pictures": digits["x_train"], "y_train": digits["y_train"], "ids": np.arange(3)})
    data = read(path, columns={"x_train": "pictures"}, transform={"layout": "nhwc"})
    assert any("ids" in note for note in data.info.notes)


def test_names_that_are_not_ours_are_refused_with_the_names_found(read: Read, npz: Write, digits: Arrays) -> None:
    path = npz({"images": digits["x_train"], "labels": digits["y_train"]})
    with pytest.raises(BadData, match=r"\['images', 'labels'\].*x_train") as caught:
        read(path)
    assert caught.value.code == "missing_array"
    assert code(read, path, columns={"x_train": "pictures"}) == "missing_array"
    assert code(read, npz({"x": np.ones((9, 2)), "x_train": np.ones((9, 2))})) == "missing_array"
    assert code(read, npz({"x_train": np.ones((9, 2)), "y_test": np.ones(9)})) == "missing_array"


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("pickle was run",))


def test_object_arrays_are_refused_and_never_unpickled(read: Read, tmp_path: Path) -> None:
    array = np.empty(20, object)
    array[:] = [Bomb() for _ in range(20)]
    path = zipped(tmp_path / "d.npz", {"x_train.npy": npy(array, pickled=True)})
    assert code(read, path) == "object_array"
    assert code(read, zipped(tmp_path / "p.npz", {"x.npy": pickle.dumps(Bomb())})) == "not_a_data_file"


@pytest.mark.parametrize("array", [np.array(["a", "b"]), np.ones(4, complex), np.ones(3, [("a", "f4")])])
def test_other_dtypes_are_refused(read: Read, npz: Write, array: np.ndarray[Any, Any]) -> None:
    assert code(read, npz({"x_train": array})) == "unsupported_dtype"


def test_a_header_that_declares_more_than_follows_is_refused_before_allocating(read: Read, tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1 << 20)})
    path = zipped(tmp_path / "d.npz", {"x_train.npy": header.getvalue() + b"1234"})
    assert code(read, path) == "not_a_data_file"


def test_a_compressed_array_larger_than_the_disk_is_refused(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "d.npz", x_train=np.zeros((100_000, 100), np.float32))
    monkeypatch.setattr("search.data.safety.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 20}))
    with pytest.raises(BadData, match="40 MB unpacked") as caught:
        read(tmp_path / "d.npz")
    assert caught.value.code == "data_too_large"


def test_duplicate_names_are_refused(read: Read, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", npy(np.ones((9, 2))))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x.npy", npy(np.ones((9, 2))))
    assert code(read, tmp_path / "d.npz") == "unsafe_archive"


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 50]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": ["4"], "data_offsets": [0, 16]},
        {"dtype": "F32"},
        [1, 2],
    ],
)
def test_safetensors_headers_that_lie_are_refused(read: Read, tmp_path: Path, entry: object) -> None:
    header = json.dumps({"x_train": entry}).encode()
    path = tmp_path / "d.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    assert code(read, path) == "not_a_data_file"


def test_what_is_no_data_is_refused(read: Read, tmp_path: Path) -> None:
    for number, content in enumerate([b"", b"hello, this is text", b"PK\x03\x04 broken", pickle.dumps({"x": 1})]):
        path = tmp_path / f"file{number}.npz"
        path.write_bytes(content)
        assert code(read, path) == "not_a_data_file"
    assert code(read, path, format="npz") == "not_a_data_file"
    assert code(read, path, format="safetensors") == "not_a_data_file"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(place=408, value=2, kind="compressed")  # the directory begins before the file does
@given(
    place=st.integers(0, 2000), value=st.integers(0, 255), kind=st.sampled_from(["npz", "compressed", "safetensors"])
)
def test_a_damaged_file_is_refused_or_read_never_a_crash(tmp_path: Path, place: int, value: int, kind: str) -> None:
    arrays = {"x_train": np.ones((20, 3), np.float32), "y_train": np.arange(20) % 2}
    path = tmp_path / "damaged"
    if kind == "safetensors":
        save_file(arrays, path)
    else:
        with path.open("wb") as file:
            (np.savez if kind == "npz" else np.savez_compressed)(file, **arrays)
    content = bytearray(path.read_bytes())
    content[place % len(content)] = value
    path.write_bytes(content)
    with contextlib.suppress(BadData):  # anything else fails the test
        data = read_data(path, DataSpec(), scratch=tmp_path / "scratch")
        assert data.info.splits.train == 16
