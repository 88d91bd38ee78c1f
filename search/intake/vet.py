"""Vet an uploaded ``.pt2`` with ``zipfile`` and ``json`` alone, and write a new archive from what passed.

``torch.export.load`` runs code from a hostile file by at least eight routes (pickles, compiled libraries, symbolic
strings, ...). So nothing of an upload is handed on: every value below is checked, rebuilt, and written to a new
archive, and only that one is loaded. What is not understood is refused; what is not needed (sample inputs, guards,
stack traces, call-graph entries) is left behind.
"""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.errors import Refused
from search.intake.archive import Archive
from search.intake.graphs import GraphVetter
from search.intake.names import Names
from search.intake.payloads import clean_payloads
from search.intake.signature import clean_ranges, clean_signature

__all__ = ["SCHEMA_MAJOR", "Vetted", "vet"]

SCHEMA_MAJOR = 8
"""Files of this major schema are read: torch 2.9 and later (2.8 wrote the schema, but pickled its weights)."""


@dataclass(frozen=True)
class Vetted:
    """The new archive and what its JSON says about its origin."""

    path: Path
    torch_version: str
    nodes: int
    renamed: dict[str, str]
    """Names that are others than in the upload; see ``search.intake.names``."""


def vet(upload: Path, out: Path) -> Vetted:
    """Check ``upload`` and write the clean archive ``out`` (weights are streamed, never all in memory).

    Raises ``BadModel`` (damaged, not a ``.pt2``) or ``Refused``, naming the first thing that was not allowed.
    """
    with Archive(upload) as archive:
        program = archive.json(f"models/{archive.model}.json")
        if not isinstance(program, dict):
            raise Refused("bad_json", "the model's description is not a JSON object: write it with tenfold.export")
        torch_version = _check_version(program)
        names = Names()
        weights, weight_records = clean_payloads(archive, "weights", names)
        constants, constant_records = clean_payloads(archive, "constants", names)

        module = _member(program, "graph_module", dict)
        graphs = GraphVetter(names)
        graph = graphs.graph(_member(module, "graph", dict))
        signature, call_graph = clean_signature(module, graph, set(weights), set(constants), names)
        clean = {
            "graph_module": {
                "graph": graph,
                "signature": signature,
                "module_call_graph": call_graph,
                "metadata": {},
                "treespec_namedtuple_fields": {},
            },
            "opset_version": {"aten": 10},
            "range_constraints": clean_ranges(program.get("range_constraints") or {}),
            "schema_version": {"major": SCHEMA_MAJOR, "minor": 1},
            "verifiers": ["TRAINING"],
            "torch_version": torch_version,
            "guards_code": [],
        }
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED, allowZip64=True) as new:
            for folder, records in (("weights", weight_records), ("constants", constant_records)):
                for old_name, new_name in records.items():
                    info = zipfile.ZipInfo(f"model/data/{folder}/{new_name}")
                    with new.open(info, "w", force_zip64=True) as f:
                        for chunk in archive.stream(f"data/{folder}/{old_name}"):
                            f.write(chunk)
            texts = {
                "data/weights/model_weights_config.json": json.dumps({"config": weights}, allow_nan=False),
                "data/constants/model_constants_config.json": json.dumps({"config": constants}, allow_nan=False),
                "models/model.json": json.dumps(clean, allow_nan=False),
                "data/sample_inputs/model.pt": "",
                "archive_format": "pt2",
                "archive_version": "0",
                ".data/version": "6\n",
                "byteorder": "little",
            }
            for name, text in texts.items():
                new.writestr(zipfile.ZipInfo(f"model/{name}"), text)
    return Vetted(out, torch_version, graphs.nodes, names.renamed)


def _member(parent: dict[str, Any], key: str, kind: type) -> Any:
    value = parent.get(key)
    if not isinstance(value, kind):
        raise Refused("bad_json", f"{key!r} is missing or not a {kind.__name__}: write the file with tenfold.export")
    return value


def _check_version(program: dict[str, Any]) -> str:
    version = program.get("schema_version")
    major = version.get("major") if isinstance(version, dict) else None
    written_by = program.get("torch_version")
    shown = written_by if isinstance(written_by, str) and len(written_by) < 40 else "an unknown torch"
    if major != SCHEMA_MAJOR:
        raise Refused(
            "schema_version",
            f"the file was written by torch {shown!r} in schema {major!r}; schema {SCHEMA_MAJOR} (torch 2.9 and later) "
            "is read: export the model again with one of those",
        )
    return shown if all(c.isalnum() or c in ".+" for c in shown) else "unknown"
