from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import build  # noqa: E402


@pytest.fixture(scope="session")
def host():
    """The CUDA sources, compiled for the host."""
    if (reason := build.unavailable()) is not None:
        pytest.skip(reason)
    return build.load()
