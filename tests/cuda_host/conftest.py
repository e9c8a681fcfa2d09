from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import host_build  # noqa: E402


@pytest.fixture(scope="session")
def compiler():
    """For tests that compile the CUDA sources for the host."""
    if (reason := host_build.unavailable()) is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def host(compiler):
    """The CUDA sources, compiled for the host."""
    return host_build.load()
