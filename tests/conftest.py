"""Gives tests what `tests.fixtures` has, where tests run: not in the process that only hands files out to others."""

import os
import sys

import pytest

HANDS_OUT = "PYTEST_XDIST_WORKER" not in os.environ and any(word.startswith("-n") for word in sys.argv[1:])

if not HANDS_OUT:
    pytest.register_assert_rewrite("tests.fixtures")
    from tests.fixtures import *  # noqa: F403
