"""/healthz (this process), /readyz (everything it needs), /metrics (Prometheus). Open: they tell counts and states."""

import logging
from collections import Counter
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field
from redis import Redis, RedisError
from sqlalchemy.exc import SQLAlchemyError

from api.auth import Db
from api.metrics import Metrics
from db import overview, workers
from db.engine import Database
from db.settings import Settings

__all__ = ["router"]

log = logging.getLogger("tenfold.api")

router = APIRouter(tags=["health"])

BROKER_SECONDS = 2.0


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Part(BaseModel):
    ok: bool
    detail: str


class Readiness(BaseModel):
    status: Literal["ready", "degraded", "unavailable"] = Field(
        description="`degraded`: requests are answered, but jobs wait or run with a weaker jail. "
        "`unavailable` comes with 503."
    )
    database: Part
    broker: Part
    workers: Part
    jail: Part


@router.get("/healthz", operation_id="healthz")
def healthz() -> Health:
    """This process answers."""
    return Health()


def _broker(url: str | None) -> Part:
    if url is None:
        return Part(ok=False, detail="TENFOLD_REDIS_URL is not set: jobs start only when a worker's sweeper looks")
    try:
        with Redis.from_url(url, socket_connect_timeout=BROKER_SECONDS, socket_timeout=BROKER_SECONDS) as redis:
            redis.ping()
    except (RedisError, OSError, ValueError) as error:
        detail = f"does not answer ({type(error).__name__}): jobs start only when a worker's sweeper looks"
        return Part(ok=False, detail=f"{detail}; check TENFOLD_REDIS_URL")
    return Part(ok=True, detail="answers")


def _workers(db: Database) -> tuple[Part, Part, Part]:
    try:
        with db.read() as s:
            alive = workers.live(s)
    except SQLAlchemyError as error:
        log.error("database unavailable", exc_info=error)
        unknown = Part(ok=False, detail="not known while the database does not answer")
        return (
            Part(ok=False, detail=f"does not answer ({type(error).__name__}): check TENFOLD_DATABASE_URL"),
            unknown,
            unknown,
        )
    database = Part(ok=True, detail="answers")
    if not alive:
        none = "none was seen in the last minute: start one with `tenfold-server worker`"
        return database, Part(ok=False, detail=none), Part(ok=False, detail="no worker has told of its jail")
    queues = Counter(worker.queue for worker in alive)
    layers = sorted({layer for worker in alive for layer in worker.jail if layer != "mode"})
    missing = [layer for layer in layers if not all(worker.jail.get(layer) for worker in alive)]
    jail = f"missing on a worker: {', '.join(missing)}" if missing else f"whole on every worker: {', '.join(layers)}"
    seen = ", ".join(f"{count} on {queue}" for queue, count in sorted(queues.items()))
    return database, Part(ok=True, detail=seen), Part(ok=not missing, detail=jail)


@router.get("/readyz", operation_id="readyz", responses={503: {"model": Readiness, "description": "Not ready"}})
def readyz(request: Request, db: Db) -> Readiness:
    """Database, broker, workers and their jails, each with a sentence. 503 only when requests cannot be answered."""
    settings: Settings = request.app.state.settings
    database, seen, jail = _workers(db)
    broker = _broker(settings.redis_url)
    whole = broker.ok and seen.ok and jail.ok
    status: Any = "unavailable" if not database.ok else "ready" if whole else "degraded"
    body = Readiness(status=status, database=database, broker=broker, workers=seen, jail=jail)
    return JSONResponse(body.model_dump(mode="json"), status_code=200 if database.ok else 503)  # type: ignore[return-value]


@router.get("/metrics", operation_id="metrics", response_class=Response, include_in_schema=False)
def metrics(request: Request, db: Db) -> Response:
    """Requests of this process; jobs, tasks and workers of the whole service."""
    figures: Metrics = request.app.state.metrics
    with db.read() as s:
        jobs, tasks = overview.job_counts(s), overview.task_counts(s)
        queues = Counter(worker.queue for worker in workers.live(s))
    return Response(figures.render(jobs, tasks, queues), media_type=CONTENT_TYPE_LATEST)
