"""Settings for every test: reproducible property tests, and no test that leaves a process-wide setting changed."""

from __future__ import annotations

import os

# Before torch is imported: waiting threads that spin cost the tests, which are many small calls, most of their time
# on a machine that does anything else besides.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

from pykernels import _library, backends

# The same examples in every run, so that a failure is always one that a change brought.
hypothesis.settings.register_profile(
    "reproducible", derandomize=True, deadline=None, database=None, print_blob=True
)
hypothesis.settings.load_profile("reproducible")


def _settings() -> dict[str, object]:
    return {
        "torch's threads": torch.get_num_threads(),
        "deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default backend": backends._default,
        "instruction set": _library.active_isa() if _library.error() is None else None,
    }


@pytest.fixture(autouse=True)
def _unchanged_settings():
    torch.manual_seed(0)
    before = _settings()
    yield
    assert _settings() == before
