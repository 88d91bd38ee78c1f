"""Bare weights (safetensors, or a state dict) and a named architecture, to an exported program."""

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from search.errors import BadModel, Refused
from search.intake.architectures import ARCHITECTURES, build
from search.intake.archive import open_zip

__all__ = ["load_pretrained", "read_weights"]

_PICKLE_MAX = 64 * 2**20


def load_pretrained(path: Path, kind: str, architecture: dict[str, Any] | None) -> ExportedProgram:
    """``kind``: safetensors or state_dict. Raises ``BadModel``: no architecture, or weights that do not fit it."""
    weights = read_weights(path, kind)  # first: what is no state dict at all is told so
    if not architecture:
        raise BadModel(
            "no_architecture",
            f"a {kind} file holds weights only: name the architecture, for example "
            f"{{'name': 'resnet20_cifar10'}} (one of {', '.join(sorted(ARCHITECTURES))}), or upload a .pt2 "
            "written by tenfold.export, which holds the network itself",
        )
    if "transformers" in architecture:
        return _export_transformer(architecture["transformers"], weights)
    name = architecture.get("name")
    if not isinstance(name, str):
        raise BadModel("no_architecture", f"the architecture {str(architecture)[:80]} has no 'name'")
    options = architecture.get("options", {k: v for k, v in architecture.items() if k != "name"})
    if not isinstance(options, dict):
        raise BadModel("bad_option", f"the architecture's options are {str(options)[:60]!r}, not an object")
    with torch.device("meta"):
        model, example = build(name, options)
    _fit(model, weights, name)
    return _export(model.eval(), (torch.zeros(example.shape),))


def read_weights(path: Path, kind: str) -> dict[str, Tensor]:
    """Name to tensor. A tensor larger than the bytes behind it is refused before anything copies it."""
    weights = _read_safetensors(path) if kind == "safetensors" else _read_state_dict(path)
    prefixes = ("module.", "_orig_mod.")  # DataParallel and torch.compile put them in front
    for prefix in prefixes:
        if weights and all(k.startswith(prefix) for k in weights):
            weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as e:
        raise BadModel("damaged", f"the safetensors file cannot be read ({str(e)[:150]}): upload it again") from None


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    with open_zip(path) as z:
        largest = max((i.file_size for i in z.infolist() if i.filename.endswith(".pkl")), default=0)
    if largest > _PICKLE_MAX:
        raise Refused("too_large", f"the index of the state dict has {largest} bytes, at most {_PICKLE_MAX} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # the restricted unpickler raises many kinds
        raise Refused(
            "pickle",
            f"the file is more than a state dict of tensors ({_first_line(e)}): "
            "save model.state_dict() alone, or upload a .pt2 written by tenfold.export",
        ) from None
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not loaded:
        raise BadModel("no_weights", f"the file holds a {type(loaded).__name__}, not a state dict of tensors")
    for name, t in loaded.items():
        if not isinstance(name, str) or not isinstance(t, Tensor):
            raise BadModel(
                "no_weights",
                f"the entry {str(name)[:60]!r} is a {type(t).__name__}, not a tensor: save model.state_dict() alone",
            )
        if t.layout is not torch.strided or t.is_quantized or t.is_meta:
            raise Refused("payload", f"the tensor {name[:80]!r} is not dense: convert it to a plain tensor")
        if t.numel() * t.element_size() > t.untyped_storage().nbytes():
            raise Refused(
                "tensor_bounds",
                f"the tensor {name[:80]!r} claims shape {tuple(t.shape)}, more than the "
                f"{t.untyped_storage().nbytes()} bytes stored for it",
            )
    return loaded


def _fit(model: nn.Module, weights: dict[str, Tensor], name: str) -> None:
    """Put the weights into a network on the meta device, names and shapes equal; counters may be missing."""
    expected = model.state_dict()
    optional = {k for k in expected if k.endswith("num_batches_tracked")}
    missing = [k for k in expected if k not in weights and k not in optional]
    unknown = [k for k in weights if k not in expected and not k.endswith("num_batches_tracked")]
    if missing or unknown:
        raise BadModel(
            "weights_do_not_fit",
            f"the weights do not fit {name}: missing {missing[:3] or 'none'}, unknown {unknown[:3] or 'none'}",
        )
    for k, v in expected.items():
        if k in weights and weights[k].shape != v.shape:
            raise BadModel(
                "weights_do_not_fit",
                f"{k} has shape {tuple(weights[k].shape)} in the file and {tuple(v.shape)} in {name}: "
                "check the architecture's options",
            )
    full = {k: weights[k] if k in weights else torch.zeros((), dtype=torch.long) for k in expected}
    full = {k: v.to(torch.float32) if v.is_floating_point() else v for k, v in full.items()}
    model.load_state_dict(full, assign=True)
    for p in model.parameters():
        p.requires_grad_(True)


def _export(model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor] | None = None) -> ExportedProgram:
    shapes: Any = tuple({0: Dim.DYNAMIC} for _ in args) if not kwargs else {k: {0: Dim.DYNAMIC} for k in kwargs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return export(model, args, kwargs, dynamic_shapes=shapes)


_CLASS = re.compile(r"[A-Z][A-Za-z0-9]{2,80}\Z")


def _export_transformer(config: object, weights: dict[str, Tensor]) -> ExportedProgram:
    """``config``: the contents of a ``config.json`` of Hugging Face. Only the library's own classes: no code is
    fetched."""
    try:
        import transformers
    except ImportError:
        raise BadModel(
            "no_transformers", "this server has no transformers library: upload a .pt2 written by tenfold.export"
        ) from None
    names = config.get("architectures") if isinstance(config, dict) else None
    if (
        not isinstance(config, dict)
        or not isinstance(names, list)
        or len(names) != 1
        or not _CLASS.match(str(names[0]))
    ):
        raise BadModel("unknown_architecture", "the config.json names no single class in 'architectures'")
    cls: Any = getattr(transformers, names[0], None)
    if not _is_model_class(cls, transformers.PreTrainedModel):
        raise BadModel("unknown_architecture", f"{names[0]!r} is not a model class of transformers")
    plain = {k: v for k, v in config.items() if not k.startswith("_") and k not in ("auto_map", "quantization_config")}
    try:
        made = cls.config_class(**{**plain, "use_cache": False})
        made._attn_implementation = "sdpa"
        with torch.device("meta"):
            outline = cls(made)
        _check_outline(outline, weights, names[0])
        model = cls(made)
    except BadModel:
        raise
    except Exception as e:  # a config can be wrong in as many ways as it has fields
        raise BadModel(
            "bad_option", f"transformers cannot build {names[0]} from this config.json ({str(e)[:150]})"
        ) from None
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    model = model.float().eval()
    return _export(model, (), {model.main_input_name: _transformer_example(model, made)})


def _is_model_class(cls: Any, base: type) -> bool:
    return isinstance(cls, type) and issubclass(cls, base) and getattr(cls, "config_class", None) is not None


def _check_outline(outline: nn.Module, weights: dict[str, Tensor], name: str) -> None:
    """Names and shapes, before memory is spent on the network; tied weights may be missing."""
    expected = outline.state_dict()
    tied = set(getattr(outline, "_tied_weights_keys", None) or ())
    buffers = {k for k, _ in outline.named_buffers()}
    missing = [k for k in expected if k not in weights and k not in buffers and k not in tied]
    wrong = [k for k, v in weights.items() if k in expected and v.shape != expected[k].shape]
    if missing or wrong:
        raise BadModel(
            "weights_do_not_fit",
            f"the weights do not fit {name}: missing {missing[:3] or 'none'}, other shape {wrong[:3] or 'none'}",
        )


def _transformer_example(model: Any, config: Any) -> Tensor:
    if model.main_input_name == "input_ids":
        length = min(int(getattr(config, "max_position_embeddings", 128) or 128), 128)
        return torch.zeros(2, length, dtype=torch.long)
    if model.main_input_name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return torch.zeros(2, config.num_channels, size, size)
    raise BadModel(
        "unknown_architecture",
        f"models that take {model.main_input_name!r} are not built from a config.json: "
        "upload a .pt2 written by tenfold.export",
    )


def _first_line(e: Exception) -> str:
    """Without colours, and without torch's own advice, which is to load the file unsafely."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(e))
    told = re.search(r"Unsupported (global|operand|class)[^.:]*:? ?[^\s,]*( [\w.]+)?", plain)
    return told[0][:120] if told else (plain.strip().splitlines() or [type(e).__name__])[0][:120]
