"""What the search's ladder stands on, measured on small real networks: the recipe, the rungs and the iterations.

    python -m benchmarks.ladder recipe --network mlp_mnist
    python -m benchmarks.ladder rungs --network mlp_mnist --plans 20 --epochs 10
    python -m benchmarks.ladder iterations --network mlp_mnist --epochs 8
    python -m benchmarks.ladder recipe --network resnet20 --weights ../shared/weights/resnet20_cifar10.safetensors

* ``recipe``: one setting of the training changed at a time, at several lengths, from the same candidates.
* ``rungs``: the same candidates after no gradient step, some steps, and ever more epochs: how well does each length
  order them as the longest does? Of candidates of many sizes, and of one size only, which is the harder question.
* ``iterations``: one decomposition and all epochs, against two (MUSCO): to the geometric mean of the sizes first, half
  of the epochs, from that network's dense equivalent on to the end, the other half.

``--rows`` training images (10,000), the held-out ones to choose the best weights, all test images for each row. Rows
are written as they come, so that what was measured before an interruption is there.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import optuna
from optuna.samplers import RandomSampler
from rich.console import Console
from rich.table import Table
from scipy import stats

from benchmarks.candidates import PRETRAINED, Built, Candidates
from benchmarks.machine import machine
from benchmarks.networks import NETWORKS
from benchmarks.no_gradient import plan_at
from search.allocate import predicted
from search.ground import ground_of
from search.predict import Predictor
from search.space import GuidedSpace, at_share, space_for
from search.spec import (
    Budget,
    Cost,
    FineTune,
    JobSpec,
    Plan,
    Rung,
    SearchSpec,
    TrialRecord,
    TrialState,
)

__all__ = ["RECIPES", "correlations", "iterations", "main", "recipe", "rungs"]

Row = dict[str, Any]
Told = Callable[[Row], None]

BASE = FineTune()
"""What the variants differ from: the service's own."""
RECIPES: dict[str, dict[str, float]] = {
    "base": {},
    "weight decay 5e-4": {"weight_decay": 5e-4},
    "distill 0.7": {"distill": 0.7},
    "distill 0.5": {"distill": 0.5},
    "rate 0.0025": {"learning_rate": 0.0025},
    "rate 0.005": {"learning_rate": 0.005},
    "rate 0.01": {"learning_rate": 0.01},
    "rate 0.04": {"learning_rate": 0.04},
    "labels only": {"distill": 0.0},
    "temperature 1": {"temperature": 1.0},
    "temperature 2": {"temperature": 2.0},
    "temperature 4": {"temperature": 4.0},
    "temperature 1, distill 0.5": {"temperature": 1.0, "distill": 0.5},
    "averaged 0.99": {"ema": 0.99},
    "a quarter by blocks": {"sequential": 0.25},
}
SHARES = (0.1, 0.04)
"""Of the cost, kept by the candidates whose recipes and iterations are compared."""


def recipe(candidates: Candidates, options: argparse.Namespace) -> Iterator[Row]:
    """Each variant from the same candidates and batches, the shorter length first."""
    for epochs in options.lengths:
        for seed in range(options.seeds):
            for share in options.shares:
                start = candidates.built(plan_at(candidates.profile, share, 0.5))
                for name in dict.fromkeys(("base", *options.variants)):
                    changed = BASE.model_copy(update=RECIPES[name])
                    done = candidates.trained(start, changed, epochs=epochs, seed=seed)
                    yield {
                        **_sizes(candidates, start),
                        "kept": share,
                        "epochs": epochs,
                        "seed": seed,
                        "recipe": name,
                        "untrained": start.result.value,
                        "select": done.select,
                        "last": done.last,
                        "test": done.test,
                    }


def rungs(candidates: Candidates, options: argparse.Namespace) -> Iterator[Row]:
    """Drops on the select split: ``profile`` is the rise of the loss that the profile predicts, ``prior`` the drop that
    ``search.predict`` expects before it has learnt anything, ``again`` the longest training with another seed."""
    per_epoch = len(candidates.bench.data.train) // BASE.batch_size
    lengths = {"30 steps": 30 / per_epoch, "100 steps": 100 / per_epoch, "300 steps": 300 / per_epoch}
    original = candidates.bench.on_select.value
    predictor = Predictor(candidates.spec, candidates.profile, ())
    for group, number, plan in _drawn(candidates, options.plans, options.level):
        start = candidates.built(plan)
        record = TrialRecord(
            number=0, stage=0, parent=None, params={}, plan=plan, state=TrialState.DONE, rung=Rung.CHEAP,
            results={Rung.CHEAP: start.result},
        )  # fmt: skip
        expected = predictor.final(record)
        row = {
            **_sizes(candidates, start),
            "group": group,
            "number": number,
            "profile": predicted(plan, candidates.profile.sites)[2],
            "no gradient": start.result.drop,
            "prior": None if expected is None else expected.mean,
        }
        for name, epochs in lengths.items():
            if epochs < options.epochs:
                row[name] = original - candidates.trained(start, BASE, epochs=epochs, seed=0).select
        row["full"] = original - candidates.trained(start, BASE, epochs=options.epochs, seed=0).select
        row["again"] = original - candidates.trained(start, BASE, epochs=options.epochs, seed=1).select
        yield row


def _drawn(candidates: Candidates, count: int, level: float) -> Iterator[tuple[str, int, Plan]]:
    """Different plans by chance: of any size, and of one size by turns (so that an interruption leaves both)."""
    space = GuidedSpace(candidates.spec, ground_of(candidates.spec, candidates.profile, None))
    knobs = space.distributions()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    seen: set[str] = set()
    for number in range(count):
        for group in ("any size", "one size"):
            for _ in range(100):
                params = dict(study.ask(knobs).params)
                if group == "one size":
                    params |= {"kept": level, "macs_share": 0.5}
                plan = space.plan(params)
                if repr(plan) not in seen and plan:
                    break
            seen.add(repr(plan))
            yield group, number, plan


def correlations(rows: Sequence[Row]) -> list[Row]:
    """Each rung's rank correlation with the next one and with the longest training, in each group and over all rows."""
    table = []
    order = ("profile", "no gradient", "prior", "30 steps", "100 steps", "300 steps", "full", "again")
    for group in (*dict.fromkeys(row["group"] for row in rows), "all"):
        these = [row for row in rows if group in (row["group"], "all")]
        names = [name for name in order if name in these[0]]
        ladder = [name for name in names if name not in ("prior", "again")]
        for name in names:
            following = ladder[ladder.index(name) + 1] if name in ladder and name != "full" else None
            entry: Row = {"group": group, "rung": name, "plans": len(these), "next": following}
            for label, other in (("next", following), ("full", "full" if name != "full" else None)):
                if other is not None and len(these) > 2:
                    x, y = [r[name] for r in these], [r[other] for r in these]
                    entry[f"spearman_{label}"] = round(float(stats.spearmanr(x, y).statistic), 3)
                    entry[f"kendall_{label}"] = round(float(stats.kendalltau(x, y).statistic), 3)
            table.append(entry)
    return table


def iterations(candidates: Candidates, options: argparse.Namespace) -> Iterator[Row]:
    """One, two and three decompositions at equal epochs in all, to the same share of the cost."""
    for seed in range(options.seeds):
        for share in options.shares:
            for steps in (1, 2, 3):
                yield _stepwise(candidates, share, steps, options.epochs, seed)


def _stepwise(candidates: Candidates, share: float, steps: int, epochs: float, seed: int) -> Row:
    spec, plan, parent = candidates.spec, None, None
    for step in range(steps):
        profile = candidates.session.profile(step, parent) if step else candidates.profile
        ground = ground_of(spec, profile, plan)
        plan = at_share(spec, space_for(spec, ground), share ** ((step + 1) / steps)).plan
        start = candidates.built(plan, profile, parent)
        done = candidates.trained(start, BASE, epochs=epochs / steps, seed=seed)
        parent = done.weights
    return {
        **_sizes(candidates, start),
        "kept": share,
        "steps": steps,
        "epochs": epochs,
        "seed": seed,
        "before_last": start.result.value,
        "select": done.select,
        "test": done.test,
    }


def _sizes(candidates: Candidates, start: Built) -> Row:
    costs, dense = start.result.costs, candidates.profile.costs
    return {
        "parameters_ratio": round(dense.parameters / costs.parameters, 3),
        "macs_ratio": round(dense.macs / max(costs.macs, 1), 3),
    }


# ------------------------------------------------------------------------------------------------ tables


def _recipe_table(rows: Sequence[Row]) -> Table:
    """Differences to the base, paired by candidate and seed, in points of accuracy on the test images."""
    table = _table("Recipe: test accuracy less the base's, points", "epochs", "÷", "runs", *RECIPES)
    for epochs, kept in dict.fromkeys((r["epochs"], r["kept"]) for r in rows):
        these = [r for r in rows if (r["epochs"], r["kept"]) == (epochs, kept)]
        test = {(r["recipe"], r["seed"]): 100 * r["test"] for r in these}
        seeds = {r["seed"] for r in these}
        cells = [f"{mean(v for (name, _), v in test.items() if name == 'base'):.2f}"]
        for name in list(RECIPES)[1:]:
            gains = [test[name, s] - test["base", s] for s in seeds if (name, s) in test]
            cells.append(_spread(gains, "+"))
        table.add_row(f"{epochs:g}", f"{these[0]['parameters_ratio']:.3g}", str(len(seeds)), *cells)
    return table


def _rungs_table(rows: Sequence[Row]) -> Table:
    table = _table("Rank correlation (Spearman, Kendall)", "group", "rung", "plans", "with the next", "with full")
    for entry in correlations(rows):
        cells = [
            f"{entry[f'spearman_{label}']:.2f}, {entry[f'kendall_{label}']:.2f}" if f"spearman_{label}" in entry else ""
            for label in ("next", "full")
        ]
        table.add_row(entry["group"], entry["rung"], str(entry["plans"]), *cells)
    return table


def _iterations_table(rows: Sequence[Row]) -> Table:
    table = _table(
        "Iterations", "kept", "steps", "parameters ÷", "MACs ÷", "before the last training %", "test %", "runs"
    )
    for kept, steps in dict.fromkeys((r["kept"], r["steps"]) for r in rows):
        these = [r for r in rows if (r["kept"], r["steps"]) == (kept, steps)]
        table.add_row(
            f"{kept:g}",
            str(steps),
            f"{mean(r['parameters_ratio'] for r in these):.3g}",
            f"{mean(r['macs_ratio'] for r in these):.3g}",
            f"{100 * mean(r['before_last'] for r in these):.2f}",
            _spread([100 * r["test"] for r in these]),
            str(len(these)),
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Mean, and its standard error where there are several."""
    if not values:
        return ""
    error = f" ± {stdev(values) / math.sqrt(len(values)):.2f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.2f}{error}"


PARTS: dict[str, tuple[Callable[[Candidates, argparse.Namespace], Iterator[Row]], Callable[[Sequence[Row]], Table]]] = {
    "recipe": (recipe, _recipe_table),
    "rungs": (rungs, _rungs_table),
    "iterations": (iterations, _iterations_table),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--network", choices=(*NETWORKS, *PRETRAINED), required=True)
    parser.add_argument("--weights", type=Path, default=None, help=f"of {' or '.join(PRETRAINED)}")
    parser.add_argument("--rows", type=int, default=10_000, help="training images")
    parser.add_argument("--epochs", type=float, default=8.0, help="rungs: of the longest training; iterations: of all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the cost that are kept")
    parser.add_argument(
        "--lengths", type=float, nargs="+", default=(2.0, 8.0), help="recipe: epochs, the shortest first"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=tuple(RECIPES), default=tuple(RECIPES), help="of the recipe, beside the base"
    )
    parser.add_argument("--level", type=float, default=0.1, help="rungs: share kept by the candidates of one size")
    parser.add_argument("--plans", type=int, default=20, help="rungs: candidates of each of the two groups")
    parser.add_argument("--methods", nargs="+", default=None, help="default: all, mixed layer by layer")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    if (options.network in PRETRAINED) != (options.weights is not None):
        parser.error(f"--weights goes with --network {' or '.join(PRETRAINED)}, got --network {options.network}")
    out: Path = options.json or Path(f"benchmarks/results/ladder_{options.part}_{options.network}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    words = " ".join(sys.argv[1:] if arguments is None else arguments)
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.ladder {words}",
        "date": date.today().isoformat(),
        "machine": machine(),
        "rows": [],
    }
    rows, table = PARTS[options.part]
    began = time.process_time()
    with tempfile.TemporaryDirectory(prefix="tenfold-ladder-") as scratch:
        spec = JobSpec(
            budget=Budget(max_drop=0.02),
            minimize=(Cost.PARAMETERS, Cost.MACS),
            methods=tuple(options.methods) if options.methods else "auto",
            fine_tune=BASE.model_copy(update={"epochs": options.epochs}),
            search=SearchSpec(),
        )
        candidates = Candidates.of(options.network, spec, Path(scratch), rows=options.rows, weights=options.weights)
        result["original"] = {"select": candidates.bench.on_select.value, "test": candidates.bench.on_verify.value}
        for row in rows(candidates, options):
            result["rows"].append(row)
            result["cpu_s"] = round(time.process_time() - began, 1)
            out.write_text(json.dumps(result, indent=1) + "\n")
            print(
                f"{result['cpu_s']:.0f} s of processor, row {len(result['rows'])}: {row}", file=sys.stderr, flush=True
            )
    Console(width=140, highlight=False).print(table(result["rows"]))


if __name__ == "__main__":
    main()
