"""Every request the client makes is one that the OpenAPI document describes, and every operation of it is tried."""

import re
from pathlib import Path
from typing import Any

import pytest

import tenfold
from tenfold import plotting
from tenfold._drivers import Driver
from tenfold._operations import listing, operation, reading, steering
from tenfold._wire import Download, Request
from tenfold.client import Operations
from tenfold.resources import ArtifactOperations, DatasetOperations, JobOperations, ModelOperations
from tests.client.conftest import Service
from tests.client.seed import Workers

ELSEWHERE = {"load", "compress"}
"""They need torch and a network: tests/e2e."""


class Recording(Driver):
    """A driver that remembers what it was asked to do."""

    def __init__(self, inner: Driver) -> None:
        super().__init__(inner.connection)
        inner.close()
        self.seen: list[Request | Download] = []

    def _perform(self, effect: Any) -> Any:
        if isinstance(effect, Request | Download):
            self.seen.append(effect)
        return super()._perform(effect)


@pytest.fixture(scope="module")
def document(service: Service) -> dict[str, Any]:
    return service.app.openapi()


@pytest.fixture
def journey(service: Service, workers: Workers, done: str, tmp_path: Path) -> tuple[set[str], list[Request | Download]]:
    """The operations that ran, by name, and the requests that they made."""
    used: set[str] = set()
    file = tmp_path / "net.pt2"
    file.write_bytes(b"net")
    with service.client() as client:
        client._driver = driver = Recording(client._driver)

        def do(thing: Any, name: str, *args: Any, **more: Any) -> Any:
            used.add(name)
            found = getattr(thing, name)
            result = found(*args, **more) if callable(found) else found
            return list(result) if hasattr(result, "__next__") else result

        upload = do(client, "upload", file)
        do(client, "uploads")
        do(client, "delete_upload", upload)
        model = do(client, "upload_model", file, architecture={"name": "x"}, format="safetensors")
        data = do(client, "upload_dataset", file, task="classification")
        workers.inspect()
        do(model, "wait")
        do(data, "wait")
        do(client, "model", model.id)
        do(client, "dataset", data.id)
        new = do(client, "submit", model, data, min_value=0.9, metric="accuracy", search={"trials": 3}, methods=["svd"])
        for name in ("pause", "resume", "cancel", "reload", "delete"):
            do(new, name)
        for name in ("jobs", "models", "datasets", "keys", "workers", "current_key"):
            do(client, name)
        key = do(client, "create_key", "k", scopes=["read"], owner="zoe")
        do(client, "revoke_key", key["id"])
        job = do(client, "job", done)
        for name in ("trials", "events", "front", "layers", "plot"):
            do(job, name)
        do(job, "trial", 0)
        artifact = do(job, "artifacts", job["best"]["trial"])[0]
        do(client, "artifact", artifact.id)
        do(artifact, "download", tmp_path)
        do(job, "download", tmp_path)
        job.reload(wait=1.0)
        do(job, "export", 0)
        do(job, "extend", 2)
        workers.finish(done, job["best"]["trial"])
        driver.close()
    return used, driver.seen


def test_every_operation_is_tried(journey: tuple[set[str], list[Any]]) -> None:
    kinds = operation, steering, reading, listing
    classes = Operations, JobOperations, ModelOperations, DatasetOperations, ArtifactOperations
    written = {n for c in classes for base in c.__mro__ for n, v in vars(base).items() if isinstance(v, kinds)}
    assert written - ELSEWHERE == journey[0]


def test_every_request_is_in_the_document(journey: tuple[set[str], list[Any]], document: dict[str, Any]) -> None:
    assert len(journey[1]) > 40
    for request in journey[1]:
        described = _described(document, request)
        parameters = {(p["in"], p["name"].lower()): p for p in described.get("parameters", [])}
        if isinstance(request, Download):
            assert ("header", "range") in parameters
            continue
        for name in request.params:
            assert ("query", name) in parameters, (request, sorted(parameters))
        for name in request.headers:
            assert ("header", name.lower()) in parameters or name == "If-None-Match", request
        bodies = described.get("requestBody", {}).get("content", {})
        if request.file is not None:
            assert list(bodies) == ["application/octet-stream"]
        elif request.json is not None:
            _fits(document, bodies["application/json"]["schema"], request.json, request.path)
        else:
            assert not bodies or not described["requestBody"].get("required"), request


def test_the_fields_that_people_are_shown_are_in_the_document(document: dict[str, Any]) -> None:
    shown = {
        "JobView": "id name model dataset spec state stage reason_code reason progress baseline best eta_seconds",
        "Progress": "trials_done trials_asked running",
        "Running": "message done of",
        "Baseline": "metric value verify_value max_drop costs",
        "Best": "trial rung value drop verify_value verify_drop keeps_budget costs",
        "Costs": "parameters macs bytes latency_ms dense_latency_ms",
        "TrialView": "number stage rung state plan result error",
        "TrialDetail": "results",
        "TrialResult": "rung value drop costs seconds curve",
        "LayerView": "name kind weight parameters macs compressible reason sensitivity method ranks parameters_after",
        "ArtifactView": "id trial format filename size sha256",
        "EventView": "at message",
        "WorkerView": "id host queue device jail seen_at",
        "ModelView": "state reason_code reason info",
        "DatasetView": "state reason_code reason",
        "NewKeyView": "id owner name scopes secret",
    }
    for name, fields in shown.items():
        assert set(fields.split()) <= set(document["components"]["schemas"][name]["properties"]), name
    assert set(plotting.COSTS) == set(document["components"]["schemas"]["Cost"]["enum"])
    assert set(plotting.FRACTIONS) < set(document["components"]["schemas"]["Metric"]["enum"])
    assert set(tenfold.Job.TERMINAL) < set(document["components"]["schemas"]["JobState"]["enum"])


def _described(document: dict[str, Any], request: Request | Download) -> dict[str, Any]:
    method = request.method.lower() if isinstance(request, Request) else "get"
    for path, methods in sorted(document["paths"].items(), key=lambda item: item[0].count("{")):
        if method in methods and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", path), request.path):
            described: dict[str, Any] = methods[method]
            return described
    raise AssertionError(f"{method} {request.path} is not in the document")


def _fits(document: dict[str, Any], schema: dict[str, Any], value: Any, where: str) -> None:
    """Names and nesting: every field that is sent exists, every one that is required is sent."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]]
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        fitting = [one for one in choices if "$ref" in one or one.get("type") == _type(value) or "const" in one]
        assert fitting, (where, value)
        schema = fitting[0]
        if "$ref" in schema:
            _fits(document, schema, value, where)
            return
    if isinstance(value, dict) and "properties" in schema:
        assert set(value) <= set(schema["properties"]), where
        assert set(schema.get("required", [])) <= set(value), where
        for name, inner in value.items():
            _fits(document, schema["properties"][name], inner, f"{where} {name}")


def _type(value: Any) -> str:
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}
    return kinds.get(type(value), "null")
