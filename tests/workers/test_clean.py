"""The clean process: files are loaded as a stranger would, and only then offered."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from db import blobs
from workers.reloading import checked_artifacts
from workers.scratch import Scratch
from workers.supervise import Child, Crashed, Failed


@pytest.fixture
def scratch(tmp_path):
    made = Scratch(tmp_path / "scratch")
    yield made
    made.remove()


@pytest.fixture
def exported(scratch):
    """A folder with a network and the samples to check it on."""
    folder = scratch.path / "out"
    folder.mkdir()
    net = torch.nn.Linear(3, 2).eval()
    example = torch.ones(2, 3)
    torch.export.save(torch.export.export(net, (example,)), folder / "model.pt2")
    with torch.no_grad():
        answers = net(example).numpy()
    write_check(folder, example.numpy(), answers)
    return folder


def write_check(folder, inputs, expected):
    facts = json.dumps({"metric": "accuracy", "inputs": 1, "batch": 2, "last": False})
    arrays = {"input_0": inputs, "expected": expected, "targets": expected.argmax(1)}
    np.savez(folder / "check.npz", facts=np.array(facts), **arrays)


def ask_of(scratch, jail="best_effort"):
    def ask(operation, arguments):
        command = [sys.executable, "-m", "workers.clean", "--scratch", str(scratch.path), "--jail", jail]
        child = Child(command, scratch.path)
        try:
            child.ready()
            return child.call(operation, arguments)
        finally:
            child.close()

    return ask


FILES = [{"format": "pt2", "filename": "model.pt2", "facts": {"verify_value": 0.5}}]


def test_a_file_is_offered_with_what_loading_it_again_found(db, scratch, exported):
    (made,) = checked_artifacts(FILES, "out", db, scratch, ask_of(scratch))
    assert made.facts["value"] == 1.0
    assert made.facts["max_difference"] < 1e-5
    assert made.facts["verify_value"] == 0.5
    assert b"".join(blobs.read(db, made.blob_id)) == (exported / "model.pt2").read_bytes()


def test_a_file_that_answers_differently_is_not_offered(db, scratch, exported):
    write_check(exported, np.ones((2, 3), np.float32), np.full((2, 2), 9, np.float32))
    with pytest.raises(Failed, match="not offered") as failure:
        checked_artifacts(FILES, "out", db, scratch, ask_of(scratch))
    assert failure.value.code == "export_differs"


def test_a_file_that_does_not_load_is_not_offered(db, scratch, exported):
    (exported / "model.pt2").write_bytes(b"no network")
    with pytest.raises(Crashed):
        checked_artifacts(FILES, "out", db, scratch, ask_of(scratch))


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b"])
def test_a_name_that_leaves_the_folder_is_refused(db, scratch, exported, name):
    with pytest.raises(Crashed, match="not a plain name"):
        checked_artifacts([{"format": "report", "filename": name}], "out", db, scratch, ask_of(scratch))


def test_a_link_is_not_followed(db, scratch, exported):
    (exported / "report.json").symlink_to("/etc/hostname")
    with pytest.raises(OSError):
        checked_artifacts([{"format": "report", "filename": "report.json"}], "out", db, scratch, ask_of(scratch))


def test_tenfold_cannot_be_imported_in_the_clean_process(tmp_path: Path):
    script = """
import workers.clean
workers.clean.block()
for name in ("tenfold", "search", "search.spec", "workers.jail", "db"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} was imported")
"""
    import subprocess

    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root)


@pytest.mark.parametrize("planted", ["workers/__init__.py", "argparse.py", "usercustomize.py"])
def test_nothing_that_the_compute_process_left_is_imported_before_the_jail_is_closed(scratch, planted):
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for folder in (scratch.path, scratch.path / ".local" / "lib" / version / "site-packages"):
        target = folder / planted
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"open({str(scratch.path / 'escaped')!r}, 'w')")
    command = [sys.executable, "-m", "workers.clean", "--scratch", str(scratch.path), "--jail", "off"]
    child = Child(command, scratch.path)
    child.ready()
    child.close()
    assert not (scratch.path / "escaped").exists()
