"""What ``tenfold`` and ``tenfold-server run`` make of their options. Each turns ``ValueError`` into its usage error."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["in_range", "job_fields", "json_object", "read_spec"]

BOUNDS = ("max_drop", "min_value")
ELSEWHERE = ("model", "dataset", "data", "data_spec", "architecture", "metric", *BOUNDS)
"""Arguments of ``Client.submit``, or what they become: no fields of a job's spec."""


def in_range(value: float, *, above: float = -math.inf, least: float = -math.inf) -> float:
    """``value``, when it is finite, ``> above`` and ``>= least``; ValueError else."""
    if math.isfinite(value) and value > above and value >= least:
        return value
    bound = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
    raise ValueError(f"got {value:g}: give a finite number{bound}")


def json_object(text: str) -> dict[str, Any]:
    """Raises ValueError for whatever else it is, NaN and infinities in it included."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"got {text.strip()[:80]!r}: give a JSON object, {{…}}")
    json.dumps(value, allow_nan=False)
    return value


def read_spec(path: Path) -> dict[str, Any]:
    """A file's JSON with fields of a job's spec, which the service checks. Raises ValueError, and OSError."""
    try:
        given = json_object(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    if misplaced := [name for name in ELSEWHERE if name in given]:
        raise ValueError(
            f"{path} has {', '.join(misplaced)}: a metric and its bound stand in budget; what is said of the two files "
            "stands on the command line"
        )
    return given


def job_fields(given: Mapping[str, Any], **named: Any) -> dict[str, Any]:
    """``named`` options on top of the ``given`` fields of a spec, objects field by field; None was not named.

    A named bound of the budget replaces whichever was given. Raises ValueError unless there is one in the end.
    """
    fields = dict(given)
    for field, value in named.items():
        if isinstance(value, dict):
            said = {name: x for name, x in value.items() if x is not None}
            below = given.get(field)
            kept = below if isinstance(below, dict) else {}
            if any(bound in said for bound in BOUNDS):
                kept = {name: x for name, x in kept.items() if name not in BOUNDS}
            if said:
                fields[field] = {**kept, **said}
        elif value:
            fields[field] = value
    budget = fields.get("budget")
    if not isinstance(budget, dict) or sum(budget.get(bound) is not None for bound in BOUNDS) != 1:
        raise ValueError("give exactly one of --max-drop and --min-value, or of the two in the budget of --spec")
    return fields
