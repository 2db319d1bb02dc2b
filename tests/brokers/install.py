"""Gets programs onto this machine: Debian's packages, and a cache directory for what else is fetched once."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.brokers.broker import BrokerError

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def cache_directory() -> Path:
    """Return the directory for what is fetched once; a fresh clone finds it again."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(base) / "unistream-brokers"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@contextmanager
def one_at_a_time(directory: Path | None = None) -> Iterator[None]:
    """Hold the lock of a directory, by default the cache's: two launchers never install side by side."""
    with ((directory or cache_directory()) / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def system_program(name: str) -> str | None:
    """Return the path of a program that the system has, not the one of a virtual environment."""
    return shutil.which(name, path=SYSTEM_PATH)


def apt_install(package: str, *, program: str, services: Sequence[str] = ()) -> None:
    """
    Install a package of Debian unless its program is there already.

    Args:
        package: The package's name.
        program: What the package brings; when it is found nothing happens.
        services: Units that the package would start; a service that we installed is neither started nor enabled.
    """
    with one_at_a_time():
        if system_program(program):
            return
        if not system_program("apt-get") or os.geteuid() != 0:
            raise BrokerError(
                f"{program} is not installed, and installing the package {package} needs apt-get and root: install "
                f"it yourself, start Docker, or give a URL in the environment"
            )
        print(f"installing {package}", file=sys.stderr)
        with _services_stay_off():
            install = ["install", "-y", "--no-install-recommends", package]
            try:
                _apt(*install)
            except BrokerError:  # the lists are absent or old; fetching them can take minutes
                _apt("update")
                _apt(*install)
        if services and system_program("systemctl"):
            subprocess.run(["systemctl", "disable", *services], check=True, capture_output=True)
        if not system_program(program):
            raise BrokerError(f"the package {package} was installed but brought no program {program}")


def _apt(*arguments: str) -> None:
    # apt waits for another one that runs (seconds) instead of failing at once.
    command = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300", *arguments]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BrokerError(f"{' '.join(command)} failed:\n{done.stdout[-800:]}{done.stderr[-800:]}")


@contextmanager
def _services_stay_off() -> Iterator[None]:
    """Forbid package scripts to start services, in Debian's own way: a policy-rc.d that answers 101."""
    policy = Path("/usr/sbin/policy-rc.d")
    if policy.exists():
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()
