import pytest

from db import jobs, tasks, trials
from db.tables import AssetState, Dataset, Job
from search.decompose import JOINT_METHODS, METHODS
from search.spec import METHOD_NAMES, Rung, TrialWork


def test_a_job_is_accepted_before_its_model_is_ready(on_both):
    reply = on_both.post("/v1/jobs", json=on_both.job_body(name="small"))
    assert reply.status_code == 202
    body = reply.json()
    assert (body["state"], body["name"], body["best"], body["baseline"]) == ("queued", "small", None, None)
    assert reply.headers["Location"] == body["links"]["self"] == f"/v1/jobs/{body['id']}"
    assert on_both.get(reply.headers["Location"]).json() == body


def test_the_specification_is_read_back_with_its_defaults(service):
    spec = service.get(f"/v1/jobs/{service.new_job()}").json()["spec"]
    assert spec["budget"]["max_drop"] == 0.01
    assert spec["minimize"] == ["parameters"]
    assert spec["search"]["trials"] == 4


def test_progress_baseline_best_and_time_left_are_told(on_both):
    job = on_both.searching_job(trials=3)
    on_both.complete_trial(on_both.result(drop=0.02, parameters=20))
    on_both.complete_trial(on_both.result(drop=0.004, parameters=60))
    running = on_both.claim()
    with on_both.db.begin() as s:
        assert tasks.heartbeat(s, running.id, 1, 90, {"message": "reconstructing fc", "done": 1, "of": 4})
    seen = on_both.get(f"/v1/jobs/{job}").json()
    assert seen["state"] == "searching"
    assert seen["progress"]["trials_done"] == 2
    assert seen["progress"]["trials_asked"] == 4
    assert seen["progress"]["running"] == [
        {
            "task": running.id,
            "kind": "trial",
            "trial": 2,
            "attempt": 1,
            "message": "reconstructing fc",
            "done": 1,
            "of": 4,
        }
    ]
    assert seen["baseline"]["costs"]["parameters"] == 100
    assert (seen["best"]["trial"], seen["best"]["drop"], seen["best"]["costs"]["parameters"]) == (1, 0.004, 60)
    assert seen["best"]["verified"] is False
    assert seen["eta_seconds"] >= 0
    assert on_both.get("/v1/jobs").json()["items"][0]["best"] == seen["best"]


def test_a_trial_taken_further_still_counts_as_done(service):
    job = service.searching_job()
    service.complete_trial(service.result())
    with service.db.read() as s:
        plan = jobs.advance_snapshot(s, job).history[0].plan
    work = TrialWork(number=0, stage=0, parent=None, params={}, plan=plan, rung=Rung.SHORT)
    service.apply(job, [work])
    assert service.get(f"/v1/jobs/{job}").json()["progress"]["trials_done"] == 1


def test_the_verdict_on_unseen_data_is_told(service):
    best = service.get(f"/v1/jobs/{service.done_job()}").json()["best"]
    assert (best["verified"], best["keeps_budget"], best["verify_value"]) == (True, True, 0.885)


def write_as_another_version(service, job):
    with service.db.begin() as s:
        row = jobs.get(s, service.owner, job)
        row.spec = {**row.spec, "budget": {"max_drop": "a lot"}}


def test_a_job_of_another_version_is_listed_with_a_message_beside_the_others(on_both):
    theirs, mine = on_both.new_job(), on_both.new_job()
    write_as_another_version(on_both, theirs)
    seen = {job["id"]: job for job in on_both.get("/v1/jobs").json()["items"]}
    assert (seen[mine]["reason"], seen[mine]["progress"]["trials_asked"]) == (None, 4)
    unread = seen[theirs]
    assert (unread["state"], unread["spec"], unread["reason_code"]) == ("queued", None, "unreadable_job")
    assert "start the version that wrote it" in unread["reason"]
    assert on_both.get(f"/v1/jobs/{theirs}").json() == unread


def test_a_trial_of_another_version_does_not_hide_the_job(service):
    job = service.done_job()
    with service.db.begin() as s:
        trials.get(s, service.owner, job, 0).results = {"full": {"costs": "low"}}
    seen = service.get(f"/v1/jobs/{job}").json()
    assert (seen["state"], seen["best"], seen["reason_code"]) == ("done", None, "unreadable_job")
    assert seen["spec"]["search"]["trials"] == 4


def test_a_job_of_another_version_is_not_worked_with_but_may_go(service):
    job = service.done_job()
    write_as_another_version(service, job)
    for reply in (service.post(f"/v1/jobs/{job}/extend", json={"trials": 2}), service.get(f"/v1/jobs/{job}/front")):
        assert (reply.status_code, reply.json()["code"]) == (409, "unreadable_job")
    assert service.delete(f"/v1/jobs/{job}").status_code == 204


@pytest.mark.parametrize("noun", ["model", "dataset"])
def test_what_is_not_there_is_named(service, noun):
    reply = service.post("/v1/jobs", json=service.job_body() | {noun: "mdl_none"})
    assert (reply.status_code, reply.json()["code"]) == (404, f"{noun}_not_found")


def test_a_rejected_model_is_refused_with_its_reason(service):
    body = service.job_body()
    task = service.claim()
    with service.db.begin() as s:
        assert tasks.fail(s, task.id, task.attempt, "not_a_zip", "no .pt2", retry=False)
    reply = service.post("/v1/jobs", json=body)
    assert (reply.status_code, reply.json()["code"]) == (409, "model_rejected")
    assert "no .pt2" in reply.json()["detail"]


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"budget": {"max_drop": 0.1, "metric": "mse"}}, "metric_contradicts_task", "accuracy, top5"),
        ({"budget": {"max_drop": 5}}, "budget_not_a_fraction", "0.05"),
        ({"budget": {"min_value": 91.5}}, "budget_not_a_fraction", "0.915"),
        ({"budget": {}}, "invalid_request", "exactly one of max_drop and min_value"),
        ({"budget": {"max_dorp": 0.1, "max_drop": 0.1}}, "unknown_field", "did you mean 'max_drop'"),
        ({"budget": {"max_drop": -1}}, "invalid_request", "-1 arrived"),
        ({"methods": ["tuker2"]}, "unknown_method", "tucker2"),
        ({"methods": []}, "no_method", "empty"),
        ({"budget": {"min_value": -5}}, "budget_not_a_fraction", "between 0 and 1"),
        ({"minimize": []}, "invalid_request", "at least one"),
        ({"minimize": ["parameters", "parameters"]}, "invalid_request", "each once"),
        ({"export": []}, "invalid_request", "at least one"),
        ({"layers": {"fixed": {"fc": {"method": "svd", "ranks": [0]}}}}, "invalid_request", "ranks"),
        ({"layers": {"fixed": {"fc": {"method": "qr", "ranks": [1]}}}}, "unknown_method", "qr"),
        (
            {
                "layers": {
                    "fixed": {"two": {"method": "joint_mps", "ranks": [2, 1, 1], "members": {"a": [0], "b": [2]}}}
                }
            },
            "invalid_request",
            "fill a grid",
        ),
        ({"layers": {"groups": {"two": []}}}, "invalid_request", "'layers.groups.two': "),
        (
            {"fine_tune": {"epochs": -1}},
            "invalid_request",
            "'fine_tune.epochs': Input should be 'auto', or Input should be greater than or equal to 0 (-1 arrived).",
        ),
        ({"colour": "red"}, "unknown_field", "'red' arrived"),
        ({"search": {"trials": 0}}, "invalid_request", "search.trials"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_with_advice(service, change, code, says):
    reply = service.post("/v1/jobs", json={"model": "m", "dataset": "d", **service.job_body(), **change})
    assert (reply.status_code, reply.json()["code"]) == (422, code), reply.text
    assert says in reply.json()["detail"]
    assert service.get("/v1/jobs").json()["items"] == []


@pytest.mark.parametrize(
    ("task", "metric", "status"),
    [
        ("segmentation", "miou", 202),
        ("segmentation", "pixel_accuracy", 202),
        ("segmentation", "accuracy", 422),
        ("keypoints", None, 202),
        ("keypoints", "miou", 422),
        ("classification", "pck", 422),
    ],
)
def test_a_metric_goes_with_the_task_of_its_data(service, task, metric, status):
    body = service.job_body(budget={"metric": metric, "max_drop": 0.01})
    made = service.post("/v1/datasets", json={"upload": service.upload(), "task": task}).json()
    reply = service.post("/v1/jobs", json=body | {"dataset": made["id"]})
    assert reply.status_code == status, reply.text
    if status == 422:
        assert reply.json()["code"] == "metric_contradicts_task"


def test_the_budget_of_a_share_is_a_fraction(service):
    body = service.job_body(budget={"max_drop": 3})
    made = service.post("/v1/datasets", json={"upload": service.upload(), "task": "segmentation"}).json()
    reply = service.post("/v1/jobs", json=body | {"dataset": made["id"]})
    assert (reply.status_code, reply.json()["code"]) == (422, "budget_not_a_fraction")
    assert "0.03" in reply.json()["detail"]


def test_top5_of_a_few_classes_is_refused(service):
    body = service.job_body(budget={"metric": "top5", "max_drop": 0.01})
    with service.db.begin() as s:
        data = s.get(Dataset, body["dataset"])
        data.state = AssetState.READY
        data.info = {
            "format": "npz", "task": "classification", "inputs": [], "target": None, "classes": 3,
            "splits": {"train": 8, "select": 4, "verify": 4},
        }  # fmt: skip
    assert service.post("/v1/jobs", json=body).json()["code"] == "metric_contradicts_task"


def test_the_methods_the_api_knows_are_those_there_are():
    assert set(METHOD_NAMES) == {*METHODS, *JOINT_METHODS}


def test_too_many_unfinished_jobs_are_refused(small_service):
    body = small_service.job_body()
    assert small_service.post("/v1/jobs", json=body).status_code == 202
    reply = small_service.post("/v1/jobs", json=body)
    assert (reply.status_code, reply.json()["code"]) == (409, "too_many_live_jobs")


def test_pause_resume_and_cancel(on_both):
    job = on_both.searching_job()
    assert on_both.post(f"/v1/jobs/{job}/pause").json()["state"] == "paused"
    assert on_both.post(f"/v1/jobs/{job}/resume").json()["state"] == "searching"
    assert on_both.post(f"/v1/jobs/{job}/cancel").json()["state"] == "cancelled"
    reply = on_both.post(f"/v1/jobs/{job}/pause")
    assert (reply.status_code, reply.json()["code"]) == (409, "job_not_active")


def test_a_finished_job_can_be_extended_exported_from_and_deleted(on_both):
    job = on_both.done_job()
    reply = on_both.post(f"/v1/jobs/{job}/trials/0/export")
    assert (reply.status_code, reply.json()["state"]) == (202, "done")
    assert reply.json()["progress"]["queued"] == 1
    reply = on_both.post(f"/v1/jobs/{job}/extend", json={"trials": 2})
    assert (reply.status_code, reply.json()["state"]) == (202, "searching")
    assert reply.json()["spec"]["search"]["trials"] == 6
    assert on_both.delete(f"/v1/jobs/{job}").json()["code"] == "job_not_finished"
    on_both.post(f"/v1/jobs/{job}/cancel")
    assert on_both.delete(f"/v1/jobs/{job}").status_code == 204
    assert on_both.get(f"/v1/jobs/{job}").status_code == 404


def test_a_job_that_used_its_hours_says_that_it_needs_more(service):
    job = service.done_job(search={"trials": 4, "hours": 2})
    with service.db.begin() as s:
        s.get(Job, job).spent_seconds = 9000
    reply = service.post(f"/v1/jobs/{job}/extend", json={"trials": 2})
    assert (reply.status_code, reply.json()["code"]) == (422, "hours_used_up")
    assert "2.5 of its 2 hours" in reply.json()["detail"]
    reply = service.post(f"/v1/jobs/{job}/extend", json={"trials": 2, "hours": 1})
    assert (reply.status_code, reply.json()["spec"]["search"]["hours"]) == (202, 3.5)


def test_a_trial_that_is_not_there_cannot_be_exported(service):
    reply = service.post(f"/v1/jobs/{service.done_job()}/trials/7/export")
    assert (reply.status_code, reply.json()["code"]) == (404, "trial_not_found")


def test_pages_join_without_gaps(on_both):
    body = on_both.job_body()
    made = [on_both.post("/v1/jobs", json=body).json()["id"] for _ in range(5)]
    seen, cursor = [], None
    while True:
        page = on_both.get("/v1/jobs", params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        seen += [job["id"] for job in page["items"]]
        if (cursor := page["next"]) is None:
            break
    assert seen == made[::-1]


def test_a_cursor_of_ones_own_making_is_refused(service):
    reply = service.get("/v1/jobs", params={"cursor": "abc"})
    assert (reply.status_code, reply.json()["code"]) == (422, "bad_cursor")
    assert "abc" in reply.json()["detail"]
