"""Measured latency and its host-wide lock."""

import fcntl
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from search.latency import measure, pause_while_measuring


class Sleeper(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return x


def test_latency_is_the_median_in_milliseconds_of_each() -> None:
    fast, slow = measure(Sleeper(0.010), Sleeper(0.002), (torch.zeros(1),), seconds=0.2)
    assert 2.0 <= fast < slow
    assert 10.0 <= slow < 20.0


def test_measuring_restores_mode_and_threads() -> None:
    dense, small = nn.Linear(4, 4).train(), nn.Linear(4, 4).eval()
    before = torch.get_num_threads()
    measure(dense, small, (torch.zeros(1, 4),), threads=2, seconds=0.01)
    assert dense.training
    assert not small.training
    assert torch.get_num_threads() == before


def test_a_lock_held_elsewhere_delays_the_measurement(tmp_path: Path) -> None:
    path = tmp_path / "latency.lock"
    other = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    threading.Timer(0.3, lambda: fcntl.flock(other, fcntl.LOCK_UN)).start()
    start = time.monotonic()
    measure(nn.Identity(), nn.Identity(), (torch.zeros(1),), lock=path, seconds=0.01)
    assert time.monotonic() - start >= 0.25
    os.close(other)


def test_a_lock_that_is_never_given_back_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.latency.PATIENCE_S", 0.2)
    path = tmp_path / "latency.lock"
    mine, other = (os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2))
    fcntl.flock(other, fcntl.LOCK_EX)
    pause_while_measuring(mine)
    assert measure(nn.Identity(), nn.Identity(), (torch.zeros(1),), lock=path, seconds=0.01)[0] > 0
    os.close(mine)
    os.close(other)


def test_a_training_stands_still_while_another_measures(tmp_path: Path) -> None:
    path = tmp_path / "latency.lock"
    mine, other = (os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2))
    pause_while_measuring(mine)  # nobody measures: returns at once
    fcntl.flock(other, fcntl.LOCK_EX)
    threading.Timer(0.3, lambda: fcntl.flock(other, fcntl.LOCK_UN)).start()
    start = time.monotonic()
    pause_while_measuring(mine)
    assert time.monotonic() - start >= 0.25
    os.close(mine)
    os.close(other)


def test_an_open_descriptor_serves_as_the_lock_and_stays_open(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "latency.lock", os.O_RDWR | os.O_CREAT)
    measure(nn.Identity(), nn.Identity(), (torch.zeros(1),), lock=descriptor, seconds=0.01)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)
