"""The causal convolution's Triton kernels compile for every target, fit its memory and do not spill."""

from __future__ import annotations

import re

import pytest
import torch
from isolated import isolated

ahead_of_time = isolated(TRITON_INTERPRET="0")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _launches(target: str, dtype: torch.dtype, *, length: int = 4096, sequences: int = 0, width: int = 4,
              silu: bool = True,
              state: bool = True, token_first: bool = False):
    """What the forward pass, the backward pass and a step launch."""
    import aot

    from pykernels.ops.causal_conv1d import triton as module

    batch = 1 if sequences else 2
    x = _meta(batch, length, 1536, dtype=dtype).transpose(1, 2) if token_first else _meta(batch, 1536, length,
                                                                                          dtype=dtype)
    weight, bias = _meta(1536, width, dtype=FP32), _meta(1536, dtype=FP32) if silu else None
    cu = _meta(sequences + 1, dtype=torch.int32) if sequences else None
    states = _meta(sequences or batch, 1536, width - 1, dtype=dtype)
    inputs = x, weight, bias, states if state else None, cu, silu
    return aot.launches(module, target, lambda: (
        module.fwd(*inputs), module.bwd(x, states if state else None, *inputs),
        module.step(x[:, :, :1], states[:batch], weight, bias, _meta(batch, dtype=torch.int32) if state else None,
                    silu)))


def _check(target: str, dtype: torch.dtype, **options: object) -> None:
    import aot

    aot.check_fit(_launches(target, dtype, **options), target)


@ahead_of_time
@pytest.mark.parametrize("token_first", [False, True], ids=["channel-first", "token-first"])
@pytest.mark.parametrize("target", TARGETS)
def test_main_configurations(target, token_first):
    _check(target, BF16, token_first=token_first)


@ahead_of_time
@pytest.mark.parametrize("target", ["sm_86", "sm_90", "gfx942"])
def test_options(target):
    _check(target, FP32, sequences=5, width=7)
    _check(target, FP16, silu=False, state=False, width=2)


@ahead_of_time
def test_lengths_do_not_change_what_is_compiled():
    """Serving calls with ever different lengths must not compile ever new kernels."""
    import aot

    def compiled_by(length: int, sequences: int):
        # Strides over batches are not used with one batch, and follow the length when channel-first.
        return [aot.specialization(launch, ignore=r"stride_\w+b")
                for launch in _launches("sm_90", BF16, length=length, sequences=sequences, token_first=True)]

    first = compiled_by(1000, 3)
    assert len(first) == 6
    for lengths in ((1024, 16), (1001, 1), (4096, 2)):
        assert compiled_by(*lengths) == first


def test_every_kernel_is_covered():
    """The cases above launch every kernel that the module defines."""
    from pathlib import Path

    source = Path(__file__).parents[2] / "pykernels" / "ops" / "causal_conv1d" / "triton.py"
    defined = set(re.findall(r"def (causal_conv1d_\w+_kernel)", source.read_text()))
    assert defined == {f"causal_conv1d_{part}_kernel" for part in ("fwd", "fwd_state", "bwd_sums", "bwd_input",
                                                                   "bwd_state", "step")}
