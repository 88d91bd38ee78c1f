"""Tenfold: hand over a trained network, data and an accuracy budget; get the smallest network that keeps it.

``Client`` (and ``AsyncClient``) submits, watches and downloads; it needs no torch. With torch installed, ``export``
writes the file to upload and ``apply`` rebuilds a compressed network from ``plan.json`` and ``model.safetensors`` for
further training.
"""

from typing import TYPE_CHECKING, Any

from .client import AsyncClient, Client
from .errors import TenfoldError
from .resources import Artifact, AsyncArtifact, AsyncDataset, AsyncJob, AsyncModel, Dataset, Job, Model

if TYPE_CHECKING:
    from .applying import apply
    from .exporting import export

__all__ = [
    "Artifact",
    "AsyncArtifact",
    "AsyncClient",
    "AsyncDataset",
    "AsyncJob",
    "AsyncModel",
    "Client",
    "Dataset",
    "Job",
    "Model",
    "TenfoldError",
    "apply",
    "export",
]

_NEEDS_TORCH = {"export": "exporting", "apply": "applying"}


def __getattr__(name: str) -> Any:
    if name in _NEEDS_TORCH:
        from importlib import import_module

        return getattr(import_module(f".{_NEEDS_TORCH[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
