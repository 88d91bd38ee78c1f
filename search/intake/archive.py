"""The outside of an uploaded ``.pt2``: a ZIP that is checked entry by entry before anything is read from it."""

import json
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from search.errors import BadModel, Refused

__all__ = ["Archive", "list_names", "open_zip"]

_CENTRAL_DIRECTORY_MAX = 32 * 2**20
_ENTRIES_MAX = 60_000
_JSON_MAX = 96 * 2**20
_CHUNK = 2**20

_ROOT = re.compile(r"[A-Za-z0-9_\- .]{1,200}\Z")
_KEPT = re.compile(
    r"(archive_format|archive_version|byteorder|models/\w{1,64}\.json"
    r"|data/weights/(weight_\d{1,6}|\w{1,64}_weights_config\.json)"
    r"|data/constants/(tensor_\d{1,6}|\w{1,64}_constants_config\.json))\Z",
    re.ASCII,
)
_IGNORED = re.compile(
    r"(\.data/(version|serialization_id)|version|\.format_version|\.storage_alignment|data/sample_inputs/\w{1,64}\.pt"
    r"|extra/[\w.\-]{1,100})\Z",
    re.ASCII,
)
"""Present in honest files and never opened."""

_AGAIN = "write the file again with tenfold.export (or torch.export.save of torch 2.9 or later)"
_REFUSED_PARTS = (
    (re.compile(r"data/aotinductor/"), "compiled_code", "compiled code, which would run here"),
    (re.compile(r"data/constants/(custom|opaque)_obj_"), "custom_object", "a pickled object"),
    (
        re.compile(r"data/(weights|constants)/[^/]*\.pt\Z"),
        "pickled_weights",
        "pickled weights, as torch 2.8 wrote them",
    ),
    (re.compile(r"(?:.*/)?data\.pkl\Z|.*\.pkl\Z"), "pickle", "a pickle"),
    (re.compile(r"serialized_"), "old_format", "the format of an older torch"),
    (re.compile(r"data/executorch/"), "compiled_code", "a program for another runtime"),
)


def list_names(path: Path) -> list[str]:
    """The entries' names, of whatever kind of ZIP. Raises ``BadModel`` (``not_a_zip``) or ``Refused``."""
    with _opened(path) as z:
        return z.namelist()


def open_zip(path: Path) -> zipfile.ZipFile:
    """A ZIP whose directory is small, whose entries are stored as they are, do not overlap and are not repeated.

    Raises ``BadModel`` (``not_a_zip``) or ``Refused``.
    """
    z = _opened(path)
    try:
        _check_entries(z, path.stat().st_size)
    except Refused:
        z.close()
        raise
    return z


def _opened(path: Path) -> zipfile.ZipFile:
    """``zipfile`` alone would read a directory of any size into memory."""
    try:
        with path.open("rb") as f:
            _check_directory(f, path.stat().st_size)
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, struct.error, OSError, ValueError, NotImplementedError, EOFError) as e:
        raise BadModel(
            "not_a_zip", f"the file is not a complete ZIP archive ({e}): upload it again, or {_AGAIN}"
        ) from None


def _check_directory(f: BinaryIO, size: int) -> None:
    """The end record, as torch and ``zipfile`` write it (no comment), and its ZIP64 twin."""
    if size < 22:
        raise ValueError(f"{size} bytes")
    f.seek(-22, 2)
    signature, _, _, _, entries, directory, _, comment = struct.unpack("<4s4H2LH", f.read(22))
    if signature != b"PK\x05\x06" or comment:
        raise ValueError("no end record: it is cut short")
    if size >= 42 + 56:
        f.seek(-42, 2)
        mark, _, offset, _ = struct.unpack("<4sLQL", f.read(20))
        if mark == b"PK\x06\x07":
            if offset != size - 42 - 56:  # where ``zipfile`` reads it, whatever the locator says
                raise ValueError("its ZIP64 end record is not before its locator")
            f.seek(offset)
            _, _, _, _, _, _, _, entries64, directory64, _ = struct.unpack("<4sQ2H2L4Q", f.read(56))
            entries, directory = (
                max(entries, entries64) if entries != 0xFFFF else entries64,
                max(directory if directory != 0xFFFFFFFF else 0, directory64),
            )
    if entries > _ENTRIES_MAX or directory > _CENTRAL_DIRECTORY_MAX:
        raise Refused("too_many_entries", f"the archive lists {entries} entries; at most {_ENTRIES_MAX} are read")


def _check_entries(z: zipfile.ZipFile, size: int) -> None:
    seen: set[str] = set()
    total = 0
    for info in z.infolist():
        name = info.filename
        shown = repr(name[:100])
        if "\\" in info.orig_filename or "\0" in info.orig_filename:
            raise Refused("entry_name", f"the entry {shown} has a backslash or a null byte in its name")
        parts = name.split("/")
        if name.startswith("/") or any(p in ("", "..", ".") for p in parts) or len(parts) > 6:
            raise Refused("entry_name", f"the entry {shown} points outside the archive or is a folder")
        if name in seen:
            raise Refused("duplicate_entry", f"the entry {shown} appears twice")
        seen.add(name)
        if info.flag_bits & 0x1:
            raise Refused("encrypted", f"the entry {shown} is encrypted")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise Refused(
                "compressed_entry", f"the entry {shown} is compressed: {_AGAIN}, which stores entries as they are"
            )
        total += info.file_size
    if total > size:
        raise Refused("overlapping_entries", f"the entries claim {total} bytes, the file has {size}")


class Archive:
    """A ``.pt2`` whose entry names are all known. ``names``: path below the root folder to entry."""

    def __init__(self, path: Path) -> None:
        self._zip = open_zip(path)
        try:
            self.names = self._sorted_out()
            self.model = self._only_model()
            self._check_constants()
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> "Archive":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zip.close()

    def _sorted_out(self) -> dict[str, zipfile.ZipInfo]:
        names: dict[str, zipfile.ZipInfo] = {}
        roots = set()
        for info in self._zip.infolist():
            root, _, name = info.filename.partition("/")
            roots.add(root)
            for pattern, code, what in _REFUSED_PARTS:
                if pattern.match(name) or (code in ("pickle", "old_format") and pattern.match(info.filename)):
                    raise Refused(code, f"the entry {info.filename[:100]!r} holds {what}: {_AGAIN}")
            if _KEPT.match(name):
                names[name] = info
            elif not _IGNORED.match(name):
                raise Refused(
                    "unknown_entry", f"the entry {info.filename[:100]!r} does not belong to a .pt2 file: {_AGAIN}"
                )
        if len(roots) != 1 or not _ROOT.match(next(iter(roots))):
            raise Refused("entry_name", f"a .pt2 file has one root folder, this one has {sorted(roots)[:3]!r}")
        return names

    def _only_model(self) -> str:
        models = [n[len("models/") : -len(".json")] for n in self.names if n.startswith("models/")]
        if len(models) != 1:
            raise Refused("one_model", f"the file holds {len(models)} models {models[:4]!r}: save exactly one")
        return models[0]

    def _check_constants(self) -> None:
        for name, values in (("archive_format", (b"pt2",)), ("archive_version", (b"0",)), ("byteorder", (b"little",))):
            if name not in self.names:
                if name == "byteorder":
                    continue
                raise BadModel("not_pt2", f"the archive has no entry {name!r}, so it is not a .pt2 file: {_AGAIN}")
            found = self.read(name, 64)
            if found.strip() not in values:
                raise Refused(
                    "archive_version", f"{name} is {found!r}, this server reads {values[0].decode()!r}: {_AGAIN}"
                )

    def size(self, name: str) -> int:
        return self.names[name].file_size

    def read(self, name: str, at_most: int) -> bytes:
        if name not in self.names:
            raise BadModel("not_pt2", f"the archive has no entry {name!r}: {_AGAIN}")
        if self.size(name) > at_most:
            raise Refused("too_large", f"the entry {name!r} has {self.size(name)} bytes, at most {at_most} are read")
        return b"".join(self.stream(name))

    def stream(self, name: str) -> Iterator[bytes]:
        """The entry's bytes in chunks, its checksum verified at the end."""
        try:
            with self._zip.open(self.names[name]) as f:
                while chunk := f.read(_CHUNK):
                    yield chunk
        except (
            zipfile.BadZipFile,
            EOFError,
            OSError,
            NotImplementedError,
            RuntimeError,
            ValueError,
            struct.error,
        ) as e:
            raise BadModel("damaged", f"the entry {name!r} is damaged ({e}): upload the file again") from None

    def json(self, name: str) -> Any:
        raw = self.read(name, _JSON_MAX)
        try:
            return json.loads(raw)
        except (ValueError, RecursionError) as e:
            raise Refused("bad_json", f"the entry {name!r} is not usable JSON ({e}): {_AGAIN}") from None
