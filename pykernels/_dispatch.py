"""The ops of all backends: those of the native library, and beside them those that are implemented in Python (Triton).

A backend's ops are found by name: `<op>_<part>_<backend>` in `torch.ops.pykernels`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

import torch

from . import _library

NAMESPACE = "pykernels"
_fragment = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(name: str, schema: str, implementation: Callable) -> None:
    """Defines `pykernels::name` with `schema` ("(Tensor x) -> Tensor"), implemented for every device by a function."""
    _fragment.define(name + schema)
    _fragment.impl(name, implementation, "CompositeExplicitAutograd")


def register_fake(name: str, fake: Callable) -> None:
    """Registers the shape function of `pykernels::name`, which must be defined."""
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_fragment)


def empty_like_layout(x: torch.Tensor) -> torch.Tensor:
    """A new tensor [B, D, L] laid out as x is: token by token when x is, else channel by channel."""
    if x.stride(1) == 1 and x.stride(2) != 1:
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1]).transpose(1, 2)
    return x.new_empty(x.shape)


def op(name: str) -> torch._ops.OpOverload:
    """The op `pykernels::name`."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def bump_versions(name: str, mutated: tuple[int, ...]) -> None:
    """Makes `pykernels::name` bump the version counters of the arguments it overwrites, so that autograd notices.

    Neither the native library nor `define` does so by itself.
    """

    def run(keyset, *args):
        for i in mutated:
            torch.autograd.graph.increment_version(args[i])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op(name).redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    _fragment.impl(name, run, "ADInplaceOrView", with_keyset=True)


def register(name: str, schemas: Mapping[str, str], fakes: Mapping[str, Callable], *,
             mutated: Mapping[str, tuple[int, ...]] | None = None, triton: str | None = None) -> Callable:
    """Registers what the parts of op `name` ("fwd", "bwd", ...) need on every backend that has them.

    The native library defines its parts itself; those of Triton are the functions of the module named `triton`,
    imported at the first call since that takes a second. `mutated` gives the positions of the arguments that a part
    overwrites.
    -> run(part, backend, *args), which calls one; one that overwrites below autograd: rule out gradients before.
    """
    ops: dict[tuple[str, str], torch._ops.OpOverload] = {}
    mutated = {} if mutated is None else mutated

    def of_triton(part: str) -> Callable:
        def implementation(*args):
            return getattr(importlib.import_module(triton), part)(*args)

        return implementation

    _library.error()  # loads it
    for part, schema in schemas.items():
        if triton is not None:
            define(f"{name}_{part}_triton", schema, of_triton(part))
        for backend in ("cpu", "cuda", "triton"):
            full = f"{name}_{part}_{backend}"
            if hasattr(getattr(torch.ops, NAMESPACE), full):
                ops[part, backend] = op(full)
                register_fake(full, fakes[part])
                if part in mutated:
                    bump_versions(full, mutated[part])

    def run(part: str, backend: str, *args):
        call = ops.get((part, backend)) or op(f"{name}_{part}_{backend}")
        if part not in mutated or torch.compiler.is_compiling():
            return call(*args)
        # What the dispatcher would do on the way down to the kernel, without the microseconds of its layers in Python.
        torch.autograd.graph.increment_version([args[i] for i in mutated[part]])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return call(*args)

    return run
