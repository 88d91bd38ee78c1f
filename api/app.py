"""The API process: ``create_app(settings)``, and ``app_from_environment`` for uvicorn's ``--factory``."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool

from api import artifacts, datasets, health, jobs, keys, models, problems, reference, trials, uploads, workers
from api.dashboard import add_dashboard
from api.http import Envelope
from api.limits import RateLimit
from api.metrics import Metrics
from db.engine import Database
from db.settings import Settings, load_settings

__all__ = ["app_from_environment", "create_app"]

JSON_LIMIT = 4 * 2**20
"""Bytes of a request's body everywhere but at uploads: room for a plan of every layer, not for a file."""

DESCRIPTION = """\
Finds the smallest network that keeps your accuracy budget.

Upload a trained network and data, ask "lose at most half a point", and get back the smallest network that does, \
the trade-off around it, and files that load without Tenfold.

Every request carries `Authorization: Bearer KEY`. Failures are `application/problem+json` with a stable `code`. \
Lists are paged with `cursor`; GETs have ETags, and `?wait=30` waits for a change. \
Every POST takes an `Idempotency-Key`. Times are UTC seconds.\
"""


def _version() -> str:
    try:
        return version("tenfold-server")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "0"


def _lifespan(settings: Settings) -> Callable[[FastAPI], "AsyncIterator[None]"]:
    async def run(app: FastAPI) -> AsyncIterator[None]:
        db = Database(settings.database, blob_url=settings.blob_url, pool_size=settings.pool_size)
        try:
            if db.sqlite:  # one host and one file: nobody else will do it. PostgreSQL: `tenfold-server migrate`.
                await run_in_threadpool(db.migrate)
            app.state.db = db
            yield
        finally:
            db.close()

    return run


class Api(FastAPI):
    """FastAPI whose document shows failures as they are sent."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = problems.describe(super().openapi())
        return self.openapi_schema


def create_app(settings: Settings) -> FastAPI:
    """The whole API on the database, broker and limits that ``settings`` name."""
    app = Api(
        title="Tenfold",
        version=_version(),
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        lifespan=asynccontextmanager(_lifespan(settings)),
        generate_unique_id_function=_operation_id,
    )
    app.state.settings = settings
    app.state.metrics = Metrics()
    app.state.limits = RateLimit(settings.requests_per_minute)
    problems.install(app)
    app.add_middleware(
        Envelope, json_limit=JSON_LIMIT, upload_limit=int(settings.max_upload_bytes), metrics=app.state.metrics
    )
    for part in (uploads, models, datasets, jobs, trials, artifacts, keys, workers, health, reference):
        app.include_router(part.router)
    add_dashboard(app)
    return app


def _operation_id(route: APIRoute) -> str:
    """Ids are written out at each operation: they are part of the contract with clients."""
    assert route.operation_id or not route.include_in_schema, f"{route.path} has no operation_id"  # noqa: S101
    return route.operation_id or route.name


def app_from_environment() -> FastAPI:
    """What ``uvicorn --factory api.app:app_from_environment`` serves."""
    return create_app(load_settings())
