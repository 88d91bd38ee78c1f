"""Keys, idempotent replies, workers, uploads, pages, settings."""

import pytest

from db import keys, replies, uploads, workers
from db.errors import Conflict, NotFound
from db.keys import Scope
from db.settings import Settings
from db.tables import IdempotentReply, Key, Worker
from search.errors import BadRequest


def test_a_key_is_found_by_its_secret_which_is_not_stored(database):
    with database.begin() as s:
        row, secret = keys.add(s, "ann", "laptop", [Scope.SUBMIT])
        assert secret.startswith("tf_")
        assert keys.find(s, secret).id == row.id
        assert keys.find(s, secret + "x") is None
        assert secret not in repr({c.key: getattr(s.get(Key, row.id), c.key) for c in Key.__table__.columns})


def test_a_revoked_key_is_not_found(database):
    with database.begin() as s:
        row, secret = keys.add(s, "ann", "laptop", [Scope.READ])
        keys.revoke(s, "ann", row.id)
        assert keys.find(s, secret) is None
        assert [key.id for key in keys.page(s, "ann").items] == [row.id]
        with pytest.raises(NotFound):
            keys.revoke(s, "bob", row.id)


@pytest.mark.parametrize(
    ("scopes", "allowed"),
    [([Scope.READ], {Scope.READ}), ([Scope.SUBMIT], {Scope.READ, Scope.SUBMIT}), ([Scope.ADMIN], set(Scope))],
)
def test_a_scope_holds_those_below_it(database, scopes, allowed):
    with database.begin() as s:
        key, _ = keys.add(s, "ann", "k", scopes)
        assert {scope for scope in Scope if keys.allows(key, scope)} == allowed


def test_the_use_of_a_key_is_remembered_to_the_minute(database):
    with database.begin() as s:
        row, _ = keys.add(s, "ann", "k", [Scope.READ])
        keys.touch(s, row.id)
    with database.begin() as s:
        first = s.get(Key, row.id).last_used_at
        keys.touch(s, row.id)
        s.expire_all()
        assert s.get(Key, row.id).last_used_at == first
        assert first is not None


def test_however_many_start_at_once_one_first_key_is_made(database, together):
    def start():
        with database.begin() as s:
            return keys.ensure_admin(s)

    secrets = [secret for secret in together([start] * 4) if secret is not None]
    assert len(secrets) == 1
    with database.read() as s:
        assert keys.allows(keys.find(s, secrets[0]), Scope.ADMIN)


def test_the_first_key_can_be_given(database):
    with database.begin() as s:
        assert keys.ensure_admin(s, secret="tf_given") == "tf_given"
        assert keys.find(s, "tf_given").owner == "admin"
        assert keys.ensure_admin(s, secret="tf_other") is None


# ------------------------------------------------------------------------------------------------ idempotent replies


def test_a_repeated_request_gets_the_first_reply(database):
    with database.begin() as s:
        assert replies.begin(s, "ann", "k1", "hash") is None
        replies.finish(s, "ann", "k1", 202, {"id": "job_1"})
    with database.begin() as s:
        again = replies.begin(s, "ann", "k1", "hash")
        assert (again.status, again.body) == (202, {"id": "job_1"})
        assert replies.begin(s, "bob", "k1", "other") is None, "each owner has keys of its own"


def test_a_request_in_progress_is_not_run_twice(database):
    with database.begin() as s:
        replies.begin(s, "ann", "k1", "hash")
    with pytest.raises(Conflict) as caught, database.begin() as s:
        replies.begin(s, "ann", "k1", "hash")
    assert caught.value.code == "idempotency_key_in_progress"


def test_first_requests_at_once_act_once(database, together):
    def request():
        with database.begin() as s:
            return replies.begin(s, "ann", "k1", "hash")

    returned = together([request] * 6)
    assert returned.count(None) == 1
    assert all(isinstance(r, Conflict) for r in returned if r is not None)


def test_a_key_with_another_request_is_refused(database):
    with database.begin() as s:
        replies.begin(s, "ann", "k1", replies.request_hash("POST", "/v1/jobs", b"{}"))
    with pytest.raises(BadRequest) as caught, database.begin() as s:
        replies.begin(s, "ann", "k1", replies.request_hash("POST", "/v1/jobs", b'{"a":1}'))
    assert caught.value.code == "idempotency_key_reused"


def test_a_request_that_died_or_failed_gives_its_key_free(database):
    with database.begin() as s:
        replies.begin(s, "ann", "dead", "hash")
        s.get(IdempotentReply, ("ann", "dead")).created_at -= 1000
        replies.begin(s, "ann", "failed", "hash")
        replies.forget(s, "ann", "failed")
    with database.begin() as s:
        assert replies.begin(s, "ann", "dead", "hash") is None
        assert replies.begin(s, "ann", "failed", "hash") is None


def test_old_replies_are_forgotten(database):
    with database.begin() as s:
        replies.begin(s, "ann", "old", "hash")
        replies.begin(s, "ann", "new", "hash")
        s.get(IdempotentReply, ("ann", "old")).created_at -= 100_000
        replies.clean(s)
    with database.read() as s:
        assert s.get(IdempotentReply, ("ann", "old")) is None
        assert s.get(IdempotentReply, ("ann", "new")) is not None


# ------------------------------------------------------------------------------------------------ workers


def _seen(s, worker="w1", host="here"):
    workers.seen(s, worker, host=host, queue="cpu", device="2 cores", jail={"seccomp": True})


def test_workers_are_live_while_they_are_seen(database):
    with database.begin() as s:
        _seen(s)
        _seen(s, "w2")
        _seen(s)
        assert [worker.id for worker in workers.live(s)] == ["w1", "w2"]
        s.get(Worker, "w1").seen_at -= 100
        s.flush()
        assert [worker.id for worker in workers.live(s)] == ["w2"]
        workers.gone(s, "w2")
        assert workers.live(s) == []


def test_sqlite_refuses_a_second_host_and_postgresql_does_not(database):
    with database.begin() as s:
        _seen(s, "w1", "alpha")
    if not database.sqlite:
        with database.begin() as s:
            _seen(s, "w2", "beta")
        return
    with pytest.raises(Conflict, match=r"'alpha'.*'beta'.*TENFOLD_DATABASE_URL") as caught, database.begin() as s:
        _seen(s, "w2", "beta")
    assert caught.value.code == "sqlite_on_several_hosts"
    with database.begin() as s:
        s.get(Worker, "w1").seen_at -= 100
    with database.begin() as s:
        _seen(s, "w2", "beta")


# ------------------------------------------------------------------------------------------------ uploads and pages


def test_an_upload_belongs_to_its_owner(house):
    mine = house.upload("ann", b"x" * 100)
    house.upload("ann", b"x" * 100)
    with house.db.begin() as s:
        assert uploads.stored_bytes(s, "ann") == 200
        assert uploads.stored_bytes(s, "bob") == 0
        with pytest.raises(NotFound):
            uploads.get(s, "bob", mine)
        with pytest.raises(NotFound):
            uploads.delete(s, "bob", mine)
        blob_id = uploads.get(s, "ann", mine).blob_id
        with pytest.raises(NotFound):
            uploads.get(s, "ann", blob_id)
        assert uploads.add(s, "ann", "a" * 300 + ".pt2", blob_id).filename.endswith(".pt2")


def test_pages_have_every_row_once_while_rows_come_and_go(house):
    made = [house.upload("ann", bytes([n])) for n in range(7)]
    with house.db.begin() as s:
        first = uploads.page(s, "ann", None, 3)
        assert [row.id for row in first.items] == made[:3:-1]
    house.upload("ann", b"newer")
    with house.db.begin() as s:
        uploads.delete(s, "ann", made[4])
        second = uploads.page(s, "ann", first.next, 3)
        third = uploads.page(s, "ann", second.next, 3)
    assert [row.id for row in second.items + third.items] == [made[n] for n in (3, 2, 1, 0)]
    assert third.next is None


def test_rows_of_one_moment_are_paged_by_id(house):
    made = [house.upload("ann", bytes([n])) for n in range(5)]
    with house.db.begin() as s:
        for upload_id in made:
            uploads.get(s, "ann", upload_id).created_at = 1.5
    found, cursor = [], None
    with house.db.read() as s:
        for _ in range(3):
            page = uploads.page(s, "ann", cursor, 2)
            found += [row.id for row in page.items]
            cursor = page.next
    assert cursor is None
    assert found == sorted(made, reverse=True)


@pytest.mark.parametrize("cursor", ["", "x", "!!!!", "W10", "WyJhIl0", "WzEsMl0", "ÿ", "bnVsbA", "Z" * 5000])
def test_a_cursor_that_is_not_ours_is_refused(database, cursor):
    with database.read() as s, pytest.raises(BadRequest) as caught:
        uploads.page(s, "ann", cursor)
    assert caught.value.code == "bad_cursor"


# ------------------------------------------------------------------------------------------------ settings


def test_settings_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TENFOLD_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("TENFOLD_MEMORY_LIMIT", "8GiB")
    monkeypatch.setenv("TENFOLD_JAIL", "best_effort")
    settings = Settings()
    assert (settings.memory_limit, settings.jail, settings.lease_seconds) == (8 * 2**30, "best_effort", 90.0)
    assert settings.database == f"sqlite:///{tmp_path / 'tenfold.sqlite'}"


def test_every_setting_says_what_it_does():
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []
