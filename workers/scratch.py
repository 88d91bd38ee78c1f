"""Scratch folders: one for each compute process, gone with it, and swept when their worker was killed.

A folder belongs to the worker that holds a lock on the file beside it. The kernel lets go of the lock when that worker
dies, whatever way it dies, and the next sweep on this host deletes what is left.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from db import blobs
from db.engine import Database

__all__ = ["Scratch", "sweep"]

READ_BYTES = 2**20


class Scratch:
    """A private folder under ``root``, and the way of blobs into it and out of it."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = root / f"run-{secrets.token_hex(8)}"
        self._lock = _locked(_lock_of(self.path))
        self.path.mkdir(mode=0o700)

    def fetch(self, db: Database, blob_id: str) -> str:
        """The name of a file with the blob's content, written once."""
        with self._blobs() as folder:
            if not _is_file(blob_id, folder):
                half = f"{blob_id}.half"
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(half, dir_fd=folder)
                descriptor = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
                with os.fdopen(descriptor, "wb") as out:
                    for chunk in blobs.read(db, blob_id):
                        out.write(chunk)
                os.rename(half, blob_id, src_dir_fd=folder, dst_dir_fd=folder)
        return f"blobs/{blob_id}"

    @contextlib.contextmanager
    def _blobs(self) -> Iterator[int]:
        """A descriptor of the folder of blobs. The child may write here too: a link is followed nowhere, for it would
        lead our own writing out of the jail."""
        with contextlib.suppress(FileExistsError):
            (self.path / "blobs").mkdir()
        folder = os.open(self.path / "blobs", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            yield folder
        finally:
            os.close(folder)

    def store(self, db: Database, name: str) -> str:
        """Keep a file that the child wrote as a blob, and return the blob's id."""
        with self.open(name) as descriptor:
            return blobs.write(db, _chunks(descriptor)).id

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[int]:
        """A descriptor of a regular file in this folder. The child chose the name, so no link is followed on the way.

        Raises ``ValueError`` for a name that leaves the folder and ``OSError`` for what is not a plain file.
        """
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts:
            raise ValueError(f"the compute process named a file outside its folder: {name!r}")
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for part in parts[:-1]:
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = inner
            file = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        finally:
            os.close(folder)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(f"{name!r} is not a plain file")
            yield file
        finally:
            os.close(file)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        _lock_of(self.path).unlink(missing_ok=True)
        os.close(self._lock)


def sweep(root: Path) -> int:
    """Delete the folders of dead workers under ``root``. Returns how many there were."""
    gone = 0
    for lock in root.glob("run-*.lock") if root.is_dir() else ():
        try:
            descriptor = os.open(lock, os.O_RDWR)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)
            gone += 1
        finally:
            os.close(descriptor)
    return gone


def _locked(path: Path) -> int:
    """A held lock on a file that is still there: a sweep may take it away between opening and locking."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _is_file(name: str, folder: int) -> bool:
    try:
        return stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _chunks(descriptor: int) -> Iterator[bytes]:
    while chunk := os.read(descriptor, READ_BYTES):
        yield chunk
