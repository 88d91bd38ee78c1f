"""Limits that every reader shares."""

import shutil
from pathlib import Path

from search.errors import BadData

__all__ = ["KEEP_FREE", "check_room"]

KEEP_FREE = 256 << 20
"""Bytes of disk left alone, so that an upload never fills it."""


def check_room(size: int, folder: Path, what: str) -> None:
    """Raise BadData unless ``size`` bytes fit on the disk of ``folder`` with some to spare."""
    free = shutil.disk_usage(folder).free
    if size > free - KEEP_FREE:
        raise BadData(
            "data_too_large",
            f"{what} needs {size / 1e6:.0f} MB unpacked and {free / 1e6:.0f} MB of disk are free; "
            "upload less data or give the worker a larger disk.",
        )
