"""What the process is from outside: light, described, healthy."""

import json
import re
import subprocess
import sys
from pathlib import Path

from db import workers

ROOT = Path(__file__).parents[2]


def test_the_api_starts_without_torch():
    code = (
        "import time, sys, json; began = time.perf_counter(); import api.app; from db.settings import Settings; "
        "api.app.create_app(Settings()); seconds = time.perf_counter() - began; "
        "heavy = [m for m in ('torch', 'numpy', 'optuna', 'tensorly', 'scipy', 'onnx') if m in sys.modules]; "
        "import psutil; print(json.dumps([heavy, seconds, psutil.Process().memory_info().rss / 2**20]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy, seconds, mebibytes = json.loads(done.stdout)
    assert heavy == []
    assert seconds < 10  # about one on an idle machine
    assert mebibytes < 200  # about ninety


def test_every_operation_is_described(service):
    document = service.client.get("/openapi.json").json()
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    ids = [operation["operationId"] for operation in operations]
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[a-z_]+", name) for name in ids)
    assert all(operation["description"] for operation in operations)
    assert {"create_upload", "create_model", "create_dataset", "create_job", "get_job", "get_front"} <= set(ids)


def test_every_operation_under_v1_needs_a_key(service):
    document = service.client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert ("security" in operation) == path.startswith("/v1/"), path


def test_every_reference_in_the_document_leads_somewhere(service):
    text = service.client.get("/openapi.json").text
    schemas = json.loads(text)["components"]["schemas"]
    for name in re.findall(r'"#/components/schemas/([^"]+)"', text):
        assert name in schemas


def test_the_examples_of_the_document_are_accepted(service):
    schemas = service.client.get("/openapi.json").json()["components"]["schemas"]
    model, data = service.model_and_data()
    upload = service.upload()
    for name, path, real in (
        ("ModelRequest", "/v1/models", {"upload": upload}),
        ("DatasetRequest", "/v1/datasets", {"upload": upload}),
        ("JobRequest", "/v1/jobs", {"model": model, "dataset": data}),
    ):
        assert service.post(path, json=schemas[name]["example"] | real).status_code == 202


def test_the_documentation_needs_no_script_and_no_network(service):
    reply = service.client.get("/docs")
    assert reply.status_code == 200
    assert "<script" not in reply.text
    assert "http://" not in reply.text
    assert "https://" not in reply.text
    assert "/v1/jobs/{job_id}" in reply.text
    assert "In the metric&#39;s units" in reply.text


def test_the_page_lets_only_its_own_scripts_run(service):
    policy = service.client.get("/").headers["Content-Security-Policy"]
    assert "script-src 'self';" in policy
    assert "default-src 'none'" in policy


def test_health_is_open(service):
    assert service.client.get("/healthz").json() == {"status": "ok"}


def test_readiness_says_what_is_missing(service):
    reply = service.client.get("/readyz")
    assert (reply.status_code, reply.json()["status"]) == (200, "degraded")
    assert reply.json()["database"]["ok"] is True
    assert "TENFOLD_REDIS_URL" in reply.json()["broker"]["detail"]
    assert "tenfold-server worker" in reply.json()["workers"]["detail"]


def test_readiness_tells_of_workers_and_their_jails(on_both):
    jail = {"landlock": True, "seccomp": False, "rlimits": True}
    with on_both.db.begin() as s:
        workers.seen(s, "w1", host="here", queue="cpu", device="2 cores", jail=jail)
    body = on_both.client.get("/readyz").json()
    assert body["workers"] == {"ok": True, "detail": "1 on cpu"}
    assert (body["jail"]["ok"], "seccomp" in body["jail"]["detail"]) == (False, True)


def test_a_jail_that_is_off_is_no_whole_one(service):
    jail = {"mode": "off", "landlock": False, "seccomp": False, "rlimits": False}
    with service.db.begin() as s:
        workers.seen(s, "w1", host="here", queue="cpu", device="2 cores", jail=jail)
    body = service.client.get("/readyz").json()
    assert body["status"] == "degraded"
    assert body["jail"] == {"ok": False, "detail": "missing on a worker: landlock, rlimits, seccomp"}


def test_without_its_database_the_process_is_not_ready(service, tmp_path):
    service.db.close()
    for file in (tmp_path / "database").iterdir():
        file.unlink()
    (tmp_path / "database").rmdir()
    reply = service.client.get("/readyz")
    assert (reply.status_code, reply.json()["status"]) == (503, "unavailable")
    assert service.client.get("/healthz").status_code == 200
    assert service.get("/v1/jobs").json()["code"] == "database_unavailable"


def test_metrics_count_requests_by_route_and_work_by_state(on_both):
    job = on_both.new_job()
    on_both.get(f"/v1/jobs/{job}")
    text = on_both.client.get("/metrics").text
    assert 'tenfold_requests_total{method="GET",route="/v1/jobs/{job_id}",status="200"} 1.0' in text
    assert 'tenfold_jobs{state="queued"} 1.0' in text
    assert 'tenfold_tasks{queue="cpu",state="queued"} 2.0' in text
    assert job not in text
