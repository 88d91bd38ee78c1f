from copy import deepcopy
from typing import Any

import pytest

from benchmarks.papers.table import Settings, Table
from benchmarks.papers.tnet import PAPER, RATIOS, SMALL, Size, _notes, run

TINY = Size(stacks=1, depth=1, features=12, side=32, rows=4, test_rows=3, epochs=1, batch=4, rate=1e-3)


def test_every_form_has_a_row_at_every_ratio_and_the_dense_network_comes_first() -> None:
    grown: list[Table] = []
    run(Settings(seeds=(3,)), lambda table: grown.append(deepcopy(table)), TINY)
    rows = grown[-1].rows
    assert [len(table.rows) for table in grown] == list(range(1, 15))
    assert all(set(row) == set(grown[-1].columns) for row in rows)
    assert rows[0]["kernels"] == "dense"
    assert rows[0]["to dense, points"] is None
    for form in ("joint Tucker", "joint MPS", "layer-wise Tucker"):
        counted = [row["kernels ÷"] for row in rows if row["kernels"] == form]
        assert counted == [pytest.approx(ratio, rel=0.35) for ratio in RATIOS]
    for row in rows:
        assert row["network parameters"] - row["kernel parameters"] == rows[0]["network parameters"] - 6 * 144 * 9
    assert grown[-1].settings["epochs"] == 1


def test_multiplications_are_those_of_the_network_at_inference() -> None:
    tables: list[Table] = []
    run(Settings(), tables.append, TINY)
    dense = tables[-1].rows[0]
    # An image of 32: the stem at 16 × 16, skip at 8 × 8, down and up at 4 × 4, the head at 8 × 8.
    macs = 12 * 3 * 49 * 256 + 2 * 144 * 9 * 64 + 4 * 144 * 9 * 16 + 14 * 12 * 64
    assert dense["MMACs"] == pytest.approx(macs / 1e6)
    tucker = next(row for row in tables[-1].rows if row["kernels"] == "joint Tucker")
    rank = int(tucker["ranks"].split("×")[4])
    small = (2 * 64 + 4 * 16) * (2 * 12 * rank + 9 * rank**2)
    assert tucker["MMACs"] == pytest.approx(dense["MMACs"] + (small - (2 * 64 + 4 * 16) * 144 * 9) / 1e6)


def test_the_papers_size_is_the_papers() -> None:
    assert PAPER.shape == (4, 4, 3, 2, 128, 128, 3, 3)
    assert SMALL.shape[4] < PAPER.shape[4]


def row(kernels: str, ratio: float, points: float | None) -> dict[str, Any]:
    return {"kernels": kernels, "kernels ÷": ratio, "to dense, points": points}


def test_a_claim_that_the_rows_do_not_show_is_said_so() -> None:
    notes = "\n".join(
        _notes(
            [
                row("dense", 1.0, None),
                row("joint Tucker", 1.37, 0.4),
                row("joint Tucker", 3.9, -0.2),
                row("joint Tucker", 10.1, -1.5),
                row("layer-wise Tucker", 1.37, 0.1),
                row("layer-wise Tucker", 3.9, -0.5),
                row("layer-wise Tucker", 9.8, -1.9),
            ]
        )
    )
    assert "Better than dense at small compression, joint Tucker: shown (÷1.35: +0.40)" in notes
    assert "high compression, joint Tucker: NOT shown (÷4: -0.20, ÷10: -1.50)" in notes
    assert "Better than layer-wise Tucker, joint Tucker: shown (÷1.35: +0.30, ÷4: +0.30, ÷10: +0.40)" in notes
    assert "MPS" not in notes


def test_a_claim_is_judged_by_the_mean_of_the_seeds() -> None:
    (claim,) = [
        note
        for note in _notes([row("joint MPS", 1.8, 1.0), row("joint MPS", 1.8, -2.0)])
        if note.startswith("Better than dense")
    ]
    assert "NOT shown (÷1.8: -0.50)" in claim
