"""Finding the driver of a URL's scheme among the installed distributions; names no adapter."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points

from unistream.driver.contract import API_VERSION, Driver
from unistream.errors import AmbiguousDriverError, ConfigError, MissingClientError, UnknownSchemeError

__all__ = ["find_driver", "installed_schemes"]

GROUP = "unistream.drivers"


def installed_schemes() -> list[str]:
    """Every scheme that an installed distribution serves."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def find_driver(scheme: str) -> type[Driver]:
    """
    The driver class for a scheme; only that one is imported.

    Raises:
        UnknownSchemeError: No installed distribution serves it.
        AmbiguousDriverError: Two do.
        MissingClientError: Its client library is not installed.
        ConfigError: It was written for another version of the driver contract.
    """
    found = {entry.value: entry for entry in entry_points(group=GROUP, name=scheme)}
    if not found:
        schemes = installed_schemes()
        near = get_close_matches(scheme, schemes, 1)
        hint = f"did you mean {near[0]}://?" if near else f"installed: {', '.join(schemes)}"
        raise UnknownSchemeError(f"no driver for the scheme {scheme!r}; {hint}")
    if len(found) > 1:
        owners = " and ".join(sorted(_owner(entry) for entry in found.values()))
        raise AmbiguousDriverError(f"the scheme {scheme!r} is claimed by {owners}; uninstall one of them")
    [entry] = found.values()
    driver = _load(entry)
    if driver.api != API_VERSION:
        raise ConfigError(
            f"the driver of {_owner(entry)} for {scheme!r} speaks version {driver.api} of the driver contract, "
            f"this unistream speaks {API_VERSION}; install matching versions",
            driver=scheme,
        )
    return driver


def _load(entry: EntryPoint) -> type[Driver]:
    package = entry.module.partition(".")[0]
    try:
        driver = entry.load()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("unistream", package, ""):
            raise
        raise MissingClientError(
            f"the driver for {entry.name!r} needs the package {missing!r}, which is not installed; "
            f"install {_owner(entry)} with its extra for this broker",
            driver=entry.name,
        ) from error
    if not (isinstance(driver, type) and issubclass(driver, Driver)):
        raise ConfigError(f"{_owner(entry)}: {entry.value} is not a subclass of unistream.driver.contract.Driver")
    return driver


def _owner(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value
