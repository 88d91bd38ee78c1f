"""Bare weights with a named architecture are taken in; what cannot be is refused with the way to a file that can."""

import json
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from search.errors import BadModel, Refused
from search.intake import load_model
from search.intake.allowed import ATEN
from search.intake.architectures import ARCHITECTURES, build


@pytest.mark.parametrize("kind", ["safetensors", "state_dict"])
def test_weights_and_an_architecture_give_the_network(kind: str, tmp_path: Path) -> None:
    model, example = build("resnet20_cifar10", {"classes": 7})
    path = tmp_path / "weights"
    if kind == "safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    lifted = load_model(path, architecture={"name": "resnet20_cifar10", "options": {"classes": 7}}, scratch=tmp_path)
    assert lifted.format == kind
    assert lifted.batch == "any"
    x = torch.randn(3, *example.shape[1:])
    assert torch.equal(lifted.module(x), model.eval()(x))
    assert isinstance(lifted.module.get_submodule("layer2.0.conv1"), nn.Conv2d)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_runs_on_its_example(name: str) -> None:
    with torch.device("meta"):
        model, example = build(name, {})
        assert model.eval()(example).shape == (2, 10)


def test_resnets_have_the_published_sizes() -> None:
    sizes = {n: sum(p.numel() for p in build(f"resnet{n}_cifar10", {})[0].parameters()) for n in (20, 32)}
    assert sizes == {20: 269_722, 32: 464_154}


def test_weights_that_do_not_fit_say_where(tmp_path: Path) -> None:
    model, _ = build("mlp", {"inputs": 8, "hidden": 4})
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    for architecture, code, text in [
        (None, "no_architecture", "name the architecture"),
        ({"name": "resnet9000"}, "unknown_architecture", "resnet9000"),
        ({"name": "mlp", "inputs": 9, "hidden": 4}, "weights_do_not_fit", r"\(4, 8\) in the file"),
        ({"name": "mlp", "depth": 3}, "weights_do_not_fit", "missing"),
        ({"name": "mlp", "layers": 3}, "bad_option", "no option 'layers'"),
        ({"name": "mlp", "hidden": 10**9}, "bad_option", "from 1 to"),
        ({"name": "mlp", "hidden": "4"}, "bad_option", "'4'"),
    ]:
        with pytest.raises(BadModel, match=text) as e:
            load_model(tmp_path / "w.safetensors", architecture=architecture, scratch=tmp_path)
        assert e.value.code == code


def test_a_damaged_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "a.safetensors")
    raw = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(raw[:-5])
    with pytest.raises(BadModel) as e:
        load_model(tmp_path / "b.safetensors", architecture={"name": "mlp"}, scratch=tmp_path)
    assert e.value.code == "damaged"


def torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates what we must still tell apart
        torch.jit.script(nn.Linear(2, 2)).save(path)


def onnx_file(path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    onnx.save(helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [out])), path)


@pytest.mark.parametrize(
    ("write", "code"),
    [
        (torchscript, "torchscript"),
        (onnx_file, "onnx"),
        (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "pickle"),
        (lambda p: torch.save({"a": torch.zeros(2)}, p, _use_new_zipfile_serialization=False), "pickle"),
        (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + b"0" * 99), "unknown_format"),
        (lambda p: p.write_bytes(b""), "empty"),
        (lambda p: p.write_bytes(b"GIF89a" + b"0" * 99), "unknown_format"),
        (lambda p: zipfile.ZipFile(p, "w").writestr("a/b.txt", "x") or None, "unknown_format"),
        (lambda p: torch.save(nn.Linear(2, 2), p), "pickle"),
    ],
)
def test_other_formats_are_refused_with_advice(write: Any, code: str, tmp_path: Path) -> None:
    path = tmp_path / "upload"
    write(path)
    with pytest.raises(BadModel) as e:
        load_model(path, scratch=tmp_path)
    assert e.value.code == code
    if code != "empty":
        assert "tenfold.export" in e.value.message


@pytest.mark.parametrize("version", ["2.9.1", "2.15.0"])
def test_files_of_other_torch_versions_are_exact(version: str, tmp_path: Path) -> None:
    """Written by ``tenfold.export`` under that torch; the answers are that torch's own."""
    files = Path(__file__).with_name("files")
    lifted = load_model(files / f"torch-{version}.pt2", scratch=tmp_path)
    known = np.load(files / f"torch-{version}.npz")
    found = lifted.module(torch.from_numpy(known["x"]))
    torch.testing.assert_close(found, torch.from_numpy(known["y"]), rtol=1e-5, atol=1e-6)
    assert isinstance(lifted.module.get_submodule("attention.in_proj"), nn.Linear)


def test_every_allowed_operator_exists() -> None:
    assert [name for name in ATEN if not hasattr(torch.ops.aten, name)] == []
    assert not {"from_file", "empty", "set_", "resize_", "empty_strided", "item"} & ATEN


def test_a_format_that_is_not_the_files_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "a")
    for wanted, code in [("pt2", "wrong_format"), ("gguf", "unknown_format")]:
        with pytest.raises(BadModel) as e:
            load_model(tmp_path / "a", format=wanted, scratch=tmp_path)
        assert e.value.code == code


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(Refused, match="state_dict") as e:
        load_model(tmp_path / "module.pt", architecture={"name": "mlp"}, scratch=tmp_path)
    assert e.value.code == "pickle"


def test_a_config_of_transformers_builds_no_foreign_code(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "a")
    for config in ({"architectures": ["os.system"]}, {"architectures": ["Trainer"]}, {}, "x", json.loads("[]")):
        with pytest.raises(BadModel) as e:
            load_model(tmp_path / "a", architecture={"transformers": config}, scratch=tmp_path)
        assert e.value.code == "unknown_architecture"
