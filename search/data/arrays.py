"""Arrays out of ``.npz`` and ``.safetensors`` files: memory-mapped, without pickle, sizes checked before anything
is allocated.
"""

import json
import math
import shutil
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from search.data.archives import damage
from search.data.raw import Array, Raw, Rows
from search.data.safety import check_room
from search.errors import BadData

__all__ = ["read_npz", "read_safetensors"]

SPLIT_SUFFIXES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
MAX_ARRAYS = 1_000
MAX_HEADER = 10_000_000
"""Bytes of a safetensors header."""
MAX_RANK = 8

SAFETENSORS_TYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "BF16": "<u2",  # widened to float32 below: numpy has no bfloat16
}


def read_npz(path: Path, columns: Mapping[str, str], scratch: Path) -> Raw:
    """The arrays of an ``.npz``: stored members are mapped where they lie, deflated ones unpacked into ``scratch``.

    Raises BadData for an object array, a damaged member, or names that are not ours (``columns`` renames them).
    """
    arrays: dict[str, Array] = {}
    with damage("the .npz"), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > MAX_ARRAYS:
            raise BadData("archive_too_large", f"the .npz holds {len(members)} arrays; at most {MAX_ARRAYS} fit.")
        for number, member in enumerate(members):
            name = member.filename.removesuffix(".npy")
            if name in arrays:
                raise BadData("unsafe_archive", f"the .npz holds {name!r} twice; write it again with numpy.savez.")
            arrays[name] = _npz_member(path, archive, member, scratch / f"array{number}.npy")
    return _by_role("npz", arrays, columns)


def _npz_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, unpacked: Path) -> Array:
    name = member.filename
    if member.flag_bits & 1:
        raise BadData("unsafe_archive", f"the array {name!r} is encrypted; write the .npz again with numpy.savez.")
    with archive.open(member) as stream:
        dtype, shape, fortran, header = _npy_header(stream, name)
    size = math.prod(shape) * dtype.itemsize
    if member.file_size != header + size:
        raise BadData(
            "not_a_data_file",
            f"the array {name!r} declares shape {shape} of {dtype}, {size} bytes, but {member.file_size - header} "
            "follow; write the .npz again with numpy.savez.",
        )
    if size == 0:
        return np.zeros(shape, dtype)
    source, offset = path, header
    if member.compress_type == zipfile.ZIP_STORED:
        offset += _payload_offset(path, member)
    else:
        check_room(size, unpacked.parent, f"the array {name!r}")
        with archive.open(member) as stream, unpacked.open("wb") as out:
            shutil.copyfileobj(stream, out, 1 << 20)
        source = unpacked
    if source.stat().st_size < offset + size:
        raise BadData("not_a_data_file", f"the array {name!r} ends early; write the .npz again with numpy.savez.")
    return np.memmap(source, dtype, "r", offset, shape, "F" if fortran else "C")


def _npy_header(stream: IO[bytes], name: str) -> tuple[np.dtype[np.generic], tuple[int, ...], bool, int]:
    """dtype, shape, Fortran order and the header's length in bytes; numpy parses it with ``ast.literal_eval``."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(stream)
        if version not in readers:
            raise ValueError(f"version {version}")
        shape, fortran, dtype = readers[version](stream)
        header = stream.tell()
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise BadData(
            "not_a_data_file", f"{name!r} in the .npz is no numpy array ({error}); write it with numpy.savez."
        ) from error
    _check_layout(name, dtype, shape)
    return dtype, shape, fortran, header


def _check_layout(name: str, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> None:
    if dtype.hasobject:
        raise BadData(
            "object_array",
            f"the array {name!r} holds Python objects (dtype object), which only pickle can read; "
            "convert it with numpy.asarray(..., dtype=numpy.float32) before saving.",
        )
    if dtype.kind not in "biuf" or dtype.itemsize > 8 or dtype.subdtype is not None:
        raise BadData(
            "unsupported_dtype",
            f"the array {name!r} has dtype {dtype}; store integers, booleans or float16/32/64.",
        )
    if not 1 <= len(shape) <= MAX_RANK or min(shape) < 0:
        raise BadData("wrong_shape", f"the array {name!r} has shape {shape}; the first dimension must count rows.")


def _payload_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin; the local header's name and extra lengths can differ from the directory."""
    with path.open("rb") as file:
        file.seek(member.header_offset)
        header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile("bad local header")
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    return int(member.header_offset + 30 + name_length + extra_length)


class Entry(BaseModel):
    """One tensor in a safetensors header; offsets count from the header's end."""

    model_config = ConfigDict(strict=True, extra="forbid")

    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]
    data_offsets: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


def read_safetensors(path: Path, columns: Mapping[str, str], scratch: Path) -> Raw:
    """The tensors of a ``.safetensors`` file, mapped where they lie (bfloat16 is widened into ``scratch``)."""
    entries, base = _safetensors_header(path)
    room = path.stat().st_size - base
    arrays: dict[str, Array] = {}
    for number, (name, entry) in enumerate(entries.items()):
        if entry.dtype not in SAFETENSORS_TYPES:
            raise BadData(
                "unsupported_dtype", f"the tensor {name!r} is {entry.dtype}; store integers, booleans or floats."
            )
        dtype, shape = np.dtype(SAFETENSORS_TYPES[entry.dtype]), tuple(entry.shape)
        _check_layout(name, dtype, shape)
        start, stop = entry.data_offsets
        if stop - start != math.prod(shape) * dtype.itemsize or stop > room:
            raise BadData(
                "not_a_data_file",
                f"the tensor {name!r} declares shape {shape} of {entry.dtype} at bytes {start} to {stop} of {room}: "
                "the sizes disagree; write the file again with safetensors.numpy.save_file.",
            )
        array: Array = np.zeros(shape, dtype) if start == stop else np.memmap(path, dtype, "r", base + start, shape)
        arrays[name] = _widened(array, scratch / f"array{number}.npy") if entry.dtype == "BF16" else array
    return _by_role("safetensors", arrays, columns)


def _safetensors_header(path: Path) -> tuple[dict[str, Entry], int]:
    """The declared tensors, and the byte where their data begins."""
    advice = "write the file again with safetensors.numpy.save_file."
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER):
            raise BadData("not_a_data_file", f"the file declares a header of {length} bytes in {size}; {advice}")
        text = file.read(length)
    try:
        header = json.loads(text)
        entries = {name: Entry.model_validate(entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadData("not_a_data_file", f"the file's header is no safetensors header; {advice}") from error
    if len(entries) > MAX_ARRAYS:
        raise BadData("archive_too_large", f"the file holds {len(entries)} tensors; at most {MAX_ARRAYS} fit.")
    return entries, 8 + length


def _widened(array: Array, path: Path) -> Array:
    """bfloat16 is the upper half of a float32; widened a block of rows at a time."""
    check_room(array.size * 4, path.parent, "bfloat16 data as float32")
    out = np.lib.format.open_memmap(path, "w+", np.float32, array.shape)
    for start in range(0, len(array), 4096):
        out[start : start + 4096] = (array[start : start + 4096].astype(np.uint32) << 16).view(np.float32)
    return out


def _by_role(format: str, arrays: dict[str, Array], columns: Mapping[str, str]) -> Raw:
    """Arrays by split and input: ``x_train``, ``y_val``, ``length_val``, ``inputs.ids_test`` …, or ``x``, ``y`` alone.

    ``columns`` maps one of these names to the name in the file.
    """
    missing = [name for name in columns.values() if name not in arrays]
    if missing:
        raise BadData("missing_array", f"columns names {missing}, but the file holds {sorted(arrays)}.")
    renamed = {stored: role for role, stored in columns.items()}
    splits: dict[str, Rows] = {}
    ignored: list[str] = []
    inputs: dict[str, dict[str, Array]] = {}
    targets: dict[str, dict[str, Array]] = {"y": {}, "length": {}}
    for stored, array in arrays.items():
        role = renamed.get(stored, stored)
        stem, _, suffix = role.rpartition("_")
        split = SPLIT_SUFFIXES.get(suffix)
        stem, split = (stem, split) if split else (role, "train")
        known = stem in ("x", *targets) or (stem.startswith("inputs.") and len(stem) > len("inputs."))
        if not known:
            ignored.append(stored)
            continue
        name = stem.removeprefix("inputs.")
        place = targets[stem] if stem in targets else inputs.setdefault(split, {})
        if place.setdefault(split if stem in targets else name, array) is not array:
            raise BadData("missing_array", f"two arrays are {name} of the {split} split; keep one ({sorted(arrays)}).")
    if not inputs:
        raise BadData(
            "missing_array",
            f"the file holds {sorted(arrays)}; name the arrays x_train, y_train, x_val, y_val (and x_test, y_test), "
            "or x and y, or inputs.<name>_train for several inputs, or give columns.",
        )
    for split, named in inputs.items():
        splits[split] = Rows(named, targets["y"].pop(split, None), targets["length"].pop(split, None))
    for name, left in targets.items():
        if left:
            raise BadData("missing_array", f"there is {name} for {sorted(left)} but no inputs x for them.")
    notes = (f"arrays not used: {', '.join(sorted(ignored))}",) if ignored else ()
    return Raw(format, splits, notes=notes)
