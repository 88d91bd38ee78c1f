"""The files of an uploaded zip or tar, read in place: nothing is extracted by name, so a path can do no harm, and
what is declared is bounded before it is read.
"""

import errno
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from search.errors import BadData

__all__ = ["damage", "is_tar", "list_files", "read_files"]

MAX_FILES = 5_000_000
MAX_FILE_BYTES = 2 << 30
"""Of one member (a Parquet shard; images are far below)."""
MAX_RATIO, RATIO_ALLOWANCE = 100, 1 << 30
"""Unpacked bytes: at most so many times the upload, plus the allowance. Images and Parquet hardly compress."""
MAX_NAME = 1024
EXTENDED = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
MAX_EXTENDED, MAX_PAX = 1 << 16, 100
"""Bytes of one extended header of a tar, and how many global values they may leave."""
NOISE = ("__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini")

Keep = Callable[[str], bool]


def is_tar(path: Path) -> bool:
    """Whether ``path`` is a tar, plain or compressed, judged by its first header only."""
    try:
        with tarfile.open(path, "r|*", tarinfo=_Header) as archive:
            return archive.next() is not None
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, TypeError):  # TypeError: gzip cut short
        return False


def list_files(path: Path) -> list[str]:
    """Names of the regular files that are not noise, in the archive's order.

    Raises BadData for absolute or climbing names, duplicates, encryption, and declared sizes beyond the bounds.
    """
    names: list[str] = []
    seen: set[str] = set()
    total, most = 0, path.stat().st_size * MAX_RATIO + RATIO_ALLOWANCE
    with damage("the archive"):
        for name, size in _members(path):
            total += size
            if size > MAX_FILE_BYTES or total > most or len(names) > MAX_FILES:
                raise BadData(
                    "archive_too_large",
                    f"the archive unpacks to more than is allowed ({total} bytes at {name[:80]!r} from "
                    f"{path.stat().st_size}); split it, or store the images without packing them twice.",
                )
            if _clean(name, seen):
                names.append(name)
    return names


def read_files(path: Path, keep: Keep) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files that ``keep`` wants, in the archive's order, one in memory at a time."""
    with damage("the archive"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    if not member.filename.endswith("/") and keep(member.filename):
                        with archive.open(member) as stream:
                            yield member.filename, _bounded(stream, member.file_size)
        else:
            for entry, stream in _tar_members(path):
                if keep(entry.name):
                    yield entry.name, _bounded(stream, entry.size)


def _members(path: Path) -> Iterator[tuple[str, int]]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.flag_bits & 1:
                    raise BadData("unsafe_archive", f"{member.filename[:80]!r} is encrypted; pack it without password.")
                if not member.filename.endswith("/"):  # is_dir fails on an empty name
                    yield member.filename, member.file_size
    else:
        for entry, _ in _tar_members(path):
            yield entry.name, entry.size


def _tar_members(path: Path) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """Regular files, in one forward pass; links and devices are passed over."""
    with tarfile.open(path, "r|*", tarinfo=_Header) as archive:
        while (entry := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
            stream = archive.extractfile(entry) if entry.isreg() else None
            if stream is not None:
                yield entry, stream


def _bounded(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size + 1)
    if len(content) != size:
        raise EOFError(f"{len(content)} bytes where {size} were declared")
    return content


def _clean(name: str, seen: set[str]) -> bool:
    """Whether a file counts; raises BadData when its name is none that an honest archive holds."""
    path = PurePosixPath(name)
    if not name or "\\" in name or "\0" in name or path.is_absolute() or ".." in path.parts or len(name) > MAX_NAME:
        raise BadData(
            "unsafe_archive", f"the archive holds a file named {name[:80]!r}; pack it with plain relative names."
        )
    if name in seen:
        raise BadData("unsafe_archive", f"the archive holds {name[:80]!r} twice; pack it again.")
    seen.add(name)
    return not any(part in NOISE or part.startswith("._") for part in path.parts)


class _Header(tarfile.TarInfo):
    """``tarfile`` reads extended headers whole before anybody can look at their size; these are bounded first."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if (self.type in EXTENDED and self.size > MAX_EXTENDED) or len(archive.pax_headers) > MAX_PAX:
            raise BadData(
                "unsafe_archive", f"the archive holds a header of {self.size} bytes; pack it with short plain names."
            )
        if self.type == tarfile.GNUTYPE_SPARSE:
            self._proc_gnusparse_10()
        return super()._proc_member(archive)  # type: ignore[misc,no-any-return]

    def _proc_gnusparse_10(self, *_: object) -> None:
        raise BadData("unsafe_archive", "the archive holds a sparse file, whose map has no bound; pack it without -S.")


@contextmanager
def damage(what: str) -> Iterator[None]:
    """Turns what zipfile, tarfile and the decompressors raise on a damaged file into BadData; a full disk passes.

    Of OSError, those without a number come from a decompressor, and EINVAL from an offset before the file's begin.
    """
    try:
        yield
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        lzma.LZMAError,
        struct.error,
        EOFError,
        UnicodeDecodeError,
        NotImplementedError,
        RuntimeError,
        OSError,
    ) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise BadData("not_a_data_file", f"{what} is damaged ({error}); pack and upload it again.") from error
