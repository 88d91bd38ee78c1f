"""Train, select, verify: which rows learn, which choose, which check at the end (DESIGN 3.4)."""

import numpy as np
from numpy.typing import NDArray

from search.data.raw import Array, Raw, Rows
from search.errors import BadData
from search.spec import DataSpec

__all__ = ["Part", "hold_out", "three_parts"]

Indices = NDArray[np.int64]
Part = tuple[Rows, Indices | None]
"""Stored rows and which of them; None means all, in order."""

VALIDATION = 0.2
"""Share of the training rows that choose, where nothing else is there to do so."""
LEAST = {"train": 8, "select": 2, "verify": 2}
"""Rows below which a part cannot do its work at all."""


def three_parts(raw: Raw, spec: DataSpec) -> dict[str, Part]:
    """``train``, ``select``, ``verify``. Verify is the test split if there is one; else ``spec.test`` of the training
    rows; else half of validation. Validation that is missing is the other half of the test split, unless
    ``spec.validation`` asks for training rows or there is no test split.

    Raises BadData when a split is missing, empty or too small.
    """
    if "train" not in raw.splits:
        raise BadData(
            "empty_split",
            f"there are no training rows, only {sorted(raw.splits)}; add x_train (or a train folder).",
        )
    for name, rows in raw.splits.items():
        if _count(rows) == 0:
            raise BadData("empty_split", f"the {name} split has no rows; fill it, or leave it out to have one made.")
    train, train_rows = raw.splits["train"], None
    verify: Part | None = (raw.splits["test"], None) if "test" in raw.splits else None
    if verify is None and spec.test > 0:
        train_rows, held = hold_out(train, train_rows, spec.test, spec.seed + 1)
        verify = (train, held)
    select: Part | None = (raw.splits["val"], None) if "val" in raw.splits else None
    if select is None and (spec.validation is not None or "test" not in raw.splits):
        share = VALIDATION if spec.validation is None else spec.validation
        share = min(share / (1 - spec.test), 0.9) if train_rows is not None else share
        train_rows, held = hold_out(train, train_rows, share, spec.seed)
        select = (train, held)
    if select is None or verify is None:
        whole = select or verify
        assert whole is not None  # noqa: S101 - without a test split, validation was held out
        kept, held = hold_out(*whole, 0.5, spec.seed + 2)
        select, verify = (whole[0], kept), (whole[0], held)
    parts = {"train": (train, train_rows), "select": select, "verify": verify}
    for name, part in parts.items():
        _check_size(name, part)
    return parts


def hold_out(rows: Rows, among: Indices | None, share: float, seed: int) -> tuple[Indices, Indices]:
    """Split the row numbers ``among`` (all when None) into kept and held out, ``share`` of them held out, each
    sorted; whole-number targets are stratified: every class gives its share, to within one row.
    """
    among = np.arange(_count(rows)) if among is None else among
    generator = np.random.default_rng(seed)
    position = generator.permutation(len(among)).astype(np.float64)
    if rows.target is not None and rows.target.ndim == 1 and rows.target.dtype.kind in "iub":
        position = _within_class(rows.target[among], generator)
    held = round(len(among) * share)
    order = np.argsort(position, kind="stable")
    return np.sort(among[order[held:]]), np.sort(among[order[:held]])


def _within_class(labels: Array, generator: np.random.Generator) -> NDArray[np.float64]:
    """Each row's place in its shuffled class, in [0, 1): sorting by it visits the classes evenly."""
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    place = np.empty(len(labels))
    rank = np.arange(len(labels)) - np.repeat(starts, counts)
    place[by_class] = (rank + np.repeat(generator.random(len(starts)), counts)) / np.repeat(counts, counts)
    return place


def _count(rows: Rows) -> int:
    return len(next(iter(rows.inputs.values())))


def _check_size(name: str, part: Part) -> None:
    rows, chosen = part
    count = _count(rows) if chosen is None else len(chosen)
    if count < LEAST[name]:
        raise BadData(
            "too_few_rows",
            f"{count} rows are left to {name} and at least {LEAST[name]} are needed; upload more data, or change the "
            "split fractions (validation, test).",
        )
