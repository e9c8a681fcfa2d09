"""Which backend serves a call, and why.

Each op describes its backends as an `Op`: for each one a function from the call's facts (`Query`) to None ("can serve")
or the reason why not. `choose` combines that with what this machine has (`Environment`) and what was asked for. It is a
pure function of its arguments: `python -m pykernels info` prints exactly what a call would get.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Mapping

import torch

from . import _library

BACKENDS = ("cuda", "triton", "cpu", "reference")  # in the order that "auto" prefers them


class BackendUnavailable(RuntimeError):
    """The backend asked for can't serve this call on this machine; the message says why and names one that can."""


@dataclasses.dataclass(frozen=True)
class Query:
    """What a choice may depend on: facts of the call that are known without reading tensor values."""

    device: str  # torch device type
    dtype: torch.dtype
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)  # e.g. head_dim
    options: frozenset[str] = frozenset()  # names of the options in use, e.g. "softcap", "varlen"
    grad: bool = False  # whether a backward pass may follow


@dataclasses.dataclass(frozen=True)
class Environment:
    """What this process can run; each field is None when usable, else the reason why not."""

    cpu: str | None
    cuda: str | None
    triton: str | None
    triton_interpret: bool  # TRITON_INTERPRET=1: Triton kernels run on CPU tensors, slowly
    capability: tuple[int, int] | None  # of the current CUDA device


@dataclasses.dataclass(frozen=True)
class Op:
    """An op's entry in the table of backends.

    `backends` maps a backend's name to `supports(query) -> None | reason`; `explicit_only` are backends that "auto"
    leaves out although they can serve, with the reason.
    """

    name: str
    backends: Mapping[str, Callable[[Query], str | None]]
    explicit_only: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Choice:
    backend: str | None  # None: nothing can serve
    reason: str
    rejected: Mapping[str, str]  # backend -> why not, for those considered before it


def _cuda_error() -> str | None:
    if (reason := _library.error()) is not None:
        return reason
    if _library.cuda_build() is None:
        return "this build of pykernels has no CUDA kernels (nvcc was absent, or PYKERNELS_CUDA=0)"
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no usable NVIDIA GPU"
    if (capability := torch.cuda.get_device_capability()) < (8, 0):
        return "the kernels need compute capability 8.0, this GPU has {}.{}".format(*capability)
    # cudart is part of the library; it needs a driver at least as new as itself within the same major version.
    library_major = int(_library.cuda_build().split(".")[0])
    driver = torch._C._cuda_getDriverVersion()
    if driver // 1000 < library_major:
        return f"built for CUDA {library_major}, the driver supports CUDA {driver // 1000}.{driver % 1000 // 10}"
    return None


def _triton_error(interpret: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'pykernels[triton]')"
    if interpret or torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available()):
        return None
    return "torch finds no GPU that Triton can use (TRITON_INTERPRET=1 runs its kernels on the CPU, slowly)"


@torch.compiler.assume_constant_result  # torch.compile looks through caches, and can't trace how it is found
def environment() -> Environment:
    """This process's environment, found once."""
    return _find_environment()


@functools.cache
def _find_environment() -> Environment:
    interpret = os.environ.get("TRITON_INTERPRET", "0") == "1"
    return Environment(
        cpu=_library.error(),
        cuda=_cuda_error(),
        triton=_triton_error(interpret),
        triton_interpret=interpret,
        capability=torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
    )


def _why_not(op: Op, backend: str, query: Query, env: Environment) -> str | None:
    if backend not in op.backends:
        return f"{op.name} has no {backend} backend"
    if backend == "cpu":
        if query.device not in ("cpu", "meta"):  # on meta, where no backend has anything to compute, shapes alone
            return f"the tensors are on {query.device}"
        if env.cpu is not None:
            return env.cpu
    elif backend == "cuda":
        if query.device != "cuda":
            return f"the tensors are on {query.device}"
        if env.cuda is not None:
            return env.cuda
    elif backend == "triton":
        if env.triton is not None:
            return env.triton
        if query.device == "cpu" and not env.triton_interpret:
            return "the tensors are on cpu (TRITON_INTERPRET=1 runs Triton kernels there, slowly)"
        if query.device not in ("cpu", "cuda", "xpu"):
            return f"Triton has no {query.device} target"
    return op.backends[backend](query)


def choose(op: Op, query: Query, requested: str, env: Environment) -> Choice:
    """The backend for a call: the one requested, or for "auto" the first in `BACKENDS` that can serve.

    "auto" never takes the reference: it is quadratic in memory and slow, so it must be asked for by name. On the CPU it
    never takes Triton's interpreter either, for the same reason.
    """
    if requested != "auto":
        reason = _why_not(op, requested, query, env)
        if reason is None:
            return Choice(requested, "requested", {})
        return Choice(None, reason, {requested: reason})
    rejected: dict[str, str] = {}
    for backend in BACKENDS:
        if backend == "reference" or (backend == "triton" and query.device == "cpu"):
            continue
        reason = _why_not(op, backend, query, env) or op.explicit_only.get(backend)
        if reason is None:
            return Choice(backend, f"first choice on {query.device}" if not rejected else "next choice", rejected)
        rejected[backend] = reason
    return Choice(None, "no compiled backend can serve", rejected)


_default = os.environ.get("PYKERNELS_BACKEND", "auto")


def check_name(backend: str, argument: str = "backend") -> str:
    """Returns `backend` if it is a backend's name or "auto", else raises ValueError."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"{argument} must be one of {('auto', *BACKENDS)}, got {backend!r}")
    return backend


def default() -> str:
    """The backend of calls that name none."""
    return _default


class use_backend(contextlib.AbstractContextManager):
    """Sets the default of every op's `backend` argument, for the process, or for a `with` block.

    `pykernels.use_backend("reference")` holds until the next call; as a context manager it restores the previous
    default at the end. It is a plain module variable, not per thread. `PYKERNELS_BACKEND` sets the initial value.
    """

    def __init__(self, backend: str):
        global _default
        check_name(backend)
        self._previous = _default
        _default = backend

    def __exit__(self, *exc_info) -> None:
        global _default
        _default = self._previous


def asked_for(backend: str) -> str:
    """An op's argument `backend`, or where that is "auto" the default."""
    return check_name(default(), "PYKERNELS_BACKEND") if check_name(backend) == "auto" else backend


def resolve(op: Op, query: Query, backend: str) -> str:
    """The name of the backend that serves the call, or BackendUnavailable."""
    requested = asked_for(backend)
    env = environment()
    choice = choose(op, query, requested, env)
    if choice.backend is not None:
        return choice.backend
    alternative = choose(op, query, "auto", env).backend or "reference"
    reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.rejected.items())
    raise BackendUnavailable(f"{op.name}: backend {requested!r} can't serve this call ({reasons}). "
                             f"backend={alternative!r} can.")
