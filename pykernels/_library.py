"""The native library: found, loaded once, and asked about itself.

`libpykernels.so` lies beside this file (or where `PYKERNELS_LIBRARY` says). It has no Python symbols: torch loads it
for its ops, ctypes for a few plain C functions. A library that is missing or does not load is no error at import, since
the Triton and reference backends do without it; `error()` then says why, and so does every message about the cpu and
cuda backends.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

import torch

_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"


def path() -> Path:
    """Where the native library is expected."""
    return Path(os.environ.get("PYKERNELS_LIBRARY") or Path(__file__).with_name("libpykernels" + _SUFFIX))


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    file = path()
    if not file.exists():
        return None, (f"{file} does not exist: pykernels was installed or checked out without building its native "
                      "library")
    try:
        torch.ops.load_library(str(file))
        library = ctypes.CDLL(str(file))
    except OSError as error:
        return None, f"{file} does not load under torch {torch.__version__}: {error}"
    for name in ("pykernels_active_isa", "pykernels_built_isas", "pykernels_cuda_build"):
        getattr(library, name).restype = ctypes.c_char_p
    return library, None


def error() -> str | None:
    """Why the native library is not there, or None when it is."""
    return _load()[1]


def _require() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    return library


def active_isa() -> str:
    """The instruction set that the cpu backend runs on now."""
    return _require().pykernels_active_isa().decode()


def built_isas() -> list[str]:
    """The instruction sets in this build, from least to most capable."""
    return _require().pykernels_built_isas().decode().split(",")


def machine_isas() -> list[str]:
    """Those of `built_isas()` that this machine has."""
    return [isa for isa in built_isas() if _require().pykernels_machine_has_isa(isa.encode())]


def set_isa(isa: str) -> None:
    """Switches the cpu backend to another instruction set (for tests and comparisons)."""
    if _require().pykernels_set_isa(isa.encode()) != 0:
        raise ValueError(f"isa must be one of {machine_isas()} on this machine, got {isa!r}")


def cuda_build() -> str | None:
    """The CUDA version and architectures in this build (`13.0: sm_80 sm_90a sm_100 ptx_80`), None without CUDA."""
    return _require().pykernels_cuda_build().decode() or None


def cuda_kernels(op: str, capability: tuple[int, int]) -> str | None:
    """Which of this build's CUDA kernels serve `op` on that compute capability; None if the build does not say."""
    describe = getattr(_require(), f"pykernels_{op}_kernels", None)
    if describe is None:
        return None
    describe.restype = ctypes.c_char_p
    return describe(10 * capability[0] + capability[1]).decode()


def allocate_by_dispatch(on: bool) -> None:
    """Whether native ops get new tensors through torch's dispatcher, so that torch can fill them (for tests)."""
    if _load()[0] is not None:
        _require().pykernels_allocate_by_dispatch(on)


def release_scratch() -> None:
    """Frees the scratch memory that the cpu kernels keep per thread between calls."""
    if _load()[0] is not None:
        _require().pykernels_release_scratch()
