"""Waking workers. Imports no torch: the API wakes them too.

A message says "look into the database" and nothing else. One that gets lost costs a few seconds: every worker's
sweeper wakes again for rows that still wait.
"""

import logging
import os
import threading
from functools import lru_cache

from celery import Celery
from kombu.exceptions import KombuError, OperationalError

__all__ = ["TASK", "broker_url", "make_app", "wake"]

log = logging.getLogger(__name__)

TASK = "tenfold.wake"
EXPIRES_S = 60
"""A wake that waited longer is worth nothing: the sweeper has sent others."""
_guard = threading.Lock()


def wake(queue: str, url: str | None = None, *, times: int = 1) -> bool:
    """Wake up to ``times`` workers of ``queue`` (a device class). Never raises when the broker is away.

    ``url``: the broker; ``TENFOLD_REDIS_URL`` when left out. Returns whether the messages went out.
    """
    try:
        app = make_app(broker_url(url or os.environ["TENFOLD_REDIS_URL"]))
        with _guard:
            for _ in range(times):
                app.send_task(TASK, queue=queue, expires=EXPIRES_S, retry=False, ignore_result=True)
    except KeyError:
        log.warning("no worker was woken: TENFOLD_REDIS_URL is not set")
        return False
    except (OSError, KombuError, OperationalError) as error:
        log.warning("no worker was woken (the sweeper will): the broker is away: %s", error)
        return False
    return True


def broker_url(url: str) -> str:
    """The name that Celery has for it: a ``unix://`` socket is ``redis+socket://`` there."""
    return "redis+socket://" + url.removeprefix("unix://") if url.startswith("unix://") else url


@lru_cache(maxsize=4)
def make_app(url: str) -> Celery:
    """The Celery application on the broker at ``url``, as clients and workers both need it.

    Messages are acknowledged as they arrive and nothing is prefetched: Celery on Redis hands a long task out again
    while it still runs, so leases in the database decide who works, not the broker.
    """
    app = Celery("tenfold", broker=url, set_as_current=False)
    app.conf.update(
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        task_acks_late=False,
        task_create_missing_queues=True,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_soft_shutdown_timeout=1.0,
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=3,
        broker_transport_options={
            "socket_connect_timeout": 3,
            "socket_timeout": 10,
            "socket_keepalive": True,
            "health_check_interval": 10,
            "max_retries": 1,
            "interval_start": 0,
        },
        control_queue_expires=60,
    )
    return app
