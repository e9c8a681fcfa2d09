"""Where an op can run here, and the process-wide settings that tests vary."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from .. import _library, backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@contextlib.contextmanager
def use_isa(isa: str) -> Iterator[None]:
    """Runs the cpu backend on one of `_library.machine_isas()`."""
    previous = _library.active_isa()
    _library.set_isa(isa)
    try:
        yield
    finally:
        _library.set_isa(previous)


@contextlib.contextmanager
def use_threads(threads: int) -> Iterator[None]:
    """Sets torch's intra-op threads, which the cpu kernels run on."""
    previous = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that is allocated but not written is NaN; ATen fills it, for torch.empty and for the native library alike.

    This is torch's deterministic mode, so inside it `deterministic=None` means True.
    """
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    _library.allocate_by_dispatch(True)
    try:
        yield
    finally:
        _library.allocate_by_dispatch(False)
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@dataclasses.dataclass(frozen=True)
class Target:
    """A backend on a device; for the cpu backend also the instruction set."""

    backend: str
    device: str
    isa: str | None = None

    def __str__(self) -> str:
        if self.isa is not None:
            return f"{self.backend}-{self.isa}"
        return self.backend if self.backend == self.device else f"{self.backend}-{self.device}"

    def active(self) -> contextlib.AbstractContextManager:
        """The context to run in."""
        return use_isa(self.isa) if self.isa is not None else contextlib.nullcontext()


def choice(op: backends.Op, backend: str, device: str, dtype: torch.dtype) -> backends.Choice:
    """What `backend` ("auto" or a name) would get for a plain call here."""
    sizes = collections.defaultdict(lambda: 64)  # whichever an op's backends look at
    return backends.choose(op, backends.Query(device, dtype, sizes), backend, backends.environment())


def devices() -> list[str]:
    """The torch device types that are usable here."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found.append("cuda")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        found.append("xpu")
    return found


def dtypes(op: backends.Op, target: Target) -> list[torch.dtype]:
    """The dtypes to check on `target`: those it serves; of the reference, itself the yardstick, only the wide ones."""
    candidates = (torch.float32, torch.float64) if target.backend == "reference" else DTYPES
    return [
        dtype for dtype in candidates if choice(op, target.backend, target.device, dtype).backend is not None
    ]


def targets(op: backends.Op, every_isa: bool = True) -> list[Target]:
    """Everything here that can run `op`, the reference first."""
    found = []
    for backend in reversed(backends.BACKENDS):
        for device in devices():
            target = Target(backend, device)
            if not dtypes(op, target):
                continue
            if backend == "cpu" and every_isa:
                found += [Target(backend, device, isa) for isa in _library.machine_isas()]
            else:
                found.append(target)
    return found
