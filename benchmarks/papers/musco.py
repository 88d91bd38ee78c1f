"""MUSCO (Gusak et al. 2019): decompose and fine-tune in several steps, or all at once?

Ranks are EVBMF's, weakened by w, for Tucker-2 on convolutions and SVD on matrices, as in the paper; the search and the
allocator have no part in it. One shot decomposes once and trains for all the epochs; two steps decompose, train for
half of them, measure the variational ranks of what came out, decompose that again (its dense equivalent, so that depth
stays) and train for the other half. Everything runs as trials of the service do.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

import tenfold
from benchmarks.datasets import prepare
from benchmarks.networks import NETWORKS, trained
from benchmarks.papers.table import Settings, Table
from search.ground import ground_of
from search.intake.architectures import build
from search.session import Session
from search.space import analytic
from search.spec import (
    Augmentation,
    Budget,
    DataSpec,
    FineTune,
    JobSpec,
    Plan,
    Profile,
    Rung,
    SearchSpec,
    Transform,
    TrialResult,
    TrialWork,
)

__all__ = ["run"]

SCHEDULES: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("one shot", (1.0,)),
    ("one shot", (0.8,)),
    ("one shot", (0.5,)),
    ("two steps", (0.5, 0.5)),
    ("two steps", (0.6, 0.6)),
    ("two steps", (0.8, 0.8)),
)
"""The weakening of each step's ranks."""
METHODS = ("tucker2", "svd")

CIFAR = Transform(
    scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), layout="nhwc", augment=Augmentation.CROP_FLIP
)


@dataclass(frozen=True)
class Job:
    """A trained network and its data, as files that the service takes."""

    name: str
    model: Path
    data: Path
    spec: DataSpec
    recipe: FineTune
    epochs: float
    """All steps together."""
    architecture: dict[str, Any] | None = None


def run(settings: Settings, done: Callable[[Table], None]) -> None:
    makers: dict[str, Callable[[Path, Settings], Job | None]] = {
        "classification: ResNet-20, CIFAR-10": _classification,
        "segmentation: drawn scenes": _segmentation,
        "next character: an MLP on this project's documents": _next_character,
    }
    with tempfile.TemporaryDirectory() as folder:
        for number, (title, make) in enumerate(makers.items()):
            scratch = Path(folder) / str(number)
            scratch.mkdir()
            job = make(scratch, settings)
            if job is not None:
                _compare(title, job, settings, scratch, done)


def _compare(title: str, job: Job, settings: Settings, scratch: Path, done: Callable[[Table], None]) -> None:
    table = Table(
        title,
        ("schedule", "w", "seed", "parameters ÷", "MACs ÷", "original %", "before training %", "after %", "epochs"),
        settings={"epochs": job.epochs, "seeds": list(settings.seeds), "methods": list(METHODS)},
        notes=["Ranks come from w alone, so that rows differ in size: compare what is kept at a size."],
    )
    for seed in settings.seeds:
        for row, (schedule, weakenings) in enumerate(SCHEDULES):
            at = scratch / f"{seed}-{row}"
            profile, first, last = _steps(job, settings, seed, weakenings, at)
            dense, costs = profile.costs, last.costs
            table.rows.append(
                {
                    "schedule": schedule,
                    "w": ", ".join(f"{w:g}" for w in weakenings),
                    "seed": seed,
                    "parameters ÷": round(dense.parameters / costs.parameters, 3),
                    "MACs ÷": round(dense.macs / costs.macs, 3),
                    "original %": round(100 * profile.verify_value, 2),
                    "before training %": None if first.value is None else round(100 * first.value, 2),
                    "after %": None if last.verify_value is None else round(100 * last.verify_value, 2),
                    "epochs": job.epochs,
                }
            )
            done(table)


def _steps(
    job: Job, settings: Settings, seed: int, weakenings: Sequence[float], scratch: Path
) -> tuple[Profile, TrialResult, TrialResult]:
    """The first profile, the result before any training, and the one after the last step."""
    each = job.epochs / len(weakenings)
    session = Session(
        job.model,
        job.data,
        architecture=job.architecture,
        data_spec=job.spec,
        spec=JobSpec(
            budget=Budget(max_drop=1.0),
            methods=METHODS,
            fine_tune=job.recipe.model_copy(update={"epochs": each, "short_epochs": each}),
            search=SearchSpec(seed=seed),
        ),
        scratch=scratch / "session",
        device=settings.device,
    )
    first: TrialResult | None = None
    original: Profile | None = None
    parent: Path | None = None
    plan: Plan = {}
    for step, w in enumerate(weakenings):
        profile = session.profile(step, parent)
        original = original or profile
        last = step == len(weakenings) - 1
        rung = Rung.FULL if last else Rung.SHORT
        plan = analytic(ground_of(session.bench.spec, profile, plan), w)
        work = TrialWork(number=step, stage=step, parent=None, params={}, plan=plan, rung=rung, epochs=each)
        if first is None:
            cheap = work.model_copy(update={"rung": Rung.CHEAP, "epochs": 0.0})
            first = session.trial(cheap, profile, parent, None, None, scratch / "cheap")
        out = scratch / str(step)
        result = session.trial(work, profile, parent, None, None, out)
        parent = out / "weights.safetensors"
    assert original is not None
    assert first is not None
    return original, first, result


# ------------------------------------------------------------------------------------------------ the tasks


def _classification(scratch: Path, settings: Settings) -> Job | None:
    """Eight thousand images train; half of the test images choose, the other half is what the table shows."""
    if settings.weights is None:
        return None
    name = settings.weights.name.split(".")[0]
    net, _ = build(name, {})
    net.load_state_dict(load_file(settings.weights))
    tenfold.export(net.eval(), torch.zeros(2, 3, 32, 32), scratch / "model.pt2")
    with np.load(prepare("cifar10")) as parts:
        keep = np.random.default_rng(0).permutation(len(parts["y_train"]))[:8_000]
        arrays = {"x_train": parts["x_train"][keep], "y_train": parts["y_train"][keep]}
        np.savez(scratch / "data.npz", **arrays, x_test=parts["x_test"], y_test=parts["y_test"])
    epochs = 6.0 if settings.epochs is None else settings.epochs
    spec = DataSpec(transform=CIFAR)
    return Job(name, scratch / "model.pt2", scratch / "data.npz", spec, FineTune(), epochs)


def _segmentation(scratch: Path, settings: Settings) -> Job:
    """Of the benchmarks' own segmenter."""
    known = NETWORKS["segmenter_scenes"]
    epochs = 6.0 if settings.epochs is None else settings.epochs
    return Job(
        "segmentation",
        trained("segmenter_scenes"),
        prepare(known.data),
        known.spec,
        FineTune(batch_size=known.batch),
        epochs,
    )


CONTEXT = 12
"""Characters that the next one is guessed from."""


class NextCharacter(nn.Module):
    """(batch, 12) characters → logits of the next: embeddings side by side, two hidden layers."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 24)
        self.hidden = nn.Sequential(
            nn.Flatten(), nn.Linear(24 * CONTEXT, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()
        )
        self.head = nn.Linear(256, characters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.hidden(self.embedding(x)))
        return logits


def _next_character(scratch: Path, settings: Settings) -> Job:
    pages = sorted(Path(__file__).parents[2].joinpath("docs").glob("*.md"))
    text = "\n".join(page.read_text() for page in pages)
    known = {c: i for i, c in enumerate(sorted(set(text)))}
    codes = np.array([known[c] for c in text], np.int64)
    x = np.lib.stride_tricks.sliding_window_view(codes[:-1], CONTEXT)
    y = codes[CONTEXT:]
    held = np.arange(len(y)) // 1_000 % 5 == 0  # every fifth thousand, whole, so that contexts hardly overlap
    torch.manual_seed(0)
    net = NextCharacter(len(known))
    _learn(net, torch.from_numpy(x[~held].copy()), torch.from_numpy(y[~held]))
    tenfold.export(net.eval(), torch.zeros(2, CONTEXT, dtype=torch.int64), scratch / "model.pt2")
    arrays = {"x_train": x[~held], "y_train": y[~held], "x_test": x[held], "y_test": y[held]}
    np.savez(scratch / "data.npz", **arrays)
    epochs = 6.0 if settings.epochs is None else settings.epochs
    recipe = FineTune(optimizer="adamw", learning_rate=1e-3, weight_decay=0.01)
    return Job("next character", scratch / "model.pt2", scratch / "data.npz", DataSpec(), recipe, epochs)


def _learn(net: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int = 6, batch: int = 256) -> None:
    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,))
        loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
