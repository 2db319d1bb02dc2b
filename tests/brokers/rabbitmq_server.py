"""RabbitMQ from Debian's packages, as a node of its own: own name, own epmd, own directory, loopback only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from tests.brokers.broker import Broker, BrokerError, Command, Image
from tests.brokers.install import SYSTEM_PATH, apt_install, system_program

SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")  # Debian's /usr/sbin one changes to another user first
# Milliseconds, instead of three minutes, before a message is moved again to a queue that had no leader after a start.
MOVING = "-rabbit dead_letter_worker_publisher_confirm_timeout 5000"


class RabbitMQ(Broker):
    """A RabbitMQ node; the second process is its epmd, Erlang's own name server."""

    ports: ClassVar[tuple[str, ...]] = ("client", "distribution", "epmd")
    default_port: ClassVar[int] = 5672

    def __init__(self, name: str) -> None:
        self.name = name

    def install(self) -> None:
        """Install Debian's rabbitmq-server."""
        apt_install("rabbitmq-server", program="rabbitmq-server", services=["rabbitmq-server"])
        if not SERVER.exists():
            raise BrokerError(f"{self.name}: there is a rabbitmq-server, but not Debian's ({SERVER} is missing)")

    def commands(self, directory: Path, ports: Mapping[str, int]) -> Sequence[Command]:
        """Write rabbitmq.conf and return two processes, epmd and the node."""
        config = directory / "rabbitmq.conf"
        config.write_text(
            f"listeners.tcp.1 = 127.0.0.1:{ports['client']}\n"
            "vm_memory_high_watermark.absolute = 1GB\n"
            "disk_free_limit.absolute = 50MB\n"
        )
        epmd = {"ERL_EPMD_PORT": str(ports["epmd"]), "ERL_EPMD_ADDRESS": "127.0.0.1"}
        env = {
            **epmd,
            "PATH": SYSTEM_PATH,
            "HOME": str(directory),  # where the Erlang cookie lies
            "RABBITMQ_NODENAME": f"unistream-{ports['client']}@localhost",
            "RABBITMQ_DIST_PORT": str(ports["distribution"]),
            "RABBITMQ_CONFIG_FILE": str(config),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(directory / "advanced.config"),
            "RABBITMQ_CONF_ENV_FILE": str(directory / "rabbitmq-env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(directory / "data"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(directory / "generated"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(directory / "node.pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"-noinput -kernel inet_dist_use_interface {{127,0,0,1}} {MOVING}",
            "RABBITMQ_SERVER_ERL_ARGS": "+P 1048576 +t 5000000 +stbt db +zdbbl 128000 +sbwt none +sbwtdcpu none",
            "RABBITMQ_ALLOW_INPUT": "1",  # the script becomes the Erlang machine instead of watching over it
            "ERL_CRASH_DUMP_BYTES": "0",
        }
        name_server = system_program("epmd")
        if name_server is None:
            raise BrokerError(f"{self.name}: Erlang's epmd is missing")
        return [Command("epmd", [name_server], epmd), Command("rabbitmq", [str(SERVER)], env)]

    def image(self, ports: Mapping[str, int]) -> Image:
        """Return the official image."""
        return Image("rabbitmq:4", env={"RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": MOVING})

    def url(self, port: int) -> str:
        """Return amqp://guest:guest@127.0.0.1:PORT/%2F."""
        return f"amqp://guest:guest@127.0.0.1:{port}/%2F"
