import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from search.intake import LiftedModel, load_model
from tenfold.exporting import export


def _zoo() -> ModuleType:
    """Tests are imported by path (importlib mode), so the module beside this file is too."""
    spec = importlib.util.spec_from_file_location("intake_zoo", Path(__file__).with_name("zoo.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["intake_zoo"] = module
    spec.loader.exec_module(module)
    return module


_zoo()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., LiftedModel]:
    """Export a module as a user does and take the file in as the server does."""

    def through_a_file(model: nn.Module, example: tuple[torch.Tensor, ...]) -> LiftedModel:
        return load_model(export(model, example, tmp_path / "model.pt2"), scratch=tmp_path)

    return through_a_file
