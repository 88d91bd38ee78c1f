"""Ask Optuna which candidates to try next. The study is rebuilt from our own rows each time and then forgotten.

What Optuna sees (one objective a minimized cost, and the drop):

* log of the share kept of each cost;
* the *predicted final* drop (``search.predict``), never a raw value of some rung, and not below half of the budget:
  a candidate that keeps the budget with room to spare is no better for it, so the search stays near the boundary;
* a constraint: predicted final drop minus budget (at most zero is feasible).

The same history gives the same asks: each ask is seeded with a hash of the job's seed and the trial's number.
"""

import hashlib
import math
import random
from collections.abc import Sequence
from itertools import islice

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from search.front import measured, ratios, size
from search.ground import Ground, ground_of
from search.moves import MOVED, moved
from search.predict import Predictor, unit
from search.space import LOWEST, Params, SearchSpace, Start, at_share, macs_share, space_for, starts
from search.spec import JobSpec, Outcome, Plan, Profile, Rung, Sampler, TrialRecord, TrialState, TrialWork

__all__ = ["ground_for", "next_trials", "plan_key", "rebuild"]

_ASKS = 6
"""Times the sampler is asked again when it proposes what was tried before; then chance perturbs."""
_PERTURBATIONS = 60
_ALLOCATED = ("allocator", "boundary")
"""Starts of the allocator's own plans, as it would split the cost unasked."""
_FIRST = 2
"""Of the allocator's own plans are measured before the gap between them is halved."""
_CLOSED = 0.93
"""The boundary of the budget is known well enough when the sizes on both its sides are as near as this."""


def plan_key(plan: Plan) -> str:
    """Equal for equal plans, whatever the order of their sites."""
    return repr(
        sorted(
            (site, p.method, p.ranks, sorted(p.options.items()), sorted(p.members.items())) for site, p in plan.items()
        )
    )


def ground_for(spec: JobSpec, profile: Profile, history: Sequence[TrialRecord], parent: int | None) -> Ground:
    plan = next((r.plan for r in history if r.number == parent), None) if parent is not None else None
    return ground_of(spec, profile, plan)


def next_trials(
    spec: JobSpec, profile: Profile, history: Sequence[TrialRecord], k: int, *, parent: int | None = None
) -> list[TrialWork]:
    """Up to ``k`` new candidates of ``profile``'s stage, each at the cheap rung; fewer when the space is exhausted.

    ``parent``: the trial that the stage starts from; the stage's earlier trials know it better. No plan is proposed
    twice in a stage, and none that would not be cheaper than the original in every minimized cost.
    """
    stage = [r for r in sorted(history, key=lambda r: r.number) if r.stage == profile.stage]
    parent = stage[0].parent if stage else parent
    ground = ground_for(spec, profile, history, parent)
    if not ground.sites or k <= 0:
        return []
    proposals = _Proposals(spec, space_for(spec, ground), history, stage)
    first = max((r.number for r in history), default=-1) + 1
    works: list[TrialWork] = []
    for number in range(first, first + k):
        found = proposals.next(number)
        if found is None:
            break
        params, plan = found
        work = TrialWork(number=number, stage=profile.stage, parent=parent, params=params, plan=plan, rung=Rung.CHEAP)
        works.append(work)
    return works


class _Proposals:
    """New plans for one stage: by turns at the boundary of the budget, until that is known, and the first points while
    there are any, then the sampler's; then perturbed by chance."""

    def __init__(
        self, spec: JobSpec, space: SearchSpace, history: Sequence[TrialRecord], stage: Sequence[TrialRecord]
    ) -> None:
        self._spec = spec
        self._space = space
        self._stage = stage
        self._seen = {plan_key(plan) for record in stage for plan in (record.asked, record.plan)}
        share = spec.search.trials // spec.search.stages
        given = islice(starts(spec, space), min(max(share // 3, 2), 10))
        begun = any("start" not in record.params for record in stage)  # the first points come before all others
        self._starts = iter(()) if begun else given
        self._study: optuna.Study | None = None
        self._under_way: list[Params] = []
        self._profile = space.ground.profile
        self._predictor = Predictor(spec, self._profile, history)

    def next(self, number: int) -> tuple[Params, Plan] | None:
        if number % 2 == 0 and (found := self._at_the_boundary(number)) is not None:
            return found
        for start in self._starts:
            if self._is_new(start.plan):
                return self._take(start.params, start.plan)
        for attempt in range(_ASKS):
            params = self._ask(_seed(self._spec, number, attempt))
            plan = self._space.plan(params)
            if self._is_new(plan):
                return self._take(params, plan)
        return self._perturbed(random.Random(_seed(self._spec, number, _ASKS)))  # noqa: S311 - not a secret

    def _at_the_boundary(self, number: int) -> tuple[Params, Plan] | None:
        """The allocator's plan half way between its smallest candidate that should keep the budget and its next
        smaller one that should not: in tens of trials a sampler does not find that boundary, halving does. Once it is
        known, moves of the smallest.

        Only its own count: another's plan of that size that fails says nothing of the allocator's. Sizes are in the
        allocator's own mix of costs, for what is asked of it must lie between what was found.
        """
        ground, mix = self._space.ground, macs_share(self._spec)
        kept: list[float] = []
        beyond: list[float] = []
        for record in self._stage:
            keeps = self._keeps(record)
            if keeps is not None and record.params.get("start") in _ALLOCATED:
                (kept if keeps else beyond).append(ground.share(record.plan, mix))
        if len(kept) + len(beyond) < _FIRST:
            return None
        smallest = min(kept, default=ground.start_share)
        largest = max((share for share in beyond if share < smallest), default=max(ground.least_share, LOWEST))
        if largest > _CLOSED * smallest:
            start = self._moved(number)
        else:
            start = at_share(self._spec, self._space, math.sqrt(smallest * largest))
        return self._take(start.params, start.plan) if start is not None and self._is_new(start.plan) else None

    def _moved(self, number: int) -> Start | None:
        """A move of the smallest of the allocator's candidates, or of their moves, that should keep the budget."""
        able = [
            (size(result.costs, self._profile.costs, self._spec.minimize), record.number, record)
            for record in self._stage
            if (record.params.get("start") in _ALLOCATED or MOVED in record.params)
            and self._keeps(record)
            and (result := measured(record)) is not None
        ]
        return moved(self._spec, self._space, min(able)[-1], self._stage, number) if able else None

    def _keeps(self, record: TrialRecord) -> bool | None:
        """Whether it should keep the budget; None while nothing usable is measured."""
        final = self._predictor.final(record)
        return None if final is None else final.mean <= self._profile.max_drop

    def _is_new(self, plan: Plan) -> bool:
        return plan_key(plan) not in self._seen and self._space.ground.saves(plan, self._spec.minimize)

    def _take(self, params: Params, plan: Plan) -> tuple[Params, Plan]:
        self._seen.add(plan_key(plan))
        self._under_way.append(params)
        if self._study is not None:  # so that the next ask of this batch knows it is under way
            self._study.add_trial(_running(params, self._space.distributions()))
        return params, plan

    def _ask(self, seed: int) -> Params:
        if self._study is None:
            self._study = rebuild(self._spec, self._space, self._predictor, self._stage)
            self._study.add_trials([_running(p, self._space.distributions()) for p in self._under_way])
        self._study.sampler = _sampler(self._spec, seed)
        trial = self._study.ask(self._space.distributions())
        params = dict(trial.params)
        self._study.tell(trial, state=OptunaState.FAIL)  # it comes back as RUNNING if it is taken
        return params

    def _perturbed(self, chance: random.Random) -> tuple[Params, Plan] | None:
        knobs = self._space.distributions()
        for _ in range(_PERTURBATIONS):
            params: Params = {name: _draw(knob, chance) for name, knob in knobs.items()}
            plan = self._space.plan(params)
            if self._is_new(plan):
                return self._take(params, plan)
        return None


def rebuild(spec: JobSpec, space: SearchSpace, predictor: Predictor, stage: Sequence[TrialRecord]) -> optuna.Study:
    """The in-memory study of one stage, in trial-number order."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        directions=["minimize"] * (len(spec.minimize) + 1), sampler=_sampler(spec, spec.search.seed)
    )
    profile = space.ground.profile
    knobs = space.distributions()
    study.add_trials([_frozen(r, i, spec, profile, predictor, knobs) for i, r in enumerate(stage)])
    return study


def _frozen(
    record: TrialRecord,
    position: int,
    spec: JobSpec,
    profile: Profile,
    predictor: Predictor,
    knobs: dict[str, BaseDistribution],
) -> FrozenTrial:
    best, final = measured(record), predictor.final(record)
    if best is None or final is None:
        if any(result.outcome is Outcome.NON_FINITE for result in record.results.values()):
            return _broken(record, position, spec, profile, knobs)
        live = record.state in (TrialState.QUEUED, TrialState.RUNNING)
        return _running(record.params, knobs) if live else create_trial(state=OptunaState.FAIL)
    return _complete(
        record, position, spec, profile, knobs, ratios(best.costs, profile.costs, spec.minimize), final.mean
    )


def _broken(
    record: TrialRecord, position: int, spec: JobSpec, profile: Profile, knobs: dict[str, BaseDistribution]
) -> FrozenTrial:
    """Non-finite outputs: not a failure of the run but the worst of plans, and the sampler should know."""
    costs = next(iter(record.results.values())).costs
    shares = ratios(costs, profile.costs, spec.minimize)
    return _complete(record, position, spec, profile, knobs, shares, profile.max_drop + 100 * unit(profile))


def _complete(
    record: TrialRecord,
    position: int,
    spec: JobSpec,
    profile: Profile,
    knobs: dict[str, BaseDistribution],
    shares: tuple[float, ...],
    drop: float,
) -> FrozenTrial:
    enough = profile.max_drop - 0.5 * unit(profile)
    # NSGA-II reads generations from here; the rows do not keep them, but they follow from the trials' order.
    generation = {"NSGAIISampler:generation": position // _population(spec)}
    return create_trial(
        params=_known(record.params, knobs),
        distributions=knobs,
        values=[*(math.log(max(share, 1e-9)) for share in shares), max(drop, enough)],
        constraints={"budget": drop - profile.max_drop},
        system_attrs=generation,
    )


def _running(params: Params, knobs: dict[str, BaseDistribution]) -> FrozenTrial:
    return create_trial(state=OptunaState.RUNNING, params=_known(params, knobs), distributions=knobs)


def _known(params: Params, knobs: dict[str, BaseDistribution]) -> Params:
    return {name: params[name] for name in knobs}


def _population(spec: JobSpec) -> int:
    return min(max(spec.search.trials // 6, 6), 40)


def _sampler(spec: JobSpec, seed: int) -> BaseSampler:
    match spec.search.sampler:
        case Sampler.TPE:
            return TPESampler(seed=seed, n_startup_trials=6)
        case Sampler.NSGA2:
            return NSGAIISampler(seed=seed, population_size=_population(spec))
        case Sampler.GP:
            return GPSampler(seed=seed, n_startup_trials=6)
        case Sampler.RANDOM:
            return RandomSampler(seed=seed)


def _seed(spec: JobSpec, number: int, attempt: int) -> int:
    digest = hashlib.blake2b(f"{spec.search.seed}/{number}/{attempt}".encode(), digest_size=4)
    return int.from_bytes(digest.digest(), "big")


def _draw(knob: BaseDistribution, chance: random.Random) -> str | int | float | bool:
    match knob:
        case CategoricalDistribution():
            choice: str | int | float | bool = chance.choice(knob.choices)
            return choice
        case FloatDistribution(log=True):
            return math.exp(chance.uniform(math.log(knob.low), math.log(knob.high)))
        case FloatDistribution():
            return chance.uniform(knob.low, knob.high)
    raise TypeError(f"the space has a knob of a kind that is not drawn at random: {knob!r}")
