"""Uploads as users would make them: small, seeded, written with the usual libraries."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search.data import Data, read_data
from search.spec import DataSpec, LayerInfo, ModelInfo, TensorInfo

Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture
def digits() -> Arrays:
    """Grey 8×8 bytes, NHWC, ten classes, 200/60/40 rows."""
    random = np.random.default_rng(0)
    arrays: Arrays = {}
    for split, rows in (("train", 200), ("val", 60), ("test", 40)):
        arrays[f"x_{split}"] = random.integers(0, 256, (rows, 8, 8, 1), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(rows) % 10
    return arrays


@pytest.fixture
def npz(tmp_path: Path) -> Callable[[Arrays], Path]:
    def write(arrays: Arrays) -> Path:
        path = tmp_path / "data.npz"
        np.savez(path, **arrays)
        return path

    return write


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Data]:
    """Read a file with the fields of a DataSpec as keywords."""

    def reader(path: Path, **fields: Any) -> Data:
        return read_data(path, DataSpec.model_validate(fields), scratch=tmp_path / "scratch")

    return reader


def model_info(
    inputs: list[tuple[str, str, tuple[int | None, ...]]], output: tuple[int | None, ...] = (None, 10)
) -> ModelInfo:
    """A network with these inputs (name, dtype, shape) and one output."""
    layer = LayerInfo(name="fc", kind="Linear", weight=(1, 1), output=(1,), parameters=1, macs=1, compressible=True)
    return ModelInfo(
        format="pt2",
        inputs=tuple(TensorInfo(name=name, dtype=dtype, shape=shape) for name, dtype, shape in inputs),
        outputs=(TensorInfo(name="logits", dtype="float32", shape=output),),
        layers=(layer,),
        parameters=1,
        macs=1,
        bytes=4,
    )


@pytest.fixture
def model() -> Callable[..., ModelInfo]:
    return model_info
