"""Loads `tests.fixtures` where tests run: a process that only hands files out to workers needs no framework."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Load what the tests share, in each worker of a parallel run or in the single process."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.fixtures")
