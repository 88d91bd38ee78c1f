"""Runs a server that knows no better, and ends it with the process that started this one. Standard library only.

``python watchdog.py COMMAND…``: end of file on standard input (the starter stopped, or was killed) ends the command;
the command's own end ends this process. Were *this* process killed, the kernel ends the command (Linux).
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading

PR_SET_PDEATHSIG = 1
GRACE_S = 5


def main(command: list[str]) -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    server = _start(command)
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    threading.Thread(target=lambda: os._exit(abs(server.wait())), daemon=True).start()
    while os.read(0, 4096):
        pass
    server.terminate()
    try:
        server.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    """From the main thread, which lives as long as the process: the kernel's signal follows the spawning thread."""
    if sys.platform != "linux":
        return subprocess.Popen(command, stdin=subprocess.DEVNULL)
    prctl = ctypes.CDLL(None).prctl
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
