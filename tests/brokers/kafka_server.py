"""Apache Kafka 4 in KRaft mode, one node, run by Java from its Maven artifacts."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from tests.brokers.broker import Broker, BrokerError, Command, Image
from tests.brokers.install import apt_install, cache_directory, one_at_a_time, system_program

VERSION = "4.4.0"
LOG4J = "2.25.5"  # the version that Kafka itself depends on
CLUSTER = "dW5pc3RyZWFtLXRlc3RzIQ"

POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>unistream</groupId><artifactId>kafka-server</artifactId><version>{VERSION}</version>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{VERSION}</version>
    </dependency>
    <dependency>
      <groupId>org.apache.logging.log4j</groupId><artifactId>log4j-slf4j-impl</artifactId><version>{LOG4J}</version>
    </dependency>
  </dependencies>
</project>
"""

LOGGING = """appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = [%d] %p %m (%c{1})%n
rootLogger.level = INFO
rootLogger.appenderRef.console.ref = console
"""

# One replica of everything, few internal partitions (each is a directory and a leader election at the first use),
# groups that form without waiting for more members, sessions as short as a test may want. After kill -9 the node may
# register again only when its old session has ended (9 s by default).
SETTINGS = {
    "auto.create.topics.enable": "false",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "4",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "4",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    "broker.session.timeout.ms": "4000",
    "broker.heartbeat.interval.ms": "1000",
    "log.cleaner.dedupe.buffer.size": "16777216",
}


class Kafka(Broker):
    """A single Kafka node, broker and controller in one process."""

    ports: ClassVar[tuple[str, ...]] = ("client", "controller")
    default_port: ClassVar[int] = 9092

    def __init__(self, name: str) -> None:
        self.name = name

    def install(self) -> None:
        """Install Java and fetch Kafka's jars by Maven, once per machine."""
        apt_install("openjdk-17-jre-headless", program="java")
        jars = self._jars()
        if jars.exists():
            return
        apt_install("maven", program="mvn")
        with one_at_a_time():
            if not jars.exists():
                _fetch(jars)

    def commands(self, directory: Path, ports: Mapping[str, int]) -> Sequence[Command]:
        """Write server.properties, format the storage when it is new, and return one process."""
        listeners = {"PLAINTEXT": ports["client"], "CONTROLLER": ports["controller"]}
        settings = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@127.0.0.1:{ports['controller']}",
            "controller.listener.names": "CONTROLLER",
            "listeners": ",".join(f"{name}://127.0.0.1:{port}" for name, port in listeners.items()),
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{ports['client']}",
            "log.dirs": str(directory / "data"),
            **SETTINGS,
        }
        config = directory / "server.properties"
        config.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        logging = directory / "log4j2.properties"
        logging.write_text(LOGGING)
        java = system_program("java")
        if java is None:
            raise BrokerError(f"{self.name}: there is no java on this machine")
        base = [java, f"-Dlog4j2.configurationFile={logging}", "-cp", f"{self._jars()}/*"]
        if not (directory / "data" / "meta.properties").exists():
            _execute([*base, "kafka.tools.StorageTool", "format", "-t", CLUSTER, "-c", str(config)])
        memory = ["-Xms128m", "-Xmx512m", "-XX:+UseSerialGC"]
        return [Command("kafka", [java, *memory, *base[1:], "kafka.Kafka", str(config)])]

    def image(self, ports: Mapping[str, int]) -> Image:
        """Return the official image; the host's port must be known inside, for clients are told it."""
        settings = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": "1@localhost:9093",
            "controller.listener.names": "CONTROLLER",
            "listeners": "PLAINTEXT://:9092,CONTROLLER://:9093",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{ports['client']}",
            **SETTINGS,
        }
        env = {f"KAFKA_{name.upper().replace('.', '_')}": value for name, value in settings.items()}
        return Image(f"apache/kafka:{VERSION}", env=env)

    def url(self, port: int) -> str:
        """Return kafka://127.0.0.1:PORT."""
        return f"kafka://127.0.0.1:{port}"

    def _jars(self) -> Path:
        return cache_directory() / f"kafka-{VERSION}"


def _fetch(jars: Path) -> None:
    """Fill the folder with Kafka and what it needs at run time; it appears only when it is whole."""
    work = jars.with_name(f"{jars.name}.{os.getpid()}")
    work.mkdir()
    (work / "pom.xml").write_text(POM)
    maven = system_program("mvn")
    goal = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={work / 'jars'}"]
    try:
        _execute([str(maven), "--batch-mode", "--no-transfer-progress", "--file", str(work / "pom.xml"), *goal])
        (work / "jars").rename(jars)
    finally:
        shutil.rmtree(work)


def _execute(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BrokerError(f"kafka: {' '.join(command)} failed:\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
