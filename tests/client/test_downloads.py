"""Downloads: checked, gone on with, never mixed up."""

import hashlib
from pathlib import Path

import pytest

import tenfold
from tenfold.errors import Corrupted, JobFailed
from tests.client.conftest import Service
from tests.client.seed import Workers


def part_of(artifact: tenfold.Artifact, folder: Path) -> Path:
    return folder / f"{artifact['filename']}.{artifact['sha256'][:12]}.part"


def model_file(client: tenfold.Client, job: str) -> tenfold.Artifact:
    return next(a for a in client.job(job).artifacts() if a["format"] == "pt2")


def test_all_files_of_the_best_network_arrive(
    client: tenfold.Client, workers: Workers, done: str, tmp_path: Path
) -> None:
    files = client.job(done).download(tmp_path / "new" / "folder")
    assert {f.name for f in files} == {"model.pt2", "model.onnx", "report.json"}
    assert {a["sha256"] for a in client.job(done).artifacts()} == {
        hashlib.sha256(f.read_bytes()).hexdigest() for f in files
    }


def test_a_download_goes_on_where_it_broke_off(client: tenfold.Client, done: str, tmp_path: Path) -> None:
    artifact = model_file(client, done)
    whole = artifact.download(tmp_path / "whole").read_bytes()
    part_of(artifact, tmp_path).write_bytes(whole[:2_000_000])
    seen: list[tuple[int, int]] = []
    path = artifact.download(tmp_path, progress=lambda done, of: seen.append((done, of)))
    assert path.read_bytes() == whole
    assert seen[0][0] > 2_000_000
    assert seen[-1] == (len(whole), len(whole))
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == ["model.pt2"]


def test_what_does_not_have_the_promised_digest_is_refused(client: tenfold.Client, done: str, tmp_path: Path) -> None:
    artifact = model_file(client, done)
    partial = part_of(artifact, tmp_path)
    partial.write_bytes(b"not this file")
    with pytest.raises(Corrupted, match=r"model\.pt2 arrived with SHA-256 .*, promised was .*; try again"):
        artifact.download(tmp_path)
    assert not partial.exists()
    assert artifact.download(tmp_path).stat().st_size == artifact["size"]


def test_a_file_that_is_there_is_not_fetched_again(
    service: Service, client: tenfold.Client, done: str, tmp_path: Path
) -> None:
    artifact = client.artifact(model_file(client, done).id)
    first = artifact.download(tmp_path)
    at = first.stat().st_mtime_ns
    assert artifact.download(tmp_path) == first
    assert first.stat().st_mtime_ns == at


def test_a_job_without_a_network_says_how_to_get_one(client: tenfold.Client, workers: Workers, tmp_path: Path) -> None:
    job = client.job(workers.job("no files"))
    with pytest.raises(JobFailed, match=r"has no model\.pt2; ask for it"):
        job.load(tmp_path)
    job.cancel()
