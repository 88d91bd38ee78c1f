import hashlib
import threading
import time

import pytest

from search.spec import CurvePoint, EpochRecord, Outcome, Rung, SiteChoice, SitePlan

from .conftest import PROFILE

CONTENT = b"0123456789" * 200_000  # two chunks
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def test_trials_come_with_the_result_of_their_highest_rung(on_both):
    job = on_both.searching_job(trials=2)
    curve = (EpochRecord(epoch=1, loss=0.5, value=0.8, learning_rate=0.1),)
    on_both.complete_trial(on_both.result(curve=curve))
    first, second = on_both.get(f"/v1/jobs/{job}/trials").json()["items"]
    assert (first["number"], first["state"], first["result"]["drop"]) == (0, "done", 0.005)
    assert first["plan"]["fc"] == {"method": "svd", "ranks": [2], "options": {}, "members": {}}
    assert first["result"]["curve"] == []
    assert (second["state"], second["result"]) == ("queued", None)
    alone = on_both.get(f"/v1/jobs/{job}/trials/0").json()
    assert alone["results"]["cheap"]["curve"][0]["loss"] == 0.5


def test_a_trial_that_failed_tells_how(service):
    job = service.searching_job()
    service.complete_trial(service.result(outcome=Outcome.NON_FINITE, drop=None))
    trial = service.get(f"/v1/jobs/{job}/trials/0").json()
    assert "ranks are too low" in trial["results"]["cheap"]["outcome"]


def test_the_front_has_only_what_nothing_beats(on_both):
    job = on_both.searching_job(trials=4)
    assert on_both.get(f"/v1/jobs/{job}/front").json()["points"] == []
    for drop, parameters in ((0.01, 30), (0.002, 60), (0.02, 70), (0.0, 120)):
        on_both.complete_trial(on_both.result(drop=drop, parameters=parameters))
    front = on_both.get(f"/v1/jobs/{job}/front").json()
    assert [(p["trial"], p["costs"]["parameters"]) for p in front["points"]] == [(0, 30), (1, 60)]
    assert front["baseline"]["max_drop"] == 0.01
    assert not any(p["verified"] for p in front["points"])
    other = on_both.get(f"/v1/jobs/{job}/front", params={"cost": "macs"}).json()
    assert other["minimize"] == ["macs"]
    assert [p["trial"] for p in other["points"]] == [3]


def test_layers_before_and_after(on_both):
    job = on_both.searching_job()
    before = on_both.get(f"/v1/jobs/{job}/layers").json()
    assert before["trial"] is None
    assert [layer["parameters_after"] for layer in before["layers"]] == [None, None]
    on_both.complete_trial(on_both.result())
    fc, norm = on_both.get(f"/v1/jobs/{job}/layers").json()["layers"]
    assert (fc["method"], fc["ranks"], fc["parameters"], fc["parameters_after"]) == ("svd", [2], 90, 46)
    assert (fc["error"], fc["sensitivity"]) == (0.25, 1.5)
    assert (norm["method"], norm["parameters_after"], norm["compressible"]) == (None, 10, False)
    assert on_both.get(f"/v1/jobs/{job}/layers", params={"trial": 9}).status_code == 404


def test_a_layer_that_shares_factors_shows_its_part_of_them(on_both):
    members = {"fc": (0,), "head": (1,)}
    point = CurvePoint(ranks=(2, 3, 3), parameters=91, macs=701, error=0.2, errors=(0.1, 0.3), rise=0.4)
    group = SiteChoice(
        site="pair", members=members, dense_parameters=180, dense_macs=1600, curves={"joint_tucker": (point,)}
    )
    profile = PROFILE.model_copy(update={"groups": (group,)})
    plan = {"pair": SitePlan(method="joint_tucker", ranks=(2, 3, 3), members=members)}
    job = on_both.searching_job(profile=profile, plan=plan)
    on_both.complete_trial(on_both.result())
    fc, norm = on_both.get(f"/v1/jobs/{job}/layers").json()["layers"]
    assert (fc["method"], fc["ranks"], fc["together"]) == ("joint_tucker", [2, 3, 3], ["fc", "head"])
    assert (fc["parameters_after"], fc["macs_after"], fc["error"]) == (46, 351, 0.1)
    assert norm["together"] == []
    trial = on_both.get(f"/v1/jobs/{job}/trials/0").json()
    assert trial["plan"]["pair"]["members"] == {"fc": [0], "head": [1]}


def test_events_are_told_in_order_and_gone_on_from(on_both):
    job = on_both.searching_job()
    first = on_both.get(f"/v1/jobs/{job}/events", params={"limit": 2}).json()
    assert first["items"][0]["message"] == "Accepted."
    rest = on_both.get(f"/v1/jobs/{job}/events", params={"cursor": first["next"]}).json()
    assert rest["next"] is None
    none_yet = on_both.get(f"/v1/jobs/{job}/events", params={"cursor": rest["last"]}).json()
    assert (none_yet["items"], none_yet["last"]) == ([], rest["last"])
    on_both.post(f"/v1/jobs/{job}/pause")
    news = on_both.get(f"/v1/jobs/{job}/events", params={"cursor": rest["last"]}).json()
    assert [event["data"] for event in news["items"]] == [{"state": "paused"}]


# ----------------------------------------------------------------------------------------------- waiting for news


def test_what_one_has_already_is_not_sent_again(service):
    path = f"/v1/jobs/{service.searching_job()}"
    etag = service.get(path).headers["ETag"]
    again = service.get(path, headers={"If-None-Match": etag})
    assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", etag)
    service.complete_trial(service.result())
    assert service.get(path, headers={"If-None-Match": etag}).status_code == 200


def test_a_long_poll_ends_with_the_change(service):
    path = f"/v1/jobs/{service.searching_job()}"
    etag = service.get(path).headers["ETag"]
    timer = threading.Timer(0.7, service.complete_trial, [service.result()])
    began = time.monotonic()
    timer.start()
    reply = service.get(path, params={"wait": 30}, headers={"If-None-Match": etag})
    timer.join()
    assert reply.status_code == 200
    assert 0.6 < time.monotonic() - began < 10
    assert reply.json()["progress"]["trials_done"] == 1


def test_a_long_poll_without_a_change_ends_in_time(service):
    path = f"/v1/jobs/{service.searching_job()}"
    etag = service.get(path).headers["ETag"]
    began = time.monotonic()
    reply = service.get(path, params={"wait": 1}, headers={"If-None-Match": etag})
    assert reply.status_code == 304
    assert 0.9 < time.monotonic() - began < 5


def test_a_long_poll_on_a_model_ends_with_its_inspection(service):
    model, _ = service.model_and_data()
    etag = service.get(f"/v1/models/{model}").headers["ETag"]
    timer = threading.Timer(0.3, service.inspect)
    timer.start()
    reply = service.get(f"/v1/models/{model}", params={"wait": 30}, headers={"If-None-Match": etag})
    timer.join()
    assert reply.json()["state"] == "ready"


def test_one_can_wait_for_the_next_event(service):
    job = service.searching_job()
    last = service.get(f"/v1/jobs/{job}/events").json()["last"]
    timer = threading.Timer(0.3, service.complete_trial, [service.result()])
    timer.start()
    reply = service.get(f"/v1/jobs/{job}/events", params={"cursor": last, "wait": 30})
    timer.join()
    assert reply.json()["items"][0]["kind"] == "trial"


def test_waiting_for_events_needs_a_place_to_wait_from(service):
    reply = service.get(f"/v1/jobs/{service.new_job()}/events", params={"wait": 30})
    assert (reply.status_code, reply.json()["code"]) == (422, "cursor_needed")


def test_waiting_for_what_does_not_exist_ends_at_once(service):
    assert service.get("/v1/jobs/job_none", params={"wait": 30}).status_code == 404


# ---------------------------------------------------------------------------------------------------- downloads


@pytest.fixture
def artifact(on_both):
    job = on_both.done_job(CONTENT)
    return on_both, on_both.get(f"/v1/jobs/{job}/artifacts").json()["items"][0]


def test_an_artifact_is_told_with_its_hash(artifact):
    service, seen = artifact
    assert (seen["filename"], seen["size"], seen["sha256"]) == ("mödel.pt2", len(CONTENT), SHA256)
    assert seen["facts"] == {"value": 0.9}
    assert service.get(f"/v1/artifacts/{seen['id']}").json() == seen


def test_the_content_comes_whole_with_its_hash_as_the_tag(artifact):
    service, seen = artifact
    reply = service.get(seen["links"]["content"])
    assert (reply.status_code, reply.content) == (200, CONTENT)
    assert reply.headers["ETag"] == f'"{SHA256}"'
    assert reply.headers["Content-Length"] == str(len(CONTENT))
    assert reply.headers["Accept-Ranges"] == "bytes"
    assert reply.headers["Content-Disposition"] == (
        "attachment; filename=\"m_del.pt2\"; filename*=UTF-8''m%C3%B6del.pt2"
    )
    again = service.get(seen["links"]["content"], headers={"If-None-Match": f'"{SHA256}"'})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-9", 0, 10),
        ("bytes=1048570-1048585", 1048570, 1048586),
        ("bytes=1999990-", 1999990, 2000000),
        ("bytes=-5", 1999995, 2000000),
        ("bytes=5-99999999", 5, 2000000),
    ],
)
def test_a_range_comes_alone(artifact, asked, start, stop):
    service, seen = artifact
    reply = service.get(seen["links"]["content"], headers={"Range": asked})
    assert (reply.status_code, reply.content) == (206, CONTENT[start:stop])
    assert reply.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(CONTENT)}"


def test_a_range_beyond_the_end_is_refused_with_the_size(artifact):
    service, seen = artifact
    reply = service.get(seen["links"]["content"], headers={"Range": f"bytes={len(CONTENT)}-"})
    assert (reply.status_code, reply.json()["code"]) == (416, "range_not_satisfiable")
    assert reply.headers["Content-Range"] == f"bytes */{len(CONTENT)}"


@pytest.mark.parametrize("asked", ["bytes=9-3", "bytes=0-1,4-5", "lines=1-2", "bytes=-"])
def test_a_range_that_means_nothing_gets_the_whole(artifact, asked):
    service, seen = artifact
    assert service.get(seen["links"]["content"], headers={"Range": asked}).status_code == 200


def test_a_range_of_another_version_gets_the_whole(artifact):
    service, seen = artifact
    headers = {"Range": "bytes=0-9", "If-Range": '"other"'}
    assert service.get(seen["links"]["content"], headers=headers).status_code == 200
    headers["If-Range"] = f'"{SHA256}"'
    assert service.get(seen["links"]["content"], headers=headers).status_code == 206


def test_artifacts_of_one_trial(service):
    job = service.done_job()
    assert len(service.get(f"/v1/jobs/{job}/artifacts", params={"trial": 0}).json()["items"]) == 1
    assert service.get(f"/v1/jobs/{job}/artifacts", params={"trial": 1}).json()["items"] == []


def test_the_rung_of_each_point_is_told(service):
    job = service.done_job()
    assert service.get(f"/v1/jobs/{job}/front").json()["points"][0]["rung"] == Rung.FULL
