"""How long each rung trains: as long as was asked, or as the hours allow. Imports no torch."""

import statistics
from collections.abc import Sequence

from search.spec import DEFAULT_EPOCHS, JobSpec, Profile, Rung, TrialRecord

__all__ = ["epoch_seconds", "full_epochs", "out_of_time", "planned_epochs", "short_epochs"]

SHORT = 1.0
"""Epochs of a promoted candidate where no hours are given, and the fewest that tell anything: a shorter training ends
beneath a good start whatever its rate, and its time is better spent on the whole recipe."""
LONGEST = {Rung.SHORT: 2.0, Rung.FULL: 300.0}
SHORTEST = 0.1
"""Of the whole recipe."""
SEARCHING = 0.4
"""Share of the hours in which candidates are made and promoted; the rest is for refining."""
PROMOTING = 0.5
"""Share of that which short trainings may take."""
CHECKING = 0.6
"""Share of the time left that one refinement may take, for another may have to follow."""


def out_of_time(spec: JobSpec, profile: Profile, elapsed_hours: float) -> bool:
    """Whether no candidate and no promotion may begin any more."""
    limit = _search_hours(spec, profile)
    return limit is not None and elapsed_hours >= spec.search.hours_before + limit


def short_epochs(spec: JobSpec, profile: Profile) -> float:
    """Of a promoted candidate; a third of them are. 0: the hours do not allow such trainings, and there are none."""
    asked, limit = spec.fine_tune.short_epochs, _search_hours(spec, profile)
    if asked != "auto":
        return asked
    if limit is None or not profile.epoch_seconds:
        return SHORT
    each = PROMOTING * 3600 * limit / max(3.0, spec.search.trials / 3)
    epochs = each / profile.epoch_seconds
    return 0.0 if epochs < SHORT else _rounded(epochs, SHORT, LONGEST[Rung.SHORT])


def planned_epochs(spec: JobSpec, profile: Profile) -> float:
    """Of the whole recipe, as far as it can be told before the search has ended."""
    before = spec.search.hours_before
    return full_epochs(spec, profile, (), before + SEARCHING * (_allowed_hours(spec) or 0.0))


def full_epochs(spec: JobSpec, profile: Profile, history: Sequence[TrialRecord], elapsed_hours: float) -> float:
    """Of a refinement that begins now."""
    asked, hours = spec.fine_tune.epochs, spec.search.hours
    if asked != "auto":
        return asked
    each = epoch_seconds(profile, history)
    if hours is None or not each:
        return DEFAULT_EPOCHS
    left = CHECKING * 3600 * max(hours - elapsed_hours, 0.0)
    return _rounded(left / each, max(SHORTEST, short_epochs(spec, profile)), LONGEST[Rung.FULL])


def epoch_seconds(profile: Profile, history: Sequence[TrialRecord]) -> float:
    """As the trainings of ``history`` took them; before there is one, as the profile timed it. 0: not known."""
    paces = [r.epoch_seconds for record in history for r in record.results.values() if r.epoch_seconds > 0]
    return statistics.median(paces) if paces else profile.epoch_seconds


def _allowed_hours(spec: JobSpec) -> float | None:
    search = spec.search
    return None if search.hours is None else max(0.0, search.hours - search.hours_before)


def _search_hours(spec: JobSpec, profile: Profile) -> float | None:
    """Of the allowed ones."""
    hours, epochs = _allowed_hours(spec), spec.fine_tune.epochs
    if hours is None or not spec.fine_tune.trains:
        return hours
    if epochs == "auto":
        return SEARCHING * hours
    return max(SEARCHING * hours, hours - epochs * profile.epoch_seconds / 3600)


def _rounded(epochs: float, least: float, most: float) -> float:
    """To two digits, for people read it."""
    return float(f"{min(max(epochs, least), most):.2g}")
