"""Where the broker's URL comes from, and taking it apart: argument, environment, TOML profile.

Reads the environment and files, contacts nobody. Passwords never leave `Target`.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from unistream.driver.contract import Driver
from unistream.driver.types import Retention, Target
from unistream.errors import ConfigError

__all__ = ["Config", "load", "parse_target", "suggest"]

DEFAULT_FILE = "unistream.toml"

_TOPIC_KEYS = ("partitions", "ordering", "retention", "max_backlog", "overflow", "groups")
_GROUP_KEYS = ("ordering", "start", "lease", "max_lease", "dead_letter")
_RETENTION_KEYS = ("max_age", "max_bytes", "max_messages")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True)
class Config:
    """
    Which broker, and what the operator says of its topics and groups.

    What stands here of a topic or group wins over what the program says: the operator has the last word.

    Attributes:
        url: Scheme, hosts, credentials, options.
        topics: Topic name to settings of `create_topic`, and under `groups` group name to settings of `group`.
    """

    url: str = field(repr=False)
    topics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the names of the settings; their values are checked where they are used."""
        if not isinstance(self.url, str):
            raise ConfigError(f'the URL is {type(self.url).__name__}, not a str like "redis://localhost:6379/0"')
        _check_topics(self.topics, "topics")

    def topic(self, name: str) -> dict[str, Any]:
        """Settings for `create_topic`."""
        return {key: value for key, value in self.topics.get(name, {}).items() if key != "groups"}

    def group(self, topic: str, name: str | None) -> dict[str, Any]:
        """Settings for `group`."""
        return dict(self.topics.get(topic, {}).get("groups", {}).get(name, {}))


def load(target: str | Config | None, profile: str | None) -> Config:
    """
    The configuration for `connect`.

    With a target: that. Else `UNISTREAM_URL`, unless a profile is named; else the profile (`profile`, or
    `UNISTREAM_PROFILE`, or the only one) of the file `UNISTREAM_CONFIG` or `./unistream.toml`.

    Raises:
        ConfigError: There is none, or something in it is wrong.
    """
    if isinstance(target, Config):
        return target
    if target is not None:
        return Config(target)
    url = os.environ.get("UNISTREAM_URL")
    if url and profile is None:
        return Config(url)
    path = Path(os.environ.get("UNISTREAM_CONFIG", DEFAULT_FILE))
    if not path.is_file():
        raise ConfigError(
            f"connect(): no URL was given, UNISTREAM_URL is not set, and there is no file {path}; "
            'give a URL, for example connect("memory://local")'
        )
    return _profile(path, profile or os.environ.get("UNISTREAM_PROFILE"))


def _profile(path: Path, name: str | None) -> Config:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    _known(document, ("profile",), str(path))
    profiles = _table(document.get("profile", {}), f"{path}: profile")
    if name is None:
        if len(profiles) != 1:
            raise ConfigError(
                f"{path} has the profiles {', '.join(profiles) or '(none)'}; say which: connect(profile=…)"
            )
        [name] = profiles
    if name not in profiles:
        raise ConfigError(f"{path}: no profile {name!r}{suggest(name, profiles)}")
    where = f"{path}: profile.{name}"
    profile = _substitute(profiles[name], where)
    _known(profile, ("url", "topics"), where)
    if not isinstance(profile.get("url"), str):
        raise ConfigError(f"{where}: a url is missing")
    topics = profile.get("topics", {})
    _check_topics(topics, f"{where}.topics")
    return Config(profile["url"], topics)


def _check_topics(topics: Any, where: str) -> None:
    for topic, settings in _table(topics, where).items():
        place = f"{where}.{topic}"
        _known(settings, _TOPIC_KEYS, place)
        retention = settings.get("retention")
        if retention is not None and not isinstance(retention, Retention):
            _known(retention, _RETENTION_KEYS, f"{place}.retention")
        for group, options in _table(settings.get("groups", {}), f"{place}.groups").items():
            _known(options, _GROUP_KEYS, f"{place}.groups.{group}")


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is not a table")
    return value


def _known(table: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
    for key in _table(table, where):
        if key not in keys:
            raise ConfigError(f"{where}: unknown key {key!r}{suggest(key, keys)}")


def suggest(word: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown word: the nearest known one, or all of them."""
    known = sorted(known)
    near = get_close_matches(word, known, 1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there are {', '.join(known)}" if known else "; there are none"


def _substitute(value: Any, where: str) -> Any:
    """Replace `${NAME}` in every text by the environment's value, so that secrets stay out of files."""
    if isinstance(value, dict):
        return {key: _substitute(each, where) for key, each in value.items()}
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        if name not in os.environ:
            raise ConfigError(f"{where}: the environment has no {name}, which ${{{name}}} asks for")
        return os.environ[name]

    return _VARIABLE.sub(replace, value)


def scheme_of(url: str) -> str:
    """
    The scheme of a URL, in lower case.

    Raises:
        ConfigError: There is none.
    """
    if not isinstance(url, str):
        raise ConfigError(f'the URL is {type(url).__name__}, not a str like "redis://localhost:6379/0"')
    scheme, separator, _ = url.partition("://")
    if not separator or not scheme:
        raise ConfigError('the URL has no scheme; it looks like "redis://localhost:6379/0"')
    return scheme.lower()


def parse_target(url: str, driver: type[Driver]) -> Target:
    """
    Take a URL apart and parse its options as the driver declares them.

    Raises:
        ConfigError: It is no URL, or an option is unknown or nonsense. The message shows no password.
    """
    scheme = scheme_of(url)
    try:
        parts = urlsplit(url)
        if "@" in f"{parts.path}{parts.query}" or parts.fragment:
            # Nothing of the URL is shown: what looks like a path here may be half of a password.
            raise ValueError("percent-encode '/', '?', '#' and '@' in its user name and password")
        credentials, _, addresses = parts.netloc.rpartition("@")
        hosts = tuple(_host(address) for address in addresses.split(",") if address)
    except ValueError as error:
        hint = str(error) if "percent-encode" in str(error) else "a host or port is malformed"
        raise ConfigError(f"the {scheme} URL can't be read: {hint}", driver=scheme) from None
    try:
        query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise ConfigError(f"the {scheme} URL can't be read: options look like ?name=value&…", driver=scheme) from None
    options = {name: option.default for name, option in driver.options.items()}
    for name, text in query:
        if name not in driver.options:
            raise ConfigError(
                f"{scheme}: unknown option {name!r} in the URL{suggest(name, driver.options)}", driver=scheme
            )
        try:
            options[name] = driver.options[name].parse(text)
        except ValueError as error:
            raise ConfigError(f"{scheme}: option {name}={text!r} in the URL: {error}", driver=scheme) from None
    username, separator, password = credentials.partition(":")
    return Target(
        scheme,
        hosts,
        unquote(parts.path.removeprefix("/")),
        unquote(username) or None,
        unquote(password) if separator else None,
        options,
    )


def _host(address: str) -> tuple[str, int | None]:
    parts = urlsplit(f"//{address}")
    return parts.hostname or "", parts.port
