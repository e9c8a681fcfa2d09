"""What the signatures promise holds on any backend; without the native library the reference serves the tests."""

from __future__ import annotations

import pytest

import pykernels
from pykernels import _library


@pytest.fixture(autouse=True)
def _some_backend(_unchanged_settings):
    with pykernels.use_backend("auto" if _library.error() is None else "reference"):
        yield
