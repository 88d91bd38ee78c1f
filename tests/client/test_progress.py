"""Progress where there is no terminal: a log says what changes, not that time passes."""

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from search.spec import Rung
from tenfold import Client
from tenfold.progress import PAUSE, Lines
from tests.client.seed import Workers


class Log:
    """What ``Lines`` writes of one job, on a clock that only the test moves."""

    def __init__(self, client: Client, id: str) -> None:
        self.now = 0.0
        self.written = io.StringIO()
        self.job = client.job(id)
        self.lines = Lines(Console(file=self.written, width=200), clock=lambda: self.now)

    def told(self, step: Callable[[], object]) -> list[str]:
        """The new lines after ``step``, however often one looks."""
        step()
        before = len(self.written.getvalue())
        for _ in range(3):
            self.job.reload()
            self.lines(self.job)
        return self.written.getvalue()[before:].splitlines()


@pytest.fixture
def log(client: Client, workers: Workers) -> Log:
    return Log(client, workers.job("piped to a file"))


def test_a_log_has_a_line_for_each_stage_and_each_better_candidate(log: Log, workers: Workers) -> None:
    id = log.job.id
    assert [line.split()[0] for line in log.told(lambda: None)] == ["queued"]
    assert log.told(lambda: workers.profile(id))[0].startswith("profiling")
    best: list[object] = [None]
    for number in range(30):
        begun = log.told(lambda number=number: workers.trial(id, number))  # type: ignore[misc]
        assert [line.split()[0] for line in begun] == ["searching"] * (number == 0)
        improved = log.told(lambda number=number: workers.trial(id, number, Rung.SHORT))  # type: ignore[misc]
        best.append(log.job.data["best"] and log.job.data["best"]["trial"])
        assert ["best" in line for line in improved] == [True] * (best[-1] != best[-2])
    assert len(set(best)) > 2
    chosen = log.job.data["best"]["trial"]
    assert log.told(lambda: workers.trial(id, chosen, Rung.FULL))[0].startswith("refining")
    assert log.told(lambda: workers.export(id, chosen))[0].startswith("exporting")
    assert log.told(lambda: workers.finish(id, chosen))[0].startswith("done")


def test_a_long_step_has_a_line_a_minute(log: Log, workers: Workers) -> None:
    id = log.job.id
    log.told(lambda: workers.profile(id))
    log.told(lambda: workers.trial(id, 0))
    said = []
    for number in range(1, 31):  # ten seconds each, of a kind that is never within the budget
        log.now += PAUSE / 6
        said += log.told(lambda number=number: workers.trial(id, number))  # type: ignore[misc]
    assert log.job.data["best"] is None
    assert [line.split("trial ")[1].split()[0] for line in said] == ["7", "13", "19", "25", "31"]
    log.now += 10 * PAUSE
    assert log.told(lambda: None) == []
