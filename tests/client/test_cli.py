"""The ``tenfold`` command: ``--json`` on stdout, sentences on stderr, documented exit codes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tenfold import Client, cli
from tests.client.conftest import Service
from tests.client.seed import Workers, inspecting


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Said]


@pytest.fixture
def run(service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("TENFOLD_URL", service.url)
    monkeypatch.setenv("TENFOLD_API_KEY", service.key)

    def command(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["tenfold", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return Said(int(end.value.code or 0), *capsys.readouterr())

    return command


def test_listings_come_as_json_and_as_tables(run: Run, done: str) -> None:
    assert done in {j["id"] for j in run("jobs", "--json").json}
    assert len(run("trials", done, "--json").json) == 15
    assert run("front", done, "--json").json[0]["costs"]["parameters"] > 0
    for command in ("jobs", "trials", "front"):
        said = run(command, *([] if command == "jobs" else [done]))
        assert said.code == 0
        assert "done" in said.out or "short" in said.out


def test_download_shows_before_and_after(run: Run, done: str, tmp_path: Path) -> None:
    said = run("download", done, "--out", tmp_path)
    assert "3 files" in said.out
    assert "accuracy on unseen data" in said.out
    assert {Path(f).name for f in run("download", done, "-o", tmp_path, "--json").json["files"]} == {
        "model.pt2",
        "model.onnx",
        "report.json",
    }


def test_watch_follows_to_the_end(run: Run, done: str) -> None:
    said = run("watch", done)
    assert said.code == 0
    assert "done" in said.err


def test_a_job_is_steered(run: Run, workers: Workers) -> None:
    id = workers.job("by hand")
    assert run("pause", id, "--json").json["state"] == "paused"
    assert run("resume", id, "--json").json["state"] == "queued"
    said = run("watch", id, "--timeout", "0.2")
    assert (said.code, "it goes on" in said.err) == (7, True)
    assert "cancelled" in run("cancel", id).out
    said = run("watch", id)
    assert said.code == 1
    said = run("extend", id, "--trials", 3)
    assert said.code == 6
    assert "job_not_extendable" in said.err


def test_a_job_that_used_its_hours_is_extended_by_more_of_them(run: Run, service: Service) -> None:
    id = service.workers.job("an hour long", 4, hours=1)
    service.workers.search(id, 4)
    service.workers.finish(id, 0)
    service.spend(id, hours=1)
    said = run("extend", id, "--trials", 3)
    assert (said.code, "give the hours to add" in said.err) == (6, True)
    job = run("extend", id, "--trials", 3, "--hours", 0.5, "--json").json
    assert (job["state"], job["spec"]["search"]["hours"]) == ("searching", 1.5)


def test_submit_uploads_and_a_refused_model_has_its_own_exit_code(run: Run, workers: Workers, tmp_path: Path) -> None:
    file = tmp_path / "net.pt2"
    file.write_bytes(b"net")
    spec = '{"transform": {"scale": 0.5}}'
    with inspecting(workers):
        job = run("submit", file, file, "--max-drop", "0.01", "--trials", 4, "--data-spec", spec, "--json").json
    assert job["spec"]["search"]["trials"] == 4
    run("cancel", job["id"])
    with inspecting(workers, refuse="not a network"):
        said = run("submit", file, file, "--max-drop", "0.01")
    assert (said.code, "not a network" in said.err) == (3, True)


def test_a_spec_file_names_what_has_no_option_and_options_win(run: Run, workers: Workers, tmp_path: Path) -> None:
    file, spec = tmp_path / "net.pt2", tmp_path / "job.json"
    file.write_bytes(b"net")
    fields = {
        "budget": {"max_drop": 0.1, "expect": 0.9},
        "methods": ["svd"],
        "layers": {"exclude": ["head*"]},
        "search": {"trials": 9, "stages": 2},
    }
    spec.write_text(json.dumps(fields))
    with inspecting(workers):
        job = run("submit", file, file, "--spec", spec, "--trials", 4, "--max-drop", "0.2", "--json").json
        run("cancel", job["id"])
        spec.write_text(json.dumps(fields | {"stages": 2, "minimize": "macs"}))
        refused = run("submit", file, file, "--spec", spec)
    said = job["spec"]
    assert (said["budget"]["max_drop"], said["budget"]["expect"]) == (0.2, 0.9)
    assert (said["methods"], said["layers"]["exclude"]) == (["svd"], ["head*"])
    assert (said["search"]["trials"], said["search"]["stages"]) == (4, 2)
    assert refused.code == 6
    assert "'stages' is not a field here (2 arrived)" in refused.err
    assert "'minimize': " in refused.err


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("resnet20_cifar10", {"name": "resnet20_cifar10", "options": {}}),
        ('{"name": "mlp", "options": {"depth": 3}}', {"name": "mlp", "options": {"depth": 3}}),
    ],
)
def test_weights_alone_go_with_their_architecture(
    run: Run, workers: Workers, client: Client, tmp_path: Path, given: str, kept: dict[str, Any]
) -> None:
    file = tmp_path / "net.safetensors"
    file.write_bytes(b"net")
    with inspecting(workers):
        job = run("submit", file, file, "--max-drop", "0.01", "--architecture", given, "--json").json
    assert client.model(job["model"])["architecture"] == kept
    run("cancel", job["id"])


def test_wrong_use_a_wrong_key_and_no_service_have_exit_codes(
    run: Run, done: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"x")
    assert run("submit", file, file).code == 2
    assert run("submit", file, file, "--max-drop", "0.1", "--data-spec", "{").code == 2
    assert run("submit", file, file, "--max-drop", "0.1", "--architecture", "{").code == 2
    assert run("submit", file, file, "--spec", file).code == 2
    for option, value in (("--hours", "nan"), ("--hours", "0"), ("--epochs", "-1"), ("--trials", 0)):
        assert run("compress", file, file, "-o", tmp_path, "--max-drop", "0.1", option, value).code == 2
    assert run("submit", file, file, "--max-drop", "0.1", "--data-spec", '{"transform": {"scale": NaN}}').code == 2
    assert run("extend", done, "--trials", 1, "--hours", "inf").code == 2
    said = run("watch", done, "--timeout", "nan")
    assert (said.code, "give a finite number of at least 0" in said.err) == (2, True)
    assert run("trials", "job_none").code == 6
    monkeypatch.setenv("TENFOLD_API_KEY", "tf_wrong")
    assert run("jobs").code == 4
    monkeypatch.setenv("TENFOLD_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("tenfold._wire._pause", lambda attempt: 0.0)
    said = run("jobs")
    assert (said.code, "tenfold-server up" in said.err) == (5, True)


def test_keys_are_managed(run: Run) -> None:
    key = run("keys", "create", "ci", "--scope", "read", "--json").json
    assert key["secret"].startswith("tf_")
    assert key["scopes"] == ["read"]
    assert run("keys", "revoke", key["id"]).code == 0
    revoked = next(k for k in run("keys", "list", "--json").json if k["id"] == key["id"])
    assert revoked["revoked_at"] is not None


def test_nothing_needs_torch_until_it_is_asked_for() -> None:
    code = (
        "import sys, tenfold, tenfold.cli, tenfold.plotting; "
        "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules); print('light')"
    )
    said = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (said.stdout.strip(), said.stderr) == ("light", "")


def test_a_figure_is_drawn_of_the_front(run: Run, done: str, tmp_path: Path) -> None:
    picture = tmp_path / "front.png"
    assert run("front", done, "--plot", picture).code == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
