"""Real hostile files, each with a harmless marker: refused, or rendered harmless; never run, no crash, no hang."""

import copy
import io
import json
import pickle
import random
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from search.errors import BadModel, Refused
from search.intake import load_model
from search.intake.vet import vet
from tenfold.exporting import export

Edit = Callable[[dict[str, bytes]], None]


class Marker:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "ran"))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(x)) + torch.ones(4, 1, 1)
        return self.fc(x.reshape(x.shape[0], 4, 36).mean(2))


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return export(Net(), torch.randn(2, 3, 8, 8), tmp_path_factory.mktemp("honest") / "model.pt2")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def forge(honest: Path, tmp_path: Path) -> Callable[[Edit], Path]:
    """The honest file with its entries edited (names without the root folder)."""

    def forged(edit: Edit) -> Path:
        with zipfile.ZipFile(honest) as z:
            entries = {n.partition("/")[2]: z.read(n) for n in z.namelist()}
        edit(entries)
        path = tmp_path / "hostile.pt2"
        with zipfile.ZipFile(path, "w") as z:
            for name, data in entries.items():
                z.writestr(name[1:] if name.startswith("!") else f"model/{name}", data)
        return path

    return forged


def program(entries: dict[str, bytes]) -> Any:
    return json.loads(entries["models/model.json"])


def edit_program(change: Callable[[Any], None]) -> Edit:
    def edit(entries: dict[str, bytes]) -> None:
        p = program(entries)
        change(p)
        entries["models/model.json"] = json.dumps(p).encode()

    return edit


def edit_weights(change: Callable[[dict[str, Any]], None], folder: str = "weights") -> Edit:
    def edit(entries: dict[str, bytes]) -> None:
        name = f"data/{folder}/model_{folder}_config.json"
        config = json.loads(entries[name])
        change(config["config"])
        entries[name] = json.dumps(config).encode()

    return edit


def refused(path: Path, code: str) -> None:
    with pytest.raises(Refused) as e:
        load_model(path, scratch=path.parent)
    assert e.value.code == code, e.value.message


def pickled(marker: Path) -> bytes:
    out = io.BytesIO()
    torch.save(Marker(marker), out)
    return out.getvalue()


# ------------------------------------------------------------------ the eight routes to running code at load


def test_pickled_weights(forge: Any, marker: Path) -> None:
    def edit(entries: dict[str, bytes]) -> None:
        edit_weights(lambda c: c["conv.weight"].update(use_pickle=True))(entries)
        entries["data/weights/weight_0"] = pickled(marker)

    refused(forge(edit), "pickled_weights")
    assert not marker.exists()


@pytest.mark.parametrize("folder", ["weights", "constants"])
def test_legacy_weights(forge: Any, marker: Path, folder: str) -> None:
    refused(forge(lambda e: e.update({f"data/{folder}/model.pt": pickled(marker)})), "pickled_weights")
    assert not marker.exists()


def test_pickled_constants(forge: Any, marker: Path) -> None:
    def edit(entries: dict[str, bytes]) -> None:
        entries["data/constants/tensor_9"] = pickled(marker)
        meta = {"path_name": "tensor_9", "is_param": False, "use_pickle": True, "tensor_meta": None}
        edit_weights(lambda c: c.update(evil=meta), "constants")(entries)

    refused(forge(edit), "pickled_weights")
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["opaque_obj_0", "custom_obj_0"])
def test_pickled_objects(forge: Any, marker: Path, kind: str) -> None:
    def edit(entries: dict[str, bytes]) -> None:
        entries[f"data/constants/{kind}"] = pickle.dumps(Marker(marker))
        meta = {"path_name": kind, "is_param": False, "use_pickle": True, "tensor_meta": None}
        edit_weights(lambda c: c.update(evil=meta), "constants")(entries)

    refused(forge(edit), "custom_object")
    assert not marker.exists()


def test_sample_inputs_are_never_opened(forge: Any, marker: Path, tmp_path: Path) -> None:
    lifted = load_model(forge(lambda e: e.update({"data/sample_inputs/model.pt": pickled(marker)})), scratch=tmp_path)
    assert lifted.batch == "any"
    assert not marker.exists()


def test_symbolic_strings(forge: Any, marker: Path) -> None:
    evil = f"__import__('pathlib').Path({str(marker)!r}).write_text('ran')"
    for text in (
        evil,
        "10**10**10",
        "Symbol('s0').func",
        "s0.is_positive",
        "(lambda: s0)()",
        "Pow(10, 10)",
        "'s0'",
        "s0+" * 3000 + "s0",
    ):

        def change(p: Any, text: str = text) -> None:
            values = p["graph_module"]["graph"]["tensor_values"]
            values["x"]["sizes"][0] = {"as_expr": {"expr_str": text, "hint": {"as_int": 2}}}

        started = time.monotonic()
        refused(forge(edit_program(change)), "symbolic_expression")
        assert time.monotonic() - started < 5
    assert not marker.exists()


def test_compiled_code(forge: Any) -> None:
    refused(forge(lambda e: e.update({"data/aotinductor/model/a.so": b"\x7fELF"})), "compiled_code")


@pytest.mark.parametrize(
    "name", ["data/../../evil", "!../evil", "!/etc/evil", "data/weights/./weight_0", "models\\model.json"]
)
def test_names_that_leave_the_archive(forge: Any, name: str, tmp_path: Path) -> None:
    refused(forge(lambda e: e.update({name: b"x"})), "entry_name")
    assert not (tmp_path.parent / "evil").exists()


def test_the_old_format(tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "old.pt2"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("version", "5.1")
        z.writestr("serialized_exported_program.json", "{}")
        for name in ("serialized_state_dict.pt", "serialized_constants.pt", "serialized_example_inputs.pt"):
            z.writestr(name, pickled(marker))
    refused(path, "old_format")
    assert not marker.exists()


# ------------------------------------------------------------------ later, or by other ways


def test_tree_specs_that_import_are_rendered_harmless(forge: Any, tmp_path: Path) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    context = json.dumps(
        {"default_factory_module": "evil_module", "default_factory_name": "x", "dict_context": '["a"]'}
    )
    leaf = {"type": None, "context": None, "children_spec": []}
    evil = {"type": "collections.defaultdict", "context": context, "children_spec": [leaf]}

    def change(p: Any) -> None:
        p["graph_module"]["module_call_graph"][0]["signature"].update(
            in_spec=json.dumps([1, evil]), out_spec=json.dumps([1, evil])
        )

    lifted = load_model(forge(edit_program(change)), scratch=tmp_path)
    assert isinstance(lifted.module(*lifted.example(2)), tuple)


def test_guards_and_foreign_metadata_are_left_behind(forge: Any, tmp_path: Path, marker: Path) -> None:
    code = f"__import__('pathlib').Path({str(marker)!r}).write_text('ran')"

    def change(p: Any) -> None:
        p["guards_code"] = [code]
        p["verifiers"] = [code]
        p["graph_module"]["metadata"] = {"custom": code}
        for node in p["graph_module"]["graph"]["nodes"]:
            node["metadata"].update(custom=code, source_fn_stack=code, from_node=code, torch_fn=code)
            node["metadata"]["nn_module_stack"] = f"{code},{code},{code}"

    path = forge(edit_program(change))
    vet(path, tmp_path / "clean.pt2")
    assert b"write_text" not in (tmp_path / "clean.pt2").read_bytes()
    assert load_model(path, scratch=tmp_path).module is not None
    assert not marker.exists()


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.empty.memory_format",
        "torch.ops.aten.set_.source_Storage",
        "torch.ops.aten.add.out",
        "torch.ops.prim.device.default",
        "torch.ops.higher_order.cond",
        "torch.ops.aten.linear.__class__.__mro__",
        "torch.os.system",
        "_operator.pow",
        "_operator.attrgetter",
        "math.factorial",
        "#evil:x",
        "torch.ops.aten._transformer_encoder_layer_fwd.default",
        None,
    ],
)
def test_operators_that_are_not_allowed(forge: Any, target: object) -> None:
    refused(forge(edit_program(lambda p: p["graph_module"]["graph"]["nodes"][0].update(target=target))), "operator")


def _argument(value: Any) -> Edit:
    return edit_program(lambda p: p["graph_module"]["graph"]["nodes"][-1]["inputs"][0].update(arg=value))


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ({"as_operator": "torch.os.system"}, "argument"),
        ({"as_custom_obj": {"name": "a", "class_fqn": "b"}}, "argument"),
        ({"as_string": "/etc/passwd"}, "string"),
        ({"as_string": "a" * 30}, "string"),
        ({"as_tensor": {"name": "x); import os #"}}, "name"),
        ({"as_int": 10**30}, "argument"),
        ({"as_int": True}, "argument"),
        ({"as_ints": [1] * 70_000}, "bad_json"),
        ({"as_device": {"type": "meta", "index": None}}, "device"),
        ({"as_layout": 1}, "layout"),
        ({"as_scalar_type": 99}, "dtype"),
        ({"as_int": 1, "as_none": True}, "bad_json"),
        ([], "bad_json"),
    ],
)
def test_arguments_that_are_not_allowed(forge: Any, value: object, code: str) -> None:
    refused(forge(_argument(value)), code)


def test_a_number_in_place_of_a_type(forge: Any) -> None:
    """torch takes any integer for a scalar type and crashes on -5."""

    def change(p: Any) -> None:
        nodes = p["graph_module"]["graph"]["nodes"]
        node = next(n for n in nodes if n["target"] == "torch.ops.aten.ones.default")
        node["inputs"].append({"name": "dtype", "arg": {"as_int": -5}, "kind": 2})

    path = forge(edit_program(change))
    with pytest.raises(Refused, match="-5"):
        load_model(path, scratch=path.parent)


def test_geometry_that_crashes_a_kernel(forge: Any) -> None:
    """A transposed convolution of stride 20000 is a segmentation fault in torch 2.13 on the CPU."""

    def change(p: Any) -> None:
        nodes = p["graph_module"]["graph"]["nodes"]
        node = next(n for n in nodes if n["target"] == "torch.ops.aten.conv2d.default")
        node["inputs"].append({"name": "stride", "arg": {"as_ints": [2, 20_000]}, "kind": 1})

    refused(forge(edit_program(change)), "argument")


def test_a_huge_tensor_is_refused_before_it_is_allocated(forge: Any) -> None:
    def change(p: Any) -> None:
        nodes = p["graph_module"]["graph"]["nodes"]
        node = next(n for n in nodes if n["target"] == "torch.ops.aten.ones.default")
        node["inputs"][0]["arg"] = {"as_ints": [2**20, 2**14]}

    path = forge(edit_program(change))
    with pytest.raises(BadModel, match="more than 4 GiB"):
        load_model(path, scratch=path.parent)


def test_a_billion_layers_of_lstm(tmp_path: Path, forge: Any) -> None:
    export(nn.LSTM(3, 3, batch_first=True), torch.randn(2, 4, 3), tmp_path / "lstm.pt2")
    with zipfile.ZipFile(tmp_path / "lstm.pt2") as z:
        honest = {n.partition("/")[2]: z.read(n) for n in z.namelist()}

    def change(p: Any) -> None:
        nodes = p["graph_module"]["graph"]["nodes"]
        node = next(n for n in nodes if n["target"] == "torch.ops.aten.lstm.input")
        next(i for i in node["inputs"] if i["name"] == "num_layers")["arg"] = {"as_int": 10**9}

    def edit(entries: dict[str, bytes]) -> None:
        entries.clear()
        entries.update(honest)
        edit_program(change)(entries)

    refused(forge(edit), "argument")


def test_nested_graphs_have_a_limit(forge: Any) -> None:
    def change(p: Any) -> None:
        graph = p["graph_module"]["graph"]
        inner = graph["nodes"][-1]
        for _ in range(5):
            sub = {**graph, "nodes": [inner]}
            inner = {
                "target": "torch.ops.higher_order.wrap_with_set_grad_enabled",
                "inputs": [{"name": "", "arg": {"as_graph": {"name": "g", "graph": sub}}, "kind": 1}],
                "outputs": [],
                "metadata": {},
            }
        graph["nodes"].append(inner)

    refused(forge(edit_program(change)), "nesting")


def test_sizes_cannot_be_squared_forever(forge: Any) -> None:
    def change(p: Any) -> None:
        graph = p["graph_module"]["graph"]
        last: dict[str, Any] = {"as_int": 2**62}
        for i in range(50):
            graph["nodes"].append(
                {
                    "target": "_operator.mul",
                    "inputs": [{"name": n, "arg": last, "kind": 1} for n in "ab"],
                    "outputs": [{"as_sym_int": {"as_name": f"m{i}"}}],
                    "metadata": {},
                }
            )
            last = {"as_sym_int": {"as_name": f"m{i}"}}

    refused(forge(edit_program(change)), "huge_size")


def test_symbols_that_are_counted_one_by_one_stay_small(forge: Any) -> None:
    limits = {"min_val": 0, "max_val": None}
    refused(forge(edit_program(lambda p: p["range_constraints"].update(u999999999=limits))), "range")


# ------------------------------------------------------------------ tensors


@pytest.mark.parametrize(
    "meta",
    [
        {"sizes": [{"as_int": 2**17}, {"as_int": 2**17}], "strides": [{"as_int": 0}, {"as_int": 0}]},
        {"sizes": [{"as_int": 100}], "strides": [{"as_int": 1}]},
        {"storage_offset": {"as_int": 10**6}},
        {"dtype": 8},
    ],
)
def test_tensors_stay_inside_their_bytes(forge: Any, meta: dict[str, Any]) -> None:
    refused(forge(edit_weights(lambda c: c["fc.weight"]["tensor_meta"].update(meta))), "tensor_bounds")


def test_negative_strides_and_foreign_records(forge: Any) -> None:
    refused(
        forge(edit_weights(lambda c: c["fc.weight"]["tensor_meta"].update(strides=[{"as_int": -1}] * 2))), "payload"
    )
    refused(forge(edit_weights(lambda c: c["fc.weight"].update(path_name="../../../etc/passwd"))), "payload")
    refused(forge(edit_weights(lambda c: c["fc.weight"].update(path_name="weight_99"))), "payload")
    refused(forge(edit_weights(lambda c: c.update({"a..b": c["fc.weight"]}))), "tensor_name")


def test_a_state_dict_that_claims_more_than_it_has(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(1).as_strided((2**17, 2**17), (0, 0))}, tmp_path / "bomb.pt")
    assert (tmp_path / "bomb.pt").stat().st_size < 4096
    with pytest.raises(Refused, match="claims shape") as e:
        load_model(tmp_path / "bomb.pt", architecture={"name": "mlp"}, scratch=tmp_path)
    assert e.value.code == "tensor_bounds"


def test_a_state_dict_with_code(tmp_path: Path, marker: Path) -> None:
    torch.save({"fc.weight": Marker(marker)}, tmp_path / "evil.pt")
    refused_with = pytest.raises(Refused)
    with refused_with as e:
        load_model(tmp_path / "evil.pt", architecture={"name": "mlp"}, scratch=tmp_path)
    assert e.value.code == "pickle"
    assert not marker.exists()


# ------------------------------------------------------------------ the archive itself


def test_compressed_entries_are_not_inflated(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("model/models/model.json", b"0" * 50_000_000)
    assert path.stat().st_size < 200_000
    refused(path, "compressed_entry")


def test_overlapping_entries(honest: Path, tmp_path: Path) -> None:
    """Many directory entries for the same stored bytes."""
    path = tmp_path / "overlap.pt2"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("model/data/weights/weight_0", b"x" * 100_000)
        first = z.infolist()[0]
        for i in range(1, 200):
            copy = zipfile.ZipInfo(f"model/data/weights/weight_{i}")
            copy.header_offset, copy.CRC = first.header_offset, first.CRC
            copy.file_size = copy.compress_size = first.file_size
            z.filelist.append(copy)
            z.NameToInfo[copy.filename] = copy
    refused(path, "overlapping_entries")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_repeated_and_encrypted_entries(honest: Path, tmp_path: Path) -> None:
    path = tmp_path / "twice.pt2"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("model/archive_format", "pt2")
        z.writestr("model/archive_format", "pt2")
    refused(path, "duplicate_entry")
    raw = bytearray(honest.read_bytes())
    at = raw.find(b"PK\x01\x02")
    raw[at + 8] |= 1
    (tmp_path / "encrypted.pt2").write_bytes(raw)
    refused(tmp_path / "encrypted.pt2", "encrypted")


def test_a_huge_directory_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "directory.pt2"
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFF0, 0xFFF0, 2**31, 30, 0)
    path.write_bytes(b"PK\x03\x04" + b"\0" * 100 + end)
    refused(path, "too_many_entries")


def test_a_zip64_record_that_only_we_would_read_does_not_hide_the_real_one(honest: Path, tmp_path: Path) -> None:
    """``zipfile`` reads the record before the locator, wherever that points."""

    def record(entries: int, directory: int) -> bytes:
        return struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, entries, entries, directory, 0)

    path = tmp_path / "decoy.pt2"
    decoy, real = record(1, 50), record(2**40, 2**40)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 4, 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    path.write_bytes(b"PK\x03\x04" + decoy + real + locator + end)
    with pytest.raises(BadModel) as e:
        load_model(path, scratch=tmp_path)
    assert e.value.code == "not_a_zip"


def test_deep_and_broken_json(forge: Any) -> None:
    refused(forge(lambda e: e.update({"models/model.json": b"[" * 1_000_000})), "bad_json")
    refused(forge(lambda e: e.update({"models/model.json": b"{"})), "bad_json")
    refused(forge(lambda e: e.update({"models/model.json": b"9" * 100_000})), "bad_json")
    refused(forge(lambda e: e.update({"models/model.json": b'"\xff"'})), "bad_json")


def test_unknown_and_missing_entries(forge: Any) -> None:
    refused(forge(lambda e: e.update({"data/surprise": b"x"})), "unknown_entry")
    refused(forge(lambda e: e.update({"models/second.json": e["models/model.json"]})), "one_model")
    refused(forge(edit_program(lambda p: p["schema_version"].update(major=9))), "schema_version")
    path = forge(lambda e: e.pop("archive_format"))
    with pytest.raises(BadModel) as e:
        load_model(path, scratch=path.parent)
    assert e.value.code == "not_pt2"


def test_truncated_files_are_refused_wherever_they_end(honest: Path, tmp_path: Path) -> None:
    raw = honest.read_bytes()
    for length in [0, 1, 4, 21, 22, 100, *range(1000, len(raw), len(raw) // 12), len(raw) - 1]:
        (tmp_path / "cut.pt2").write_bytes(raw[:length])
        with pytest.raises(BadModel):
            load_model(tmp_path / "cut.pt2", scratch=tmp_path)


def test_random_bytes_are_refused_or_harmless(honest: Path, tmp_path: Path) -> None:
    """Flips, in the directory and the JSON above all; the vetting is what meets them, so the vetting is fuzzed."""
    raw = honest.read_bytes()
    rng = random.Random(0)
    tried, passed = 600, 0
    for _ in range(tried):
        data = bytearray(raw)
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "fuzz.pt2").write_bytes(data)
        try:
            vet(tmp_path / "fuzz.pt2", tmp_path / "clean.pt2")
        except BadModel:
            continue
        passed += 1
    assert passed < tried


def test_shuffled_json_is_refused_or_harmless(honest: Path, forge: Any, tmp_path: Path) -> None:
    """Values of the description swapped for others, behind correct checksums: the loader and the run meet them."""
    rng = random.Random(1)
    values: list[Any] = [
        None,
        True,
        -1,
        0,
        2**40,
        1e400,
        "x",
        "conv.weight",
        [],
        {},
        {"as_int": 3},
        [[]],
        "s77",
        {"as_none": True},
    ]

    def mutate(p: Any) -> None:
        for _ in range(rng.choice((1, 2, 3))):
            at = p
            while True:
                keys = list(at) if isinstance(at, dict) else range(len(at))
                if not keys:
                    break
                key = rng.choice(list(keys))
                if not isinstance(at[key], dict | list) or rng.random() < 0.08:
                    at[key] = copy.deepcopy(rng.choice(values))
                    break
                at = at[key]

    messages = []
    for _ in range(150):
        try:
            load_model(forge(edit_program(mutate)), scratch=tmp_path)
            messages.append("taken in")
        except BadModel as e:
            messages.append(e.message)
    assert "taken in" in messages
    assert len({*messages}) > 5
    assert all(0 < len(m) < 1500 for m in messages)


def test_reading_a_large_file_takes_a_second_not_the_memory(tmp_path: Path) -> None:
    import tracemalloc

    model = nn.Sequential(nn.Flatten(), nn.Linear(5000, 5000, bias=False), nn.Linear(5000, 4))
    path = export(model, torch.randn(2, 5000), tmp_path / "large.pt2")
    assert path.stat().st_size > 95e6
    tracemalloc.start()
    started = time.monotonic()
    vet(path, tmp_path / "clean.pt2")
    seconds = time.monotonic() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6
    assert seconds < 10  # about a quarter of a second on an idle machine
