"""One whole service for all end-to-end tests: real processes, real Valkey, real SQLite."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import tenfold
from examples.demo import service
from examples.digits import save, split, train

DATA_SPEC = {"transform": {"scale": 1 / 16}}


class Running(NamedTuple):
    url: str
    key: str
    folder: Path

    def client(self) -> tenfold.Client:
        return tenfold.Client(self.url, self.key)


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A started service, with ``digits.pt2`` and ``digits.npz`` in its folder."""
    folder = tmp_path_factory.mktemp("service")
    data = split()
    save(data, folder / "digits.npz")
    net = train(data, epochs=8)
    tenfold.export(net, torch.zeros(4, 1, 8, 8), folder / "digits.pt2")
    with service(folder, workers=2) as (url, key):
        yield Running(url, key, folder)


@pytest.fixture(scope="session")
def finished(running: Running) -> Iterator[tenfold.Job]:
    """A job that has run to its end."""
    with running.client() as client:
        job = client.submit(
            running.folder / "digits.pt2",
            running.folder / "digits.npz",
            max_drop=0.02,
            name="digits",
            data_spec=DATA_SPEC,
            search={"trials": 6, "calibration_samples": 256},
            fine_tune={"epochs": 3, "short_epochs": 1, "batch_size": 64},
        )
        yield job.wait(240)
