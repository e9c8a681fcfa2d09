"""Defining ops that are implemented in Python (Triton) beside those of the native library.

A backend's ops are found by name: `<op>_<part>_<backend>` in `torch.ops.pykernels`.
"""

from __future__ import annotations

import functools
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


@functools.cache
def op(name: str) -> torch._ops.OpOverload:
    """The op `pykernels::name`, looked up once."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default
