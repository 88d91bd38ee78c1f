"""The ladder's studies and the samplers' on a network that takes a second."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import ladder
from benchmarks.candidates import Candidates
from benchmarks.no_gradient import plan_at
from benchmarks.samplers import alone, curve, hypervolumes
from search.session import Session
from search.spec import Budget, Cost, Costs, DataSpec, FineTune, JobSpec, Plan, Rung, TrialRecord, TrialResult

pytestmark = pytest.mark.usefixtures("short_measurements")


@pytest.fixture(scope="module")
def candidates(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Candidates:
    spec = JobSpec(budget=Budget(max_drop=0.05), minimize=(Cost.PARAMETERS, Cost.MACS), methods=("svd",))
    scratch = tmp_path_factory.mktemp("candidates")
    session = Session(*files, data_spec=DataSpec(), spec=spec, scratch=scratch / "session")
    return Candidates(session, spec, scratch)


def options(**values: object) -> argparse.Namespace:
    return argparse.Namespace(
        **{"seeds": 1, "shares": (0.4,), "variants": tuple(ladder.RECIPES), "epochs": 2.0, "lengths": (1.0,), **values}
    )


def cost(row: ladder.Row) -> float:
    """Share kept, parameters and multiply-accumulates alike."""
    share: float = (1 / row["parameters_ratio"] + 1 / row["macs_ratio"]) / 2
    return share


def test_a_plan_is_built_once(candidates: Candidates) -> None:
    plan = plan_at(candidates.profile, 0.5)
    first = candidates.built(plan)
    count = candidates.evaluated
    assert candidates.built(dict(reversed(plan.items()))) is first
    assert candidates.evaluated == count
    assert first.result.costs.parameters <= 0.5 * candidates.profile.costs.parameters


def test_training_starts_from_the_candidate_and_leaves_it_as_it_was(candidates: Candidates) -> None:
    start = candidates.built(plan_at(candidates.profile, 0.15))
    before = start.weights.read_bytes()
    done = candidates.trained(start, FineTune(learning_rate=0.05), epochs=3, seed=0)
    assert start.weights.read_bytes() == before
    assert start.result.value is not None
    assert done.last is not None
    assert done.last != start.result.value
    assert done.select == max(start.result.value, done.select)


def test_recipes_start_from_the_same_candidate_and_differ_in_what_they_say(candidates: Candidates) -> None:
    rows = list(ladder.recipe(candidates, options(shares=(0.15,), lengths=(0.5,))))
    assert [r["recipe"] for r in rows] == list(ladder.RECIPES)
    assert len({(r["parameters_ratio"], r["untrained"]) for r in rows}) == 1
    assert len({r["last"] for r in rows}) > 1


def test_candidates_of_one_size_are_of_one_size_and_no_plan_comes_twice(candidates: Candidates) -> None:
    rows = list(ladder.rungs(candidates, options(plans=3, level=0.3)))
    assert [r["group"] for r in rows] == ["any size", "one size"] * 3
    level = [cost(r) for r in rows if r["group"] == "one size"]
    assert all(0.2 < share <= 0.301 for share in level)
    assert all({"profile", "no gradient", "prior", "full", "again"} <= row.keys() for row in rows)


def test_a_rung_that_orders_as_the_longest_training_does_correlates_fully() -> None:
    drops = [0.1, 0.4, 0.2, 0.3]
    rows = [{"group": "g", "no gradient": d**2, "30 steps": -d, "full": d, "again": d} for d in drops]
    table = {entry["rung"]: entry for entry in ladder.correlations(rows)}
    assert table["no gradient"]["spearman_full"] == 1.0
    assert table["no gradient"]["kendall_next"] == -1.0
    assert table["30 steps"]["next"] == "full"
    assert table["30 steps"]["spearman_full"] == -1.0
    assert table["again"]["kendall_full"] == 1.0


def test_iterations_end_at_the_same_size_and_share_the_epochs(candidates: Candidates) -> None:
    rows = list(ladder.iterations(candidates, options(shares=(0.3,))))
    assert [r["steps"] for r in rows] == [1, 2, 3]
    assert all(0.2 < cost(r) <= 0.301 for r in rows)
    assert all(r["epochs"] == 2.0 for r in rows)


def test_the_allocator_alone_halves_the_widest_gap(candidates: Candidates) -> None:
    profile = candidates.profile
    first = alone(profile, ())[0]
    assert float(first.params["kept"]) == pytest.approx((0.95 * 0.02) ** 0.5)
    result = candidates.built(first.plan).result
    record = TrialRecord(
        **first.model_dump(exclude={"kind", "epochs"}),
        state="done",
        results={Rung.CHEAP: result.model_copy(update={"drop": 0.5})},
    )
    again = alone(profile, (record,), mixes=(0.5,))[0]
    assert float(again.params["kept"]) == pytest.approx((0.95 * float(first.params["kept"])) ** 0.5)
    assert alone(profile, (record,))[0].params["macs_share"] == 0.0


def test_what_is_reached_counts_only_what_keeps_the_budget(candidates: Candidates) -> None:
    profile = candidates.profile
    dense = profile.costs

    def tried(plan: Plan) -> tuple[TrialResult, float]:
        half = Costs(parameters=dense.parameters // 2, macs=dense.macs // 2, bytes=4)
        drop = next(drops)
        return TrialResult(rung=Rung.CHEAP, value=profile.value - drop, drop=drop, costs=half, seconds=0.0), drop

    drops = iter((2 * profile.max_drop, 0.0))
    reached = curve(candidates.spec, profile, lambda history, _: alone(profile, history), tried, 2)
    assert reached[0].boundary == 0.0
    assert reached[0].smallest == 1.0
    assert reached[0].front > 0.0
    assert reached[1].boundary == pytest.approx(0.25, abs=0.01)
    assert reached[1].smallest == pytest.approx(0.5, abs=0.01)


def test_the_allocator_alone_reaches_the_simulated_boundary() -> None:
    assert hypervolumes(None, 0, 8, blocks=4)[-1] > 0.3


def test_rows_are_written_as_json(candidates: Candidates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Candidates, "of", classmethod(lambda cls, *_, **__: candidates))
    out = tmp_path / "results" / "recipe.json"
    words = "recipe --network mlp_mnist --shares 0.4 --lengths 1 --variants base --json"
    ladder.main([*words.split(), str(out)])
    written = json.loads(out.read_text())
    assert [row["recipe"] for row in written["rows"]] == ["base"]
    assert written["original"].keys() == {"select", "test"}
