"""What the peers' entries share: conditions, and calls in the layouts that they like."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from torch import Tensor

from ..kit import Call, Case, step


def on_gpu(module: str) -> Callable[[Case], str | None]:
    """The usual conditions of a GPU package."""

    def missing(case: Case) -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        return None if case.device == "cuda" else "runs on NVIDIA GPUs only"

    return missing


def needs(module: str, *, causal_only: bool = False) -> Callable[[Case], str | None]:
    """The usual conditions of a GPU package for attention."""

    def missing(case: Case) -> str | None:
        package = module.split(".")[0]
        if importlib.util.find_spec(package) is None or importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        if case.device != "cuda":
            return "runs on NVIDIA GPUs only"
        if case.dtype not in ("bf16", "fp16"):
            return f"has no {case.dtype}"
        if causal_only and case.options != "causal":
            return "is causal only"
        return None

    return missing


def _named(tensors: tuple[Tensor, ...], view: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: view(x) for name, x in zip(("out", "dq", "dk", "dv"), tensors)}


def heads_first(problem, function: Callable[..., Tensor]) -> Call:
    """A call on [B, H, T, D], contiguous, as torch's attention likes it."""
    inputs = [x.transpose(1, 2).contiguous() for x in (problem.q, problem.k, problem.v)]
    dout = None if problem.dout is None else problem.dout.transpose(1, 2).contiguous()
    return Call(step(function, inputs, dout), lambda result: _named(result, lambda x: x.transpose(1, 2)))


def time_first(problem, function: Callable[..., Tensor]) -> Call:
    """A call on [B, T, H, D], contiguous, as flash-attn and we like it."""
    run = step(function, (problem.q, problem.k, problem.v), problem.dout)
    return Call(run, lambda result: _named(result, lambda x: x))
