import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from workers.supervise import Child

TOY = Path(__file__).with_name("toy_compute.py")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Start toy compute processes; all are closed at the end."""
    children: list[Child] = []

    def starter(*options: str, **keywords: object) -> Child:
        scratch = tmp_path / f"scratch{len(children)}"
        scratch.mkdir()
        command = [sys.executable, str(TOY), "--scratch", str(scratch), "--jail", "off", *options]
        child = Child(command, scratch, **keywords)  # type: ignore[arg-type]
        children.append(child)
        child.ready()
        return child

    yield starter
    for child in children:
        child.close()
