import pytest

from db import tasks
from db.tables import TaskKind

KINDS = [("models", TaskKind.INSPECT_MODEL), ("datasets", TaskKind.INSPECT_DATA)]


@pytest.mark.parametrize(("path", "kind"), KINDS)
def test_it_is_accepted_with_an_inspection_and_a_place_to_look(on_both, path, kind):
    reply = on_both.post(f"/v1/{path}", json={"upload": on_both.upload()})
    assert reply.status_code == 202
    assert reply.json()["state"] == "inspecting"
    assert reply.json()["name"] == "net.pt2"
    assert reply.headers["Location"] == f"/v1/{path}/{reply.json()['id']}"
    assert int(reply.headers["Retry-After"]) >= 1
    assert on_both.claim().kind is kind


def test_once_inspected_its_layers_are_told(service):
    model, data = service.model_and_data()
    service.inspect()
    seen = service.get(f"/v1/models/{model}").json()
    assert seen["state"] == "ready"
    assert [layer["name"] for layer in seen["info"]["layers"]] == ["fc", "norm"]
    assert service.get("/v1/models").json()["items"][0]["info"] is None
    assert service.get(f"/v1/datasets/{data}").json()["info"]["splits"] == {"train": 8, "select": 4, "verify": 4}


@pytest.mark.parametrize(("path", "kind"), KINDS)
def test_a_rejection_tells_why(service, path, kind):
    made = service.post(f"/v1/{path}", json={"upload": service.upload()}).json()
    task = service.claim()
    with service.db.begin() as s:
        assert tasks.fail(s, task.id, task.attempt, "not_a_zip", "the file is no .pt2: export it again", retry=False)
    seen = service.get(f"/v1/{path}/{made['id']}").json()
    assert (seen["state"], seen["reason_code"]) == ("rejected", "not_a_zip")
    assert "export it again" in seen["reason"]


@pytest.mark.parametrize(("path", "kind"), KINDS)
def test_an_upload_that_is_not_there_is_named(service, path, kind):
    reply = service.post(f"/v1/{path}", json={"upload": "upl_none"})
    assert (reply.status_code, reply.json()["code"]) == (404, "upload_not_found")
    assert "upl_none" in reply.json()["detail"]


def test_a_content_hash_is_no_id(service):
    made = service.post("/v1/uploads", content=b"x").json()
    assert service.post("/v1/models", json={"upload": made["sha256"]}).status_code == 404


def test_weights_without_an_architecture_are_refused(service):
    reply = service.post("/v1/models", json={"upload": service.upload(), "format": "safetensors"})
    assert (reply.status_code, reply.json()["code"]) == (422, "architecture_needed")


def test_an_architecture_and_a_transform_are_kept(service):
    architecture = {"name": "resnet20_cifar10", "options": {"classes": 10}}
    body = {"upload": service.upload(), "format": "safetensors", "architecture": architecture}
    assert service.post("/v1/models", json=body).json()["architecture"] == architecture
    transform = {"scale": 0.5, "mean": [0.1], "std": [0.2], "layout": "nhwc", "augment": "crop"}
    made = service.post("/v1/datasets", json={"upload": service.upload(), "transform": transform}).json()
    assert made["spec"]["transform"] == {**transform, "size": None}


def test_a_std_of_zero_is_refused_with_what_arrived(service):
    reply = service.post("/v1/datasets", json={"upload": "u", "transform": {"std": [0.0]}})
    assert reply.status_code == 422
    assert "(0.0,)" in reply.json()["detail"]


@pytest.mark.parametrize(
    "fields",
    [
        {"task": "segmentation", "transform": {"augment": "crop_flip"}},
        {"task": "keypoints", "pck_threshold": 0.2, "mirror": [[2, 5], [3, 6]], "transform": {"augment": "crop_flip"}},
        {"task": "keypoints", "mirror": [], "columns": {"length": "heads"}},
    ],
)
def test_a_task_of_maps_is_kept_with_its_options(on_both, fields):
    reply = on_both.post("/v1/datasets", json={"upload": on_both.upload(), **fields})
    assert reply.status_code == 202
    kept = on_both.get(f"/v1/datasets/{reply.json()['id']}").json()["spec"]
    transform = fields.pop("transform", {})
    assert kept.items() >= fields.items()
    assert kept["transform"].items() >= transform.items()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"task": "keypoints", "transform": {"augment": "crop_flip"}}, "swaps left and right joints"),
        ({"task": "keypoints", "mirror": [[1, 1]]}, "names a joint twice"),
        ({"task": "keypoints", "pck_threshold": -1}, "-1 arrived"),
        ({"task": "segmentation", "pck_threshold": 0.5}, "the task is segmentation"),
        ({"task": "detection"}, "'segmentation' or 'keypoints' ('detection' arrived)"),
    ],
)
def test_options_that_the_task_contradicts_are_refused(service, fields, says):
    reply = service.post("/v1/datasets", json={"upload": "u", **fields})
    assert reply.status_code == 422
    assert says in reply.json()["detail"], reply.json()["detail"]


@pytest.mark.parametrize("path", ["models", "datasets"])
def test_one_that_a_job_uses_stays(service, path):
    job = service.get(f"/v1/jobs/{service.new_job()}").json()
    reply = service.delete(f"/v1/{path}/{job[path[:-1]]}")
    assert (reply.status_code, reply.json()["code"]) == (409, f"{path[:-1]}_in_use")
    assert job["id"] in reply.json()["detail"]


@pytest.mark.parametrize("path", ["models", "datasets"])
def test_one_that_no_job_uses_can_go(service, path):
    made = service.post(f"/v1/{path}", json={"upload": service.upload()}).json()["id"]
    assert service.delete(f"/v1/{path}/{made}").status_code == 204
    assert service.get(f"/v1/{path}/{made}").status_code == 404
