"""Where the brokers under test are: the environment says it, and one that is absent is a failure, never a skip."""

from __future__ import annotations

import os

import pytest

__all__ = ["url_of"]


def url_of(variable: str) -> str:
    """The URL that an environment variable gives."""
    url = os.environ.get(variable)
    if not url:
        pytest.fail(
            f"{variable} is not set: run `make test`, or `python -m tests.brokers run -- pytest …`", pytrace=False
        )
    return url
