"""Which sampler finds the budget's boundary first? Equal candidates, several seeds, no fine-tuning.

    python -m benchmarks.samplers --trials 60 --seeds 10
    python -m benchmarks.samplers --network mlp_mnist --max-drop 0.01 --trials 24 --seeds 3

Simulated jobs, or real candidates of a small network (``benchmarks.networks``), each plan built once for all samplers.
Beside the samplers stands the allocator alone, which halves the gap at the boundary for parameters, for
multiply-accumulates and for both, and asks no sampler. After each candidate:

* ``boundary``: hypervolume below (share kept 1, drop = budget) of the candidates that keep the budget, as a share of
  that box; below half of the budget a candidate is no better for it, which is what the search is told, too;
* ``front``: hypervolume below (share kept 1, the accuracy of guessing) of all candidates;
* ``smallest``: geometric mean of the shares kept of the smallest candidate that keeps the budget.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.candidates import Candidates
from benchmarks.machine import machine
from benchmarks.networks import NETWORKS
from benchmarks.no_gradient import plan_at
from benchmarks.simulator import Surface
from search.front import hypervolume, ratios, size
from search.spec import (
    Budget,
    Cost,
    FineTune,
    JobSpec,
    Plan,
    Profile,
    Rung,
    Sampler,
    SearchSpec,
    Space,
    TrialRecord,
    TrialResult,
    TrialState,
    TrialWork,
)
from search.study import next_trials

__all__ = ["Reached", "alone", "curve", "hypervolumes"]

ALONE = "allocator alone"
CHANCE = 0.1
"""Accuracy of a network that guesses one of ten classes."""
MIXES = (0.5, 0.0, 1.0)
"""Weights of multiply-accumulates against parameters that the allocator alone uses."""
LEAST = 0.02
"""Share of the cost below which it does not look."""

Try = Callable[[Plan], tuple[TrialResult, float]]
"""A plan's result at the cheap rung, and its true drop (where the result's own is noisy)."""
Propose = Callable[[Sequence[TrialRecord], int], list[TrialWork]]
"""What to try after a history, at most so many."""


class Reached(NamedTuple):
    boundary: float
    front: float
    smallest: float


def curve(spec: JobSpec, profile: Profile, propose: Propose, tried: Try, trials: int, k: int = 1) -> list[Reached]:
    """What one search has reached after each candidate, ``k`` being asked at a time."""
    history: list[TrialRecord] = []
    at_boundary: list[tuple[float, ...]] = []
    anywhere: list[tuple[float, ...]] = []
    smallest = 1.0
    reached: list[Reached] = []
    room = profile.value - CHANCE
    reference = (1.0,) * (len(spec.minimize) + 1)
    while len(history) < trials and (works := propose(history, min(k, trials - len(history)))):
        for work in works:
            result, drop = tried(work.plan)
            values = work.model_dump(exclude={"kind", "epochs"}) | {
                "state": TrialState.DONE,
                "results": {Rung.CHEAP: result},
            }
            history.append(TrialRecord.model_validate(values))
            shares = ratios(result.costs, profile.costs, spec.minimize)
            at_boundary.append((*shares, max(drop / profile.max_drop, 0.5)))
            anywhere.append((*shares, max(drop, 0.0) / room))
            if drop <= profile.max_drop:
                smallest = min(smallest, size(result.costs, profile.costs, spec.minimize))
            boundary = hypervolume(at_boundary, reference) / 0.5
            reached.append(Reached(boundary, hypervolume(anywhere, reference), smallest))
    return reached


def alone(profile: Profile, history: Sequence[TrialRecord], mixes: Sequence[float] = MIXES) -> list[TrialWork]:
    """The allocator's plan in the middle of the widest gap between a share that keeps the budget and one that fails."""
    gaps = {}
    for mix in mixes:
        kept, beyond = [0.95], [LEAST]
        for record in history:
            drop = record.results[Rung.CHEAP].drop
            if record.params["macs_share"] == mix:
                keeps = drop is not None and drop <= profile.max_drop
                (kept if keeps else beyond).append(float(record.params["kept"]))
        gaps[mix] = (max((s for s in beyond if s < min(kept)), default=LEAST), min(kept))
    mix, (low, high) = max(gaps.items(), key=lambda gap: gap[1][1] / gap[1][0])
    share = math.sqrt(low * high)
    return [
        TrialWork(
            number=len(history),
            stage=profile.stage,
            parent=None,
            params={"kept": share, "macs_share": mix},
            plan=plan_at(profile, share, mix),
            rung=Rung.CHEAP,
        )
    ]


def hypervolumes(
    sampler: Sampler | None,
    seed: int,
    trials: int,
    *,
    space: Space = Space.GUIDED,
    max_drop: float = 0.03,
    blocks: int = 9,
    k: int = 1,
) -> list[float]:
    """``Reached.boundary`` after each candidate of one simulated search; without a sampler, the allocator alone."""
    surface = Surface(seed, blocks=blocks, max_drop=max_drop)
    spec = _spec(max_drop, trials, seed, sampler, space, (Cost.PARAMETERS,))
    return [reached.boundary for reached in _simulated(surface, spec, sampler, trials, k)]


def _simulated(surface: Surface, spec: JobSpec, sampler: Sampler | None, trials: int, k: int = 1) -> list[Reached]:
    profile = surface.profile(0)

    def tried(plan: Plan) -> tuple[TrialResult, float]:
        return surface.result(spec, plan, Rung.CHEAP, {}), surface.drop(plan, 0.0)

    return curve(spec, profile, _proposer(spec, profile, sampler), tried, trials, k)


def _proposer(spec: JobSpec, profile: Profile, sampler: Sampler | None) -> Propose:
    if sampler is None:
        return lambda history, _: alone(profile, history, MIXES if len(spec.minimize) > 1 else (0.0,))
    return lambda history, k: next_trials(spec, profile, history, k)


def _spec(
    max_drop: float, trials: int, seed: int, sampler: Sampler | None, space: Space, minimize: tuple[Cost, ...]
) -> JobSpec:
    return JobSpec(
        budget=Budget(max_drop=max_drop),
        minimize=minimize,
        fine_tune=FineTune(epochs=0),
        search=SearchSpec(trials=trials, seed=seed, sampler=sampler or Sampler.TPE, space=space),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=tuple(NETWORKS), help="default: a simulated one for each seed")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--max-drop", type=float, default=0.03)
    parser.add_argument(
        "--minimize", type=Cost, nargs="+", default=None, help="default: parameters and macs; simulated, parameters"
    )
    parser.add_argument("--space", type=Space, choices=list(Space), default=Space.GUIDED)
    parser.add_argument("--samplers", nargs="+", choices=(ALONE, *Sampler), default=(ALONE, *Sampler))
    parser.add_argument("--methods", nargs="+", default=None, help="of a real network's candidates; default: all")
    parser.add_argument("--rows", type=int, default=10_000, help="training images of a real network")
    parser.add_argument("--json", type=Path, help="write the curves there")
    options = parser.parse_args(arguments)
    real = options.network is not None
    minimize = tuple(options.minimize or ((Cost.PARAMETERS, Cost.MACS) if real else (Cost.PARAMETERS,)))
    words = " ".join(sys.argv[1:] if arguments is None else arguments)
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.samplers {words}",
        "date": date.today().isoformat(),
        "machine": machine(),
        "curves": {name: [] for name in options.samplers},
    }
    with tempfile.TemporaryDirectory(prefix="tenfold-samplers-") as scratch:
        candidates = None
        if real:
            spec = _spec(options.max_drop, options.trials, 0, None, options.space, minimize)
            if options.methods:
                spec = spec.model_copy(update={"methods": tuple(options.methods)})
            candidates = Candidates.of(options.network, spec, Path(scratch), rows=options.rows)
        for seed in range(options.seeds):
            for name in options.samplers:
                sampler = None if name == ALONE else Sampler(name)
                if real and sampler is None and seed:
                    continue  # it has no chance in it
                spec = _spec(options.max_drop, options.trials, seed, sampler, options.space, minimize)
                if candidates is None:
                    reached = _simulated(Surface(seed, max_drop=options.max_drop), spec, sampler, options.trials)
                else:
                    reached = _real(candidates, spec, sampler, options.trials)
                    result["evaluated"] = candidates.evaluated
                result["curves"][name].append([{k: round(v, 4) for k, v in r._asdict().items()} for r in reached])
                print(f"seed {seed}, {name}: {reached[-1]}", file=sys.stderr, flush=True)
                if options.json:
                    options.json.write_text(json.dumps(result) + "\n")
    console = Console(width=120, highlight=False)
    for figure in Reached._fields:
        console.print(_table(figure, result["curves"], options.trials))


def _real(candidates: Candidates, spec: JobSpec, sampler: Sampler | None, trials: int) -> list[Reached]:
    spec = spec.model_copy(update={"methods": candidates.spec.methods})

    def tried(plan: Plan) -> tuple[TrialResult, float]:
        result = candidates.built(plan).result
        return result, 1.0 if result.drop is None else result.drop

    return curve(spec, candidates.profile, _proposer(spec, candidates.profile, sampler), tried, trials)


def _table(figure: str, curves: dict[str, list[list[dict[str, float]]]], trials: int) -> Table:
    """Means over the seeds, and their standard errors."""
    marks = [n for n in (5, 10, 16, 24, 30, 60, 100, 200, 500) if n <= trials]
    table = Table(title=f"{figure}, after so many candidates")
    for column in ("", *map(str, marks)):
        table.add_column(column, justify="right")
    for name, runs in curves.items():
        cells = []
        for n in marks:
            values = [run[min(n, len(run)) - 1][figure] for run in runs]
            error = f" ± {stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{error}" if values else "")
        table.add_row(name, *cells)
    return table


if __name__ == "__main__":
    main()
