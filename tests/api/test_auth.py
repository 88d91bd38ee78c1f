import pytest

from api.limits import RateLimit
from api.problems import Problem
from db import keys
from db.keys import Scope


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_key"),
        ({"Authorization": "Basic YTpi"}, "malformed_authorization"),
        ({"Authorization": "Bearer"}, "malformed_authorization"),
        ({"Authorization": "Bearer tf_nobody"}, "unknown_key"),
    ],
)
def test_without_a_usable_key_nothing_is_told(service, headers, code):
    reply = service.client.get("/v1/jobs", headers=headers)
    assert reply.status_code == 401
    assert reply.json()["code"] == code
    assert reply.headers["WWW-Authenticate"].startswith("Bearer")


def test_an_unknown_key_is_not_repeated_in_full(service):
    reply = service.client.get("/v1/jobs", headers={"Authorization": "Bearer tf_0123456789abcdef"})
    assert "tf_012" in reply.json()["detail"]
    assert "0123456789" not in reply.text


def test_a_revoked_key_stops_at_once(service):
    admin = service.as_owner("root", Scope.ADMIN)
    made = admin.post("/v1/keys", json={"name": "laptop", "scopes": ["read"]}).json()
    headers = {"Authorization": f"Bearer {made['secret']}"}
    assert service.client.get("/v1/jobs", headers=headers).status_code == 200
    assert admin.delete(f"/v1/keys/{made['id']}").status_code == 204
    assert service.client.get("/v1/jobs", headers=headers).json()["code"] == "unknown_key"


def test_a_scope_that_is_missing_is_named(service):
    reader = service.as_owner("ann", Scope.READ)
    reply = reader.post("/v1/uploads", content=b"x")
    assert reply.status_code == 403
    assert reply.json()["code"] == "scope_missing"
    assert "'submit'" in reply.json()["detail"]


@pytest.mark.parametrize("path", ["/v1/keys", "/v1/workers"])
def test_what_concerns_everyone_needs_an_admin(service, path):
    assert service.get(path).status_code == 403
    assert service.as_owner("root", Scope.ADMIN).get(path).status_code == 200


def test_others_things_do_not_exist(on_both):
    job = on_both.done_job()
    artifact = on_both.get(f"/v1/jobs/{job}/artifacts").json()["items"][0]["id"]
    model = on_both.get(f"/v1/jobs/{job}").json()["model"]
    upload = on_both.upload()
    bob = on_both.as_owner("bob")
    for path in (
        f"/v1/jobs/{job}",
        f"/v1/jobs/{job}/trials",
        f"/v1/jobs/{job}/trials/0",
        f"/v1/jobs/{job}/front",
        f"/v1/jobs/{job}/layers",
        f"/v1/jobs/{job}/events",
        f"/v1/jobs/{job}/artifacts",
        f"/v1/artifacts/{artifact}",
        f"/v1/artifacts/{artifact}/content",
        f"/v1/models/{model}",
        f"/v1/uploads/{upload}",
    ):
        assert bob.get(path).status_code == 404, path
    for path in (f"/v1/jobs/{job}", f"/v1/models/{model}", f"/v1/uploads/{upload}"):
        assert bob.delete(path).status_code == 404, path
    assert bob.post(f"/v1/jobs/{job}/trials/0/export").status_code == 404
    assert bob.post("/v1/models", json={"upload": upload}).json()["code"] == "upload_not_found"
    assert bob.get("/v1/jobs").json()["items"] == []


def test_the_key_in_use_tells_who_one_is(service):
    seen = service.get("/v1/keys/current").json()
    assert (seen["owner"], seen["scopes"]) == ("ann", ["read", "submit"])
    assert "secret" not in seen


def test_a_keys_last_use_is_remembered(service):
    admin = service.as_owner("root", Scope.ADMIN)
    service.get("/v1/jobs")
    used = {key["owner"]: key["last_used_at"] for key in admin.get("/v1/keys").json()["items"]}
    assert used["ann"] is not None


def test_a_key_that_asks_too_often_is_told_when_to_come_back(small_service):
    replies = [small_service.get("/v1/jobs") for _ in range(21)]
    assert [reply.status_code for reply in replies[:20]] == [200] * 20
    assert replies[20].status_code == 429
    assert replies[20].json()["code"] == "too_many_requests"
    assert int(replies[20].headers["Retry-After"]) >= 1


def test_the_rate_limit_refills_with_time_and_counts_keys_apart():
    limit = RateLimit(60)
    for _ in range(60):
        limit.spend("a", now=0.0)
    with pytest.raises(Problem):
        limit.spend("a", now=0.5)
    limit.spend("b", now=0.5)
    limit.spend("a", now=2.0)


def test_the_secret_is_kept_nowhere(service):
    admin = service.as_owner("root", Scope.ADMIN)
    made = admin.post("/v1/keys", json={"name": "k", "owner": "eve"}, headers={"Idempotency-Key": "one"}).json()
    again = admin.post("/v1/keys", json={"name": "k", "owner": "eve"}, headers={"Idempotency-Key": "one"}).json()
    assert made["secret"].startswith("tf_")
    assert again == {**made, "secret": None}
    with service.db.read() as s:
        found = keys.find(s, made["secret"])
    assert found is not None
    assert found.owner == "eve"
