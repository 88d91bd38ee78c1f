"""A training run on disk: safetensors for tensors, JSON in its header for the rest. Never pickle."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["optimizer_state", "read", "read_planned", "restore_optimizer", "write"]


def write(path: Path, groups: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
    """Write groups of tensors (``"model": {name: tensor}``) and JSON facts in one file, atomically.

    Tensors are copied, since safetensors refuses those that share memory (tied weights do).
    """
    tensors = {
        f"{group}/{name}": t.detach().to("cpu", copy=True).contiguous()
        for group, members in groups.items()
        for name, t in members.items()
    }
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, str(partial), metadata={"facts": json.dumps(facts)})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def read(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The groups and facts that ``write`` stored."""
    groups: dict[str, dict[str, Tensor]] = {}
    with safe_open(str(path), framework="pt") as file:
        facts = json.loads((file.metadata() or {}).get("facts", "{}"))
        for key in file.keys():  # noqa: SIM118 - the handle is no mapping
            group, _, name = key.partition("/")
            groups.setdefault(group, {})[name] = file.get_tensor(key)
    return groups, facts


def read_planned(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and the plan in the header: what ``export.save_weights`` wrote."""
    with safe_open(str(path), framework="pt") as file:
        plan = json.loads(file.metadata()["plan"])
        return {key: file.get_tensor(key) for key in file.keys()}, plan  # noqa: SIM118


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Per-parameter state (momenta, step counts) as ``"index/key"`` tensors."""
    return {
        f"{index}/{key}": torch.as_tensor(value)
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, stored: Mapping[str, Tensor]) -> None:
    """Put back what ``optimizer_state`` gave; groups and learning rates stay as they are."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in stored.items():
        index, _, name = key.partition("/")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
