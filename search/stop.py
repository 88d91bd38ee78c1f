"""When the search of new candidates ends before all trials are used. ``optuna.terminator`` is deprecated."""

from collections.abc import Sequence

from search.front import dominates, hypervolume, is_cheaper, measured, ratios
from search.pace import out_of_time
from search.predict import Predictor
from search.spec import JobSpec, Profile, TrialRecord, TrialState

__all__ = ["patience", "reason_to_stop"]

_LIVE = (TrialState.QUEUED, TrialState.RUNNING)
_FAILURES = 6
"""So many of a stage's latest candidates in a row without anything usable: the next would fail too."""
_GROWTH = 0.002
"""Relative growth of the hypervolume that counts as progress."""


def patience(spec: JobSpec) -> int:
    """Candidates without progress before the search is over; so an extended job always gets on again."""
    return 10 + -(-spec.search.trials // 2)


def reason_to_stop(spec: JobSpec, profile: Profile, history: Sequence[TrialRecord], elapsed_hours: float) -> str | None:
    """A sentence when no new candidate of ``profile``'s stage should be tried; None to go on."""
    if out_of_time(spec, profile, elapsed_hours):
        return f"the search's part of the {spec.search.hours:g} hours is used up"
    stage = [r for r in sorted(history, key=lambda r: r.number) if r.stage == profile.stage]
    ended = [r for r in stage if measured(r) is not None or r.state not in _LIVE]
    latest = ended[-_FAILURES:]
    if len(latest) == _FAILURES and all(measured(r) is None for r in latest):
        return f"the last {_FAILURES} candidates all failed"
    idle = _without_progress(spec, profile, history, ended)
    if idle >= patience(spec):
        return f"{idle} candidates brought nothing better"
    return None


def _without_progress(
    spec: JobSpec, profile: Profile, history: Sequence[TrialRecord], ended: Sequence[TrialRecord]
) -> int:
    """Candidates since the hypervolume of (shares kept) of those predicted to keep the budget last grew."""
    predictor = Predictor(spec, profile, history)
    reference = tuple(1.0 for _ in spec.minimize)
    points: list[tuple[float, ...]] = []
    volume, idle = 0.0, 0
    for record in ended:
        best, final = measured(record), predictor.final(record)
        idle += 1
        if best is None or final is None or final.mean > profile.max_drop:
            continue
        if not is_cheaper(best.costs, profile.costs, spec.minimize):
            continue
        point = ratios(best.costs, profile.costs, spec.minimize)
        if any(other == point or dominates(other, point) for other in points):
            continue
        points = [*(other for other in points if not dominates(point, other)), point]
        grown = hypervolume(points, reference)
        if grown > volume * (1 + _GROWTH):
            volume, idle = grown, 0
    return idle
