"""URLs, TOML files, environment and discovery: clear errors, and no secret in any of them (END-6)."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import unistream
from tests.unit.portable.scripted import Script, ScriptedDriver
from unistream import _registry
from unistream.config import load, parse_target
from unistream.driver.types import Option
from unistream.errors import (
    AmbiguousDriverError,
    ConfigError,
    MissingClientError,
    UnknownSchemeError,
)

SECRET = "s3cr3t"


class Optional(ScriptedDriver):
    """A driver with options."""

    script = Script()
    options = {"connect_timeout": Option(float, 5.0, "Seconds."), "name": Option(str, "", "Any text.")}  # noqa: RUF012


@pytest.fixture(autouse=True)
def _no_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the machine's own configuration."""
    for name in ("UNISTREAM_URL", "UNISTREAM_CONFIG", "UNISTREAM_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_a_url_is_taken_apart() -> None:
    """Hosts with and without ports, IPv6, encoded credentials and path, options parsed, defaults filled."""
    url = f"Scripted://us%40er:{SECRET}%2F%3F%23%40@a:1,b,[::1]:3/some%2Fpath?connect_timeout=2.5"
    target = parse_target(url, Optional)

    assert target.scheme == "scripted"
    assert target.hosts == (("a", 1), ("b", None), ("::1", 3))
    assert (target.username, target.password, target.path) == ("us@er", f"{SECRET}/?#@", "some/path")
    assert target.options == {"connect_timeout": 2.5, "name": ""}
    assert SECRET not in f"{target} {target!r}"


@pytest.mark.parametrize(
    "url",
    [
        f"redis://user:{SECRET}/x@host:1",
        f"redis://user:12/{SECRET}@host",
        f"redis://user:{SECRET}?x@host",
        f"redis://user:{SECRET}#x@host",
        f"redis://user:{SECRET}@host:port",
        f"redis://user:{SECRET}@host:99999",
        f"redis://user:{SECRET}@host?connect_timeout",
        f"redis://user:{SECRET}@host?connect_timout=3",
        f"redis://user:{SECRET}@host?connect_timeout=soon",
        f"redis://user:{SECRET}@[::1",
        f"user:{SECRET}@host",
    ],
)
def test_a_url_that_can_not_be_read_shows_no_password(url: str) -> None:
    """Every malformed URL is a ConfigError that shows nothing of the password, its context included."""
    with pytest.raises(ConfigError) as caught:
        unistream.connect(url, driver=Optional)

    shown = f"{caught.value} {caught.value!r} {caught.value.__cause__!r}"
    assert SECRET not in shown
    assert "12" not in shown


def test_reprs_show_no_password() -> None:
    """Neither `Config`, `Client`, nor `Target`."""
    config = unistream.Config(f"scripted://user:{SECRET}@host/path?name={SECRET}")
    client = unistream.connect(config, driver=Optional)

    assert SECRET not in f"{config!r} {client!r} {client} {client._target!r}"
    assert "user@host" in repr(client)


@pytest.mark.parametrize("target", ["", "host:1", "://x", b"redis://x", Path("x"), 5])
def test_what_is_no_url_is_a_config_error(target: Any) -> None:
    """Whatever it is."""
    with pytest.raises(ConfigError):
        unistream.connect(target)


def test_unknown_words_come_with_a_suggestion() -> None:
    """Scheme and option: the nearest known one is named."""
    with pytest.raises(UnknownSchemeError, match="did you mean memory://"):
        unistream.connect("memry://x")
    with pytest.raises(ConfigError, match="did you mean 'connect_timeout'"):
        unistream.connect("scripted://h?conect_timeout=3", driver=Optional)


def test_the_place_of_the_url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Argument, then UNISTREAM_URL, then the profile of the file; a named profile before the environment."""
    with pytest.raises(ConfigError, match="no URL was given"):
        load(None, None)
    path = tmp_path / "unistream.toml"
    path.write_text('[profile.one]\nurl = "memory://file"\n')
    assert load(None, None).url == "memory://file"
    monkeypatch.setenv("UNISTREAM_URL", "memory://environment")
    assert load(None, None).url == "memory://environment"
    assert load(None, "one").url == "memory://file"
    assert load("memory://argument", "one").url == "memory://argument"
    monkeypatch.delenv("UNISTREAM_URL")
    other = tmp_path / "other.toml"
    other.write_text('[profile.a]\nurl = "memory://a"\n[profile.b]\nurl = "memory://b"\n')
    monkeypatch.setenv("UNISTREAM_CONFIG", str(other))
    with pytest.raises(ConfigError, match="a, b"):
        load(None, None)
    monkeypatch.setenv("UNISTREAM_PROFILE", "b")
    assert load(None, None).url == "memory://b"
    with pytest.raises(ConfigError, match="there are a, b"):
        load(None, "c")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not toml", "unistream.toml"),
        ('[profil.x]\nurl = "memory://"', "did you mean 'profile'"),
        ("profile = 5", "not a table"),
        ("[profile.x]", "url is missing"),
        ("[profile]\nx = 5", "not a table"),
        ('[profile.x]\nurl = "memory://"\ntopic = 5', "did you mean 'topics'"),
        ('[profile.x]\nurl = "memory://"\ntopics = 5', "not a table"),
        ('[profile.x]\nurl = "memory://"\n[profile.x.topics]\nt = 5', "not a table"),
        ('[profile.x]\nurl = "memory://"\n[profile.x.topics.t]\npartition = 5', "did you mean 'partitions'"),
        ('[profile.x]\nurl = "memory://"\n[profile.x.topics.t]\ngroups = 5', "not a table"),
        ('[profile.x]\nurl = "memory://"\n[profile.x.topics.t]\nretention = 5', "not a table"),
        ('[profile.x]\nurl = "memory://"\n[profile.x.topics.t.retention]\nage = 5', "max_age"),
        ('[profile.x]\nurl = "memory://"\n[profile.x.topics.t.groups.g]\nleas = 5', "did you mean 'lease'"),
        ('[profile.x]\nurl = "${NOT_THERE}"', "NOT_THERE"),
    ],
)
def test_a_file_with_a_mistake_is_a_config_error(text: str, words: str, tmp_path: Path) -> None:
    """The place is named, and what was meant where that can be guessed."""
    (tmp_path / "unistream.toml").write_text(text)

    with pytest.raises(ConfigError, match=words):
        load(None, None)


def test_a_file_that_is_no_text_is_a_config_error(tmp_path: Path) -> None:
    """Bytes that are not UTF-8."""
    (tmp_path / "unistream.toml").write_bytes(b"\xff\xfe")

    with pytest.raises(ConfigError):
        load(None, None)


def test_secrets_come_from_the_environment_and_the_operator_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`${NAME}` is replaced; what the file says of topics and groups wins over the program."""
    monkeypatch.setenv("PASSWORD", SECRET)
    (tmp_path / "unistream.toml").write_text(
        '[profile.x]\nurl = "scripted://u:${PASSWORD}@h"\n[profile.x.topics.t.groups.g]\nlease = 60\nmax_lease = 90\n'
    )

    client = unistream.connect(driver=Optional)
    group = client.group("g", "t", lease=5.0)

    assert client._target.password == SECRET
    assert (group._spec.lease, group._spec.max_lease) == (60, 90)
    assert client.group("other", "t", lease=5.0)._spec.lease == 5.0
    with pytest.raises(ConfigError, match="did you mean 'lease'"):
        unistream.Config("memory://", {"t": {"groups": {"g": {"leas": 5}}}})


# Discovery


def _install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **modules: str) -> None:
    """Entry points for the scheme `made`, one per module, with this source each."""
    entries = []
    for name, source in modules.items():
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
        entries.append(EntryPoint("made", f"{name}:Made", _registry.GROUP))
    monkeypatch.syspath_prepend(tmp_path)

    def found(*, group: str, name: str | None = None) -> list[EntryPoint]:
        return [entry for entry in entries if name in (None, entry.name)]

    monkeypatch.setattr(_registry, "entry_points", found)


DRIVER = "from tests.unit.portable.scripted import ScriptedDriver\nclass Made(ScriptedDriver):\n    api = {}\n"


def test_the_driver_of_a_scheme_is_found_and_only_that_one_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One owner: its class."""
    _install(monkeypatch, tmp_path, made_one=DRIVER.format(1))

    assert _registry.find_driver("made").__name__ == "Made"
    assert _registry.installed_schemes() == ["made"]


@pytest.mark.parametrize(
    ("modules", "kind", "words"),
    [
        ({"made_a": DRIVER.format(1), "made_b": DRIVER.format(1)}, AmbiguousDriverError, "made_a:Made and made_b:Made"),
        ({"made_c": DRIVER.format(2)}, ConfigError, "version 2"),
        ({"made_d": "import a_client_that_is_missing\n"}, MissingClientError, "a_client_that_is_missing"),
        ({"made_e": "import made_e.part\n"}, ModuleNotFoundError, "made_e"),
        ({"made_f": "Made = 5\n"}, ConfigError, "not a subclass"),
    ],
)
def test_a_driver_that_does_not_fit_is_named(
    modules: dict[str, str], kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two owners, another version, a client that is missing (and only that), no driver at all."""
    _install(monkeypatch, tmp_path, **modules)

    with pytest.raises(kind, match=words):
        _registry.find_driver("made")
