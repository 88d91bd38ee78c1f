import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from workers.supervise import Child, Crashed, Failed, Stopped


def test_a_call_returns_what_the_child_returns_and_the_child_stays_warm(start):
    child = start()
    assert child.call("echo", {"a": [1, 2]}) == {"a": [1, 2]}
    assert child.call("steps", {"n": 0})["pid"] == child.pid


def test_an_answer_may_come_before_the_thread_that_asked_has_ended(start, monkeypatch):
    write = Child._write

    def slow(self: Child, request: str) -> None:
        write(self, request)
        time.sleep(0.3)  # as on a machine that is busy

    monkeypatch.setattr(Child, "_write", slow)
    child = start()
    assert [child.call("echo", {"a": i}) for i in range(3)] == [{"a": i} for i in range(3)]
    assert child.alive


def test_progress_arrives_in_order(start):
    seen = []
    start().call("steps", {"n": 3}, on={"progress": seen.append})
    assert [p["message"] for p in seen] == ["step 0", "step 1", "step 2"]
    assert seen[1] == {"message": "step 1", "done": 1, "of": 3}


def test_an_error_of_the_science_keeps_its_code_and_the_child_lives_on(start):
    child = start()
    with pytest.raises(Failed, match="this toy refuses everything") as failure:
        child.call("refuse", {})
    assert failure.value.code == "toy_refused"
    assert child.call("echo", {"still": "here"}) == {"still": "here"}


def test_running_out_of_memory_becomes_advice(start):
    with pytest.raises(Failed, match="lower batch_size") as failure:
        start().call("out_of_memory", {})
    assert failure.value.code == "out_of_memory"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_becomes_advice(start, number):
    child = start()
    with pytest.raises(Failed, match="free space") as failure:
        child.call("no_room", {"errno": number})
    assert failure.value.code == "disk_full"


def test_an_unforeseen_error_costs_the_process_and_hides_its_details_from_users(start, capfd):
    child = start()
    with pytest.raises(Crashed, match="RuntimeError") as failure:
        child.call("fail", {})
    assert "nobody foresaw" not in str(failure.value)
    assert not child.alive
    assert "nobody foresaw this" in capfd.readouterr().err


def test_a_dead_child_is_a_crash_that_says_how(start):
    with pytest.raises(Crashed, match="exit status 7"):
        start().call("die", {})
    child = start()
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(Crashed, match="SIGKILL"):
        child.call("echo", {})


def test_stop_ends_a_child_that_is_computing(start):
    child = start()
    begun = time.monotonic()
    with pytest.raises(Stopped):
        child.call("spin", {}, stop=lambda: time.monotonic() > begun + 0.3)
    assert time.monotonic() < begun + 5
    assert not child.alive


def test_the_time_limit_stops_and_says_so(start):
    with pytest.raises(Failed, match="longer than") as failure:
        start().call("spin", {}, timeout_s=0.3)
    assert failure.value.code == "time_limit"


def test_the_memory_limit_stops_and_says_what_to_do(start):
    child = start(memory_bytes=200 * 2**20)
    with pytest.raises(Failed, match="TENFOLD_MEMORY_LIMIT") as failure:
        child.call("grow", {"mebibytes": 400})
    assert failure.value.code == "out_of_memory"
    assert not child.alive


def test_prints_of_libraries_do_not_spoil_the_messages_and_nan_becomes_null(start):
    assert start().call("chatter", {}) == {"said": True, "missing": None}


def test_an_answer_that_is_no_message_is_a_crash(start):
    with pytest.raises(Crashed, match="not a message"):
        start().call("garble", {})


def test_checkpoints_are_named_inside_the_scratch_folder(start):
    names: list[str] = []
    child = start()
    child.call("save", {}, on={"checkpoint": names.append})
    assert names == ["out/point.bin"]
    assert (child.scratch / names[0]).read_bytes() == b"half way"


def test_the_child_learns_no_secret_of_the_workers_environment(start, monkeypatch):
    monkeypatch.setenv("TENFOLD_DATABASE_URL", "postgresql://user:secret@host/db")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    found = start().call("variables", {})
    assert "secret" not in repr(found)
    assert found["HOME"].endswith("scratch0")


def test_the_child_ends_while_computing_when_its_parent_is_killed(tmp_path: Path):
    toy = Path(__file__).with_name("toy_compute.py")
    script = f"""
import sys, threading, time
from pathlib import Path
from workers.supervise import Child
scratch = Path({str(tmp_path)!r}) / "s"; scratch.mkdir()
child = Child([sys.executable, {str(toy)!r}, "--scratch", str(scratch), "--jail", "off"], scratch)
child.ready()
threading.Thread(target=lambda: child.call("spin", {{}}), daemon=True).start()
time.sleep(0.3)
print(child.pid, flush=True)
time.sleep(60)
"""
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(root)}
    )
    with parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    gone, alive = psutil.wait_procs([child], timeout=5)
    assert not alive, "the compute process outlived its worker"
    assert gone


def test_a_command_that_cannot_start_is_a_crash(tmp_path: Path):
    child = Child([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)
    with pytest.raises(Crashed, match="exit status 3"):
        child.ready()


def scripted(tmp_path: Path, script: str) -> Child:
    """A child that keeps to no protocol but says that it is ready."""
    child = Child([sys.executable, "-c", f"print('{{\"ready\": {{}}}}', flush=True)\n{script}"], tmp_path)
    child.ready()
    return child


def test_a_child_that_does_not_listen_is_stopped_all_the_same(tmp_path: Path):
    child = scripted(tmp_path, "import time; time.sleep(60)")
    end = time.monotonic() + 1
    with pytest.raises(Stopped):
        child.call("echo", {"more than a pipe holds": "x" * 2**20}, stop=lambda: time.monotonic() > end)
    assert not child.alive
    assert time.monotonic() < end + 10


def test_a_child_that_floods_its_worker_waits_at_its_own_pipe(tmp_path: Path):
    script = "import pathlib\nfor i in range(10**6): print('x' * 2**16); pathlib.Path('lines').write_text(str(i))"
    child = scripted(tmp_path, script)
    time.sleep(1)
    written = int((tmp_path / "lines").read_text())
    time.sleep(0.5)
    assert int((tmp_path / "lines").read_text()) == written < 100
    child.close()
    assert not child.alive


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_number_that_no_answer_of_the_api_could_hold_is_no_message(tmp_path: Path, number: str):
    child = scripted(tmp_path, f'print(\'{{"progress": {{"done": {number}}}}}\', flush=True); input(); input()')
    with pytest.raises(Crashed, match="not a message"):
        child.call("echo", {}, on={"progress": lambda value: pytest.fail(str(value))})
    assert not child.alive
