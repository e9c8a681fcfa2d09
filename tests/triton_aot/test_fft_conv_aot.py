"""The long convolution's Triton kernels compile for every target, fit its memory and do not spill."""

from __future__ import annotations

import re

import pytest
import torch
from isolated import isolated

ahead_of_time = isolated(TRITON_INTERPRET="0")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


def _meta(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _launches(target: str, dtype: torch.dtype, length: int, *, taps: int | None = None, rev: int = 0,
              gates: bool = True, circular: bool = False, channels: int = 64, batch: int = 2):
    """What the forward and the backward pass launch."""
    import aot

    from pykernels.ops.fft_conv import triton as module

    u, k = _meta(batch, channels, length, dtype=dtype), _meta(channels, length if taps is None else taps)
    gate = u if gates else None
    inputs = u, k, _meta(channels, rev) if rev else None, _meta(channels) if gates else None, gate, gate, 1, circular
    return aot.launches(module, target, lambda: (module.fwd(*inputs), module.bwd(u, *inputs, True, True)))


def _check(target: str, *arguments, **options: object) -> None:
    import aot

    seen = set()
    for launch in _launches(target, *arguments, **options):
        types, constants, hints = aot.specialization(launch)
        known = launch.name, str(types), str(constants), str(hints)
        if known in seen:
            continue
        seen.add(known)
        kernel = aot.compiled(launch, target)
        assert kernel.metadata.shared <= aot.SHARED_MEMORY[target], launch.name
        used = aot.resources(kernel)
        assert used["registers"] > 4 and used["spilled"] == 0, f"{launch.name} {constants}: {used}"
