"""What every paper's experiment is given and hands back."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Experiment", "Settings", "Table"]


@dataclass(frozen=True)
class Settings:
    """How much of an experiment is run. None: the experiment's own default for this machine."""

    epochs: float | None = None
    seeds: tuple[int, ...] = (0,)
    weights: Path | None = None
    """Trained weights, for the experiments that start from a trained network."""
    device: str = "cpu"
    small: bool = True
    """The size that two cores allow; otherwise the paper's."""

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Settings":
        return cls(
            arguments.epochs, tuple(arguments.seeds), arguments.weights, arguments.device, arguments.size == "small"
        )


@dataclass
class Table:
    """One table of a paper: a list of rows, and what is to be said of them."""

    title: str
    columns: tuple[str, ...]
    """Names with their units; the keys of every row. A published figure has a column of its own."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """One sentence each, claims that the rows do not show among them."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Epochs, seeds, sizes: what must be known to repeat it."""


Experiment = Callable[[Settings, Callable[[Table], None]], None]
"""``run(settings, done)``: calls ``done`` with each table whenever it has grown by a row, so that nothing is lost."""
