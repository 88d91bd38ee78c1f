"""What each kind of task asks of the compute process, and what it stores. Each handler ends in one fenced write."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from db import tasks, trials
from db.assignments import Assignment
from db.engine import Database
from db.tables import Task, TaskKind
from search.front import front
from search.spec import DataInfo, ModelInfo, Outcome, Profile, ProfileWork, TrialResult
from workers.reloading import Ask, checked_artifacts
from workers.scratch import Scratch
from workers.supervise import Crashed, Failed

__all__ = ["HANDLERS", "Hands", "opening"]

log = logging.getLogger(__name__)

V = TypeVar("V", bound=BaseModel)


@dataclass(frozen=True)
class Hands:
    """What a handler works with."""

    db: Database
    task: Task
    given: Assignment
    scratch: Scratch
    """Of the compute process."""
    ask: Ask
    ask_clean: Ask
    """The same of a process that cannot import Tenfold."""

    def fetch(self, blob_id: str | None) -> str | None:
        return None if blob_id is None else self.scratch.fetch(self.db, blob_id)

    def read(self, kind: type[V], answer: Any) -> V:
        """What the child returned, as a value of the vocabulary; the child is not trusted to have made one."""
        try:
            return kind.model_validate(answer)
        except ValidationError as error:
            log.error("task %s: an answer of the compute process does not fit: %s", self.task.id, error)
            raise Crashed("the compute process gave an answer that does not fit the vocabulary") from None


def inspect_model(hands: Hands) -> bool:
    task, model = hands.task, _present(hands.given.model)
    arguments = {"model": hands.fetch(model.blob_id), "format": model.format, "architecture": model.architecture}
    info = hands.read(ModelInfo, hands.ask("inspect_model", arguments))
    with hands.db.begin() as s:
        return tasks.complete_inspection(s, task.id, task.attempt, info)


def inspect_data(hands: Hands) -> bool:
    task, data = hands.task, _present(hands.given.data)
    arguments = {"data": hands.fetch(data.blob_id), "spec": data.spec.model_dump(mode="json")}
    info = hands.read(DataInfo, hands.ask("inspect_data", arguments))
    with hands.db.begin() as s:
        return tasks.complete_inspection(s, task.id, task.attempt, info)


def profile(hands: Hands) -> bool:
    task = hands.task
    work = ProfileWork.model_validate(task.work)
    arguments = {"stage": work.stage, "parent": _parent(hands, work.parent)}
    result = hands.read(Profile, hands.ask("profile", arguments))
    with hands.db.begin() as s:
        return tasks.complete_profile(s, task.id, task.attempt, result)


def trial(hands: Hands) -> bool:
    """A trial at any rung; refining is the full rung of the same."""
    task, given = hands.task, hands.given
    record = _present(given.record)
    arguments = {
        "record": record.model_dump(mode="json"),
        "work": task.work,
        "profile": _present(given.profile).model_dump(mode="json"),
        "parent": _parent(hands, record.parent),
        "weights": hands.fetch(given.weights),
        "checkpoint": hands.fetch(given.checkpoint),
        "out": f"out/{task.id}-{task.attempt}",
    }
    answer = hands.ask("refine" if task.kind is TaskKind.REFINE else "trial", arguments)
    if not isinstance(answer, dict):
        raise Crashed("the compute process gave an answer that does not fit the vocabulary")
    result = hands.read(TrialResult, answer.get("result"))
    name = answer.get("weights")
    weights = None if name is None else hands.scratch.store(hands.db, str(name))
    with hands.db.begin() as s:
        return tasks.complete_trial(s, task.id, task.attempt, result, weights)


def export(hands: Hands) -> bool:
    task, given = hands.task, hands.given
    record = _present(given.record)
    folder = f"out/{task.id}-{task.attempt}"
    arguments = {
        "record": record.model_dump(mode="json"),
        "profile": _present(given.profile).model_dump(mode="json"),
        "parent": _parent(hands, record.parent),
        "weights": hands.fetch(given.weights),
        "front": _front(hands),
        "out": folder,
    }
    files = hands.ask("export", arguments)
    made = checked_artifacts(files, folder, hands.db, hands.scratch, hands.ask_clean)
    with hands.db.begin() as s:
        return tasks.complete_export(s, task.id, task.attempt, made)


HANDLERS: dict[TaskKind, Callable[[Hands], bool]] = {
    TaskKind.INSPECT_MODEL: inspect_model,
    TaskKind.INSPECT_DATA: inspect_data,
    TaskKind.PROFILE: profile,
    TaskKind.TRIAL: trial,
    TaskKind.REFINE: trial,
    TaskKind.EXPORT: export,
}
"""Each returns whether its write was taken; False: the lease was lost meanwhile."""


def opening(hands: Hands) -> dict[str, Any]:
    """What the compute process needs to open the task's job."""
    model, data, spec = _present(hands.given.model), _present(hands.given.data), _present(hands.given.spec)
    return {
        "model": hands.fetch(model.blob_id),
        "format": model.format,
        "architecture": model.architecture,
        "data": hands.fetch(data.blob_id),
        "data_spec": data.spec.model_dump(mode="json"),
        "spec": spec.model_dump(mode="json"),
    }


def _parent(hands: Hands, number: int | None) -> str | None:
    """The fine-tuned network that a stage starts from; None: the original. Its plan is in the file's header."""
    if number is not None and hands.given.parent_weights is None:
        raise Failed("lost_reference", Outcome.LOST_REFERENCE.value)
    return hands.fetch(hands.given.parent_weights)


def _front(hands: Hands) -> list[dict[str, Any]]:
    """What the report draws around the exported point."""
    with hands.db.read() as s:
        history = trials.all_records(s, hands.task.owner, str(hands.task.job_id))
    best = front(history, _present(hands.given.spec).minimize, dense=_present(hands.given.profile).costs)
    return [record.model_dump(mode="json") for record in best]


Present = TypeVar("Present")


def _present(value: Present | None) -> Present:
    if value is None:
        raise Failed(
            "incomplete_task", "this task's rows are incomplete, which is a defect of Tenfold: run the job again"
        )
    return value
