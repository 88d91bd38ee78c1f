import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]


class Up:
    """``tenfold-server up`` as a user starts it."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.log = folder.parent / f"{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "launch.main", "up", "--data", str(folder), "--port", "0", "--workers", "1"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TENFOLD_")}
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, *options], stdout=out, stderr=out, cwd=ROOT, env=environment, start_new_session=True
            )

    def url(self) -> str:
        found = self.until(lambda: re.search(r"Tenfold is up: (\S+)", self.text()))
        return found[1]

    def text(self) -> str:
        return self.log.read_text()

    def until(self, condition: Callable[[], object], seconds: float = 60) -> re.Match[str]:
        end = time.monotonic() + seconds
        while not (found := condition()):
            if self.process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"waited in vain; exit {self.process.poll()}\n{self.text()}")
            time.sleep(0.05)
        return found  # type: ignore[return-value]

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def api(self) -> psutil.Process | None:
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                if "api" in process.cmdline():
                    return process
        return None

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def starter(*options: str, name: str = "data") -> Up:
        started.append(Up(tmp_path / name, *options))
        return started[-1]

    yield starter
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
        one.process.wait()
