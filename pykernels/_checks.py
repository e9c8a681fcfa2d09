"""Argument checks that the ops share. Each error names the argument, what was expected and what came."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._subclasses.fake_tensor import FakeTensor

from . import backends

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # not part of torch's interface: without it, looks are read every time
    TensorGuards = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# What `by_metadata` remembers. Beyond so many calls, shapes are such that they keep changing: it starts anew.
_remembered: dict[tuple, object] = {}
_MOST_REMEMBERED = 4096
# Of each function, the calls that came again last: (its arguments but tensors, those of its tensors, the result).
_recent: dict[Callable, list[tuple[list, TensorGuards, object]]] = {}
_MOST_RECENT = 4


def forget() -> None:
    """Forgets what `by_metadata` remembers."""
    _remembered.clear()
    for calls in _recent.values():
        calls.clear()


def by_metadata(function: Callable) -> Callable:
    """`function`, its results remembered by its tensors' shapes, strides, dtypes and devices and its other arguments.

    For checks and choices that depend on nothing else (but on the default backend): calls that look alike, as the steps
    of a loop do, pay for them once. A call that raises raises again. Looks that come again are compared by torch's own
    guards, in less than half the time that it takes to read them.
    """
    recent = _recent[function] = []

    @functools.wraps(function)
    def remembering(*args):
        if torch.compiler.is_compiling():  # sizes may be symbols
            return function(*args)
        tensors, others = [], [backends.default()]
        for x in args:
            if isinstance(x, Tensor):
                tensors.append(x)
                others.append(Tensor)
            else:
                others += type(x), x
        for same_others, guards, result in recent:
            if others == same_others and guards.check(*tensors):
                return result
        look = [function, *others]
        for x in tensors:
            if x.layout is not torch.strided:  # has no strides to look at, and is none of those remembered
                return function(*args)
            look += x.shape, x.is_contiguous() or x.stride(), x.dtype, x.is_cpu or x.device
        look = tuple(look)
        try:
            result = _remembered.get(look)
        except TypeError:  # something unhashable: a symbol, or an argument of a wrong type
            return function(*args)
        if result is None:
            if len(_remembered) >= _MOST_REMEMBERED:
                forget()
            result = _remembered[look] = function(*args)
        elif TensorGuards:
            guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)  # all sizes and strides
            if guards.check(*tensors):  # they take no tensor twice
                recent[:] = [(others, guards, result), *recent[:_MOST_RECENT - 1]]
        return result

    return remembering


def values_checked(x: Tensor) -> bool:
    """Whether values inside `x` (offsets, cache lengths) are checked: eager on a CPU, or PYKERNELS_CHECK=1.

    Elsewhere a check would wait for the device; kernels clamp such values and stay inside their tensors. Fake tensors
    have no values, and those of vmap can't be looked at.
    """
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return False
    if not x.is_cpu and os.environ.get("PYKERNELS_CHECK", "0") != "1":
        return False
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return False
        x = functorch.get_unwrapped(x)
    return True


def tensor(name: str, x: object, axes: str) -> Tensor:
    """Checks that `x` is a tensor with the axes that `axes` spells ("B T H K")."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor [{', '.join(axes.split())}], got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {x.layout}")
    if x.is_nested:
        raise TypeError(f"{name} must be a strided tensor, got a nested one")
    rank = axes.count(" ") + 1
    if x.dim() != rank:
        raise ValueError(f"{name} must have {rank} axes [{', '.join(axes.split())}], got shape {list(x.shape)}")
    return x


def shape(name: str, x: Tensor, expected: dict[str, int]) -> None:
    """Checks the sizes of `x` against the axes' names and sizes, in order; None accepts any."""
    sizes = x.shape
    for actual, (label, size) in zip(sizes, expected.items()):
        if size is not None and actual != size:
            labels = ", ".join(f"{label}={'any' if size is None else size}" for label, size in expected.items())
            raise ValueError(f"{name} must have shape [{labels}], got {list(sizes)} ({label} differs)")


def main_dtype(name: str, x: Tensor) -> None:
    """Checks for a dtype that the ops compute in; float64 only on the CPU."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or (on the CPU) float64, got {x.dtype}")


def same_dtype(name: str, x: Tensor, reference_name: str, reference: Tensor) -> None:
    if x.dtype != reference.dtype:
        raise TypeError(f"{name} must have {reference_name}'s dtype {reference.dtype}, got {x.dtype}")


def same_device(name: str, x: Tensor, reference_name: str, reference: Tensor) -> None:
    if x.device != reference.device:
        raise ValueError(f"{name} must be on {reference_name}'s device {reference.device}, got {x.device}")


def integer(name: str, x: Tensor) -> None:
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")


def number(name: str, x: object) -> float:
    if isinstance(x, bool) or not isinstance(x, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    if not -math.inf < x < math.inf:
        raise ValueError(f"{name} must be finite, got {x}")
    return x


def flag(name: str, x: object) -> bool:
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be True or False, got {x!r}")
    return x


def autocast(*tensors: object) -> tuple:
    """Under autocast, casts as torch's own attention does: to the autocast dtype, but for float64."""
    device = next((x.device.type for x in tensors if isinstance(x, Tensor)), "cpu")
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype, castable = torch.get_autocast_dtype(device), (torch.float32, torch.bfloat16, torch.float16)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in castable else x for x in tensors)


def cu_seqlens(name: str, x: object, total: int, device: torch.device) -> Tensor:
    """Checks offsets [sequences + 1] of sequences packed along an axis of `total` tokens; returns them as int32."""
    tensor(name, x, "sequences+1")
    integer(name, x)
    if x.device != device:
        raise ValueError(f"{name} must be on the tensors' device {device}, got {x.device}")
    if x.shape[0] < 1:
        raise ValueError(f"{name} must hold sequences + 1 offsets, got an empty tensor")
    if values_checked(x):
        values = x.tolist()
        if values[0] != 0:
            raise ValueError(f"{name} must start at 0, got {values[0]}")
        for i, (a, b) in enumerate(zip(values, values[1:])):
            if b < a:
                raise ValueError(f"{name} must not decrease, got {a} then {b} at index {i + 1}")
        if values[-1] > total:
            raise ValueError(f"{name} must end within the {total} packed tokens, got {values[-1]}")
    return x.to(torch.int32).contiguous()


def parameter(name: str, x: Tensor, reference_name: str, reference: Tensor) -> None:
    """Checks for what parameters, gates and states may be: the main dtype or float32, on the same device."""
    if x.dtype not in (reference.dtype, torch.float32):
        allowed = " or ".join(dict.fromkeys(map(str, (reference.dtype, torch.float32))))
        raise TypeError(f"{name} must be {allowed} beside {reference_name}'s {reference.dtype}, got {x.dtype}")
    same_device(name, x, reference_name, reference)


def state_indices(name: str, x: object, batch: int, slots: int, device: torch.device) -> Tensor:
    """Checks the state slots [B] of a step, -1 for padding, each other at most once; returns them as int32."""
    tensor(name, x, "B")
    integer(name, x)
    if x.device != device:
        raise ValueError(f"{name} must be on the tensors' device {device}, got {x.device}")
    shape(name, x, {"B": batch})
    if values_checked(x):
        seen: set[int] = set()
        for b, slot in enumerate(x.tolist()):
            if not -1 <= slot < slots:
                raise ValueError(f"{name} must hold slots below {slots}, or -1 for padding, "
                                 f"got {slot} for batch entry {b}")
            if slot >= 0 and slot in seen:
                raise ValueError(f"{name} must name each slot once, got {slot} again for batch entry {b}")
            seen.add(slot)
    return x.to(torch.int32).contiguous()


def inference(function: str, alternative: str, **tensors: Tensor | None) -> None:
    """In grad mode: raises when autograd would follow an in-place function."""
    for name, x in tensors.items():
        if x is not None and x.requires_grad:
            raise RuntimeError(f"{name} requires grad, but {function} is for inference (it overwrites its state): "
                               f"call it under torch.no_grad(), or use {alternative}")


def writable(name: str, x: Tensor) -> None:
    """Checks that no two elements of `x` share memory, as those of an expanded tensor do."""
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride())):
        raise ValueError(f"{name} is overwritten, so its elements must not share memory, "
                         f"got strides {tuple(x.stride())}")
