"""`python -m unistream.conformance`: the suite's commands where the extra `cli` is not installed; see `command`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from unistream.conformance.command import WRONG_CALL, Order, conform, kill, replay, seeds_of, sim
from unistream.conformance.hooks import HOOKS
from unistream.conformance.plan import SHAPES, Shape
from unistream.conformance.registry import PROFILES
from unistream.conformance.rounds import JOBS
from unistream.errors import UnistreamError


def _hook(text: str) -> tuple[str, str]:
    name, _, command = text.partition("=")
    if name not in HOOKS or not command:
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=COMMAND, NAME one of {', '.join(HOOKS)}")
    return name, command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m unistream.conformance", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="judge a backend")
    run.add_argument("--profile", choices=list(PROFILES), default="core")
    run.add_argument("--only", action="append", default=[], help="id or group of cases; may repeat")
    run.add_argument("--jobs", type=int, default=JOBS, help="cases at once on a real broker")
    run.add_argument("--json", type=Path, help="file for the JSON report, or - to print it")
    run.add_argument("--histories", type=Path, help="folder for the histories of failed cases")
    random = commands.add_parser("sim", help="run random workloads")
    random.add_argument("--seeds", type=seeds_of, default=range(20), help="N or FIRST:LAST")
    random.add_argument("--shape", action="append", choices=get_args(Shape), default=[])
    random.add_argument("--messages", type=int, default=60)
    random.add_argument("--keep", type=Path, help="folder for plans and histories of runs that break a rule")
    again = commands.add_parser("replay", help="carry out a plan that was kept")
    again.add_argument("plan", type=Path)
    matrix = commands.add_parser("kill", help="prove that the suite notices broken promises")
    matrix.add_argument("--saboteur", action="append", default=[])
    matrix.add_argument(
        "--on",
        action="append",
        default=[],
        metavar="URL",
        help="a real broker, for the cases that need a socket or a process",
    )
    matrix.add_argument("--profile", choices=list(PROFILES), default="long")
    for command in (run, matrix):
        command.add_argument(
            "--hook", action="append", type=_hook, default=[], help=f"NAME=COMMAND: {', '.join(HOOKS)}"
        )
    for command in (run, random, again, matrix):
        command.add_argument("--url", default="memory://conformance")
        command.add_argument("--seed", type=int, default=1)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = _parser().parse_args(arguments)
    try:
        if given.command == "run":
            order = Order(
                profile=given.profile,
                only=given.only,
                seed=given.seed,
                jobs=given.jobs,
                json=given.json,
                histories=given.histories,
                hooks=dict(given.hook),
            )
            return conform(given.url, order)
        if given.command == "sim":
            shapes = cast(list[Shape], given.shape) or SHAPES
            return sim(given.url, seeds=given.seeds, shapes=shapes, messages=given.messages, keep=given.keep)
        if given.command == "replay":
            return replay(given.url, given.plan)
        return kill(
            given.url,
            on=given.on,
            hooks=dict(given.hook),
            names=given.saboteur,
            profile=given.profile,
            seed=given.seed,
        )
    except (ValueError, UnistreamError) as error:
        print(f"conformance: {error}", file=sys.stderr)
        return WRONG_CALL


if __name__ == "__main__":
    sys.exit(main())
