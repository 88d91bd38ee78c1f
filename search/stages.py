"""The whole life of a job after inspection, as one pure function of its rows.

::

    profile → candidates ⇄ promotions → (profile of the next stage → …) → refine → export → finished

The caller commits what is asked here and calls again whenever anything ends; nothing is remembered in between.
"""

from collections.abc import Collection, Sequence

from search.finish import finish, without_checks
from search.front import is_cheaper, measured, size
from search.pace import out_of_time
from search.predict import Predictor
from search.promote import has_short_rung, next_promotions
from search.spec import AskedWork, Finished, JobSpec, Profile, ProfileWork, Rung, TrialRecord, TrialState, TrialWork
from search.stop import reason_to_stop
from search.study import ground_for, next_trials

__all__ = ["next_work"]

_LIVE = (TrialState.QUEUED, TrialState.RUNNING)
_LEAST_TRIALS = 3
"""A stage with fewer candidates than this is not worth its profile."""


def next_work(
    spec: JobSpec,
    profiles: Sequence[Profile],
    history: Sequence[TrialRecord],
    *,
    running: int,
    k: int,
    elapsed_hours: float,
    exported: Sequence[int],
    failed_profiles: Collection[int] = (),
) -> list[AskedWork]:
    """What to start now; [] = wait for what is running.

    Args:
        profiles: those measured so far, one a stage.
        history: every trial of the job.
        running: tasks of the job that are queued or running, of whatever kind.
        k: free places; no more than ``k`` pieces of work are asked.
        elapsed_hours: since the search began.
        exported: trials whose files exist.
        failed_profiles: stages whose profile was given up; the first stage's must fail the job instead.

    Returns:
        ``ProfileWork``, new or promoted ``TrialWork``, ``RefineWork``, ``ExportWork``; ``[Finished]`` alone and only
        when nothing is running.
    """
    if k <= 0:
        return []
    ordered = sorted(profiles, key=lambda p: p.stage)
    if not ordered:
        return [] if running else [ProfileWork(stage=0, parent=None)]
    history = _settled(sorted(history, key=lambda r: r.number), running)
    profile = ordered[-1]
    seen = [without_checks(record) for record in history]
    if not ground_for(spec, ordered[0], seen, None).sites:
        return [] if running else [_nothing_to_compress(spec, ordered[0])]
    parent = _parent(spec, ordered[-2], seen) if len(ordered) > 1 else None
    onward = _next_stage(spec, profile, seen, elapsed_hours, failed_profiles)
    refined = {record.number for record in history if record.rung is Rung.FULL}
    works = _search(spec, profile, seen, k, elapsed_hours, parent, onward is not None, refined)
    if works:
        return list(works)
    if any(r.state in _LIVE and r.rung is not Rung.FULL for r in history):
        return []
    if onward is not None:
        return [] if running else [onward]
    return list(finish(spec, profile, history, running=running, k=k, elapsed_hours=elapsed_hours, exported=exported))


def _settled(history: Sequence[TrialRecord], running: int) -> list[TrialRecord]:
    """When no task is left, a trial that still looks alive lost its task: it failed."""
    if running:
        return list(history)
    return [r.model_copy(update={"state": TrialState.FAILED}) if r.state in _LIVE else r for r in history]


def _search(
    spec: JobSpec,
    profile: Profile,
    history: Sequence[TrialRecord],
    k: int,
    elapsed_hours: float,
    parent: int | None,
    goes_on: bool,
    refined: Collection[int],
) -> list[TrialWork]:
    """Promotions first, for they teach what the budget allows; then new candidates for the places left."""
    left = _quota(spec, profile, history, goes_on) - sum(r.stage == profile.stage for r in history)
    asking = left > 0 and reason_to_stop(spec, profile, history, elapsed_hours) is None
    if not asking and out_of_time(spec, profile, elapsed_hours):
        return []
    works = next_promotions(spec, profile, history, k, complete=not asking, refined=refined)
    if asking:
        works += next_trials(spec, profile, history, min(k - len(works), left), parent=parent)
        if not works:  # the space is exhausted
            works = next_promotions(spec, profile, history, k, complete=True, refined=refined)
    return works


def _stages(spec: JobSpec, profile: Profile) -> int:
    """Iterations that make sense: each needs a fine-tuned network to start from, and a few candidates."""
    if not has_short_rung(spec, profile):
        return 1
    return max(1, min(spec.search.stages, spec.search.trials // _LEAST_TRIALS))


def _quota(spec: JobSpec, profile: Profile, history: Sequence[TrialRecord], goes_on: bool) -> int:
    """Candidates of this stage: its equal share of what earlier stages left, or all of it if none follows."""
    left = spec.search.trials - sum(r.stage < profile.stage for r in history)
    return -(-left // (_stages(spec, profile) - profile.stage)) if goes_on else left


def _next_stage(
    spec: JobSpec,
    profile: Profile,
    history: Sequence[TrialRecord],
    elapsed_hours: float,
    failed_profiles: Collection[int],
) -> ProfileWork | None:
    """The profile to measure next, if another stage can follow this one."""
    stage = profile.stage + 1
    if stage >= _stages(spec, profile) or stage in failed_profiles or out_of_time(spec, profile, elapsed_hours):
        return None
    share = _quota(spec, profile, history, True)
    used = sum(r.stage == profile.stage for r in history)
    before = sum(r.stage < profile.stage for r in history)
    if spec.search.trials - before - max(share, used) < _LEAST_TRIALS:
        return None
    parent = _parent(spec, profile, history)
    return None if parent is None else ProfileWork(stage=stage, parent=parent)


def _parent(spec: JobSpec, profile: Profile, history: Sequence[TrialRecord]) -> int | None:
    """The network that the stage after ``profile``'s starts from: the smallest fine-tuned one that keeps the budget.

    One that measured within the budget is preferred to one that is only predicted to come within it.
    """
    predictor = Predictor(spec, profile, history)
    ranked: list[tuple[bool, float, int]] = []
    for record in history:
        short, final = record.results.get(Rung.SHORT), predictor.final(record)
        if (
            record.stage != profile.stage
            or short is None
            or short.drop is None
            or final is None
            or measured(record) != short
        ):
            continue
        if final.chance(profile.max_drop) > 0.6 and is_cheaper(short.costs, profile.costs, spec.minimize):
            beyond = short.drop > profile.max_drop
            ranked.append((beyond, size(short.costs, profile.costs, spec.minimize), record.number))
    return min(ranked)[2] if ranked else None


def _nothing_to_compress(spec: JobSpec, profile: Profile) -> Finished:
    found = len(profile.sites)
    return Finished(
        ok=False,
        code="no_compressible_layer",
        reason=f"Of {found} compressible layers none is left by layers.include {list(spec.layers.include)}, "
        f"layers.exclude {list(spec.layers.exclude)} and methods {spec.methods!r}; widen them."
        if found
        else "The network has no layer that the methods can make smaller; its layer table says why, one by one.",
    )
