"""Measured latency and its host-wide lock."""

import fcntl
import math
import os
import random
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from search import latency
from search.latency import Latency, measure, measure_parts, pause_while_measuring


class Sleeper(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return x


def test_latency_is_the_median_in_milliseconds_of_each() -> None:
    found = measure(Sleeper(0.010), Sleeper(0.002), (torch.zeros(1),), seconds=0.2)
    assert 2.0 <= found.compressed_ms < found.dense_ms
    assert 10.0 <= found.dense_ms < 1000.0


class Clock:
    """Time that passes only in the layers that it makes."""

    def __init__(self) -> None:
        self.now = 0.0

    def layer(self, seconds: Callable[[], float]) -> nn.Module:
        clock = self

        class Ticking(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                clock.now += seconds()
                return x

        return Ticking()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_each_part_has_the_time_of_its_layers_and_of_all_their_calls(clock: Clock) -> None:
    def network(*seconds: float) -> nn.Module:
        layers = [clock.layer(lambda s=s: s) for s in seconds]
        return nn.Sequential(*layers, layers[0])  # whose first layer is called again at the end

    parts = {"first": ("0",), "second": ("1",), "both": ("1", "2"), "whole": ("",)}
    found = measure_parts(network(0.1, 0.2, 0.3), network(0.2, 0.1, 0.3), (torch.zeros(1),), parts)
    assert {part: (round(t.compressed_ms), round(t.dense_ms)) for part, t in found.items()} == {
        "first": (400, 200),
        "second": (100, 200),
        "both": (400, 500),
        "whole": (800, 700),
    }
    assert {part: t.is_slower for part, t in found.items()} == {
        "first": True,
        "second": False,
        "both": False,
        "whole": True,
    }


def test_measuring_leaves_no_clock_behind() -> None:
    network = nn.Sequential(nn.Linear(4, 4))
    measure_parts(network, network, (torch.zeros(1, 4),), {"a": ("0",)}, seconds=0.01)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_slower_is_what_chance_does_not_explain() -> None:
    assert Latency(1.10, 1.0, noise=0.04).is_slower
    assert not Latency(1.10, 1.0, noise=0.06).is_slower
    assert not Latency(0.5, 1.0, noise=0.0).is_slower


def test_the_noise_is_how_much_measurements_of_equals_differ(clock: Clock) -> None:
    chance = random.Random(0)
    layer = clock.layer(lambda: chance.gauss(1.0, 0.1))
    found = [measure(layer, layer, (torch.zeros(1),), seconds=30.0) for _ in range(300)]
    deviations = [math.log(each.ratio) / each.noise for each in found]
    assert statistics.pstdev(deviations) == pytest.approx(1.0, abs=0.35)
    assert statistics.mean(each.noise for each in found) == pytest.approx(0.1 * math.sqrt(math.pi / 15), rel=0.2)


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
    assert measure(nn.Identity(), nn.Identity(), (torch.zeros(1),), lock=path, seconds=0.01).dense_ms > 0
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
