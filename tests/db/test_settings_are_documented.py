"""The operators' page names every setting, and none that nobody reads."""

import re
from pathlib import Path

from db.settings import Settings

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


def test_every_setting_has_a_row_and_every_row_a_setting() -> None:
    rows = re.findall(r"^\| `TENFOLD_(\w+)` \|", OPERATIONS.read_text(), flags=re.MULTILINE)
    assert sorted(rows) == sorted(name.upper() for name in Settings.model_fields)
