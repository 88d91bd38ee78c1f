"""An uploaded file to a graph of modules, safely. Everything outside starts from ``load_model``."""

from search.intake.lifted import LiftedModel, first_output
from search.intake.loading import load_model

__all__ = ["LiftedModel", "first_output", "load_model"]
