"""Servers as Docker containers, started through testcontainers; the engine keeps them after the launcher's end."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import docker
from docker.errors import DockerException, NotFound
from docker.models.containers import Container
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer

from tests.brokers.broker import Broker, BrokerError, NotReadyError
from tests.brokers.ports import free_ports
from tests.brokers.server import READY_WITHIN, STATE

STOP_WITHIN = 30


@cache
def engine_answers() -> bool:
    """Say whether a Docker engine can be used on this machine; UNISTREAM_BROKERS_DOCKER=never denies it."""
    if os.environ.get("UNISTREAM_BROKERS_DOCKER") == "never":
        return False
    if not os.environ.get("DOCKER_HOST") and not Path("/var/run/docker.sock").exists():
        return False
    try:
        client = docker.from_env(timeout=5)
        try:
            return bool(client.ping())
        finally:
            client.close()
    except DockerException:
        return False


def is_container(directory: Path) -> bool:
    """Say whether the server in this folder is a container."""
    return "container" in _load(directory)


def _load(directory: Path) -> Mapping[str, Any]:
    file = directory / STATE
    return json.loads(file.read_text()) if file.exists() else {}


class ContainerServer:
    """A server as a container, its client port published on 127.0.0.1; its data are in the container."""

    def __init__(self, broker: Broker, directory: Path) -> None:
        self.broker = broker
        self.directory = directory
        known = _load(directory)
        self.ports: dict[str, int] = known.get("ports") or free_ports(broker.ports)
        self._id: str | None = known.get("container")

    @property
    def url(self) -> str:
        """The URL for unistream."""
        return self.broker.url(self.ports[self.broker.ports[0]])

    @property
    def pid(self) -> int:
        """The id of the container's first process, as the engine's machine numbers it."""
        return int(self._container().attrs["State"]["Pid"])

    @property
    def state(self) -> str:
        """`running`, `paused` or `dead`."""
        if self._id is None:
            return "dead"
        try:
            status = self._container().status
        except NotFound:
            return "dead"
        return status if status in ("running", "paused") else "dead"

    def start(self) -> None:
        """Start what isn't running and wait until a round trip succeeds."""
        if self._id is None:
            self._create()
        elif self.state == "dead":
            self._container().start()
        deadline = time.monotonic() + READY_WITHIN
        while True:
            try:
                return self.probe()
            except NotReadyError as error:
                if self.state == "dead" or time.monotonic() > deadline:
                    log = self._container().logs(tail=15).decode(errors="replace")
                    raise BrokerError(f"{self.broker.name} did not become ready ({error}):\n{log}") from error
                time.sleep(0.1)  # the engine has no event for "ready"

    def stop(self) -> None:
        """End it in good order, by force when that takes too long; nothing happens when it is dead."""
        self.resume()
        if self.state != "dead":
            self._container().stop(timeout=STOP_WITHIN)

    def destroy(self) -> None:
        """Remove the container with its data."""
        if self._id is not None:
            self._container().remove(force=True, v=True)

    def kill9(self) -> None:
        """End the server by SIGKILL, as a crash would, and wait until it is gone."""
        container = self._container()
        container.kill("SIGKILL")
        container.wait(timeout=STOP_WITHIN)

    def restart(self) -> None:
        """Stop it if it runs, start it again, wait until ready."""
        self.stop()
        self.start()

    def probe(self) -> None:
        """Make one round trip; NotReadyError says what went wrong."""
        self.broker.probe(self.ports[self.broker.ports[0]])

    def pause(self) -> None:
        """Freeze it: connections stay open, nothing answers."""
        self._container().pause()

    def resume(self) -> None:
        """Let a frozen server go on."""
        if self.state == "paused":
            self._container().unpause()

    def _create(self) -> None:
        testcontainers_config.ryuk_disabled = True  # the reaper would end the server together with `up`
        image = self.broker.image(self.ports)
        port = self.ports[self.broker.ports[0]]
        container = DockerContainer(image.name, command=shlex.join(image.command) or None)
        # Docker takes a pair here, which keeps the port off other interfaces; testcontainers types only a number.
        container.ports = {f"{self.broker.default_port}/tcp": ("127.0.0.1", port)}  # type: ignore[dict-item]
        for name, value in image.env.items():
            container.with_env(name, value)
        try:
            container.start()
        except DockerException as error:
            raise BrokerError(f"{self.broker.name}: the image {image.name} can't be started: {error}") from error
        self._id = str(container.get_wrapped_container().id)
        self.directory.mkdir(parents=True, exist_ok=True)
        state = {"broker": self.broker.name, "ports": self.ports, "container": self._id}
        (self.directory / STATE).write_text(json.dumps(state))

    def _container(self) -> Container:
        if self._id is None:
            raise BrokerError(f"{self.broker.name} was never started")
        return docker.from_env().containers.get(self._id)
