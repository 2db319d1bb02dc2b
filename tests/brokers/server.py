"""One server in one directory, started as local processes: its life, its death and its ports."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any, Protocol

from tests.brokers.broker import Broker, BrokerError, NotReadyError
from tests.brokers.ports import free_ports
from tests.brokers.processes import Process, spawn

READY_WITHIN = 120.0  # seconds; Kafka and RabbitMQ on two busy cores take ten to thirty
STOP_WITHIN = 30.0
STATE = "server.json"


class Server(Protocol):
    """
    A running broker, however it was started. Calls block; from asyncio use `asyncio.to_thread`.

    Port and data stay the same through `kill9` and `restart`.
    """

    broker: Broker
    directory: Path

    @property
    def url(self) -> str:
        """The URL for unistream."""

    @property
    def pid(self) -> int:
        """The id of the server's main process."""

    @property
    def state(self) -> str:
        """`running`, `paused` or `dead`."""

    def start(self) -> None:
        """Start what isn't running and wait until a round trip succeeds."""

    def stop(self) -> None:
        """End it in good order, by force when that takes too long; nothing happens when it is dead."""

    def destroy(self) -> None:
        """Stop it for good, with whatever holds its data outside of `directory`."""

    def kill9(self) -> None:
        """End the server by SIGKILL, as a crash would, and wait until it is gone."""

    def restart(self) -> None:
        """Stop it if it runs, start it again, wait until ready."""

    def probe(self) -> None:
        """Make one round trip; NotReadyError says what went wrong."""

    def pause(self) -> None:
        """Freeze it: connections stay open, nothing answers."""

    def resume(self) -> None:
        """Let a frozen server go on."""


class LocalServer:
    """A server as processes of this machine; its state is a file, so that a later command finds it again."""

    def __init__(self, broker: Broker, directory: Path) -> None:
        self.broker = broker
        self.directory = directory
        known: dict[str, Any] = {}
        if (directory / STATE).exists():
            known = json.loads((directory / STATE).read_text())
        self.ports: dict[str, int] = known.get("ports") or free_ports(broker.ports)
        self._processes = {name: Process(*pair) for name, pair in known.get("processes", {}).items()}

    @property
    def url(self) -> str:
        """The URL for unistream."""
        return self.broker.url(self.ports[self.broker.ports[0]])

    @property
    def pid(self) -> int:
        """The id of the server's main process."""
        return self._main().pid

    @property
    def state(self) -> str:
        """`running`, `paused` or `dead`."""
        return self._main().state if self._processes else "dead"

    def start(self) -> None:
        """Install it if need be, start what isn't running and wait until a round trip succeeds."""
        self.broker.install()
        self.directory.mkdir(parents=True, exist_ok=True)
        for command in self.broker.commands(self.directory, self.ports):
            old = self._processes.pop(command.name, None)
            if old is None or old.state == "dead":
                old = spawn(command.argv, command.env, self.directory / f"{command.name}.log")
            self._processes[command.name] = old
            self._save()
        self._await_ready()

    def stop(self) -> None:
        """End it in good order, by force when that takes too long; nothing happens when it is dead."""
        self.resume()
        for process in reversed(list(self._processes.values())):
            process.signal(signal.SIGTERM)
            if not process.wait(STOP_WITHIN):
                process.signal(signal.SIGKILL)
                process.wait(STOP_WITHIN)

    def destroy(self) -> None:
        """Stop it for good; its data are in `directory`."""
        self.stop()

    def kill9(self) -> None:
        """End the server by SIGKILL, as a crash would, and wait until it is gone."""
        self._signal(signal.SIGKILL)
        if not self._main().wait(STOP_WITHIN):
            raise BrokerError(f"{self.broker.name}: process {self.pid} survived SIGKILL for {STOP_WITHIN:g} s")

    def restart(self) -> None:
        """Stop it if it runs, start it again, wait until ready."""
        self.stop()
        self.start()

    def probe(self) -> None:
        """Make one round trip; NotReadyError says what went wrong."""
        self.broker.probe(self.ports[self.broker.ports[0]])

    def pause(self) -> None:
        """Freeze it: connections stay open, nothing answers. On return every thread of it stands still."""
        self._signal(signal.SIGSTOP)
        while self.state == "running":  # a thread in a system call stops only at its end; no event tells
            time.sleep(0.001)

    def resume(self) -> None:
        """Let a frozen server go on; nothing happens when it isn't frozen."""
        if self._processes:
            self._main().signal(signal.SIGCONT)

    def _main(self) -> Process:
        if not self._processes:
            raise BrokerError(f"{self.broker.name} was never started")
        return list(self._processes.values())[-1]

    def _signal(self, number: signal.Signals) -> None:
        if not self._main().signal(number):
            raise BrokerError(f"{self.broker.name} is not running, so it can't be sent {number.name}")

    def _save(self) -> None:
        processes = {name: [process.pid, process.birth] for name, process in self._processes.items()}
        state = {"broker": self.broker.name, "ports": self.ports, "processes": processes}
        (self.directory / STATE).write_text(json.dumps(state))

    def _await_ready(self) -> None:
        deadline = time.monotonic() + READY_WITHIN
        while True:
            try:
                return self.probe()
            except NotReadyError as error:
                if self._main().wait(0.1):
                    raise BrokerError(f"{self.broker.name} ended while starting:\n{self._tail()}") from error
                if time.monotonic() > deadline:
                    self.stop()
                    raise BrokerError(
                        f"{self.broker.name} gave no answer within {READY_WITHIN:g} s ({error}):\n{self._tail()}"
                    ) from error

    def _tail(self) -> str:
        name = list(self._processes)[-1]
        log = self.directory / f"{name}.log"
        return f"{log}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:])
