"""A real API on SQLite behind a real uvicorn, with a stand-in for the workers (``seed.Workers``)."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

import tenfold
from api.app import create_app
from db import keys
from db.engine import Database
from db.keys import Scope
from db.lifecycle import lock_job
from db.settings import Settings
from tests.client.seed import Workers


class Service:
    """A running API; ``key`` is an admin's."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings(data_dir=folder, requests_per_minute=100_000)
        self.app = create_app(self.settings)
        config = uvicorn.Config(self.app, port=0, log_level="error", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.db = Database(self.settings.database)
        self.key = self.new_key(Scope.ADMIN)
        self.workers = Workers(self.db)

    def new_key(self, *scopes: Scope, owner: str = "ann") -> str:
        with self.db.begin() as s:
            return keys.add(s, owner, "test", scopes)[1]

    def spend(self, job: str, *, hours: float) -> None:
        """As if it had worked so long."""
        with self.db.begin() as s:
            row = lock_job(s, job)
            assert row is not None
            row.spent_seconds = 3600 * hours

    def client(self, **more: int) -> tenfold.Client:
        return tenfold.Client(self.url, self.key, **more)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.db.close()


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    running = Service(tmp_path_factory.mktemp("service"))
    yield running
    running.stop()


@pytest.fixture
def client(service: Service) -> Iterator[tenfold.Client]:
    with service.client() as made:
        yield made


@pytest.fixture
def workers(service: Service) -> Workers:
    return service.workers


@pytest.fixture(scope="session")
def done(service: Service) -> str:
    """The id of a job that has run to its end, with 15 trials, files and all."""
    return service.workers.done_job("resnet20 at one point", 15)
