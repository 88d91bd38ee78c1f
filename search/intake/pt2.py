"""A ``.pt2`` upload to torch's ``ExportedProgram``: vetted, written anew, and only the new archive loaded."""

import logging
import tempfile
import warnings
from pathlib import Path

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import load_pt2

from search.errors import BadModel, Refused
from search.intake.vet import vet

__all__ = ["load_pt2_upload"]


def load_pt2_upload(path: Path, scratch: Path) -> tuple[ExportedProgram, dict[str, str]]:
    """The program, and which names are others than in the upload (see ``search.intake.names``).

    ``scratch``: a folder for the new archive, which is deleted again. Raises ``BadModel`` or ``Refused``.

    torch's archive reader is called directly: ``torch.export.load`` falls back to an older format, and its pickles,
    when the first attempt fails.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        clean = Path(folder) / "model.pt2"
        vetted = vet(path, clean)
        noisy = logging.getLogger("torch.export.pt2_archive")
        level = noisy.level
        noisy.setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program = load_pt2(str(clean)).exported_programs["model"]
            for part in program.graph_module.modules():
                if isinstance(part, fx.GraphModule):
                    _check_enumerations(part)
            return program, vetted.renamed
        except Refused:
            raise
        except Exception as e:  # torch raises whatever its checks happen to meet
            reason = str(e).strip().splitlines()[-1][:200] if str(e).strip() else type(e).__name__
            raise BadModel(
                "unreadable_graph",
                f"the graph of {vetted.nodes} nodes, written by torch {vetted.torch_version}, cannot be rebuilt "
                f"({reason}): "
                "export the model again with tenfold.export",
            ) from None
        finally:
            noisy.setLevel(level)


_ENUMERATIONS = {"ScalarType": torch.dtype, "Layout": torch.layout, "MemoryFormat": torch.memory_format}


def _check_enumerations(part: fx.GraphModule) -> None:
    """Types, layouts and memory formats must be just that: torch takes any integer for one, and crashes on most."""
    for node in part.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        for i, a in enumerate(node.target._schema.arguments):
            kind = next((k for name, k in _ENUMERATIONS.items() if name in str(a.real_type)), None)
            value = node.args[i] if i < len(node.args) else node.kwargs.get(a.name)
            if kind is not None and value is not None and not isinstance(value, kind):
                raise Refused("argument", f"{node.target} is given {str(value)[:40]!r} as its {a.name}")
