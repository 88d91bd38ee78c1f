import subprocess
import sys
from pathlib import Path

from workers.queue import broker_url, make_app, wake

ROOT = Path(__file__).parents[2]


def test_waking_never_raises_when_the_broker_is_away(tmp_path, caplog):
    assert wake("cpu", f"redis+socket://{tmp_path}/none.sock") is False
    assert "the sweeper will" in caplog.text


def test_waking_without_a_broker_is_only_a_warning(monkeypatch, caplog):
    monkeypatch.delenv("TENFOLD_REDIS_URL", raising=False)
    assert wake("cpu") is False
    assert "TENFOLD_REDIS_URL" in caplog.text


def test_a_unix_url_is_spelled_as_celery_does():
    assert broker_url("unix:///run/valkey.sock") == "redis+socket:///run/valkey.sock"
    assert broker_url("redis://host:6379/0") == "redis://host:6379/0"


def test_messages_are_acknowledged_early_one_at_a_time_and_json_only():
    conf = make_app("redis://nowhere").conf
    assert conf.task_acks_late is False
    assert conf.worker_prefetch_multiplier == 1
    assert conf.worker_disable_prefetch is True
    assert conf.accept_content == ["json"]
    assert conf.task_ignore_result is True


def test_the_worker_process_and_its_queue_import_no_torch():
    script = """
import sys
import workers.app, workers.kinds, search.stages
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
