"""Runs a command with brokers around it, and stops exactly what it started."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from tests.brokers.fleet import Fleet, given_url, home
from tests.brokers.install import one_at_a_time
from tests.brokers.processes import Process
from tests.brokers.table import broker


def run(names: Sequence[str], command: Sequence[str]) -> int:
    """
    Run `command` with the URLs of the named brokers in its environment.

    Servers given by URL or brought up earlier are used and left alone. The others are this run's own, in a folder
    of their own, so that two runs side by side don't touch each other. In the command, `python -m tests.brokers
    restart|kill9|pause|resume NAME` reaches both kinds.

    Returns:
        The command's exit code; 128 + N when signal N ended it.
    """
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGHUP, _leave)
    lasting = Fleet(home())
    sweep(lasting.directory)
    me = Process.of(os.getpid())
    own = Fleet(lasting.directory / "runs" / f"{me.pid}-{me.birth}")
    own.directory.mkdir(parents=True)
    try:
        missing = [name for name in names if not given_url(broker(name), os.environ)]
        for name, server in lasting.known().items():
            if name in missing and server.state != "dead":
                (own.directory / name).symlink_to(server.directory.resolve(), target_is_directory=True)
        own.up(missing)
        urls = {server.broker.variable: server.url for server in own.known().values()}
        return _execute(command, {**os.environ, **urls, "UNISTREAM_BROKERS_DIR": str(own.directory)})
    finally:
        _remove(own)


def sweep(directory: Path) -> None:
    """Stop what runs left behind that were killed themselves."""
    directory.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(directory):
        for folder in directory.glob("runs/*-*"):
            pid, birth = folder.name.split("-")
            if Process(int(pid), int(birth)).state == "dead":
                _remove(Fleet(folder))


def _remove(fleet: Fleet) -> None:
    fleet.down(fleet.known())
    shutil.rmtree(fleet.directory)


def _execute(command: Sequence[str], environment: Mapping[str, str]) -> int:
    child = subprocess.Popen(command, env=dict(environment))

    def forward(number: int, frame: FrameType | None) -> None:
        # Ctrl-C at a terminal reaches the command without us: both are in the foreground process group.
        if number != signal.SIGINT or not sys.stdin.isatty():
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)
    code = child.wait()
    return 128 - code if code < 0 else code


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
