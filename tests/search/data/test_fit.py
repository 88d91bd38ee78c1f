"""Data against a network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search.data import Data, check_fit, fitted
from search.errors import BadData
from search.spec import ModelInfo

Read = Callable[..., Data]
Arrays = dict[str, np.ndarray[Any, Any]]
Write = Callable[[Arrays], Path]
Model = Callable[..., ModelInfo]

IMAGE = ("input", "float32", (None, 1, 8, 8))


def test_data_that_fits_passes(read: Read, npz: Write, digits: Arrays, model: Model) -> None:
    check_fit(read(npz(digits), transform={"layout": "nhwc"}), model([IMAGE]))
    check_fit(read(npz(digits), transform={"layout": "nhwc"}), model([("input", "torch.float32", (None, 1, None, 8))]))


@pytest.mark.parametrize(
    ("inputs", "output", "code", "says"),
    [
        ([("input", "float32", (None, 8, 8, 1))], (None, 10), "wrong_shape", "(1, 8, 8)"),
        ([("input", "float32", (None, 3, 8, 8))], (None, 10), "wrong_shape", "3 channels"),
        ([("input", "float32", (None, 1, 9, 9))], (None, 10), "wrong_shape", "resize"),
        ([("input", "float32", (None, 64))], (None, 10), "wrong_shape", "(64)"),
        ([("input", "int64", (None, 1, 8, 8))], (None, 10), "wrong_dtype", "int64"),
        ([IMAGE], (None, 9), "labels_out_of_range", "9 outputs"),
        ([IMAGE], (None, 10, 4), "wrong_target", "logits"),
        ([IMAGE, IMAGE], (None, 10), "wrong_inputs", "inputs.<name>_train"),
    ],
)
def test_misfits_say_what_arrived_and_what_to_do(
    read: Read, npz: Write, digits: Arrays, model: Model, inputs: Any, output: Any, code: str, says: str
) -> None:
    data = read(npz(digits), transform={"layout": "nhwc"})
    with pytest.raises(BadData) as caught:
        check_fit(data, model(inputs, output))
    assert caught.value.code == code
    assert says in caught.value.message


def test_channels_last_without_a_layout_names_the_layout(read: Read, npz: Write, digits: Arrays, model: Model) -> None:
    with pytest.raises(BadData, match="set layout to nhwc"):
        check_fit(read(npz(digits)), model([IMAGE]))


def test_regression_targets_must_have_the_output_shape(read: Read, npz: Write, model: Model) -> None:
    x = np.ones((30, 4), np.float32)
    takes = ("input", "float32", (None, 4))
    check_fit(read(npz({"x": x, "y": x[:, :1]}), task="regression"), model([takes], (None, 1)))
    with pytest.raises(BadData, match=r"y has shape \(any\) but the network gives \(any, 1\)"):
        check_fit(read(npz({"x": x, "y": x[:, 0]}), task="regression"), model([takes], (None, 1)))


def test_several_inputs_are_matched_by_name_whatever_their_order(read: Read, npz: Write, model: Model) -> None:
    path = npz({"inputs.mask": np.ones((30, 6), np.int64), "inputs.ids": np.zeros((30, 7), np.int64)})
    network = model([("ids", "int64", (None, 7)), ("mask", "int64", (None, 6))])
    data = fitted(read(path, task="fidelity"), network)
    assert [t.shape[1] for t in next(data.train.batches(2))[0]] == [7, 6]
    with pytest.raises(BadData, match="name the arrays") as caught:
        fitted(read(path, task="fidelity"), model([("tokens", "int64", (None, 7)), ("mask", "int64", (None, 6))]))
    assert caught.value.code == "wrong_inputs"
