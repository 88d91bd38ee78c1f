"""The final drop of a candidate, predicted from what is known of it so far.

Rungs differ by tens of points (a network at a quarter of its size: 66 % untrained, 89 % trained), so raw values of
different rungs are never compared; every decision reads ``Predictor.final`` instead. Two Bayesian linear models with
a prior that stands for what we have seen on small networks, so that they work before anything was promoted:

    short drop  ≈ w · (u, s(d), c²)     d: drop without gradient, s(d) = d / (1 + 2d) for it saturates at chance,
                                        c: log compression (mean over parameters and multiply-accumulates)
    final drop  ≈ g · short drop        only where the short rung lost anything; a gain stays a gain

The noise grows with the drop: near the budget's boundary, where the decisions fall, points count most.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from search.front import measured
from search.pace import planned_epochs, short_epochs
from search.spec import FRACTIONS, Cost, JobSpec, Profile, Rung, TrialRecord, TrialResult

__all__ = ["Prediction", "Predictor", "compression", "unit"]

Vector = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Prediction:
    """Of the drop after the whole recipe, in the budget's units."""

    mean: float
    std: float

    def chance(self, max_drop: float) -> float:
        """Probability that the drop stays within ``max_drop``."""
        if self.std <= 0:
            return float(self.mean <= max_drop)
        return 0.5 * math.erfc((self.mean - max_drop) / (self.std * math.sqrt(2)))


def unit(profile: Profile) -> float:
    """The step of drop that matters for this budget: the budget itself, but not below a quarter of a point."""
    return max(profile.max_drop, 0.0025)


def compression(result: TrialResult, profile: Profile) -> float:
    """Mean log of dense cost over kept cost, over parameters and multiply-accumulates; 0 = nothing saved."""
    kept = [result.costs.of(c) / max(profile.costs.of(c), 1.0) for c in (Cost.PARAMETERS, Cost.MACS)]
    return -sum(math.log(max(share, 1e-9)) for share in kept) / len(kept)


class Predictor:
    """Learns from every trial of ``history`` that was taken further; others give it nothing to learn."""

    def __init__(self, spec: JobSpec, profile: Profile, history: Sequence[TrialRecord]) -> None:
        self._profile = profile
        self._trains = spec.fine_tune.trains
        self._unit = unit(profile)
        if not self._trains:
            return
        short = max(short_epochs(spec, profile), 0.1)
        self._short = _ShortModel(short, profile)
        self._short.learn(history)
        self._gain = _Gain(planned_epochs(spec, profile) / short, self._unit)
        self._gain.learn(history)

    def final(self, record: TrialRecord) -> Prediction | None:
        """None when nothing usable was measured yet."""
        best = measured(record)
        if best is None or best.drop is None:
            return None
        if best.rung is Rung.FULL or not self._trains:
            return Prediction(best.drop, 0.0)
        if best.rung is Rung.SHORT:
            return self._gain.apply(Prediction(best.drop, 0.1 * self._unit))
        return self._gain.apply(self._short.predict(best))


class _ShortModel:
    """Drop after the short rung from the drop before any gradient."""

    def __init__(self, epochs: float, profile: Profile) -> None:
        self._profile = profile
        self._unit = unit(profile)
        # Relative losses move further than accuracies: a lost point of accuracy is several per cent of loss.
        scale = 1.0 if profile.metric in FRACTIONS else 5.0
        recovers = float(np.clip(0.25 * epochs**-0.3, 0.05, 0.6))
        self._mean: Vector = np.array([0.0, recovers, 0.015 * scale])
        self._covariance: Vector = np.diag(np.array([0.5, 0.5 * recovers, 0.008 * scale]) ** 2)
        self._noise = 0.4

    def _features(self, cheap: TrialResult) -> Vector:
        drop = max(cheap.drop or 0.0, 0.0)
        return np.array([self._unit, drop / (1.0 + 2.0 * drop), compression(cheap, self._profile) ** 2])

    def learn(self, history: Sequence[TrialRecord]) -> None:
        rows, targets, sigmas = [], [], []
        for record in history:
            cheap, short = measured(record, upto=Rung.CHEAP), record.results.get(Rung.SHORT)
            if cheap is None or short is None or short.drop is None:
                continue
            far = 1.0 if record.stage == self._profile.stage else 3.0  # another start: a hint, not a measurement
            rows.append(self._features(cheap))
            targets.append(short.drop)
            sigmas.append(far * math.hypot(self._noise * self._unit, 0.25 * short.drop))
        if not rows:
            return
        x, y = np.array(rows) / np.array(sigmas)[:, None], np.array(targets) / np.array(sigmas)
        precision = np.linalg.inv(self._covariance)
        covariance = np.linalg.inv(precision + x.T @ x)
        mean = covariance @ (precision @ self._mean + x.T @ y)
        # The noise itself is learnt too (four prior points say 1), so that a steady recipe earns sharp predictions.
        factor = math.sqrt((4.0 + float(np.sum((y - x @ mean) ** 2))) / (4.0 + len(rows)))
        self._mean, self._covariance, self._noise = mean, covariance * factor**2, self._noise * factor

    def predict(self, cheap: TrialResult) -> Prediction:
        x = self._features(cheap)
        mean = float(x @ self._mean)
        noise = math.hypot(self._noise * self._unit, 0.25 * mean)
        return Prediction(mean, math.sqrt(float(x @ self._covariance @ x) + noise**2))


class _Gain:
    """How much of the short rung's drop is left after the whole recipe: one slope, learnt from refined trials."""

    def __init__(self, longer: float, step: float) -> None:
        self._unit = step
        self._mean = max(longer, 1.0) ** -0.3  # ten times the epochs leave half of the drop
        self._variance = (0.5 * self._mean) ** 2 if longer > 1 else 0.01

    def learn(self, history: Sequence[TrialRecord]) -> None:
        for record in history:
            short, full = record.results.get(Rung.SHORT), record.results.get(Rung.FULL)
            if short is None or full is None or short.drop is None or full.drop is None or short.drop <= 0:
                continue
            noise = math.hypot(0.4 * self._unit, 0.25 * full.drop) ** 2
            weight = self._variance * short.drop / (self._variance * short.drop**2 + noise)
            self._mean += weight * (full.drop - self._mean * short.drop)
            self._variance *= 1.0 - weight * short.drop
        self._mean = max(self._mean, 0.0)

    def apply(self, short: Prediction) -> Prediction:
        if short.mean <= 0:
            return Prediction(short.mean, math.hypot(short.std, 0.2 * self._unit))
        spread = math.sqrt(self._variance) * short.mean
        return Prediction(self._mean * short.mean, math.hypot(self._mean * short.std, spread, 0.2 * self._unit))
