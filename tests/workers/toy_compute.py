"""A real compute process with operations that show one behaviour each. Started by path, not imported."""

import os
import sys
import time

from search.errors import BadModel
from workers.serve import serve


def echo(arguments, context):
    return arguments


def steps(arguments, context):
    for i in range(arguments["n"]):
        context.report(f"step {i}", i, arguments["n"])
    return {"pid": os.getpid()}


def refuse(arguments, context):
    raise BadModel("toy_refused", "this toy refuses everything: send something else")


def fail(arguments, context):
    raise RuntimeError("nobody foresaw this")


def out_of_memory(arguments, context):
    raise MemoryError


def no_room(arguments, context):
    raise OSError(arguments["errno"], os.strerror(arguments["errno"]))


def die(arguments, context):
    os._exit(7)


def spin(arguments, context):
    end = time.monotonic() + arguments.get("seconds", 60)
    while time.monotonic() < end:
        pass
    return {}


def grow(arguments, context):
    kept = []
    for _ in range(arguments["mebibytes"]):
        kept.append(b"x" * 2**20)
        time.sleep(0.001)
    time.sleep(30)
    return len(kept)


def chatter(arguments, context):
    print("a library that prints")
    os.write(1, b"straight to the descriptor\n")
    return {"said": True, "missing": float("nan")}


def garble(arguments, context):
    context.channel._answers.write("[1, 2]\n")
    context.channel._answers.flush()
    time.sleep(30)


def save(arguments, context):
    path = context.folder("out") / "point.bin"
    path.write_bytes(b"half way")
    context.checkpoint(path)
    return {}


def variables(arguments, context):
    return dict(os.environ)


TOYS = (echo, steps, refuse, fail, out_of_memory, no_room, die, spin, grow, chatter, garble, save, variables)

if __name__ == "__main__":
    serve({f.__name__: f for f in TOYS}, prepare=lambda: None, argv=sys.argv[1:])
