"""The ``tenfold-server`` command: everything on one machine, or one role of it."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from db.settings import Settings
from launch.options import add_arguments, positive
from search.errors import TenfoldError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 failed, 2 misuse, 130 interrupted."""
    options = _parser().parse_args(argv)
    try:
        return int(options.go(options))
    except TenfoldError as error:
        print(f"tenfold-server: {error.message} [{error.code}]", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tenfold-server",
        description="Searches for the smallest network that keeps your accuracy budget. Settings that have no option "
        "here are environment variables with the prefix TENFOLD_ (docs/operations.md).",
    )
    roles = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_up, _add_run, _add_api, _add_worker, _add_migrate, _add_key):
        add(roles)
    return parser


if TYPE_CHECKING:
    Roles = argparse._SubParsersAction[argparse.ArgumentParser]


def _add_up(roles: "Roles") -> None:
    role = roles.add_parser("up", help="the whole service on this machine")
    _add_data(role)
    role.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    role.add_argument("--port", type=int, help="port to listen on (default 8000; 0 takes a free one)")
    role.add_argument("--workers", type=positive, default=None, help="workers (default: one for two cores, at most 4)")
    role.add_argument("--verbose", action="store_true", help="logs to the terminal instead of DATA/logs")
    role.set_defaults(go=_up)


def _add_run(roles: "Roles") -> None:
    role = roles.add_parser("run", help="one job: start, submit, watch, download, stop")
    add_arguments(role)
    role.set_defaults(go=_run)


def _add_api(roles: "Roles") -> None:
    role = roles.add_parser("api", help="the API and the dashboard alone")
    _add_data(role)
    role.add_argument("--host")
    role.add_argument("--port", type=int)
    role.add_argument("--lifeline", action="store_true", help=argparse.SUPPRESS)
    role.add_argument("--descriptor", type=int, help=argparse.SUPPRESS)
    role.set_defaults(go=_api)


def _add_worker(roles: "Roles") -> None:
    role = roles.add_parser("worker", help="one worker")
    _add_data(role)
    role.add_argument("--check", action="store_true", help="only say whether a worker of this host is alive")
    role.add_argument("--queue", help="device class to work for (default TENFOLD_QUEUE, cpu)")
    role.add_argument("--lifeline", action="store_true", help=argparse.SUPPRESS)
    role.set_defaults(go=_worker)


def _add_migrate(roles: "Roles") -> None:
    role = roles.add_parser("migrate", help="bring the database up to date")
    _add_data(role)
    role.set_defaults(go=_migrate)


def _add_key(roles: "Roles") -> None:
    role = roles.add_parser("key", help="make an API key and print it")
    _add_data(role)
    role.add_argument("--name", default="from the terminal")
    role.add_argument("--owner", default="admin", help="whose models and jobs it sees (default admin)")
    role.add_argument(
        "--scope",
        action="append",
        choices=("read", "submit", "admin"),
        help="admin, submit or read, each with the lesser ones; default admin",
    )
    role.set_defaults(go=_key)


def _add_data(role: argparse.ArgumentParser) -> None:
    role.add_argument("--data", type=Path, help="data folder (default TENFOLD_DATA_DIR, ~/.local/share/tenfold)")


def settings_of(data: Path | None, **changes: object) -> Settings:
    """The environment's settings, with what the command line says on top."""
    values = {k: v for k, v in changes.items() if v is not None}
    if data is not None:
        values["data_dir"] = data.absolute()
    elif "TENFOLD_DATA_DIR" not in os.environ:
        base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
        values["data_dir"] = Path(base) / "tenfold"
    return Settings(**values)  # type: ignore[arg-type]


def _up(options: argparse.Namespace) -> int:
    from launch.serve import serve

    settings = settings_of(options.data, host=options.host, port=options.port)
    return serve(settings, workers=options.workers, verbose=options.verbose)


def _run(options: argparse.Namespace) -> int:
    from launch.run import run

    return int(run(options))


def _api(options: argparse.Namespace) -> int:
    from launch.roles import api

    settings = settings_of(options.data, host=options.host, port=options.port)
    return api(settings, lifeline=options.lifeline, descriptor=options.descriptor)


def _worker(options: argparse.Namespace) -> int:
    from launch.roles import check_worker, worker

    settings = settings_of(options.data, queue=options.queue)
    return check_worker(settings) if options.check else worker(settings, lifeline=options.lifeline)


def _migrate(options: argparse.Namespace) -> int:
    from launch.roles import migrate

    return migrate(settings_of(options.data))


def _key(options: argparse.Namespace) -> int:
    from launch.roles import key

    scopes = options.scope or ["admin"]
    return key(settings_of(options.data), owner=options.owner, name=options.name, scopes=scopes)


if __name__ == "__main__":
    sys.exit(main())
