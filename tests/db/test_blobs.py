"""Content in, content out, equal content once, and garbage gone."""

import hashlib
import random
import threading

import pytest
from sqlalchemy import func, select, text

from db import blobs, uploads
from db.blobs import CHUNK
from db.engine import Database
from db.errors import LostBlob, NotFound, StorageFull, TooLarge
from db.tables import Blob, Chunk


@pytest.fixture(params=["sqlite", "postgresql", "folder"])
def store(request, tmp_path):
    """Chunk rows in either database, and an outside store (beside SQLite)."""
    kind = "sqlite" if request.param == "folder" else request.param
    outside = f"file://{tmp_path / 'outside'}" if request.param == "folder" else None
    database = Database(request.getfixturevalue(f"{kind}_url"), blob_url=outside)
    yield database
    database.close()


def _content(size, seed=0):
    return random.Random(seed).randbytes(size)


def _chunks(db):
    with db.begin_chunks(write=False) as s:
        return s.scalar(select(func.count()).select_from(Chunk))


def _rows(db):
    with db.read() as s:
        return s.scalar(select(func.count()).select_from(Blob))


def _age(db, seconds):
    with db.begin() as s:
        s.execute(Blob.__table__.update().values(touched_at=Blob.touched_at - seconds))


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 17])
def test_what_is_written_is_read_back(store, size):
    content = _content(size)
    blob = blobs.write(store, [content[n : n + 100_000] for n in range(0, size, 100_000)])
    assert (blob.size, blob.sha256) == (size, hashlib.sha256(content).hexdigest())
    assert b"".join(blobs.read(store, blob.id)) == content


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, 10), (CHUNK - 5, CHUNK + 5), (CHUNK, 2 * CHUNK), (2 * CHUNK + 3, None), (7, 7), (5, 10**9), (10**9, None)],
)
def test_any_range_is_read(store, start, stop):
    content = _content(2 * CHUNK + 1000)
    blob = blobs.write(store, [content])
    assert b"".join(blobs.read(store, blob.id, start, stop)) == content[start:stop]


def test_reading_holds_one_chunk_at_a_time(store):
    blob = blobs.write(store, [_content(3 * CHUNK)])
    assert max(len(piece) for piece in blobs.read(store, blob.id)) == CHUNK


def test_equal_content_is_kept_once(store):
    first = blobs.write(store, [_content(CHUNK + 5)])
    second = blobs.write(store, [_content(CHUNK + 5)])
    assert second == first
    assert _rows(store) == 1
    assert _chunks(store) == (0 if store.blob_url else 2)


def test_equal_content_finished_at_once_is_kept_once(store, together):
    content = _content(CHUNK + 5)
    found = together([lambda: blobs.write(store, [content])] * 6)
    assert {blob.id for blob in found} == {found[0].id}
    assert b"".join(blobs.read(store, found[0].id)) == content
    assert _rows(store) == 1
    assert _chunks(store) == (0 if store.blob_url else 2)


def test_an_unfinished_blob_cannot_be_read(store):
    writer = blobs.Writer(store)
    writer.feed(_content(CHUNK))
    with store.read() as s:
        blob_id = s.scalar(select(Blob.id))
    with pytest.raises(NotFound):
        blobs.read(store, blob_id)
    writer.abort()


def test_an_aborted_upload_leaves_nothing(store, tmp_path):
    with pytest.raises(RuntimeError), blobs.Writer(store) as writer:  # noqa: PT012
        writer.feed(_content(3 * CHUNK))
        raise RuntimeError("the connection broke")
    assert (_rows(store), _chunks(store)) == (0, 0)
    assert [path for path in (tmp_path / "outside").rglob("*") if path.is_file()] == []


def test_a_clean_up_that_fails_does_not_hide_what_went_wrong(database, caplog):
    with pytest.raises(RuntimeError, match="the connection broke"), blobs.Writer(database) as writer:  # noqa: PT012
        with database.begin() as s:
            s.execute(text("DROP TABLE blobs" + ("" if database.sqlite else " CASCADE")))
        raise RuntimeError("the connection broke")
    assert writer is not None
    assert "garbage collection will do it" in caplog.text


def test_an_upload_over_the_limit_is_refused_and_leaves_nothing(store):
    with pytest.raises(TooLarge, match="1000 bytes") as caught:
        blobs.write(store, [_content(600), _content(600)], limit=1000)
    assert caught.value.code == "upload_too_large"
    assert (_rows(store), _chunks(store)) == (0, 0)


def test_garbage_is_what_no_row_refers_to_after_the_grace_period(store, tmp_path):
    kept, lost = blobs.write(store, [_content(CHUNK + 1, 1)]), blobs.write(store, [_content(20 * CHUNK, 2)])
    with store.begin() as s:
        uploads.add(s, "ann", "net.pt2", kept.id)
    assert blobs.collect_garbage(store, 3600) == 0
    _age(store, 4000)
    young = blobs.write(store, [b"young"])
    assert blobs.collect_garbage(store, 3600) == 1
    with pytest.raises(NotFound):
        blobs.read(store, lost.id)
    assert b"".join(blobs.read(store, kept.id)) == _content(CHUNK + 1, 1)
    assert b"".join(blobs.read(store, young.id)) == b"young"
    if store.blob_url:
        assert len([path for path in (tmp_path / "outside").rglob("*") if path.is_file()]) == 2
    else:
        assert _chunks(store) == 3


def test_a_half_written_upload_is_garbage_after_the_grace_period(store):
    writer = blobs.Writer(store)
    writer.feed(_content(2 * CHUNK))
    assert blobs.collect_garbage(store, 3600) == 0
    _age(store, 4000)
    assert blobs.collect_garbage(store, 3600) == 1
    assert _chunks(store) == 0
    with pytest.raises(LostBlob) as caught:
        writer.finish()
    assert caught.value.code == "upload_abandoned"
    writer.abort()


def test_an_equal_upload_saves_old_content_from_collection(store):
    blob = blobs.write(store, [b"again and again"])
    _age(store, 4000)
    assert blobs.write(store, [b"again and again"]).id == blob.id
    assert blobs.collect_garbage(store, 3600) == 0
    assert b"".join(blobs.read(store, blob.id)) == b"again and again"


def test_collecting_beside_equal_uploads_never_loses_content(store):
    """An upload that was told an id can use it, however often collection runs in between."""
    content, stop = _content(CHUNK + 9), threading.Event()
    errors = []

    def upload():
        for _ in range(12):
            blob = blobs.write(store, [content])
            with store.begin() as s:
                upload_id = uploads.add(s, "ann", "f", blob.id).id
            if b"".join(blobs.read(store, blob.id)) != content:
                errors.append("content differs")
            with store.begin() as s:
                uploads.delete(s, "ann", upload_id)
            # Old from now on for the collector, unless the next equal upload touches it.
            with store.begin() as s:
                s.execute(Blob.__table__.update().where(Blob.sha256.is_not(None)).values(touched_at=1.0))

    def collect():
        while not stop.is_set():
            blobs.collect_garbage(store, 600)

    def guarded(function):
        try:
            function()
        except Exception as error:
            errors.append(error)

    collector = threading.Thread(target=guarded, args=(collect,))
    uploader = threading.Thread(target=guarded, args=(upload,))
    collector.start()
    uploader.start()
    uploader.join()
    stop.set()
    collector.join()
    assert errors == []


def test_chunks_without_a_blob_are_swept_up(database):
    with database.begin_chunks() as s:
        s.add(Chunk(blob_id="blb_gone", position=0, data=b"x"))
    blobs.collect_garbage(database, 3600)
    assert _chunks(database) == 0


def test_a_missing_chunk_is_reported(database):
    blob = blobs.write(database, [_content(2 * CHUNK)])
    with database.begin_chunks() as s:
        s.execute(Chunk.__table__.delete().where(Chunk.position == 1))
    with pytest.raises(LostBlob, match="chunk 1") as caught:
        list(blobs.read(database, blob.id))
    assert caught.value.code == "blob_lost"


def test_a_full_disk_is_an_error_with_a_code_and_leaves_nothing(sqlite_url):
    database = Database(sqlite_url, pool_size=1)
    with database.chunk_engine.connect() as connection:
        connection.execute(text("PRAGMA max_page_count = 600"))
    with pytest.raises(StorageFull, match="free some space") as caught:
        blobs.write(database, [_content(8 * CHUNK)])
    assert caught.value.code == "storage_full"
    assert (_rows(database), _chunks(database)) == (0, 0)
    database.close()


def test_blobs_stay_readable_when_the_outside_store_is_set_later(database_url, tmp_path):
    inside = Database(database_url)
    blob = blobs.write(inside, [b"in rows"])
    inside.close()
    outside = Database(database_url, blob_url=f"file://{tmp_path / 'outside'}")
    moved = blobs.write(outside, [b"in a folder"])
    assert b"".join(blobs.read(outside, blob.id)) == b"in rows"
    assert b"".join(blobs.read(outside, moved.id)) == b"in a folder"
    outside.close()
    again = Database(database_url)
    with pytest.raises(LostBlob, match="TENFOLD_BLOB_URL"):
        blobs.read(again, moved.id)
    again.close()


def test_the_room_of_collected_content_takes_the_next_upload(sqlite_url):
    database = Database(sqlite_url)
    sizes = []
    for seed in range(3):
        blobs.write(database, [_content(8 * CHUNK, seed)])
        _age(database, 4000)
        blobs.collect_garbage(database, 3600)
        with database.chunk_engine.connect() as connection:
            sizes.append(connection.execute(text("PRAGMA page_count")).scalar_one())
    assert sizes[1] == sizes[2]
    database.close()


def test_a_long_upload_does_not_hold_up_the_queue(sqlite_url):
    database = Database(sqlite_url)
    with database.begin_chunks() as s, database.begin() as t:
        s.add(Chunk(blob_id="blb_x", position=0, data=b"x"))
        t.execute(text("SELECT 1"))
    database.close()
