"""Exported files are offered only after a clean process loaded them and measured what they answer."""

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Protocol

from db.engine import Database
from db.tasks import NewArtifact
from search.spec import ExportFormat
from workers.scratch import Scratch
from workers.supervise import Crashed, Failed

__all__ = ["Ask", "checked_artifacts"]

TOLERANCE = 1e-3
"""Largest difference allowed between a reloaded file's answers and the network's, relative to the largest answer."""
MEDIA_TYPES = {
    ".pt2": "application/zip",
    ".onnx": "application/octet-stream",
    ".safetensors": "application/octet-stream",
    ".json": "application/json",
    ".html": "text/html; charset=utf-8",
    ".npz": "application/zip",
    ".py": "text/x-python; charset=utf-8",
}


class Ask(Protocol):
    """Has a child process do one thing."""

    def __call__(self, operation: str, arguments: Mapping[str, Any], /) -> Any: ...


def checked_artifacts(
    files: Sequence[Mapping[str, Any]], folder: str, db: Database, scratch: Scratch, ask_clean: Ask
) -> list[NewArtifact]:
    """The files of ``folder`` as artifacts, each with what reloading it found. ``files``: ``{"format", "filename"}``.

    Raises ``Failed`` (``export_differs``) when a file does not answer as the network it was made of, and ``Crashed``
    when it does not load.
    """
    names = [_plain(file) for file in files]
    loadable = [name for name in names if PurePosixPath(name).suffix in (".pt2", ".onnx")]
    found = ask_clean("reload", {"command": [str(scratch.path / folder)]}) if loadable else {}
    for name in loadable:
        _require_equal(name, found.get(name))
    return [
        NewArtifact(
            format=ExportFormat(file["format"]),
            filename=name,
            media_type=MEDIA_TYPES.get(PurePosixPath(name).suffix, "application/octet-stream"),
            blob_id=scratch.store(db, f"{folder}/{name}"),
            facts=dict(file.get("facts") or {}) | dict(found.get(name) or {}),
        )
        for name, file in zip(names, files, strict=True)
    ]


def _plain(file: Mapping[str, Any]) -> str:
    name = str(file["filename"])
    if name != PurePosixPath(name).name or not name.isprintable() or len(name) > 255:
        raise Crashed(f"the compute process named a file {name!r}, which is not a plain name")
    return name


def _require_equal(name: str, facts: Mapping[str, Any] | None) -> None:
    if facts is None:
        raise Crashed(f"{name} was not loaded by the clean process")
    difference = facts.get("max_difference")
    allowed = TOLERANCE * max(1.0, float(facts.get("largest_answer") or 0.0))
    if difference is None or not math.isfinite(difference) or difference > allowed:
        raise Failed(
            "export_differs",
            f"{name}, loaded in a clean process, answers with a difference of {difference} where {allowed:.2g} is "
            "allowed: it was not offered. Export another trial, or other formats.",
        )
