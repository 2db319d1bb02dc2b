"""The command line: python -m tests.brokers COMMAND."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterable, Sequence

from tests.brokers.broker import Broker, BrokerError
from tests.brokers.fleet import Fleet, given_url, home
from tests.brokers.run import run, sweep
from tests.brokers.server import Server
from tests.brokers.table import BROKERS, broker

FAILED = 125  # the launcher's own failure, as opposed to the command's


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    root = argparse.ArgumentParser(
        prog="python -m tests.brokers",
        description="Real brokers for the tests: found by URL in the environment, else Docker, else local servers.",
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    some = f"of {', '.join(BROKERS)} (default: all)"
    up = add("up", "start brokers and print the export lines of their URLs")
    up.add_argument("names", nargs="*", metavar="NAME", help=some)
    down = add("down", "stop brokers that were brought up and remove their data")
    down.add_argument("names", nargs="*", metavar="NAME", help=some)
    add("status", "show the brokers that were brought up")
    add("env", "print the export lines of the brokers that are up")
    for name, text in {
        "restart": "stop a broker and start it again, on the same port with the same data",
        "kill9": "end a broker by SIGKILL; `restart` brings it back",
        "pause": "freeze a broker (SIGSTOP)",
        "resume": "let a frozen broker go on (SIGCONT)",
    }.items():
        add(name, text).add_argument("name", metavar="NAME")
    runs = add("run", "run a command with brokers around it; exits with its exit code")
    runs.add_argument("--only", metavar="NAME,…", help=some)
    runs.add_argument("words", nargs="+", metavar="-- COMMAND…", help="the command and its arguments")
    return root


def main(arguments: Sequence[str]) -> int:
    """Carry out one command and return the exit code."""
    options = parser().parse_args(arguments)
    fleet = Fleet(home())
    match options.command:
        case "up":
            chosen = _chosen(options.names)
            given = {row.variable: url for row in chosen if (url := given_url(row, os.environ))}
            _print_exports(given.items())
            own = [row.name for row in chosen if row.variable not in given]
            fleet.up(own)
            _print_exports((fleet.server(name).broker.variable, fleet.server(name).url) for name in own)
        case "down":
            sweep(fleet.directory)
            for name in fleet.down([row.name for row in _chosen(options.names)]):
                print(f"{name} is down", file=sys.stderr)
        case "status":
            for name, server in fleet.known().items():
                print(f"{name:16} {server.state:8} {server.url:48} pid {server.pid}  {server.directory}")
        case "env":
            alive = [server for server in fleet.known().values() if server.state != "dead"]
            _print_exports((server.broker.variable, server.url) for server in alive)
        case "run":
            names = options.only.split(",") if options.only else []
            return run([row.name for row in _chosen(names)], options.words)
        case action:
            getattr(_known(fleet, options.name), action)()
    return 0


def _chosen(names: Sequence[str]) -> list[Broker]:
    return [broker(name) for name in names] if names else list(BROKERS.values())


def _known(fleet: Fleet, name: str) -> Server:
    servers = fleet.known()
    if broker(name).name not in servers:
        raise BrokerError(f"{name} was not brought up here; `python -m tests.brokers up {name}` does")
    return servers[name]


def _print_exports(urls: Iterable[tuple[str, str]]) -> None:
    for variable, url in urls:
        print(f"export {variable}={shlex.quote(url)}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokerError as error:
        print(error, file=sys.stderr)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        sys.exit(130)
