"""``tenfold-server up``: one command starts everything, and nothing of it outlives that command."""

import json
import re
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from launch import valkey

ROOT = Path(__file__).parents[2]


def get(url, path, key=None):
    request = urllib.request.Request(url + path, headers={"Authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def test_it_starts_prints_the_address_and_the_key_once_and_ctrl_c_stops_all_of_it(up):
    first = up()
    url = first.url()
    key = re.search(r"admin key.*: (tf_\S+)", first.text())[1]
    assert get(url, "/v1/jobs", key)["items"] == []
    assert stat.S_IMODE((first.folder / "valkey").stat().st_mode) == 0o700
    first.until(lambda: get(url, "/v1/workers", key)["items"])
    family = first.family()
    assert len(family) >= 4, "the API, a worker, the watchdog and Valkey"
    first.interrupt()
    assert first.process.wait(20) == 0
    assert not psutil.wait_procs(family, timeout=1)[1]
    second = up()
    assert get(second.url(), "/v1/jobs", key)["items"] == [], "the key still works"
    assert "admin key" not in second.text(), "it is shown once"
    second.interrupt()
    assert second.process.wait(20) == 0


def test_nothing_is_orphaned_when_the_parent_is_killed(up):
    one = up()
    one.url()
    family = one.family()
    assert len(family) >= 4
    one.process.kill()
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not alive, [p.cmdline() for p in alive]


def test_a_second_ctrl_c_stops_at_once(up):
    one = up()
    one.url()
    family = one.family()
    one.interrupt()
    time.sleep(0.05)
    one.interrupt()
    begun = time.monotonic()
    one.process.wait(10)
    assert time.monotonic() - begun < 5
    assert not psutil.wait_procs(family, timeout=3)[1]


def test_ctrl_c_while_it_starts_stops_it_too(up):
    one = up()
    one.until(lambda: len(one.family()) >= 2)
    one.interrupt()
    assert one.process.wait(20) in (0, 130)


def test_a_part_that_dies_is_started_again(up):
    one = up()
    url = one.url()
    api = one.api()
    api.kill()
    one.until(lambda: one.api() not in (None, api))
    assert get(url, "/healthz")
    one.interrupt()
    assert one.process.wait(20) == 0


def test_a_data_folder_in_use_is_refused_with_advice(up):
    one = up()
    one.url()
    other = subprocess.run(
        [sys.executable, "-m", "launch.main", "up", "--data", str(one.folder), "--port", "0"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert other.returncode == 1
    assert "in use by another tenfold-server" in other.stderr
    assert "Traceback" not in other.stderr


def test_a_port_that_is_taken_is_refused_with_advice(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "launch.main", "up", "--data", str(tmp_path / "d"), "--port", port],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
    assert done.returncode == 1
    assert "give another --port" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("temporary", ["short", "as long"])
def test_a_data_folder_with_a_long_path_still_gets_a_socket(tmp_path, monkeypatch, temporary):
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", "/tmp" if temporary == "short" else str(deep))
    path = valkey.socket_path(deep)
    assert len(str(path)) <= valkey.LONGEST_SOCKET_PATH
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert valkey.socket_path(deep) == path
    path.parent.rmdir()


@pytest.mark.parametrize("scope", [[], ["--scope", "read"]])
def test_a_key_is_made_from_the_terminal(tmp_path, scope):
    made = subprocess.run(
        [sys.executable, "-m", "launch.main", "key", "--data", str(tmp_path), *scope],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert made.stdout.startswith("tf_")
    assert made.stdout.count("\n") == 1


def test_a_worker_on_its_own_without_a_broker_says_what_is_missing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "launch.main", "worker", "--data", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert "TENFOLD_REDIS_URL" in done.stderr
