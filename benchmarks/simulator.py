"""A synthetic compression problem with the shape of the real one, for studying the search in milliseconds.

A residual network of 19 convolutions and a classifier. Each site has three methods, with error-versus-cost curves of a
power-law spectrum; how much a site's error really hurts differs from the measured sensitivity, and differs again after
training (some layers heal, some do not), so that the allocator's front is good but not the best.
"""

import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from search.pace import planned_epochs
from search.spec import (
    AskedWork,
    Costs,
    CurvePoint,
    ExportWork,
    Finished,
    Interval,
    JobSpec,
    Metric,
    Outcome,
    Plan,
    Profile,
    ProfileWork,
    RefineWork,
    Rung,
    SiteChoice,
    TrialRecord,
    TrialResult,
    TrialState,
    TrialWork,
)
from search.stages import next_work

__all__ = ["Life", "Surface", "live"]

_OTHERWISE = 20.0
"""Seconds of work besides training."""
_CHANCE = 0.8
"""Accuracy lost by a network that only guesses."""


class Surface:
    """The truth: costs and drops of any plan at any rung, the same for the same arguments."""

    def __init__(
        self,
        seed: int = 0,
        *,
        blocks: int = 9,
        max_drop: float = 0.005,
        noise: float = 0.0007,
        epoch_seconds: float = 0.0,
    ) -> None:
        """``epoch_seconds``: of training; 0: all work takes a random time, whatever it is."""
        chance = random.Random(seed)
        self.epoch_seconds = epoch_seconds
        self.max_drop = max_drop
        self._noise = noise
        self._seed = seed
        self._sites: list[SiteChoice] = []
        self._hurts: dict[str, float] = {}
        self._lasting: dict[str, float] = {}
        for i in range(2 * blocks):
            channels, side = ((16, 32), (32, 16), (64, 8))[3 * i // (2 * blocks)]
            self._add(f"layer.{i}.conv", channels, side * side, chance)
        self._parameters = sum(s.dense_parameters for s in self._sites) + 1_500
        self._macs = sum(s.dense_macs for s in self._sites) + 500_000

    def _add(self, name: str, channels: int, positions: int, chance: random.Random) -> None:
        decay = chance.uniform(0.7, 1.6)
        dense = 9 * channels * channels
        sensitivity = math.exp(chance.gauss(0.0, 0.7))
        curves = {
            "svd": self._curve(channels, positions, decay, 1.0, lambda r: 10 * channels * r, lambda r: (r,)),
            "spatial_svd": self._curve(channels, positions, decay, 1.1, lambda r: 6 * channels * r, lambda r: (r,)),
            "tucker2": self._curve(
                channels, positions, decay, 1.3, lambda r: 2 * channels * r + 9 * r * r, lambda r: (r, r)
            ),
        }
        self._sites.append(
            SiteChoice(
                site=name,
                dense_parameters=dense,
                dense_macs=dense * positions,
                curves={m: tuple(p for p in c if p.parameters < dense) for m, c in curves.items()},
                evbmf={"svd": (channels // 3,), "tucker2": (channels // 2, channels // 2)},
                sensitivity=sensitivity,
            )
        )
        self._hurts[name] = sensitivity * math.exp(chance.gauss(0.0, 0.5))
        self._lasting[name] = self._hurts[name] * math.exp(chance.gauss(0.0, 0.6))

    @staticmethod
    def _curve(
        channels: int,
        positions: int,
        decay: float,
        penalty: float,
        parameters: Callable[[int], int],
        ranks: Callable[[int], tuple[int, ...]],
    ) -> tuple[CurvePoint, ...]:
        spectrum = [(i + 1) ** (-2 * decay) for i in range(channels)]
        total = sum(spectrum)
        return tuple(
            CurvePoint(
                ranks=ranks(r),
                parameters=parameters(r),
                macs=parameters(r) * positions,
                error=min(1.0, penalty * sum(spectrum[r:]) / total + 1e-4),
            )
            for r in range(1, channels, max(1, channels // 16))
        )

    def profile(self, stage: int) -> Profile:
        costs = Costs(parameters=self._parameters, macs=self._macs, bytes=4 * self._parameters)
        return Profile(
            stage=stage,
            metric=Metric.ACCURACY,
            value=0.917,
            verify_value=0.915,
            max_drop=self.max_drop,
            costs=costs,
            sites=tuple(self._sites),
            seconds=1.0,
            epoch_seconds=self.epoch_seconds,
        )

    def costs(self, plan: Plan) -> Costs:
        parameters, macs = self._parameters, self._macs
        for site in self._sites:
            if site.site in plan:
                point = self._point(site, plan)
                parameters += point.parameters - site.dense_parameters
                macs += point.macs - site.dense_macs
        return Costs(parameters=parameters, macs=macs, bytes=4 * parameters)

    @staticmethod
    def _point(site: SiteChoice, plan: Plan) -> CurvePoint:
        chosen = plan[site.site]
        return next(p for p in site.curves[chosen.method] if p.ranks == chosen.ranks)

    def drop(self, plan: Plan, epochs: float, rate: float = 1.0) -> float:
        """The true drop after ``epochs`` of training with ``rate`` times the best learning rate; no noise."""
        errors = {s.site: self._point(s, plan).error for s in self._sites if s.site in plan}
        before = sum(self._hurts[name] * error for name, error in errors.items())
        cheap = _CHANCE * (1.0 - math.exp(-0.5 * before**1.2))
        if epochs <= 0:
            return cheap
        kept = self.costs(plan).parameters / self._parameters
        lasting = sum(self._lasting[name] * error**1.5 for name, error in errors.items())
        floor = 0.012 * lasting + 0.004 * math.log(1.0 / kept) ** 2 - 0.003
        healed = 1.0 / (1.0 + 8.0 * epochs)
        return floor * (1.0 + 0.1 * math.log(rate) ** 2) + max(cheap - floor, 0.0) * healed

    def result(
        self, spec: JobSpec, plan: Plan, rung: Rung, params: dict[str, str | int | float | bool], epochs: float = 0.0
    ) -> TrialResult:
        truth = self.drop(plan, epochs, float(params.get("learning_rate_scale", 1.0)))
        chance = random.Random(f"{self._seed}/{sorted(plan.items())}/{rung}")
        drop = truth + chance.gauss(0.0, self._noise)
        seconds = epochs * self.epoch_seconds or 1.0
        result = TrialResult(
            rung=rung,
            value=0.917 - drop,
            drop=drop,
            costs=self.costs(plan),
            seconds=seconds,
            epochs=epochs,
            epoch_seconds=self.epoch_seconds if epochs else 0.0,
        )
        if rung is not Rung.FULL:
            return result
        verified = truth + chance.gauss(0.0, self._noise)
        error = 2 * self._noise
        worst = verified + error if spec.budget.confidence else verified
        return result.model_copy(
            update={
                "verify_value": 0.915 - verified,
                "verify_drop": verified,
                "verify_interval": Interval(low=verified - error, high=verified + error),
                "keeps_budget": worst <= self.max_drop,
            }
        )

    def hours(self, work: AskedWork, chance: random.Random) -> float:
        """That ``work`` takes."""
        if not self.epoch_seconds:
            return chance.expovariate(10.0)
        epochs = work.epochs if isinstance(work, TrialWork | RefineWork) else 0.0
        return chance.uniform(0.9, 1.1) * (_OTHERWISE + epochs * self.epoch_seconds) / 3600


@dataclass
class Life:
    """What a simulated job did."""

    history: dict[int, TrialRecord] = field(default_factory=dict)
    profiles: list[Profile] = field(default_factory=list)
    asked: list[AskedWork] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    exported: list[int] = field(default_factory=list)
    hours: float = 0.0

    @property
    def records(self) -> list[TrialRecord]:
        return [self.history[number] for number in sorted(self.history)]


def live(
    spec: JobSpec,
    surface: Surface,
    *,
    workers: int = 2,
    seed: int = 0,
    failing: float = 0.0,
    life: Life | None = None,
    steps: int = 100_000,
    breaks: Callable[[TrialRecord, Rung], Outcome | None] = lambda record, rung: None,
) -> Life:
    """Drive ``next_work`` as the workers do, tasks ending in a random order, until it says the job is finished.

    ``failing``: chance that a trial's task is given up. ``breaks`` may give a run another outcome.
    """
    chance = random.Random(seed)
    life = life or Life()
    queue: list[tuple[float, int, AskedWork]] = []
    for step in range(steps):
        asked = next_work(
            spec,
            life.profiles,
            life.records,
            running=len(queue),
            k=workers - len(queue),
            elapsed_hours=life.hours,
            exported=life.exported,
        )
        life.asked += asked
        for position, work in enumerate(asked):
            if isinstance(work, Finished):
                if queue or len(asked) != 1:
                    raise RuntimeError(f"finished while {len(queue)} tasks run: {work}")
                life.finished.append(work)
                return life
            _start(life, work)
            heapq.heappush(queue, (life.hours + surface.hours(work, chance), step * 1000 + position, work))
        if len(queue) > workers:
            raise RuntimeError(f"{len(queue)} tasks for {workers} workers")
        if not queue:
            raise RuntimeError("stalled: nothing runs and nothing is asked")
        if not asked or len(queue) == workers:
            life.hours, _, work = heapq.heappop(queue)
            _end(life, work, spec, surface, chance.random() < failing, breaks)
    raise RuntimeError(f"not finished after {steps} steps")


def _start(life: Life, work: AskedWork) -> None:
    if isinstance(work, TrialWork):
        before = life.history.get(work.number)
        if before is None and work.number != len(life.history):
            raise RuntimeError(f"trial {work.number} leaves a gap after {len(life.history)}")
        life.history[work.number] = TrialRecord(
            number=work.number,
            stage=work.stage,
            parent=work.parent,
            params=work.params,
            plan=work.plan,
            state=TrialState.RUNNING,
            rung=work.rung,
            results=before.results if before else {},
        )
    elif isinstance(work, RefineWork):
        update = {"rung": Rung.FULL, "state": TrialState.RUNNING}
        life.history[work.number] = life.history[work.number].model_copy(update=update)


def _end(
    life: Life,
    work: AskedWork,
    spec: JobSpec,
    surface: Surface,
    fails: bool,
    breaks: Callable[[TrialRecord, Rung], Outcome | None],
) -> None:
    if isinstance(work, ProfileWork):
        life.profiles.append(surface.profile(work.stage))
    elif isinstance(work, ExportWork):
        life.exported.append(work.number)
    elif isinstance(work, TrialWork | RefineWork):
        record = life.history[work.number]
        if fails:
            life.history[work.number] = record.model_copy(update={"state": TrialState.FAILED})
            return
        result = surface.result(spec, record.plan, record.rung, record.params, work.epochs)
        outcome = breaks(record, record.rung)
        if outcome is not None:
            result = result.model_copy(update={"outcome": outcome, "value": None, "drop": None, "keeps_budget": None})
        results = {**record.results, record.rung: result}
        life.history[work.number] = record.model_copy(update={"state": TrialState.DONE, "results": results})


def feasible_shares(life: Sequence[TrialRecord], surface: Surface, spec: JobSpec) -> list[float]:
    """Of each candidate in order: the share of the cost it truly keeps if it truly keeps the budget, else 1."""
    shares, epochs = [], planned_epochs(spec, surface.profile(0))
    for record in life:
        truth = surface.drop(record.plan, epochs, float(record.params.get("learning_rate_scale", 1.0)))
        share = surface.costs(record.plan).parameters / surface.profile(0).costs.parameters
        shares.append(share if truth <= surface.max_drop else 1.0)
    return shares
