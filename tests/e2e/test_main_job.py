"""The main job: upload, search, download, load without Tenfold; and what must not get through."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tenfold
from examples.digits import split
from tenfold.errors import BadRequest, JobFailed, NotAuthenticated, Rejected

CHECK = Path(__file__).parents[2] / "examples" / "check_files.py"
DATA_SPEC = {"transform": {"scale": 1 / 16}}


def test_the_result_is_smaller_and_keeps_the_budget_on_unseen_data(finished: tenfold.Job) -> None:
    best, baseline = finished["best"], finished["baseline"]
    assert best["costs"]["parameters"] < baseline["costs"]["parameters"]
    assert best["verify_drop"] <= 0.02
    assert best["keeps_budget"] is True


def test_the_files_load_and_agree_in_a_process_without_tenfold(finished, running, tmp_path: Path) -> None:
    names = {p.name for p in finished.download(tmp_path)}
    assert {"model.pt2", "model.onnx", "model.safetensors", "plan.json", "report.html", "report.json"} <= names
    command = [sys.executable, "-I", str(CHECK), str(tmp_path), str(running.folder / "digits.npz"), str(1 / 16)]
    facts = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert facts["largest_difference"] < 1e-3
    assert facts["pt2_accuracy"] == pytest.approx(finished["best"]["verify_value"], abs=0.003)


def test_no_path_of_the_server_is_in_the_files(finished, tmp_path: Path) -> None:
    for path in finished.download(tmp_path):
        assert str(Path(__file__).parents[2]).encode() not in path.read_bytes(), path.name


def test_every_point_of_the_front_can_be_had(finished) -> None:
    costs = [p["costs"]["parameters"] for p in finished.front]
    assert costs
    assert len(set(costs)) == len(costs)


def test_a_layer_with_given_ranks_shows_what_they_lose(running) -> None:
    """Ranks that no curve offers, for fewer parameters with less error are to be had."""
    with running.client() as client:
        job = client.submit(
            running.folder / "digits.pt2",
            running.folder / "digits.npz",
            max_drop=0.9,
            data_spec=DATA_SPEC,
            methods=["svd"],
            layers={"include": ["classifier.*"], "fixed": {"features.3": {"method": "tucker2", "ranks": [30, 12]}}},
            search={"trials": 1, "calibration_samples": 256},
            fine_tune={"epochs": 0, "short_epochs": 0},
            export=["safetensors"],
        ).wait(240)
        given = next(layer for layer in job.layers if layer["name"] == "features.3")
    assert (given["method"], given["ranks"]) == ("tucker2", [30, 12])
    assert given["parameters_after"] == 30 * 32 + 30 * 9 * 12 + 12 * 64
    assert 0.01 < given["error"] < 1


def test_an_unknown_key_is_told_so(running) -> None:
    with tenfold.Client(running.url, "tf_wrong") as client, pytest.raises(NotAuthenticated, match="key"):
        list(client.jobs())


def test_an_unknown_field_is_refused_by_name(running) -> None:
    with running.client() as client, pytest.raises(BadRequest, match="max_dorp"):
        client.submit(
            running.folder / "digits.pt2",
            running.folder / "digits.npz",
            data_spec=DATA_SPEC,
            budget={"max_dorp": 1},
            max_drop=0.1,
        )


def test_a_file_that_is_no_model_is_refused_with_advice(running, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"not a model at all")
    with running.client() as client, pytest.raises(Rejected, match=r"export"):
        client.upload_model(path).wait(60)


def test_labels_beyond_the_outputs_stop_the_job_with_a_sentence(running, tmp_path: Path) -> None:
    data = split()
    data["y_train"] = data["y_train"] + 5
    np.savez(tmp_path / "d.npz", **data)
    with running.client() as client, pytest.raises((JobFailed, Rejected, BadRequest), match=r"1[0-4]"):
        client.submit(running.folder / "digits.pt2", tmp_path / "d.npz", max_drop=0.01, data_spec=DATA_SPEC).wait(60)


def test_not_a_number_in_the_data_is_refused(running, tmp_path: Path) -> None:
    data = {k: v.astype(np.float32) if k.startswith("x") else v for k, v in split().items()}
    data["x_val"][3, 0, 1, 1] = np.nan
    np.savez(tmp_path / "d.npz", **data)
    with running.client() as client, pytest.raises(Rejected, match=r"(?i)nan|finite"):
        client.upload_dataset(tmp_path / "d.npz", **DATA_SPEC).wait(60)


def test_a_wrong_normalisation_is_named(running) -> None:
    wrong = {"transform": {"scale": -40.0}}
    with running.client() as client, pytest.raises(JobFailed, match=r"(?i)normali"):
        client.submit(
            running.folder / "digits.pt2",
            running.folder / "digits.npz",
            max_drop=0.01,
            data_spec=wrong,
            budget={"expect": 0.99},
        ).wait(60)


def test_a_value_that_the_original_does_not_reach_is_refused(running) -> None:
    with running.client() as client, pytest.raises(JobFailed, match=r"0\.9999"):
        client.submit(
            running.folder / "digits.pt2", running.folder / "digits.npz", min_value=0.9999, data_spec=DATA_SPEC
        ).wait(60)


def test_a_network_without_a_compressible_layer_says_so(running, tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LayerNorm(64)).eval()
    path = tenfold.export(net, torch.zeros(4, 1, 8, 8), tmp_path / "norm.pt2")
    with running.client() as client, pytest.raises((JobFailed, Rejected, BadRequest), match=r"layer"):
        client.submit(
            path,
            running.folder / "digits.npz",
            max_drop=0.01,
            data_spec={"task": "fidelity", "transform": {"scale": 1 / 16}},
        ).wait(60)


def test_a_cancelled_job_ends_as_cancelled(running) -> None:
    with running.client() as client:
        job = client.submit(
            running.folder / "digits.pt2",
            running.folder / "digits.npz",
            max_drop=0.01,
            data_spec=DATA_SPEC,
            search={"trials": 500},
        )
        job.cancel()
        with pytest.raises(JobFailed):
            job.wait(60)
        assert job.state == "cancelled"
