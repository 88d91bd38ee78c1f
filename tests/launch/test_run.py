"""``tenfold-server run``: one job from a file to a folder of files, and nothing else left of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

import tenfold
from examples.digits import save, split, train
from search.intake.architectures import small_cnn

ROOT = Path(__file__).parents[2]
QUICK = ("--trials", "2", "--epochs", "0", "--workers", "1", "--json")


class Folder:
    """Where a user works: files to hand over, a place for the result, and a temporary folder that is watched."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path / "tmp"
        self.temporary.mkdir()
        self.data = split()
        save(self.data, path / "digits.npz")

    def run(self, model: Path, *options: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TENFOLD_")}
        command = [sys.executable, "-m", "launch.main", "run", str(model), str(self.path / "digits.npz")]
        return subprocess.run(
            [*command, "--max-drop", "0.05", "--scale", "0.0625", "--out", str(self.path / "out"), *options],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment | {"TMPDIR": str(self.temporary)},
        )

    def weights(self) -> Path:
        """Of a network that is known by its name."""
        path = self.path / "weights.safetensors"
        save_file(small_cnn(channels=1, size=8, width=8).state_dict(), path)
        return path

    def assert_done(self, done: subprocess.CompletedProcess[str]) -> None:
        assert done.returncode == 0, done.stderr
        job = json.loads(done.stdout)
        assert job["state"] == "done"
        assert job["best"]["keeps_budget"] is True
        assert job["best"]["costs"]["parameters"] < job["baseline"]["costs"]["parameters"]
        files = {Path(f) for f in job["files"]}
        assert files == set((self.path / "out").iterdir())
        assert {"model.pt2", "model.safetensors", "report.json"} <= {f.name for f in files}

    def assert_nothing_else_is_left(self) -> None:
        assert not list(self.temporary.glob("tenfold-run-*"))
        assert not _running_with(str(self.temporary))


def _running_with(mark: str) -> list[str]:
    """Command lines of processes that have ``mark`` in them or in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
        except psutil.Error:
            continue
        if any(mark in word for word in words):
            found.append(" ".join(process.cmdline()))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.mark.long
def test_a_job_leaves_its_files_and_says_so_in_json(folder):
    model = tenfold.export(train(folder.data, epochs=4), torch.zeros(4, 1, 8, 8), folder.path / "digits.pt2")
    folder.assert_done(folder.run(model, *QUICK))
    folder.assert_nothing_else_is_left()


@pytest.mark.long
def test_weights_alone_and_an_architecture_are_enough(folder):
    options = '{"name": "small_cnn", "options": {"channels": 1, "size": 8, "width": 8}}'
    folder.assert_done(
        folder.run(folder.weights(), "--architecture", options, "--task", "fidelity", *QUICK, "--max-drop", "0.9")
    )


def test_what_the_service_does_not_accept_is_misuse(folder):
    refused = folder.run(folder.weights(), "--architecture", "small_cnn", "--std", "0")
    assert refused.returncode == 2
    assert "std must be positive" in refused.stderr
    folder.assert_nothing_else_is_left()


def test_a_model_that_is_refused_has_its_own_exit_status_and_says_what_to_do(folder):
    refused = folder.run(folder.weights(), "--architecture", "small_cnn", "--json")
    assert refused.returncode == 3
    assert "check the architecture's options" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert refused.stdout == ""
    assert not (folder.path / "out").exists()
    folder.assert_nothing_else_is_left()
