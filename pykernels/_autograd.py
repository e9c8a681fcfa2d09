"""What the ops' autograd shares: when it is needed, what it takes, and second derivatives from the reference alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def followed(*tensors: Tensor | None) -> bool:
    """Whether autograd follows a call on these tensors.

    In forward mode too: there the autograd.Function raises, where the bare op would give zero tangents. And inside of
    torch.func's transforms, whose tensors do not tell whether autograd outside follows them.
    """
    if forward_ad._current_level >= 0:
        return True
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return torch.is_grad_enabled()
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def apart(*arguments: object) -> tuple[object, ...]:
    """The arguments of an autograd.Function: while Dynamo traces, which takes no tensor twice, repeats become views."""
    if not torch.compiler.is_compiling():
        return arguments
    seen: list[Tensor] = []
    result = []
    for x in arguments:
        if isinstance(x, Tensor):
            if any(x is y for y in seen):
                x = x.view_as(x)
            seen.append(x)
        result.append(x)
    return tuple(result)


def signature_kept(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """An autograd.Function whose forward's signature is found once: PyTorch binds every call's arguments to it,
    and would find it anew each time (25 us)."""
    function.forward.__signature__ = inspect.signature(function.forward)
    return function


def second_derivative(function: Callable[..., tuple[Tensor, ...]], primals: Sequence[Tensor | None],
                      cotangents: Sequence[Tensor | None],
                      upstream: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The vjp of (cotangents, primals) -> vjp of `function` at primals, for the gradients `upstream` of that result.

    None among the primals is an argument left out, among the cotangents or upstream a zero.
    -> (gradients of the cotangents, gradients of the primals), None where the argument is.
    """
    given = [i for i, x in enumerate(primals) if x is not None]

    def outputs(*present: Tensor) -> tuple[Tensor, ...]:
        arguments: list[Tensor | None] = [None] * len(primals)
        for i, x in zip(given, present):
            arguments[i] = x
        return function(*arguments)

    def gradients(present_cotangents: tuple[Tensor, ...], present: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        values, vjp = torch.func.vjp(outputs, *present)
        held = iter(present_cotangents)
        return vjp(tuple(torch.zeros_like(y) if c is None else next(held) for y, c in zip(values, cotangents)))

    present = tuple(primals[i] for i in given)
    held = tuple(c for c in cotangents if c is not None)
    values, vjp = torch.func.vjp(gradients, held, present)
    dheld, dpresent = vjp(tuple(torch.zeros_like(y) if upstream[i] is None else upstream[i] for i, y in zip(given,
                                                                                                            values)))
    dheld = iter(dheld)
    result: list[Tensor | None] = [None] * len(primals)
    for i, gradient in zip(given, dpresent):
        result[i] = gradient
    return [None if c is None else next(dheld) for c in cotangents], result
