"""Loads `tests.fixtures` where tests run: a process that only hands files out to workers needs no framework."""

import gc

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Load what the tests share, in each worker of a parallel run or in the single process."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        gc.disable()  # what is imported is no garbage; `pytest_collection_finish` of the fixtures ends it
        config.pluginmanager.import_plugin("tests.fixtures")
