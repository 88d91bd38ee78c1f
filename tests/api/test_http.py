import base64
import errno
import json
import sqlite3
import threading

import pytest
from sqlalchemy.exc import OperationalError

from db import replies
from db.errors import LostBlob, StorageFull

JSON = "application/problem+json"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "no_such_route"),
        ("PUT", "/v1/jobs", 405, "method_not_allowed"),
        ("GET", "/v1/jobs?limit=0", 422, "invalid_request"),
        ("GET", "/v1/jobs/job_none", 404, "job_not_found"),
    ],
)
def test_every_failure_is_a_problem(service, method, path, status, code):
    reply = service.request(method, path)
    body = reply.json()
    assert (reply.status_code, body["status"], body["code"]) == (status, status, code)
    assert reply.headers["content-type"] == JSON
    assert body["type"] == f"urn:tenfold:problem:{code}"
    assert body["instance"] == path.split("?")[0]
    assert body["request_id"] == reply.headers["X-Request-ID"]


def test_a_wrong_method_is_told_the_right_ones(service):
    reply = service.request("PUT", "/v1/jobs")
    assert {"GET", "POST"} >= set(reply.headers["Allow"].split(", "))


def test_what_is_not_json_is_told_where(service):
    reply = service.post("/v1/jobs", content=b'{"model": }', headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["code"]) == (400, "invalid_json")
    assert "character 10" in reply.json()["detail"]


def test_a_body_that_is_no_json_type_is_refused(service):
    reply = service.post("/v1/jobs", content=b"{}", headers={"Content-Type": "text/plain"})
    assert (reply.status_code, reply.headers["content-type"]) == (422, JSON)


def test_each_unknown_field_is_named_with_what_arrived(service):
    reply = service.post("/v1/models", json={"upload": "u", "nmae": "x" * 500, "why": None})
    errors = {error["field"]: error for error in reply.json()["errors"]}
    assert reply.json()["code"] == "unknown_field"
    assert "did you mean 'name'" in errors["nmae"]["message"]
    assert len(errors["nmae"]["received"]) <= 201
    assert errors["why"]["received"] is None


def test_a_missing_field_is_named(service):
    reply = service.post("/v1/models", json={})
    assert "'upload' is missing" in reply.json()["detail"]


@pytest.mark.parametrize("pieces", [False, True])
def test_a_json_body_may_not_be_endless(service, pieces):
    content = b'{"upload": "' + b"x" * (5 << 20) + b'"}'
    headers = {"Content-Type": "application/json"}
    reply = service.post("/v1/models", content=iter([content]) if pieces else content, headers=headers)
    assert (reply.status_code, reply.json()["code"]) == (413, "body_too_large")


def test_a_request_id_is_taken_over_or_made(service):
    assert service.get("/healthz", headers={"X-Request-ID": "mine-1"}).headers["X-Request-ID"] == "mine-1"
    assert service.get("/healthz", headers={"X-Request-ID": "not\tmine"}).headers["X-Request-ID"] != "not\tmine"


def test_every_reply_has_the_security_headers(service):
    for path in ("/healthz", "/v1/jobs", "/v1/nothing"):
        headers = service.get(path).headers
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert "no-" in headers["Cache-Control"]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RuntimeError("secret path /etc"), 500, "internal_error"),
        (StorageFull(), 507, "storage_full"),
        (OSError(errno.ENOSPC, "No space left on device"), 507, "storage_full"),
        (OperationalError("select", {}, sqlite3.OperationalError("unable to open")), 503, "database_unavailable"),
        (LostBlob("blob_lost", "chunk 1 of blob b is missing"), 500, "blob_lost"),
    ],
)
def test_what_breaks_inside_is_a_problem_too(service, error, status, code):
    def broken() -> None:
        raise error

    service.client.app.get("/broken", operation_id="broken")(broken)
    reply = service.get("/broken")
    assert (reply.status_code, reply.json()["code"]) == (status, code)
    assert reply.headers["X-Frame-Options"] == "DENY"
    assert "/etc" not in reply.text


# ---------------------------------------------------------------------------------------------------- repeats


def test_a_repeated_post_acts_once(on_both):
    body = on_both.job_body()
    first, again = (on_both.post("/v1/jobs", json=body, headers={"Idempotency-Key": "k"}) for _ in range(2))
    assert first.json() == again.json()
    assert (again.status_code, again.headers["Location"]) == (202, first.headers["Location"])
    assert "Idempotency-Replayed" not in first.headers
    assert again.headers["Idempotency-Replayed"] == "true"
    assert len(on_both.get("/v1/jobs").json()["items"]) == 1


def test_a_key_with_another_body_is_refused(on_both):
    body = on_both.job_body()
    on_both.post("/v1/jobs", json=body, headers={"Idempotency-Key": "k"})
    reply = on_both.post("/v1/jobs", json=body | {"name": "other"}, headers={"Idempotency-Key": "k"})
    assert (reply.status_code, reply.json()["code"]) == (422, "idempotency_key_reused")


def test_a_key_with_another_path_is_refused(service):
    job = service.searching_job()
    service.post(f"/v1/jobs/{job}/pause", headers={"Idempotency-Key": "k"})
    assert service.post(f"/v1/jobs/{job}/resume", headers={"Idempotency-Key": "k"}).status_code == 422


def test_two_owners_may_use_the_same_key(service):
    bob = service.as_owner("bob")
    headers = {"Idempotency-Key": "k"}
    first = service.post("/v1/models", json={"upload": service.upload()}, headers=headers)
    second = bob.post("/v1/models", json={"upload": bob.upload()}, headers=headers)
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json()["id"] != second.json()["id"]


def test_while_the_first_is_at_work_a_second_is_told_to_wait(on_both):
    with on_both.db.begin() as s:
        assert replies.begin(s, "ann", "k", replies.request_hash("POST", "/v1/uploads", b"")) is None
    reply = on_both.post("/v1/uploads", content=b"x", headers={"Idempotency-Key": "k"})
    assert (reply.status_code, reply.json()["code"]) == (409, "idempotency_key_in_progress")


def test_a_refused_request_may_be_tried_again_with_its_key(service):
    headers = {"Idempotency-Key": "k"}
    body = service.job_body()
    assert service.post("/v1/jobs", json=body | {"methods": ["qr"]}, headers=headers).status_code == 422
    assert service.post("/v1/jobs", json=body, headers=headers).status_code == 202


def test_requests_from_many_threads_are_answered(service):
    body = service.job_body()
    statuses = []

    def work() -> None:
        statuses.append(service.post("/v1/jobs", json=body).status_code)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [202] * 8


# ------------------------------------------------------------------------------------------------ hostile requests


@pytest.mark.parametrize(
    "text", ["\x00", "a\x00b", "\ud800", "\x7f", "x" * 300, "", "'; DROP TABLE jobs; --", "💥" * 70]
)
def test_no_text_breaks_the_service(on_both, text):
    content = json.dumps({"upload": on_both.upload(), "name": text, "architecture": {"name": text or "a"}})
    reply = on_both.post("/v1/models", content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code in {202, 422}
    if reply.status_code == 202:
        assert on_both.get(reply.headers["Location"]).json()["name"] == text
    reply = on_both.post(
        "/v1/models", content=json.dumps({"upload": text}), headers={"Content-Type": "application/json"}
    )
    assert reply.status_code in {404, 422}


@pytest.mark.parametrize("path", ["/v1/jobs/%00", "/v1/models/a%00b", "/v1/artifacts/%F0%9F%92%A5", "/v1/keys/%2e%2e"])
def test_no_id_breaks_the_service(on_both, path):
    assert on_both.get(path).status_code in {404, 405, 422}


@pytest.mark.parametrize("key", [[1e400, "x"], [1.0, "\x00"], [10**30], [-(10**30)], ["x"], {}, None])
def test_no_cursor_breaks_the_service(on_both, key):
    cursor = base64.urlsafe_b64encode(json.dumps(key).encode()).decode()
    job = on_both.new_job()
    for path in ("/v1/jobs", f"/v1/jobs/{job}/trials", f"/v1/jobs/{job}/events"):
        assert on_both.get(path, params={"cursor": cursor}).json()["code"] == "bad_cursor"


@pytest.mark.parametrize("number", ["-1", "99999999999999999999", "1e3", "x"])
def test_no_trial_number_breaks_the_service(on_both, number):
    assert on_both.get(f"/v1/jobs/{on_both.new_job()}/trials/{number}").status_code == 422


def test_a_file_name_keeps_no_control_characters(on_both):
    made = on_both.post("/v1/uploads", params={"filename": "a\x00b\n.pt2"}, content=b"x").json()
    assert made["filename"] == "a_b_.pt2"
