"""Upgrades: the written revisions make exactly the tables that the code uses."""

import sqlite3
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from db.engine import Database
from db.errors import BadDatabase
from db.tables import Base


def test_migrations_and_tables_agree(database: Database) -> None:
    chunks_apart = database.sqlite

    def of_main(name: str | None, kind: str, _: object) -> bool:
        return not (chunks_apart and kind == "table" and name == "chunks")

    with database.engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_type": True,
                "include_name": of_main,
                "include_object": lambda _, name, kind, *__: of_main(name, kind, None),
            },
        )
        assert compare_metadata(context, Base.metadata) == []


def test_chunks_live_in_a_second_sqlite_file(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    assert "chunks" not in inspect(database.engine).get_table_names()
    assert inspect(database.chunk_engine).get_table_names() == ["chunks"]
    wanted = Base.metadata.tables["chunks"].columns
    found = inspect(database.chunk_engine).get_columns("chunks")
    assert [c["name"] for c in found] == [c.name for c in wanted]
    with database.chunk_engine.connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar_one() == "wal"
    database.close()


def test_postgresql_stores_chunks_unpacked(postgresql_url: str) -> None:
    database = Database(postgresql_url)
    query = "SELECT attstorage FROM pg_attribute WHERE attrelid = 'chunks'::regclass AND attname = 'data'"
    with database.engine.connect() as connection:
        assert connection.execute(text(query)).scalar_one() in ("e", b"e")
    database.close()


def _migrate_at_once(url: str) -> list[BaseException]:
    errors: list[BaseException] = []
    start = threading.Barrier(4)

    def one() -> None:
        database = Database(url)
        start.wait()
        try:
            database.migrate()
        except BaseException as error:
            errors.append(error)
        finally:
            database.close()

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_processes_that_start_together_migrate_sqlite_once(tmp_path: Path) -> None:
    assert _migrate_at_once(f"sqlite:///{tmp_path / 'new' / 'tenfold.sqlite'}") == []


def test_processes_that_start_together_migrate_postgresql_once(empty_postgresql_url: str) -> None:
    assert _migrate_at_once(empty_postgresql_url) == []


def test_sqlite_is_copied_before_an_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(f"sqlite:///{tmp_path / 'tenfold.sqlite'}")
    database.migrate()
    assert not list(tmp_path.glob("*.before-*"))
    revision = tmp_path / "revisions" / "versions" / "later.py"
    source = Path(__file__).parents[2] / "db" / "migrations"
    revision.parent.mkdir(parents=True)
    for name in ("env.py", "versions/0001_first_schema.py"):
        (tmp_path / "revisions" / name).write_text((source / name).read_text())
    revision.write_text(
        "from alembic import op\nimport sqlalchemy as sa\nrevision = 'later'\ndown_revision = '0001'\n"
        "def upgrade():\n    with op.batch_alter_table('jobs') as t:\n"
        "        t.add_column(sa.Column('extra', sa.Text()))\n"
    )
    monkeypatch.setattr("db.migrations.run.FOLDER", tmp_path / "revisions")
    with database.begin() as s:
        s.execute(text("INSERT INTO keys (id, owner, name, hash, scopes, created_at) VALUES ('k','o','n','h','[]',1)"))
    database.migrate()
    assert "extra" in [c["name"] for c in inspect(database.engine).get_columns("jobs")]
    with sqlite3.connect(tmp_path / "tenfold.sqlite.before-later") as copy:
        assert copy.execute("SELECT id FROM keys").fetchall() == [("k",)]
        assert copy.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]
    copy.close()
    database.close()


def test_a_database_of_a_later_version_is_refused(database: Database) -> None:
    with database.begin() as s:
        s.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(BadDatabase, match=r"'9999'.*upgrade the server") as caught:
        database.migrate()
    assert caught.value.code == "database_newer"


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://h/d", "not a url"])
def test_a_url_that_cannot_serve_is_refused(url: str) -> None:
    with pytest.raises(BadDatabase) as caught:
        Database(url)
    assert caught.value.code == "bad_database_url"


def test_a_refused_url_does_not_show_its_password() -> None:
    with pytest.raises(BadDatabase) as caught:
        Database("mysql://user:hunter2@host/name")
    assert "hunter2" not in str(caught.value)


def test_reading_transactions_cannot_write(database: Database) -> None:
    with pytest.raises(Exception, match=r"readonly|read-only"), database.read() as s:
        s.execute(text("DELETE FROM keys"))
    with database.begin() as s:
        s.execute(text("DELETE FROM keys"))
