"""Which kind of file an upload is, told from its first bytes and entry names, and advice for those not taken in."""

import struct
from pathlib import Path

from search.errors import BadModel, Refused
from search.intake.archive import list_names, open_zip

__all__ = ["FORMATS", "detect"]

FORMATS = ("auto", "pt2", "safetensors", "state_dict")

_HOW = (
    "load the model where its code is and call tenfold.export(model, example, 'model.pt2') "
    "(pip install tenfold[torch]); the .pt2 file holds the network without its code"
)


def detect(path: Path, wanted: str = "auto") -> str:
    """``pt2``, ``safetensors`` or ``state_dict``. Raises ``BadModel`` or ``Refused``, with the way to a usable file."""
    if wanted not in FORMATS:
        raise BadModel("unknown_format", f"format {wanted!r} is not one of {', '.join(FORMATS)}")
    try:
        with path.open("rb") as f:
            head = f.read(16)
        size = path.stat().st_size
    except OSError as e:
        raise BadModel("unreadable", f"the upload cannot be read ({e.strerror}): upload it again") from None
    found = _of_zip(path) if head[:4] == b"PK\x03\x04" else _of_bytes(head, size)
    if wanted not in ("auto", found):
        raise BadModel(
            "wrong_format", f"the file looks like {found}, not {wanted}: give format={found!r} or leave it out"
        )
    return found


def _of_zip(path: Path) -> str:
    whole = set(list_names(path))
    names = {n.partition("/")[2] for n in whole}
    if any(n.startswith("serialized_exported_program") for n in whole | names):
        raise Refused(
            "old_format", f"this .pt2 was written by torch 2.7 or older, whose format is not safe to read: {_HOW}"
        )
    is_pt2 = any(n.startswith("models/") for n in names) or "archive_format" in names
    if not is_pt2 and ("constants.pkl" in names or any(n.startswith("code/") for n in names)):
        raise Refused("torchscript", f"this is a TorchScript archive, which runs code when it is loaded: {_HOW}")
    open_zip(path).close()  # its entries are checked before it counts as anything
    if is_pt2:
        return "pt2"
    if "data.pkl" in names:
        return "state_dict"
    raise BadModel("unknown_format", f"this ZIP archive is not a model file: {_HOW}")


def _of_bytes(head: bytes, size: int) -> str:
    if len(head) >= 10:
        (header,) = struct.unpack("<Q", head[:8])
        if 2 <= header <= min(size - 8, 100 * 2**20) and head[8:9] == b"{":
            return "safetensors"
    if head[:1] == b"\x08" and (b"pytorch" in head or head[2:3] in (b"\x12", b"\x1a", b"\x3a")):
        raise Refused("onnx", f"ONNX is written, not read: {_HOW}")
    if head[:1] == b"\x80":
        raise Refused(
            "pickle",
            f"this is a pickle, which runs code when it is loaded: {_HOW}; "
            "or save model.state_dict() again with torch 1.6 or later",
        )
    if head[:8] == b"\x89HDF\r\n\x1a\n":
        raise BadModel("unknown_format", f"this is an HDF5 (Keras) file; PyTorch models are compressed: {_HOW}")
    if not size:
        raise BadModel("empty", "the upload is empty: send the file again")
    raise BadModel("unknown_format", f"the file's first bytes {head[:8].hex()} are not those of a model file: {_HOW}")
