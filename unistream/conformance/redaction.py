"""Knows what no report may show: passwords and other secrets of the target's URL, wherever they turn up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

HIDDEN = "***"
SHORTEST = 4
"""Shorter secrets are hidden in the URL only: everywhere else they would be found in innocent words."""


def redacted(url: str) -> str:
    """Return the URL without its password, and without its query, which may hold one."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return f"{url.partition('://')[0]}://{HIDDEN}"
    login, at, host = parts.netloc.rpartition("@")
    user, colon, _ = login.partition(":")
    place = f"{user}:{HIDDEN}@{host}" if colon else f"{login}{at}{host}"
    return urlunsplit((parts.scheme, place, parts.path, HIDDEN if parts.query else "", ""))


def _secrets(url: str) -> list[str]:
    try:
        password = urlsplit(url).netloc.rpartition("@")[0].partition(":")[2]
    except ValueError:
        password = ""
    plain = unquote(password)
    found = {password, plain, quote(plain, safe="")}
    return sorted((each for each in found if len(each) >= SHORTEST), key=len, reverse=True)


def scrub(value: Any, *urls: str) -> Any:
    """Return the value with the secrets of the URLs taken out of every text in it, however deep."""
    if isinstance(value, str):
        for url in urls:
            if len(url) > len("x://"):
                value = value.replace(url, redacted(url))
            for secret in _secrets(url):
                # Between these marks even a common word is a password, and between others a password is one.
                value = value.replace(secret, HIDDEN)
        return value
    if isinstance(value, Mapping):
        return {key: scrub(each, *urls) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(each, *urls) for each in value]
    return value
