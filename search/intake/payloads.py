"""The weights and constants an uploaded archive lists: plain strided bytes whose geometry stays inside their record."""

import re
from typing import Any

from search.errors import Refused
from search.intake.archive import Archive
from search.intake.graphs import clean_dtype
from search.intake.names import Names

__all__ = ["ITEM_SIZE", "clean_payloads"]

ITEM_SIZE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 10: 8, 12: 1, 13: 2}
"""Bytes of one element by the schema's scalar type (uint8 ... float64, complex64, bool, bfloat16)."""

_TENSORS_MAX = 50_000
_DIMENSIONS_MAX = 8
_PREFIX = {"weights": "weight_", "constants": "tensor_"}


def clean_payloads(archive: Archive, folder: str, names: Names) -> tuple[dict[str, Any], dict[str, str]]:
    """Name (as ``names`` gives it) to payload entry, rebuilt; and the records to copy (old name to new name).

    Raises ``Refused``: a pickled payload, a name that is none, a view that leaves its record.
    """
    config = archive.json(f"data/{folder}/{archive.model}_{folder}_config.json")
    entries = config.get("config") if isinstance(config, dict) else None
    if not isinstance(entries, dict) or len(entries) > _TENSORS_MAX:
        raise Refused("payload", f"the list of {folder} is not a JSON object of at most {_TENSORS_MAX} tensors")
    records: dict[str, str] = {}
    dtypes: dict[str, int] = {}
    clean: dict[str, Any] = {}
    for name, entry in entries.items():
        called = names(name)
        if not isinstance(entry, dict) or entry.get("use_pickle") is not False:
            raise Refused(
                "pickled_weights", f"the tensor {name!r} is pickled: convert it to a plain tensor and export again"
            )
        record = entry.get("path_name")
        if not isinstance(record, str) or not re.fullmatch(_PREFIX[folder] + r"\d{1,6}", record):
            raise Refused(
                "payload", f"the tensor {name!r} lies in {str(record)[:60]!r}, not in a record of the archive"
            )
        path = f"data/{folder}/{record}"
        if path not in archive.names:
            raise Refused("payload", f"the tensor {name!r} lies in {path!r}, which the archive does not have")
        meta = _clean_meta(name, entry.get("tensor_meta"), archive.size(path))
        if dtypes.setdefault(record, meta["dtype"]) != meta["dtype"]:
            raise Refused("payload", f"the tensor {name!r} reads its record as another type than its neighbours")
        is_param = entry.get("is_param") is True
        records.setdefault(record, f"{_PREFIX[folder]}{len(records)}")
        clean[called] = {"path_name": records[record], "is_param": is_param, "use_pickle": False, "tensor_meta": meta}
    return clean, records


def _clean_meta(name: str, meta: object, record_bytes: int) -> dict[str, Any]:
    if not isinstance(meta, dict):
        raise Refused("payload", f"the tensor {name!r} has no description")
    dtype = clean_dtype(meta.get("dtype"))
    if dtype not in ITEM_SIZE:
        raise Refused(
            "dtype", f"the tensor {name!r} has scalar type {dtype}, which cannot be compressed: convert it to float32"
        )
    if meta.get("layout") != 7:
        raise Refused("payload", f"the tensor {name!r} is not strided (dense): call .to_dense() and export again")
    sizes = _integers(name, meta.get("sizes"))
    strides = _integers(name, meta.get("strides"))
    (offset,) = _integers(name, [meta.get("storage_offset")])
    if len(sizes) != len(strides) or len(sizes) > _DIMENSIONS_MAX:
        raise Refused("payload", f"the tensor {name!r} has {len(sizes)} sizes and {len(strides)} strides")
    numel = 1
    for s in sizes:
        numel *= s
    last = offset + sum((s - 1) * t for s, t in zip(sizes, strides, strict=True)) if numel else 0
    item = ITEM_SIZE[dtype]
    if numel * item > record_bytes or (numel and (last + 1) * item > record_bytes) or record_bytes % item:
        raise Refused(
            "tensor_bounds",
            f"the tensor {name!r} of shape {sizes} and strides {strides} needs more than the {record_bytes} bytes "
            "stored for it",
        )
    return {
        "dtype": dtype,
        "sizes": [{"as_int": s} for s in sizes],
        "requires_grad": meta.get("requires_grad") is True,
        "device": {"type": "cpu", "index": None},
        "strides": [{"as_int": s} for s in strides],
        "storage_offset": {"as_int": offset if numel else 0},
        "layout": 7,
    }


def _integers(name: str, values: object) -> list[int]:
    out = []
    for v in values if isinstance(values, list) else [None]:
        n = v.get("as_int") if isinstance(v, dict) else None
        if not isinstance(n, int) or isinstance(n, bool) or not 0 <= n < 2**40:
            raise Refused(
                "payload", f"the tensor {name!r} has a size, stride or offset {str(v)[:60]!r}, not a small integer"
            )
        out.append(n)
    return out
