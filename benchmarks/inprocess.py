"""A job's search in this very process: ``search.stages.next_work`` says what is next, a ``Session`` does it.

What workers do through the database and the queue, without either: the same functions in the same order.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from search.session import Session
from search.spec import JobSpec, Profile, ProfileWork, Rung, TrialRecord, TrialState, TrialWork
from search.stages import next_work

__all__ = ["Search", "record_of", "search"]


@dataclass
class Search:
    """What a search found, and what it took."""

    profiles: list[Profile] = field(default_factory=list)
    history: list[TrialRecord] = field(default_factory=list)
    weights: dict[int, Path] = field(default_factory=dict)
    """Trial number to the file of its highest rung; a large network's cheap rung keeps none."""
    wall_s: float = 0.0
    cpu_s: float = 0.0
    """Of this process and all its threads: what counts on a machine that others use too."""

    @property
    def profile(self) -> Profile:
        return self.profiles[-1]


def search(session: Session, spec: JobSpec, folder: Path, told: Callable[[Search], None] | None = None) -> Search:
    """Everything up to refining: profiles, candidates and promotions. ``told``: after each piece of work.

    ``folder`` takes the weights. What comes after (checks on the verify split, files) is left to the caller.
    """
    found = Search()
    began, cpu = time.monotonic(), time.process_time()
    while True:
        works = next_work(
            spec,
            found.profiles,
            found.history,
            running=0,
            k=1,
            elapsed_hours=(time.monotonic() - began) / 3600,
            exported=(),
        )
        work = works[0]
        if isinstance(work, ProfileWork):
            parent = None if work.parent is None else found.weights[work.parent]
            found.profiles.append(session.profile(work.stage, parent))
        elif isinstance(work, TrialWork):
            _try(session, found, work, folder / f"{work.number}_{work.rung.value}")
        else:
            return found
        found.wall_s, found.cpu_s = time.monotonic() - began, time.process_time() - cpu
        if told is not None:
            told(found)


def record_of(work: TrialWork, before: TrialRecord | None = None) -> TrialRecord:
    """A trial's row when ``work`` on it begins."""
    return TrialRecord(
        **work.model_dump(exclude={"kind", "epochs"}),
        state=TrialState.RUNNING,
        results={} if before is None else before.results,
    )


def _try(session: Session, found: Search, work: TrialWork, out: Path) -> None:
    before = next((r for r in found.history if r.number == work.number), None)
    parent = None if work.parent is None else found.weights[work.parent]
    # Past the cheap rung a candidate goes on from its own weights, where they were kept.
    weights = None if work.rung is Rung.CHEAP else found.weights.get(work.number)
    result = session.trial(work, found.profile, parent, weights, None, out)
    record = record_of(work, before)
    update = {
        "plan": result.built(record.plan),
        "state": TrialState.DONE,
        "results": {**record.results, work.rung: result},
    }
    record = record.model_copy(update=update)
    found.history = [r for r in found.history if r.number != work.number] + [record]
    if (out / "weights.safetensors").exists():
        found.weights[work.number] = out / "weights.safetensors"
