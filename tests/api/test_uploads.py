import base64
import hashlib

import pytest
from sqlalchemy import func, select

from db import uploads
from db.tables import Blob, Chunk

CONTENT = bytes(range(256)) * 10_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def left_behind(service):
    with service.db.read() as s:
        rows = s.scalar(select(func.count()).select_from(Blob))
    with service.db.begin_chunks(write=False) as s:
        return rows, s.scalar(select(func.count()).select_from(Chunk))


def test_an_upload_is_kept_with_its_hash(on_both):
    reply = on_both.post("/v1/uploads", params={"filename": "net.pt2"}, content=CONTENT)
    assert reply.status_code == 201
    body = reply.json()
    assert (body["filename"], body["size"], body["sha256"]) == ("net.pt2", len(CONTENT), SHA256)
    assert reply.headers["Location"] == f"/v1/uploads/{body['id']}"
    assert on_both.get(reply.headers["Location"]).json() == body


def test_a_body_in_many_pieces_without_a_length_is_taken(service):
    reply = service.post("/v1/uploads", content=(CONTENT[at : at + 7000] for at in range(0, len(CONTENT), 7000)))
    assert reply.json()["sha256"] == SHA256


@pytest.mark.parametrize("pieces", [False, True])
def test_one_that_is_too_large_is_refused_and_leaves_nothing(small_service, pieces):
    content = b"x" * 1001
    reply = small_service.post("/v1/uploads", content=iter([content]) if pieces else content)
    assert reply.status_code == 413
    assert reply.headers["content-type"] == "application/problem+json"
    assert "1,000 bytes" in reply.json()["detail"]
    assert left_behind(small_service) == (0, 0)


def test_the_quota_of_an_owner_is_kept(small_service):
    assert small_service.post("/v1/uploads", content=b"x" * 1000).status_code == 201
    reply = small_service.post("/v1/uploads", content=b"y" * 600)
    assert reply.status_code == 413
    assert reply.json()["code"] == "quota_exceeded"
    assert "1,500" in reply.json()["detail"]


def test_the_quota_counts_a_body_without_a_length_too(small_service):
    assert small_service.post("/v1/uploads", content=b"x" * 1000).status_code == 201
    reply = small_service.post("/v1/uploads", content=iter([b"y" * 600]))
    assert reply.json()["code"] == "quota_exceeded"


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Content-SHA256": SHA256.upper()},
        {"Content-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(SHA256)).decode()}:"},
        {"Content-Digest": "sha-512=:bm90IHJlYWQ=:"},
    ],
)
def test_a_promised_hash_that_fits_is_taken(service, headers):
    assert service.post("/v1/uploads", content=CONTENT, headers=headers).status_code == 201


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"X-Content-SHA256": "0" * 64}, 422, "digest_mismatch"),
        ({"X-Content-SHA256": "xyz"}, 400, "bad_digest"),
        ({"Content-Digest": "sha-256=:bm8=:"}, 400, "bad_digest"),
    ],
)
def test_a_promised_hash_that_does_not_fit_is_refused(service, headers, status, code):
    reply = service.post("/v1/uploads", content=CONTENT, headers=headers)
    assert (reply.status_code, reply.json()["code"]) == (status, code)
    with service.db.read() as s:
        assert uploads.page(s, "ann").items == []


def test_an_empty_body_is_refused(service):
    reply = service.post("/v1/uploads", content=b"")
    assert (reply.status_code, reply.json()["code"]) == (422, "empty_upload")
    assert left_behind(service) == (0, 0)


def test_a_body_that_breaks_off_leaves_nothing(service):
    reply = service.post("/v1/uploads", content=iter([b"x" * 10]), headers={"Content-Length": "20"})
    assert (reply.status_code, reply.json()["code"]) == (400, "upload_cut_off")
    assert left_behind(service) == (0, 0)


def test_a_repeat_with_the_same_key_makes_no_second_upload(service):
    first, again = (service.post("/v1/uploads", content=CONTENT, headers={"Idempotency-Key": "k"}) for _ in range(2))
    assert again.json() == first.json()
    assert again.headers["Idempotency-Replayed"] == "true"
    assert len(service.get("/v1/uploads").json()["items"]) == 1


def test_the_same_key_with_another_file_is_refused(service):
    service.post("/v1/uploads", content=CONTENT, headers={"Idempotency-Key": "k"})
    reply = service.post("/v1/uploads", content=b"other", headers={"Idempotency-Key": "k"})
    assert (reply.status_code, reply.json()["code"]) == (422, "idempotency_key_reused")


def test_after_a_refused_upload_its_key_works_again(service):
    headers = {"Idempotency-Key": "k"}
    assert service.post("/v1/uploads", content=b"", headers=headers).status_code == 422
    assert service.post("/v1/uploads", content=CONTENT, headers=headers).status_code == 201


def test_a_deleted_upload_is_gone_and_models_made_of_it_stay(service):
    upload = service.upload()
    model = service.post("/v1/models", json={"upload": upload}).json()["id"]
    assert service.delete(f"/v1/uploads/{upload}").status_code == 204
    assert service.get(f"/v1/uploads/{upload}").status_code == 404
    assert service.get(f"/v1/models/{model}").status_code == 200


def test_equal_content_is_stored_once_and_owned_twice(service):
    first, second = service.upload(), service.upload()
    assert first != second
    assert left_behind(service) == (1, 1)
