"""The end of a job: which candidates get the whole recipe, which one is handed back, and what to tell people.

The budget is judged on the verify split, which nothing before has seen. The chosen candidate is the smallest one that
is predicted to keep the budget; if it fails, the next must be safer for what the check fell short by. At most
``search.checks`` may fail. A success that leaves room may be followed by smaller candidates.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from search.front import is_cheaper, kept, measured, size
from search.pace import full_epochs, out_of_time
from search.predict import Prediction, Predictor
from search.spec import (
    Cost,
    ExportWork,
    Finished,
    JobSpec,
    Metric,
    Outcome,
    Profile,
    RefineWork,
    Rung,
    TrialRecord,
    TrialResult,
    TrialState,
)

__all__ = ["finish", "without_checks"]

_CLIMBS = 2
"""Smaller candidates that may be refined after the first one that kept the budget."""
_WORTH = 0.97
"""A further climb has to promise at least this much of the size of what is kept already."""
_BOLD, _CAREFUL, _SURE = 0.25, 1.0, 2.0
"""Standard deviations of the prediction that count against a candidate: at the first check, at the next ones, and at
the last one, which must not gamble away an answer that is there."""
_BELIEVED = 0.5
"""Of the difference between a check and the select split."""
_HOPELESS = 3.0
"""Standard deviations above the budget beyond which a second check of the same kind would be a waste."""
_AT_ONCE = 2
"""The chosen one and the next safer may be refined side by side."""

_LIVE = (TrialState.QUEUED, TrialState.RUNNING)


def without_checks(record: TrialRecord) -> TrialRecord:
    """As the search may see it: what the final check found must not steer which candidates are made."""
    if record.rung is not Rung.FULL:
        return record
    results = {rung: result for rung, result in record.results.items() if rung is not Rung.FULL}
    rung = Rung.SHORT if Rung.SHORT in results else Rung.CHEAP
    return record.model_copy(update={"results": results, "rung": rung, "state": TrialState.DONE})


def finish(
    spec: JobSpec,
    profile: Profile,
    history: Sequence[TrialRecord],
    *,
    running: int,
    k: int,
    elapsed_hours: float,
    exported: Collection[int],
) -> Sequence[RefineWork | ExportWork | Finished]:
    """What is left to do once no candidate and no promotion is to come. [] = wait."""
    view = _View(spec, profile, history, full_epochs(spec, profile, history, elapsed_hours))
    if not view.candidates and not view.checked:
        return [] if running else [_nothing_to_check(spec, profile, history, elapsed_hours)]
    live = [r for r in view.checked if r.state in _LIVE]
    works = view.to_check(k, len(live))
    if works:
        return [RefineWork(number=record.number, epochs=view.epochs) for record in works]
    if live:
        return []
    if not view.kept:
        return [] if running else [view.not_kept()]
    best = view.kept[0].number
    if best not in exported:
        return [] if running else [ExportWork(number=best)]
    return [] if running else [view.success()]


@dataclass(frozen=True)
class _Candidate:
    record: TrialRecord
    size: float
    """Geometric mean of the shares kept of the minimized costs."""
    final: Prediction

    def at_worst(self, caution: float) -> float:
        return self.final.mean + caution * self.final.std


class _View:
    def __init__(self, spec: JobSpec, profile: Profile, history: Sequence[TrialRecord], epochs: float) -> None:
        self.spec, self.profile, self.history, self.epochs = spec, profile, history, epochs
        self.allowed = _allowed(spec, profile)
        predictor = Predictor(spec, profile, history)
        self.checked = [r for r in history if r.rung is Rung.FULL and (r.state is not TrialState.CANCELLED)]
        self.candidates: list[_Candidate] = []
        for record in history:
            best, final = measured(record), predictor.final(record)
            unusable = record.rung is Rung.FULL or record.state is TrialState.CANCELLED
            if best is None or final is None or unusable or not is_cheaper(best.costs, profile.costs, spec.minimize):
                continue
            self.candidates.append(_Candidate(record, size(best.costs, profile.costs, spec.minimize), final))
        self.candidates.sort(key=lambda c: (c.size, c.final.mean, c.record.number))
        self.kept = sorted((r for r in self.checked if self._keeps(r)), key=lambda r: (self._size(r), r.number))
        self.failed = [r for r in self.checked if r.state not in _LIVE and r not in self.kept]

    def _keeps(self, record: TrialRecord) -> bool:
        full = record.results.get(Rung.FULL)
        return (
            full is not None
            and full.keeps_budget is True
            and is_cheaper(full.costs, self.profile.costs, self.spec.minimize)
        )

    def _size(self, record: TrialRecord) -> float:
        best = measured(record)
        return 1.0 if best is None else size(best.costs, self.profile.costs, self.spec.minimize)

    def to_check(self, k: int, live: int) -> list[TrialRecord]:
        """The next candidates for the whole recipe, at most ``k``."""
        if self.kept:
            room = min(k, 1 - live) if len(self.kept) <= _CLIMBS and self._time_to_climb() else 0
        else:
            room = min(k, min(_AT_ONCE, self.spec.search.parallel) - live)
        room = min(room, self.spec.search.checks - len(self.failed) - live)
        chosen: list[TrialRecord] = []
        limit = self._limit()
        for record in (r for r in self.checked if r.state in _LIVE):
            limit = min(limit, self._expected(record))
        while len(chosen) < room and (candidate := self._next(limit, chosen, live)) is not None:
            chosen.append(candidate.record)
            limit = min(limit, candidate.final.mean - 1e-12)  # beside it, only a safer one
        return chosen

    def _time_to_climb(self) -> bool:
        """Whether the hours leave another candidate at least half of the training that what is kept had."""
        full = self.kept[0].results[Rung.FULL]
        return self.epochs >= full.epochs / 2

    def _limit(self) -> float:
        """The predicted drop that a candidate may have: the budget, and after failed checks safer by what they showed.

        A failed candidate's drop on the select split, less what its check fell short by, is what would have passed if
        both were exact. They are about equally noisy, so half of the way from the budget to there is gone.
        """
        limit = budget = min(self.profile.max_drop, self.allowed)
        for record in self.failed:
            full = record.results.get(Rung.FULL)
            if full is not None and full.drop is not None:
                passing = full.drop - max(_shortfall(self.spec, self.allowed, full), 0.0)
                limit = min(limit, full.drop, (1 - _BELIEVED) * budget + _BELIEVED * passing)
        return limit

    def _expected(self, record: TrialRecord) -> float:
        """Just below the prediction for one that is being refined now."""
        final = Predictor(self.spec, self.profile, self.history).final(record)
        return self.profile.max_drop if final is None else final.mean - 1e-12

    def _next(self, limit: float, chosen: Sequence[TrialRecord], live: int) -> _Candidate | None:
        waiting = [c for c in self.candidates if c.record not in chosen]
        if self.kept:
            return self._smaller(waiting)
        caution = self._caution(len(self.failed) + live + len(chosen))
        sure = next((c for c in waiting if c.at_worst(caution) <= limit), None)
        if sure is not None or not waiting or chosen or live:
            return sure
        # None is likely to keep the budget. The safest is checked all the same: the user asked for an answer.
        safest = min(waiting, key=lambda c: (c.at_worst(caution), c.size, c.record.number))
        hopeless = safest.at_worst(-_HOPELESS) > self.profile.max_drop
        return None if hopeless and self.failed else safest

    def _smaller(self, waiting: Sequence[_Candidate]) -> _Candidate | None:
        """The next climb: the smallest that should keep the budget or, between what is kept and what failed, the one
        nearest to half way. A check is noisy, so what failed says where to stop rather than how far to stay away."""
        top = _WORTH * self._size(self.kept[0])
        bottom = max((share for r in self.failed if (share := self._size(r)) < top), default=0.0)
        budget = min(self.profile.max_drop, self.allowed)
        inside = [c for c in waiting if bottom < c.size < top and c.at_worst(_BOLD) <= budget]
        if bottom == 0.0:
            return inside[0] if inside else None
        return min(inside, key=lambda c: abs(math.log(c.size**2 / (bottom * top))), default=None)

    def _caution(self, before: int) -> float:
        """For the check that comes after ``before`` others."""
        if before >= self.spec.search.checks - 1 > 0:
            return _SURE
        return _BOLD if before == 0 else _CAREFUL

    def success(self) -> Finished:
        best = self.kept[0]
        full = best.results[Rung.FULL]
        dense = self.profile.costs
        smaller = ", ".join(f"{cost.value} {_share(full, self.profile, cost)}" for cost in self.spec.minimize)
        return Finished(
            ok=True,
            code="kept_budget",
            reason=f"Trial {best.number} keeps the budget: {_verified(full, self.allowed)} and keeps {smaller} "
            f"of the original's ({full.costs.parameters:,} of {dense.parameters:,} parameters)."
            + (f" {self._failures()}" if self.failed else ""),
            best=best.number,
        )

    def not_kept(self) -> Finished:
        advice = ["allow a larger max_drop", "give search.trials more candidates"]
        if self.spec.fine_tune.trains:
            trained = max((r.results[Rung.FULL].epochs for r in self.failed if Rung.FULL in r.results), default=0.0)
            more = "fine_tune.epochs" if self.spec.search.hours is None else "search.hours"
            advice.append(f"train longer than {trained:g} epochs ({more})")
        else:
            advice.append("let it train (fine_tune.epochs is 0)")
        return Finished(
            ok=False,
            code="budget_not_kept",
            reason=f"No candidate kept the budget when it was checked on unseen data. {self._failures()} "
            f"The front stays as it is, and any point of it can be exported. What helps: {'; '.join(advice)}.",
        )

    def _failures(self) -> str:
        """Each failed check, in one sentence."""
        said = []
        for record in sorted(self.failed, key=lambda r: r.number):
            full = record.results.get(Rung.FULL)
            if full is None:
                said.append(f"trial {record.number} could not be refined")
            elif full.outcome not in (Outcome.OK, Outcome.DIVERGED):
                said.append(f"trial {record.number}: {full.outcome.value}")
            elif full.keeps_budget:
                said.append(f"trial {record.number} kept the budget but measured not clearly smaller than the original")
            else:
                said.append(f"trial {record.number} fell short: {_verified(full, self.allowed)}")
        return "Checked and not taken: " + "; ".join(said) + "."


def _allowed(spec: JobSpec, profile: Profile) -> float:
    """The drop that the check allows: a ``min_value`` is another drop on the verify split than on the select split."""
    wanted, original = spec.budget.min_value, profile.verify_value
    if wanted is None:
        return profile.max_drop
    if profile.metric is Metric.MSE:
        return wanted / original - 1 if original > 0 else 0.0
    return wanted - original if profile.metric is Metric.OUTPUT_ERROR else original - wanted


def _shortfall(spec: JobSpec, allowed: float, full: TrialResult) -> float:
    """How far a failed check was over the budget, by the figure that decides."""
    if spec.budget.confidence is not None and full.verify_interval is not None:
        return full.verify_interval.high - allowed
    return (full.verify_drop or 0.0) - allowed


def _share(full: TrialResult, profile: Profile, cost: Cost) -> str:
    return f"{100 * kept(full.costs, profile.costs, cost):.1f} %"


def _verified(full: TrialResult, allowed: float) -> str:
    interval = full.verify_interval
    within = f" (95 % between {interval.low:.4f} and {interval.high:.4f})" if interval is not None else ""
    drop = "an unknown drop" if full.verify_drop is None else f"a drop of {full.verify_drop:.4f}{within}"
    return f"it verified with {drop} where {allowed:.4f} is allowed"


def _nothing_to_check(
    spec: JobSpec, profile: Profile, history: Sequence[TrialRecord], elapsed_hours: float
) -> Finished:
    """No candidate is left that may be refined: say which of the reasons it is."""
    costs = " and ".join(cost.value for cost in spec.minimize)
    if any(measured(r) is not None and r.state is not TrialState.CANCELLED for r in history):
        return Finished(
            ok=False,
            code="nothing_smaller",
            reason=f"No candidate measured clearly smaller than the original in {costs} (latency: by more than chance "
            "explains); nothing is handed back, for a network must not grow. Minimize another cost, or allow more "
            "methods and layers.",
        )
    if not history and out_of_time(spec, profile, elapsed_hours):
        return Finished(
            ok=False,
            code="nothing_tried",
            reason=f"No candidate was tried: the search's part of the {spec.search.hours:g} hours was over when the "
            f"network was measured, {elapsed_hours:.2g} hours after the start. Give it more hours: extend the job, or "
            "start another.",
        )
    if not history:
        return Finished(
            ok=False,
            code="nothing_smaller",
            reason=f"No plan makes this network smaller in {costs}: its layers are too small for the methods allowed. "
            "Allow more methods and layers.",
        )
    outcomes = {r.outcome for t in history for r in t.results.values() if r.outcome is not Outcome.OK}
    said = "; ".join(sorted(outcome.value for outcome in outcomes)) or "their tasks failed; the trials say how"
    return Finished(ok=False, code="every_trial_failed", reason=f"All {len(history)} candidates failed: {said}.")
