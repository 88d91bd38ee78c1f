"""Which candidates are taken from the cheap to the short rung: asynchronous successive halving by what could win.

A third of the cheap candidates may go on. Among those waiting, the one goes first whose chance to keep the budget
times the hypervolume it would add to the confirmed ones is largest; it does not have to wait for the rung to fill.
"""

from collections.abc import Collection, Sequence

from search.front import improvement, is_cheaper, measured, ratios
from search.pace import short_epochs
from search.predict import Prediction, Predictor
from search.spec import JobSpec, Profile, Rung, TrialRecord, TrialState, TrialWork

__all__ = ["has_short_rung", "next_promotions"]

_KEEP = 3
"""One in so many goes on."""
_FIRST = 4
"""Cheap results before the first promotion of a stage."""
_LEAST_CHANCE = 0.1
"""Of keeping the budget; below it a candidate is a moonshot, however much it would save."""
_LEAST_GAIN = 1e-3
"""Expected gain of hypervolume (of the unit box) below which nothing is promoted."""


def has_short_rung(spec: JobSpec, profile: Profile) -> bool:
    return spec.fine_tune.trains and short_epochs(spec, profile) > 0


def next_promotions(
    spec: JobSpec,
    profile: Profile,
    history: Sequence[TrialRecord],
    k: int,
    *,
    complete: bool,
    refined: Collection[int] = (),
) -> list[TrialWork]:
    """Up to ``k`` candidates of ``profile``'s stage to fine-tune for a short while.

    ``complete``: no new candidate will come, so the quota is rounded up, and goes up to half of the candidates while
    none is confirmed to keep the budget. ``refined``: numbers that had the whole recipe already, maybe from the cheap
    rung directly; they must not fall back to a lower one when an extended job has places for more promotions.
    """
    if not has_short_rung(spec, profile) or k <= 0:
        return []
    stage = [r for r in sorted(history, key=lambda r: r.number) if r.stage == profile.stage]
    cheap = [r for r in stage if measured(r) is not None]
    promoted = sum(r.rung is not Rung.CHEAP for r in stage)
    predictor = Predictor(spec, profile, history)
    confirmed = _confirmed(spec, profile, cheap, predictor)
    quota = len(cheap) // _KEEP if len(cheap) >= _FIRST else 0
    if complete:
        quota = max(-(-len(cheap) // _KEEP), min(3, len(cheap)))
        if not confirmed:
            quota = max(quota, len(cheap) // 2)
    waiting = [r for r in cheap if r.rung is Rung.CHEAP and r.state is TrialState.DONE and r.number not in refined]
    waiting = [r for r in waiting if _wins(spec, profile, r)]
    works: list[TrialWork] = []
    for _ in range(min(k, quota - promoted)):
        record = _best(spec, profile, waiting, confirmed, predictor)
        if record is None:
            break
        waiting.remove(record)
        confirmed = [*confirmed, _point(spec, profile, record)]  # so that the next one adds something else
        works.append(
            TrialWork(
                number=record.number,
                stage=record.stage,
                parent=record.parent,
                params=record.params,
                plan=record.plan,
                rung=Rung.SHORT,
                epochs=short_epochs(spec, profile),
            )
        )
    return works


def _best(
    spec: JobSpec,
    profile: Profile,
    waiting: Sequence[TrialRecord],
    confirmed: Sequence[tuple[float, ...]],
    predictor: Predictor,
) -> TrialRecord | None:
    reference = tuple(1.0 for _ in spec.minimize)
    scored: list[tuple[float, float, int, TrialRecord]] = []
    for record in waiting:
        final = predictor.final(record) or Prediction(float("inf"), 0.0)
        gain = improvement(_point(spec, profile, record), confirmed, reference)
        chance = final.chance(profile.max_drop)
        scored.append((chance * gain if chance >= _LEAST_CHANCE else 0.0, -final.mean, -record.number, record))
    if not scored:
        return None
    best = max(scored, key=lambda s: s[:3])
    if best[0] >= _LEAST_GAIN:
        return best[3]
    # Nothing is likely to win. Until something is confirmed, the safest teaches the most and may still do.
    return max(scored, key=lambda s: s[1:3])[3] if not confirmed else None


def _confirmed(
    spec: JobSpec, profile: Profile, cheap: Sequence[TrialRecord], predictor: Predictor
) -> list[tuple[float, ...]]:
    """Cost shares of the fine-tuned candidates that should keep the budget, and of those being fine-tuned now."""
    points = []
    for record in cheap:
        if record.rung is Rung.CHEAP or not _wins(spec, profile, record):
            continue
        live = record.state in (TrialState.QUEUED, TrialState.RUNNING)
        final = predictor.final(record)
        trained = Rung.SHORT in record.results
        if live or (trained and final is not None and final.mean <= profile.max_drop):
            points.append(_point(spec, profile, record))
    return points


def _wins(spec: JobSpec, profile: Profile, record: TrialRecord) -> bool:
    best = measured(record)
    return best is not None and is_cheaper(best.costs, profile.costs, spec.minimize)


def _point(spec: JobSpec, profile: Profile, record: TrialRecord) -> tuple[float, ...]:
    best = measured(record)
    assert best is not None  # noqa: S101 - callers pass measured trials
    return ratios(best.costs, profile.costs, spec.minimize)
