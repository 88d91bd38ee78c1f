"""Which sampler finds the budget's boundary first? Simulated jobs, equal candidates, several seeds.

    python -m benchmarks.samplers --trials 60 --seeds 10 --json samplers.json

The figure after n candidates is the hypervolume below (share kept 1, drop = budget) of the candidates that truly keep
the budget, as a share of that whole box. No fine-tuning, so that nothing but the proposals differs.
"""

import argparse
import json
import statistics
from pathlib import Path

from benchmarks.simulator import Surface
from search.front import hypervolume, ratios
from search.spec import Budget, FineTune, JobSpec, Rung, Sampler, SearchSpec, Space, TrialRecord, TrialState
from search.study import next_trials

__all__ = ["compare", "hypervolumes"]


def hypervolumes(
    sampler: Sampler,
    seed: int,
    trials: int,
    *,
    space: Space = Space.GUIDED,
    max_drop: float = 0.03,
    blocks: int = 9,
    k: int = 1,
) -> list[float]:
    """After each candidate of one simulated search, the share of the box between nothing saved and all saved."""
    surface = Surface(seed, blocks=blocks, max_drop=max_drop)
    spec = JobSpec(
        budget=Budget(max_drop=max_drop),
        fine_tune=FineTune(epochs=0),
        search=SearchSpec(trials=trials, seed=seed, sampler=sampler, space=space),
    )
    profile = surface.profile(0)
    history: list[TrialRecord] = []
    points: list[tuple[float, ...]] = []
    volumes: list[float] = []
    while len(history) < trials:
        for work in next_trials(spec, profile, history, min(k, trials - len(history))):
            result = surface.result(spec, work.plan, Rung.CHEAP, work.params)
            values = work.model_dump(exclude={"kind", "epochs"}) | {
                "state": TrialState.DONE,
                "results": {Rung.CHEAP: result},
            }
            history.append(TrialRecord.model_validate(values))
            # Below half of the budget a candidate is no better for it: that is what the search is told, too.
            drop = max(surface.drop(work.plan, 0.0) / max_drop, 0.5)
            points.append((*ratios(result.costs, profile.costs, spec.minimize), drop))
            volumes.append(hypervolume(points, (1.0, 1.0)) / 0.5)
    return volumes


def compare(samplers: list[Sampler], seeds: int, trials: int, space: Space) -> dict[str, list[float]]:
    """Sampler to its mean hypervolume after each candidate."""
    means: dict[str, list[float]] = {}
    for sampler in samplers:
        runs = [hypervolumes(sampler, seed, trials, space=space) for seed in range(seeds)]
        means[sampler.value] = [statistics.mean(column) for column in zip(*runs, strict=True)]
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--space", type=Space, choices=list(Space), default=Space.GUIDED)
    parser.add_argument("--samplers", type=Sampler, nargs="+", default=list(Sampler))
    parser.add_argument("--json", type=Path, help="write the curves there")
    arguments = parser.parse_args()
    means = compare(arguments.samplers, arguments.seeds, arguments.trials, arguments.space)
    marks = [n for n in (10, 20, 30, 60, 100, 200, 500) if n <= arguments.trials]
    print("after candidates", *(f"{n:>6}" for n in marks))
    for name, curve in means.items():
        print(f"{name:<16}", *(f"{curve[n - 1]:6.3f}" for n in marks))
    if arguments.json:
        arguments.json.write_text(json.dumps(means))


if __name__ == "__main__":
    main()
