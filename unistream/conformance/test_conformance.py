"""What `pytest --pyargs unistream.conformance --unistream-url URL` collects: the suite, judging that backend."""

from __future__ import annotations

import pytest

from unistream.conformance.suite import Suite


class TestConformance(Suite):
    """The backend of `--unistream-url`."""

    @classmethod
    def pytest_generate_tests(cls, metafunc: pytest.Metafunc) -> None:
        """
        Make one test of each case.

        Raises:
            UsageError: Nobody said what to judge.
        """
        options = metafunc.config.option
        if not options.unistream_url:
            raise pytest.UsageError("say which backend to judge: --unistream-url URL")
        cls.target, cls.profile, cls.seed = (
            options.unistream_url,
            options.unistream_profile,
            options.unistream_seed,
        )
        super().pytest_generate_tests(metafunc)
