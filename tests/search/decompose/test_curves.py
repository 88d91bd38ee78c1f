"""What the curves are made of: all ranks from one factorization, and few fits for many points."""

import numpy as np
import pytest
import torch
from torch import Tensor

from search.decompose.base import Problem
from search.decompose.projection import alternate, errors_of_inputs, errors_of_ranks, project, refine, solve
from search.decompose.tightening import tightened
from search.spec import CurvePoint

TAPS = 3


def problem(*, white: bool) -> Problem:
    g = torch.Generator().manual_seed(0)
    out, n = 7, 5 * TAPS
    target = torch.randn(out, n, generator=g, dtype=torch.float64)
    rows = torch.rand(out, generator=g, dtype=torch.float64) + 0.5
    mixing = torch.randn(n, n, generator=g, dtype=torch.float64)
    moments = torch.ones(n, dtype=torch.float64) if white else mixing @ mixing.T / n
    return Problem(target, moments, rows, 0.25, 100.0)


@pytest.mark.parametrize("white", [True, False])
def test_one_factorization_tells_the_errors_of_all_input_ranks(white: bool) -> None:
    part = problem(white=white)
    p = project(part, TAPS)
    errors = errors_of_inputs(part, p, TAPS)
    for r in range(1, 6):
        nested = solve(part, p[:r], TAPS)
        assert float(errors[r]) == pytest.approx(part.floor + nested.error(len(nested.gains)), abs=1e-6)


@pytest.mark.parametrize("white", [True, False])
def test_one_factorization_tells_the_errors_of_all_output_ranks(white: bool) -> None:
    part = problem(white=white)
    p = project(part, TAPS)
    errors = errors_of_ranks(part, p, TAPS, [1, 2, 4])
    for r, found in errors.items():
        nested = solve(part, p[:r], TAPS)
        for high in range(1, min(7, r * TAPS) + 1):
            assert float(found[high]) == pytest.approx(part.floor + nested.error(high), abs=1e-6)


def test_an_error_of_the_plain_weight_is_the_one_of_the_rebuilt_weight() -> None:
    part = problem(white=True)
    p, nested = alternate(part, project(part, TAPS)[:2], TAPS, 3, 5)
    weight = torch.einsum("ort,ra->oat", nested.weight(3).reshape(7, 2, TAPS), p).flatten(1)
    assert part.error(weight) == pytest.approx(part.floor + nested.error(3), abs=1e-9)


def test_alternating_in_the_plain_norm_lowers_the_error_of_the_start() -> None:
    part = problem(white=True)
    start = project(part, TAPS)[:2]
    assert alternate(part, start, TAPS, 3, 5)[1].error(3) < 0.999 * solve(part, start, TAPS).error(3)


def test_inputs_that_are_not_orthonormal_explain_as_much_in_the_plain_norm() -> None:
    part = problem(white=True)
    p = project(part, TAPS)[:3]
    mixed = torch.tensor([[2.0, 0.5, 0.0], [0.0, 1.0, 0.3], [0.1, 0.0, 3.0]], dtype=p.dtype) @ p
    assert solve(part, mixed, TAPS).error(4) == pytest.approx(solve(part, p, TAPS).error(4), abs=1e-6)


def test_the_best_inputs_in_the_plain_norm_are_a_least_squares_solution() -> None:
    part = problem(white=True)
    p, nested = project(part, TAPS)[:2], solve(part, project(part, TAPS)[:2], TAPS)
    q = nested.weight(3)
    better = refine(part, p, q, TAPS)
    # Every (output, tap) is an equation in each input's two unknowns.
    equations = (part.rows[:, None, None] * q.reshape(-1, 2, TAPS)).transpose(1, 2).reshape(-1, 2)
    wanted = part.weighed.reshape(-1, 5, TAPS).transpose(1, 2).reshape(-1, 5)
    expected = torch.from_numpy(np.linalg.lstsq(equations.numpy(), wanted.numpy(), rcond=None)[0])
    torch.testing.assert_close(better, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("white", [True, False])
def test_inputs_are_left_alone_where_the_outputs_do_not_see_them(white: bool) -> None:
    part = problem(white=white)
    g = torch.Generator().manual_seed(1)
    seen, p, q = (torch.randn(*size, generator=g, dtype=torch.float64) for size in ((2, 4), (4, 5), (7, 2, TAPS)))

    def error(first: Tensor) -> float:
        """Of a ``first`` (2, 5) right before ``q``."""
        return part.error(torch.einsum("ort,ra->oat", q, first).flatten(1))

    better = refine(part, p, torch.einsum("ort,rs->ost", q, seen).flatten(1), TAPS)
    unseen = torch.linalg.svd(seen).Vh[2:]
    torch.testing.assert_close(unseen @ better, unseen @ p)
    assert error(seen @ better) == pytest.approx(error(refine(part, seen @ p, q.flatten(1), TAPS)), rel=1e-5)
    assert error(seen @ better) < error(seen @ p)
    assert torch.equal(refine(part, p, torch.zeros(7, 4 * TAPS, dtype=p.dtype), TAPS), p)


def points(*errors: float) -> list[CurvePoint]:
    return [CurvePoint(ranks=(i + 1,), parameters=10 * (i + 1), macs=10, error=e) for i, e in enumerate(errors)]


def test_points_between_two_fits_take_the_share_of_the_one_that_gained_less() -> None:
    found = tightened(points(1.1, 0.9, 0.5, 0.3), 0.1, lambda ranks: {1: 0.6, 4: 0.26}[ranks[0]], 2)
    assert [p.error for p in found] == pytest.approx([0.6, 0.1 + 0.8 * 0.8, 0.1 + 0.8 * 0.4, 0.26])


def test_a_fit_that_lost_changes_nothing() -> None:
    assert [p.error for p in tightened(points(0.9, 0.5), 0.0, lambda _: 2.0, 2)] == [0.9, 0.5]


def test_no_fits_and_no_points_are_told_as_they_came() -> None:
    assert tightened([], 0.0, lambda _: 0.0, 3) == ()
    assert tightened(points(0.5), 0.0, lambda _: 0.0, 0) == tuple(points(0.5))
