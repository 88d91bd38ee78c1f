"""The papers' experiments at the size that this machine allows.

    python -m benchmarks.papers --paper novikov
    python -m benchmarks.papers --paper su --weights ../shared/weights/resnet32_cifar10.safetensors --seeds 0 1

Prints each table as it grows, and writes them all to ``benchmarks/results/paper_<name>.json``.
"""

import argparse
import importlib
import json
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Shown

from benchmarks.machine import machine
from benchmarks.papers.table import Experiment, Settings, Table

PAPERS = ("novikov", "musco", "su", "rstd", "tnet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", choices=PAPERS, required=True)
    parser.add_argument("--epochs", type=float, default=None, help="of every training; default: the experiment's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--weights", type=Path, default=None, help="a trained network to start from")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=("small", "paper"), default="small", help="paper: for a GPU")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    out: Path = arguments.json or Path(f"benchmarks/results/paper_{arguments.paper}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    experiment: Experiment = importlib.import_module(f"benchmarks.papers.{arguments.paper}").run
    console, began, tables = Console(width=120), time.monotonic(), dict[str, Table]()

    def done(table: Table) -> None:
        tables[table.title] = table
        facts = {
            "paper": arguments.paper,
            "date": date.today().isoformat(),
            "machine": machine(),
            "command": _command(arguments),
            "seconds": round(time.monotonic() - began),
        }
        out.write_text(json.dumps({**facts, "tables": [asdict(t) for t in tables.values()]}, indent=1) + "\n")
        console.print(shown(table))

    experiment(Settings.of(arguments), done)
    console.print(f"written to {out}")


def shown(table: Table) -> Shown:
    """The table for a terminal, its notes below."""
    drawn = Shown(title=table.title, caption="\n".join(table.notes) or None)
    for column in table.columns:
        drawn.add_column(column, justify="right")
    for row in table.rows:
        drawn.add_row(*(_text(row.get(column)) for column in table.columns))
    return drawn


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _command(arguments: argparse.Namespace) -> str:
    parts = ["python -m benchmarks.papers --paper", arguments.paper]
    if arguments.epochs is not None:
        parts += ["--epochs", f"{arguments.epochs:g}"]
    parts += ["--seeds", *map(str, arguments.seeds)]
    if arguments.weights is not None:
        parts += ["--weights", arguments.weights.name]
    return " ".join([*parts, "--device", arguments.device, "--size", arguments.size])


if __name__ == "__main__":
    main()
