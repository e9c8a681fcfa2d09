"""Settings for every test: reproducible property tests, and no test that leaves a process-wide setting changed."""

from __future__ import annotations

import functools
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


def _interpret_quickly() -> None:
    """Triton's interpreter patches triton.language again at each call of a device function, a third of the tests' time:
    once for each launch and each of its modules is enough, patching what is patched changes nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch_lang = interpreter._patch_lang
    patched: set[str] = set()  # in the launch that runs

    @functools.cache
    def modules(function) -> set[str]:
        return {module.__name__ for module in (tl, tl.core) if any(x is module for x in function.__globals__.values())}

    class Scope:
        def __init__(self, inner):
            self.inner = inner

        def restore(self) -> None:  # called by the launch alone
            patched.clear()
            self.inner.restore()

    def patch_once(function):
        if patched and modules(function) <= patched:
            return None  # a device function, which makes no use of it
        scope = Scope(patch_lang(function))
        patched.update(modules(function))
        return scope

    interpreter._patch_lang = patch_once


if os.environ.get("TRITON_INTERPRET") == "1":
    _interpret_quickly()


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
