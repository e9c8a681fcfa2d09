"""The selective scan's Triton kernels compile for every target and fit its memory."""

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


def _launches(target: str, dtype: torch.dtype, *, length: int = 4096, sequences: int = 0, state: int = 16,
              B: str = "token",
              C: str = "token", options: bool = True, token_first: bool = False):
    """What the forward pass, the backward pass and a step launch."""
    import aot

    from pykernels.ops.selective_scan import triton as module

    D, batch = 1536, 1 if sequences else 2
    u = _meta(batch, length, D, dtype=dtype).transpose(1, 2) if token_first else _meta(batch, D, length, dtype=dtype)
    cu = _meta(sequences + 1, dtype=torch.int32) if sequences else None
    A, vector, states = _meta(D, state), _meta(D) if options else None, _meta(sequences or batch, D, state)
    B, C = (_meta(D, state) if kind == "constant" else _meta(batch, 4 if kind == "group" else 1, state, length,
                                                             dtype=dtype) for kind in (B, C))
    z, initial = (u, states) if options else (None, None)
    inputs = u, u, A, B, C, vector, z, vector, initial, cu, options
    chunks = module.tiles_packed(length, sequences, 64) if sequences else batch * (length // 64 + 1)
    x, projection = _meta(batch, 1, D, dtype=dtype), _meta(batch, 1, state, dtype=dtype)
    return aot.launches(module, target, lambda: (
        module.fwd(*inputs, True), module.bwd(u, initial, *inputs, _meta(chunks, state, D)),
        module.step(x, _meta(batch, 1, D, state), x, A[None], projection, projection,
                    None if vector is None else vector[None],
                    x if options else None, None if vector is None else vector[None],
                    _meta(batch, dtype=torch.int32) if options else None, options)))


def _check(target: str, dtype: torch.dtype, **options: object) -> None:
    import aot

    aot.check_fit(_launches(target, dtype, **options), target)


@ahead_of_time
@pytest.mark.parametrize("target", TARGETS)
def test_main_configurations(target):
    _check(target, BF16)


@ahead_of_time
@pytest.mark.parametrize("target", ["sm_86", "sm_90", "gfx942"])
def test_options(target):
    _check(target, FP32, sequences=5, B="constant", C="group", token_first=True)
    _check(target, FP16, B="group", C="constant", options=False, state=7)


@ahead_of_time
def test_many_states():
    _check("sm_86", BF16, state=256)


@ahead_of_time
def test_lengths_do_not_change_what_is_compiled():
    """Serving calls with ever different lengths must not compile ever new kernels."""
    import aot

    def compiled_by(length: int, sequences: int):
        # Strides over batches and groups are not used with one of each; those of B and C follow the length.
        return [aot.specialization(launch, ignore=r"stride_\w+b|stride_[BC][gn]")
                for launch in _launches("sm_90", BF16, length=length, sequences=sequences, token_first=True)]

    first = compiled_by(1000, 3)
    assert len(first) == 7
    for lengths in ((1024, 16), (1001, 1), (4096, 2)):
        assert compiled_by(*lengths) == first


def test_every_kernel_is_covered():
    """The cases above launch every kernel that the module defines."""
    from pathlib import Path

    source = Path(__file__).parents[2] / "pykernels" / "ops" / "selective_scan" / "triton.py"
    defined = set(re.findall(r"def (selective_scan_\w+_kernel)", source.read_text()))
    assert defined == {f"selective_scan_{part}_kernel" for part in ("fwd_chunk", "fwd_carry", "fwd", "bwd_chunk",
                                                                    "bwd", "step")}
