"""A small real network and its candidates, each plan built once: what the studies of the search have in common."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from benchmarks.datasets import prepare
from benchmarks.networks import NETWORKS, trained
from benchmarks.no_gradient import AUGMENTED
from search.bench import Bench, read_weights
from search.export import save_weights
from search.precision import Precision
from search.schedule import train
from search.session import Session
from search.spec import DataSpec, FineTune, JobSpec, Plan, Profile, Rung, TrialResult, TrialWork
from search.study import plan_key

__all__ = ["PRETRAINED", "Built", "Candidates", "Trained"]


PRETRAINED = ("resnet20", "resnet32")
"""CIFAR-10 networks that come as weights of a known architecture."""


@dataclass(frozen=True)
class Built:
    """A candidate without a gradient step."""

    result: TrialResult
    weights: Path


@dataclass(frozen=True)
class Trained:
    """Accuracies, fractions of 1."""

    select: float
    last: float | None
    """On the select split, of the last weights; the others are of the best ones, which may be those before training."""
    test: float
    weights: Path


class Candidates:
    """Those of a job's model and data. Choices see the select split, ``Trained.test`` the verify split."""

    def __init__(self, session: Session, spec: JobSpec, scratch: Path) -> None:
        self.session, self.spec, self._scratch = session, spec, scratch
        self._built: dict[str, Built] = {}
        self._trainings = 0

    @classmethod
    def of(cls, name: str, spec: JobSpec, scratch: Path, *, rows: int, weights: Path | None = None) -> "Candidates":
        """Of a network of ``benchmarks.networks``, or a pretrained one from its ``weights``, with the first ``rows`` of
        its training images."""
        data, data_spec = (
            ("cifar10", DataSpec(transform=AUGMENTED)) if weights else (NETWORKS[name].data, NETWORKS[name].spec)
        )
        session = Session(
            weights or trained(name),
            _subset(prepare(data), rows, scratch / "data.npz"),
            architecture={"name": f"{name}_cifar10"} if weights else None,
            data_spec=data_spec,
            spec=spec,
            scratch=scratch / "session",
        )
        return cls(session, spec, scratch)

    @property
    def bench(self) -> Bench:
        return self.session.bench

    @cached_property
    def profile(self) -> Profile:
        return self.session.profile(0, None)

    @property
    def evaluated(self) -> int:
        """Different plans that were built."""
        return len(self._built)

    def built(self, plan: Plan, profile: Profile | None = None, parent: Path | None = None) -> Built:
        """The cheap rung of a trial. ``profile`` and ``parent``: of a later stage, and the weights it starts from."""
        profile = profile or self.profile
        key = f"{parent} {plan_key(plan)}"
        if key not in self._built:
            out = self._scratch / f"built{len(self._built)}"
            work = TrialWork(number=0, stage=profile.stage, parent=None, params={}, plan=plan, rung=Rung.CHEAP)
            result = self.session.trial(work, profile, parent, None, None, out)
            self._built[key] = Built(result, out / "weights.safetensors")
        return self._built[key]

    def trained(self, start: Built, recipe: FineTune, *, epochs: float, seed: int) -> Trained:
        """``start`` after the service's training, always in float32: what the quickest format is depends on the day."""
        bench = self.bench
        network, plan = read_weights(bench.original, start.weights)
        tuned = train(
            network,
            bench.original,
            bench.data,
            recipe,
            epochs=epochs,
            seed=seed,
            metric=bench.metric,
            keep=bench.keep,
            runtime=replace(bench.runtime, precision=Precision.FLOAT32),
        )
        self._trainings += 1
        weights = save_weights(network, plan, self._scratch / f"trained{self._trainings}.safetensors")
        seen = [value for value in (start.result.value, *(look.value for look in tuned.curve)) if value is not None]
        return Trained(max(seen), tuned.curve[-1].value, bench.verify(network).value, weights)


def _subset(data: Path, rows: int, out: Path) -> Path:
    """The data set with its first ``rows`` training images, which come in no order."""
    with np.load(data) as arrays:
        cut = {k: arrays[k][:rows] if k.endswith("_train") else arrays[k] for k in arrays.files}
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(out, **cut)
    return out
