"""Defining ops that are implemented in Python (Triton) beside those of the native library.

A backend's ops are found by name: `<op>_<part>_<backend>` in `torch.ops.pykernels`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

NAMESPACE = "pykernels"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(name: str, schema: str, implementation: Callable, fake: Callable | None = None) -> None:
    """Defines `pykernels::name` with `schema` ("(Tensor x) -> Tensor"), implemented for every device by a function."""
    _library.define(name + schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    if fake is not None:
        register_fake(name, fake)


def register_fake(name: str, fake: Callable) -> None:
    """Registers the shape function of `pykernels::name`, which must be defined."""
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


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

    _library.impl(name, run, "ADInplaceOrView", with_keyset=True)
