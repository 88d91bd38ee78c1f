"""An uploaded file to a graph of modules, safely. Everything outside starts from ``load_model``."""

from search.intake.lifted import Answer, LiftedModel, first_output, last_output
from search.intake.loading import load_model

__all__ = ["Answer", "LiftedModel", "first_output", "last_output", "load_model"]
