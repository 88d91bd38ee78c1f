"""Every table. The SQL database is the only truth: messages carry ids, files are blobs, the search keeps nothing.

Times are UTC seconds (float) by the database's clock. JSON columns hold ``search.spec`` values, dumped in JSON mode:
plain JSON on PostgreSQL too, since JSONB forgets the order of keys and the search must read back what it wrote.
"""

from enum import StrEnum
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Enum,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from search.spec import Rung, TrialState

__all__ = [
    "Artifact",
    "AssetState",
    "Base",
    "Blob",
    "Chunk",
    "Dataset",
    "Event",
    "IdempotentReply",
    "Job",
    "JobState",
    "Key",
    "Model",
    "ProfileRow",
    "Task",
    "TaskKind",
    "TaskState",
    "Trial",
    "Upload",
    "Worker",
]

Json = JSON(none_as_null=True)


def _states(members: type[StrEnum]) -> Enum:
    """A state as its lower-case value in a plain string column: new members need no migration."""
    return Enum(members, native_enum=False, length=16, values_callable=lambda e: [m.value for m in e])


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {dict[str, Any]: Json, list[Any]: Json}  # noqa: RUF012


class AssetState(StrEnum):
    """Of a model or a data set."""

    INSPECTING = "inspecting"
    """Uploaded; a task is reading it."""
    READY = "ready"
    """Read and understood: ``info`` is filled."""
    REJECTED = "rejected"
    """Not usable: ``reason_code`` and ``reason`` say why and what to do."""


class JobState(StrEnum):
    QUEUED = "queued"
    """Accepted; waits for its model and data to be ready and for a worker."""
    PROFILING = "profiling"
    """Measuring the starting network of a stage."""
    SEARCHING = "searching"
    """Trials run."""
    REFINING = "refining"
    """The chosen points get the full recipe and the check on unseen data."""
    EXPORTING = "exporting"
    """Writing files and loading them again in a clean process."""
    PAUSED = "paused"
    """No new task starts; running ones finish. ``resume`` goes on."""
    CANCELLING = "cancelling"
    """Asked to stop; running tasks are being ended."""
    DONE = "done"
    """Terminal, unless extended."""
    FAILED = "failed"
    """Terminal: ``reason_code`` and ``reason`` are advice."""
    CANCELLED = "cancelled"
    """Terminal, by request."""


TERMINAL_JOBS = (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


class TaskKind(StrEnum):
    INSPECT_MODEL = "inspect_model"
    INSPECT_DATA = "inspect_data"
    PROFILE = "profile"
    TRIAL = "trial"
    REFINE = "refine"
    EXPORT = "export"


class TaskState(StrEnum):
    QUEUED = "queued"
    """A row is its own outbox: workers are woken after commit, and again by the sweeper."""
    RUNNING = "running"
    """Claimed by (worker, attempt) until ``lease_until``; heartbeats move that on."""
    DONE = "done"
    FAILED = "failed"
    """Out of attempts, or a failure that trying again cannot mend."""
    CANCELLED = "cancelled"


class Key(Base):
    __tablename__ = "keys"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64), index=True)
    name: Mapped[str] = mapped_column(String(200))
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    """SHA-256 of the secret; the secret itself is shown once and never stored."""
    scopes: Mapped[list[Any]]
    created_at: Mapped[float]
    last_used_at: Mapped[float | None]
    revoked_at: Mapped[float | None]


class Blob(Base):
    """Content: fixed-size chunk rows here, or one object in the outside store when ``TENFOLD_BLOB_URL`` is set."""

    __tablename__ = "blobs"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    sha256: Mapped[str | None] = mapped_column(String(64), unique=True)
    """None while it is being written; unique after, which is what deduplicates."""
    size: Mapped[int] = mapped_column(BigInteger)
    """Bytes; 0 while it is being written."""
    outside: Mapped[bool] = mapped_column(default=False)
    """Kept in the outside store, whatever ``TENFOLD_BLOB_URL`` says today."""
    created_at: Mapped[float]
    touched_at: Mapped[float]
    """Moved on while it is written and whenever equal content arrives; garbage collection looks at this."""


class Chunk(Base):
    """One piece of a blob. On SQLite this table lives alone in a second file beside the first, so that long uploads do
    not hold up claims and heartbeats, and the copies made before a migration stay small."""

    __tablename__ = "chunks"
    blob_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    data: Mapped[bytes] = mapped_column(LargeBinary)


class Upload(Base):
    __tablename__ = "uploads"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64), index=True)
    filename: Mapped[str] = mapped_column(String(255))
    blob_id: Mapped[str] = mapped_column(ForeignKey("blobs.id"), index=True)
    created_at: Mapped[float]


class Model(Base):
    __tablename__ = "models"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64), index=True)
    name: Mapped[str] = mapped_column(String(200))
    blob_id: Mapped[str] = mapped_column(ForeignKey("blobs.id"), index=True)
    format: Mapped[str] = mapped_column(String(32))
    """``auto``, ``pt2``, ``safetensors``, ``state_dict``."""
    architecture: Mapped[dict[str, Any] | None]
    """{"name": …, "options": {…}} for weights without a graph."""
    state: Mapped[AssetState] = mapped_column(_states(AssetState))
    reason_code: Mapped[str | None] = mapped_column(String(64))
    reason: Mapped[str | None] = mapped_column(Text)
    info: Mapped[dict[str, Any] | None]
    """``ModelInfo``."""
    created_at: Mapped[float]


class Dataset(Base):
    __tablename__ = "datasets"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64), index=True)
    name: Mapped[str] = mapped_column(String(200))
    blob_id: Mapped[str] = mapped_column(ForeignKey("blobs.id"), index=True)
    spec: Mapped[dict[str, Any]]
    """``DataSpec``."""
    state: Mapped[AssetState] = mapped_column(_states(AssetState))
    reason_code: Mapped[str | None] = mapped_column(String(64))
    reason: Mapped[str | None] = mapped_column(Text)
    info: Mapped[dict[str, Any] | None]
    """``DataInfo``."""
    created_at: Mapped[float]


class Job(Base):
    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64), index=True)
    name: Mapped[str] = mapped_column(String(200))
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), index=True)
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"), index=True)
    spec: Mapped[dict[str, Any]]
    """``JobSpec``."""
    state: Mapped[JobState] = mapped_column(_states(JobState), index=True)
    resume_to: Mapped[JobState | None] = mapped_column(_states(JobState))
    """The state that ``resume`` returns to."""
    stage: Mapped[int] = mapped_column(default=0)
    reason_code: Mapped[str | None] = mapped_column(String(64))
    reason: Mapped[str | None] = mapped_column(Text)
    best: Mapped[int | None]
    """Number of the smallest trial so far that keeps the budget; of the one handed back when done."""
    version: Mapped[int] = mapped_column(default=0)
    """Counts every change of the job, its trials and its artifacts; advancing commits only on the version it read.
    Which trial runs just now and how far it is does not count: that would make every advance start again."""
    queue: Mapped[str] = mapped_column(String(32), default="cpu")
    """Device class that runs all its tasks: latencies compare only within one."""
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    active_since: Mapped[float | None]
    """Start of the present stretch of work; None while queued, paused or terminal."""
    spent_seconds: Mapped[float] = mapped_column(default=0.0)
    """Length of the stretches of work before the present one: what ``search.hours`` is compared with."""


class ProfileRow(Base):
    __tablename__ = "profiles"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    stage: Mapped[int] = mapped_column(primary_key=True)
    parent: Mapped[int | None]
    content: Mapped[dict[str, Any]]
    """``Profile``."""


class Trial(Base):
    """One candidate. Numbers count from 0 without gaps."""

    __tablename__ = "trials"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    stage: Mapped[int]
    parent: Mapped[int | None]
    params: Mapped[dict[str, Any]]
    plan: Mapped[dict[str, Any]]
    state: Mapped[TrialState] = mapped_column(_states(TrialState))
    rung: Mapped[Rung] = mapped_column(_states(Rung))
    """The rung it is at (queued, running) or reached (done)."""
    results: Mapped[dict[str, Any]]
    """Rung to ``TrialResult``."""
    weights_blob: Mapped[str | None] = mapped_column(ForeignKey("blobs.id"), index=True)
    """safetensors of the network at the highest rung reached that trained or refined."""
    error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[float]
    finished_at: Mapped[float | None]


class Task(Base):
    """Everything that computes. One claim, one heartbeat, one fence: (id, attempt)."""

    __tablename__ = "tasks"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    kind: Mapped[TaskKind] = mapped_column(_states(TaskKind))
    owner: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), index=True)
    model_id: Mapped[str | None] = mapped_column(ForeignKey("models.id"), index=True)
    dataset_id: Mapped[str | None] = mapped_column(ForeignKey("datasets.id"), index=True)
    trial: Mapped[int | None]
    work: Mapped[dict[str, Any]]
    """The ``search.spec`` work value (``ProfileWork``, ``TrialWork``, …); {} for inspections."""
    queue: Mapped[str] = mapped_column(String(32), default="cpu")
    """Device class that may run it."""
    state: Mapped[TaskState] = mapped_column(_states(TaskState))
    attempt: Mapped[int] = mapped_column(default=0)
    max_attempts: Mapped[int] = mapped_column(default=3)
    worker: Mapped[str | None] = mapped_column(String(64))
    lease_until: Mapped[float | None]
    progress: Mapped[dict[str, Any] | None]
    """{"message": …, "done": n, "of": m}"""
    checkpoint_blob: Mapped[str | None] = mapped_column(ForeignKey("blobs.id"), index=True)
    error_code: Mapped[str | None] = mapped_column(String(64))
    error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    __table_args__ = (
        Index("ix_tasks_state_queue_created_at", "state", "queue", "created_at"),
        Index("ix_tasks_owner_started_at", "owner", "started_at"),
    )


class Artifact(Base):
    __tablename__ = "artifacts"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64), index=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    trial: Mapped[int]
    format: Mapped[str] = mapped_column(String(16))
    """``search.spec.ExportFormat``."""
    filename: Mapped[str] = mapped_column(String(255))
    media_type: Mapped[str] = mapped_column(String(100))
    blob_id: Mapped[str] = mapped_column(ForeignKey("blobs.id"), index=True)
    facts: Mapped[dict[str, Any]]
    """What reloading it in a clean process measured: {"value": …, "latency_ms": …, "max_difference": …}"""
    created_at: Mapped[float]
    __table_args__ = (UniqueConstraint("job_id", "trial", "filename"),)


class Event(Base):
    """What happened to a job, in order, in sentences for people."""

    __tablename__ = "events"
    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer(), "sqlite"), primary_key=True)
    """Rises within a job in commit order: events are added only while the job's row is locked."""
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    at: Mapped[float]
    kind: Mapped[str] = mapped_column(String(32))
    """``state``, ``trial``, ``attempt``, ``note``."""
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any]]


class Worker(Base):
    __tablename__ = "workers"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    host: Mapped[str] = mapped_column(String(255))
    queue: Mapped[str] = mapped_column(String(32))
    device: Mapped[str] = mapped_column(String(200))
    jail: Mapped[dict[str, Any]]
    """Which layers of the jail this kernel gives: {"landlock": true, "seccomp": true, …}"""
    started_at: Mapped[float]
    seen_at: Mapped[float]


class IdempotentReply(Base):
    __tablename__ = "idempotent_replies"
    owner: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(200), primary_key=True)
    request_hash: Mapped[str] = mapped_column(String(64))
    status: Mapped[int | None]
    """None while the first request is still in progress."""
    body: Mapped[dict[str, Any] | None]
    created_at: Mapped[float]
