"""The client against a real API: what is sent arrives, what is refused is told, what is waited for comes."""

import hashlib
import os
import threading
import time
import tracemalloc
from pathlib import Path

import pytest

import tenfold
from db.keys import Scope
from db.tables import JobState
from tenfold import errors
from tests.client.conftest import Service
from tests.client.seed import LAYERS, Workers, inspecting


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "net.pt2"
    path.write_bytes(os.urandom(3_000_000))
    return path


def later(seconds: float, function, *args) -> threading.Thread:
    def run() -> None:
        time.sleep(seconds)
        function(*args)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


# ------------------------------------------------------------------------------------------------------------ uploads


def test_an_upload_arrives_whole_and_tells_its_progress(client: tenfold.Client, file: Path) -> None:
    seen: list[tuple[int, int]] = []
    id = client.upload(file, progress=lambda done, of: seen.append((done, of)))
    stored = next(u for u in client.uploads() if u["id"] == id)
    assert stored["filename"] == "net.pt2"
    assert stored["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert seen[-1] == (3_000_000, 3_000_000)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_an_upload_is_never_held_in_memory(client: tenfold.Client, tmp_path: Path) -> None:
    big = tmp_path / "big.npz"
    with big.open("wb") as f:
        f.truncate(60_000_000)
    client.upload(file_of(tmp_path))  # imports and pools first
    tracemalloc.start()
    client.upload(big)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30_000_000  # the server runs in this process too, with its own few chunks


def file_of(folder: Path) -> Path:
    path = folder / "small"
    path.write_bytes(b"x")
    return path


def test_a_deleted_upload_is_gone(client: tenfold.Client, file: Path) -> None:
    id = client.upload(file)
    client.delete_upload(id)
    assert id not in {u["id"] for u in client.uploads()}
    with pytest.raises(errors.NotFound):
        client.delete_upload(id)


# ----------------------------------------------------------------------------------------------------- models, jobs


def test_files_become_a_job_with_what_was_asked(client: tenfold.Client, workers: Workers, file: Path) -> None:
    with inspecting(workers):
        job = client.submit(
            file,
            file,
            max_drop=0.02,
            minimize=("macs", "parameters"),
            data_spec={"transform": {"scale": 0.5}, "validation": 0.3},
            search={"trials": 7},
            fine_tune={"epochs": 3},
            budget={"confidence": 0.9},
        )
    assert job.state == "queued"
    assert job["name"] == "net"
    assert job["spec"]["budget"] == {
        "metric": None,
        "max_drop": 0.02,
        "min_value": None,
        "confidence": 0.9,
        "expect": None,
    }
    assert job["spec"]["minimize"] == ["macs", "parameters"]
    assert (job["spec"]["search"]["trials"], job["spec"]["fine_tune"]["epochs"]) == (7, 3)
    data = client.dataset(job["dataset"])
    assert (data["spec"]["validation"], data["spec"]["transform"]["scale"]) == (0.3, 0.5)
    model = client.model(job["model"])
    assert model.state == "ready"
    assert [layer["name"] for layer in model.layers] == [layer.name for layer in LAYERS]
    assert job.cancel().state == "cancelled"
    assert job.id in {j.id for j in client.jobs()}
    job.delete()
    with pytest.raises(errors.NotFound):
        job.reload()


def test_a_refused_model_is_told_with_its_reason(client: tenfold.Client, workers: Workers, file: Path) -> None:
    model = client.upload_model(file, name="broken")
    workers.inspect(refuse="This is a pickle: export it with tenfold.export.")
    with pytest.raises(errors.Rejected, match=r"This is a pickle.*bad_model"):
        model.wait(5)
    model.delete()


def test_weights_alone_go_with_their_architecture(client: tenfold.Client, file: Path, workers: Workers) -> None:
    model = client.upload_model(file, format="safetensors", architecture={"name": "resnet20_cifar10"})
    assert (model["format"], model["architecture"]["name"]) == ("safetensors", "resnet20_cifar10")
    workers.inspect()
    model.wait()
    assert model.id in {m.id for m in client.models()}


def test_wait_gives_up_after_its_timeout_and_the_job_goes_on(client: tenfold.Client, workers: Workers) -> None:
    job = client.job(workers.job("slow"))
    began = time.monotonic()
    with pytest.raises(errors.WaitTimeout, match=r"still queued after 1 s; it goes on"):
        job.wait(1)
    assert 0.9 < time.monotonic() - began < 4
    assert job.cancel().state == "cancelled"


def test_wait_sees_each_change_and_tells_why_a_job_failed(client: tenfold.Client, workers: Workers) -> None:
    job = client.job(workers.job("hopeless"))
    states: list[str] = []
    helper = later(0.8, lambda: workers.finish(job.id, None, ok=False, reason="Nothing smaller: allow more."))
    with pytest.raises(errors.JobFailed, match=r"Nothing smaller: allow more\. \(nothing_smaller\)") as failed:
        job.wait(20, on_change=lambda now: states.append(now.state))
    helper.join()
    assert failed.value.code == "nothing_smaller"
    assert states[0] == "queued"
    assert states[-1] == "failed"


def test_a_job_can_be_paused_resumed_extended_and_exported(client: tenfold.Client, workers: Workers) -> None:
    id = workers.job("steered", 4)
    workers.search(id, 4)
    job = client.job(id)
    assert job.pause().state == "paused"
    assert job.resume().state == "searching"
    assert job["progress"]["trials_done"] == 4
    workers.finish(id, 0)
    assert job.extend(3)["spec"]["search"]["trials"] == 7
    assert job.state == JobState.SEARCHING
    workers.finish(id, 0)
    assert job.export(2).state == "done"
    workers.export(id, 2, asked=True)
    assert {a["trial"] for a in job.artifacts(2)} == {2}
    assert not job.artifacts(1)


def test_a_finished_job_tells_everything_it_found(client: tenfold.Client, done: str) -> None:
    job = client.job(done).wait(0)
    trials = job.trials()
    assert [t["number"] for t in trials] == list(range(15))
    best = job["best"]["trial"]
    assert job.trial(best)["results"]["full"]["curve"]
    assert [p["costs"]["parameters"] for p in job.front] == sorted(p["costs"]["parameters"] for p in job.front)
    assert best in {p["trial"] for p in job.front}
    assert [layer["name"] for layer in job.layers] == [layer.name for layer in LAYERS]
    assert job.events()[0]["message"] == "Accepted."


def test_listings_are_read_page_by_page(client: tenfold.Client, workers: Workers, done: str, monkeypatch) -> None:
    monkeypatch.setattr("tenfold._operations.PAGE", 5)
    job = client.job(done)
    assert [t["number"] for t in job.trials()] == list(range(15))
    assert len(job.events()) > 20
    for n in range(6):
        client.job(workers.job(f"page {n}")).cancel()
    names = [j["name"] for j in client.jobs()]
    assert len(names) == len(set(names)) or len(names) > 6
    assert names.index("page 5") < names.index("page 0")


# ------------------------------------------------------------------------------------------------------------- errors


def test_each_refusal_is_its_own_exception(service: Service, client: tenfold.Client, done: str, file: Path) -> None:
    def by(key: str) -> tenfold.Job:
        with tenfold.Client(service.url, key) as other:
            return other.job(done).extend(1)

    with pytest.raises(errors.NotAuthenticated) as e:
        by("tf_wrong")
    assert (e.value.status, e.value.code) == (401, "unknown_key")
    with pytest.raises(errors.NotAllowed, match="scope"):
        by(service.new_key(Scope.READ))
    with pytest.raises(errors.NotFound):
        by(service.new_key(Scope.ADMIN, owner="bob"))
    with pytest.raises(errors.Conflict):
        client.job(done).resume()
    with pytest.raises(errors.BadRequest, match=r"did you mean 'transform'") as bad:
        client.upload_dataset(file, transfrom={})
    assert bad.value.problem["errors"][0]["field"] == "transfrom"


def test_an_error_carries_the_request_id_of_the_servers_log(client: tenfold.Client) -> None:
    with pytest.raises(errors.APIError) as e:
        client.job("job_none")
    assert e.value.request_id
    assert e.value.request_id == e.value.problem["request_id"]
    assert e.value.request_id in str(e.value)


def test_no_service_at_the_address_is_told_with_advice() -> None:
    advice = r"127\.0\.0\.1:9.*tenfold-server up.*TENFOLD_URL"
    with (
        tenfold.Client("127.0.0.1:9", "tf_x", retries=0) as client,
        pytest.raises(errors.ConnectionFailed, match=advice),
    ):
        client.job("x")


# --------------------------------------------------------------------------------------------------------------- keys


def test_keys_are_made_used_and_revoked(service: Service, client: tenfold.Client) -> None:
    key = client.create_key("laptop", scopes=["read"], owner="cleo")
    with tenfold.Client(service.url, key["secret"]) as other:
        assert other.current_key()["owner"] == "cleo"
        assert key["id"] in [k["id"] for k in client.keys()]  # noqa: SIM118 - no dict
        client.revoke_key(key["id"])
        with pytest.raises(errors.NotAuthenticated):
            other.current_key()
    assert client.workers() == []
