"""The front's benchmark on a network that takes a second: its own search, and peers that fail."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import front, peers
from search.front import dominates
from tests.benchmarks.conftest import CLASSES

pytestmark = pytest.mark.usefixtures("short_measurements")


def run(files: tuple[Path, Path], out: Path, *more: str) -> dict[str, Any]:
    model, data = files
    front.main(["--model", str(model), "--data", str(data), "--trials", "5", "--json", str(out), *more])
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def test_its_own_search_ends_in_a_front_and_a_picture(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(files, tmp_path / "front.json", "--no-fine-tuning")
    points, dense = result["fronts"]["tenfold"]["points"], result["dense"]
    assert len(points) >= 2
    figures = [(p["parameters"], p["macs"], -p["select"]) for p in points]
    assert not any(dominates(a, b) for a in figures for b in figures)
    assert all(p["parameters"] < dense["parameters"] and p["macs"] < dense["macs"] for p in points)
    assert 0 < result["fronts"]["tenfold"]["hypervolume"] <= 1
    assert result["choosing"]["trials"] == 5
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "epochs of the original" in " ".join(capsys.readouterr().out.split())


def test_data_may_come_in_any_form_that_the_service_takes(files: tuple[Path, Path], tmp_path: Path) -> None:
    with np.load(files[1]) as arrays:
        unsplit = {n: np.concatenate([arrays[f"{n}_{part}"] for part in ("train", "val", "test")]) for n in "xy"}
    np.savez(tmp_path / "rows.npz", **unsplit)
    spec = json.dumps({"validation": 0.4})
    result = run((files[0], tmp_path / "rows.npz"), tmp_path / "front.json", "--no-fine-tuning", "--data-spec", spec)
    assert len(result["fronts"]["tenfold"]["points"]) >= 2


def test_other_tasks_than_classification_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    x = chance.normal(size=(200, 16)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=x, y=x[:, :CLASSES])
    with pytest.raises(SystemExit, match="task of regression; this compares accuracies"):
        run((files[0], tmp_path / "rows.npz"), tmp_path / "front.json", "--data-spec", '{"task": "regression"}')


def test_with_epochs_each_point_and_the_dense_network_are_trained(files: tuple[Path, Path], tmp_path: Path) -> None:
    result = run(files, tmp_path / "front.json", "--epochs", "1", "--points", "2")
    points = result["fronts"]["tenfold"]["points"]
    assert [p["epochs"] for p in points] == [1.0] * len(points)
    assert len(points) == 2
    assert result["dense"]["trained_on"]["epochs"] == 1.0
    assert result["dense"]["trained_on"]["test"] > 0.5


def test_a_peer_that_fails_is_reported_and_the_rest_goes_on(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installer(command: Sequence[str], environment: dict[str, str], folder: Path | None = None) -> None:
        raise peers.PeerFailed("ERROR: No matching distribution found for musco-pytorch==1.0.6")

    monkeypatch.setattr(peers, "CACHE", tmp_path / "none")
    monkeypatch.setattr(peers, "_run", installer)
    result = run(files, tmp_path / "front.json", "--no-fine-tuning", "--peers", "musco")
    assert result["fronts"]["musco"]["error"] == "ERROR: No matching distribution found for musco-pytorch==1.0.6"
    assert result["fronts"]["musco"]["points"] == []
    assert len(result["fronts"]["tenfold"]["points"]) >= 2


def test_the_last_line_that_a_failing_peer_said_is_told(tmp_path: Path) -> None:
    with pytest.raises(peers.PeerFailed, match=r"^SystemExit: no such layer$"):
        peers._run([sys.executable, "-c", "raise RuntimeError('x') if 0 else print('SystemExit: no such layer', "
                    "file=__import__('sys').stderr) or exit(3)"], {})  # fmt: skip


def test_what_a_peer_writes_beside_itself_stays_in_its_folder(tmp_path: Path) -> None:
    peers._run([sys.executable, "-c", "open('left', 'w').close()"], {}, tmp_path)
    assert (tmp_path / "left").exists()


def test_a_peer_that_is_not_known_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run(files, tmp_path / "front.json", "--peers", "nni")


def test_the_hypervolume_of_half_the_network_at_no_loss_is_a_quarter_of_the_box() -> None:
    dense = {"parameters": 100, "macs": 10, "test": 0.9}
    assert front.volume([{"parameters": 50, "macs": 5, "test": 0.9}], dense, 0.1) == pytest.approx(0.25)
    assert front.volume([{"parameters": 50, "macs": 5, "test": 0.5}], dense, 0.1) == pytest.approx(0.125)
    assert front.volume([{"parameters": 50, "macs": 5, "test": 0.05}], dense, 0.1) == 0.0
