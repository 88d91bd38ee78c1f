"""The clean process: loads exported files as a stranger would, in the jail and with nothing of Tenfold importable.

Run as ``python -m workers.clean``; same protocol as the compute process, one operation.
"""

import contextlib
import importlib.abc
import io
import json
import runpy
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from workers.serve import Context, serve

__all__ = ["OURS", "reload"]

OURS = frozenset(("api", "db", "launch", "search", "tenfold", "workers"))
SCRIPT = Path(__file__).resolve().parent.parent / "search" / "reload.py"


class Blocked(importlib.abc.MetaPathFinder):
    """Makes every import of ours fail as if it were not installed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] in OURS:
            raise ModuleNotFoundError(
                f"{name} is not importable here: an exported file must load without it", name=name
            )
        return None


def block() -> None:
    sys.meta_path.insert(0, Blocked())
    for name in [n for n in sys.modules if n.partition(".")[0] in OURS and n != "__main__"]:
        del sys.modules[name]


def reload(arguments: Mapping[str, Any], context: Context) -> Any:
    """Run ``search/reload.py`` as a script of its own; what it prints last is the result, as JSON."""
    printed = io.StringIO()
    before = sys.argv
    sys.argv = [str(SCRIPT), *arguments["command"]]
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise RuntimeError(f"search/reload.py ended with {end.code!r}") from None
    finally:
        sys.argv = before
    return json.loads(printed.getvalue().strip().splitlines()[-1])


if __name__ == "__main__":
    serve({"reload": reload}, prepare=block)
