"""The causal convolution's Triton kernels under the interpreter, on the CPU."""

from __future__ import annotations

import pytest
import torch
from isolated import isolated

triton = pytest.importorskip("triton")

from pykernels import testing  # noqa: E402
from pykernels.testing import CAUSAL_CONV1D, CAUSAL_CONV1D_STEP, Target  # noqa: E402
from pykernels.testing import causal_conv1d as cases  # noqa: E402
from pykernels.testing.causal_conv1d import conv_case, conv_step_case  # noqa: E402

interpreted = isolated(TRITON_INTERPRET="1")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Between them these use every option and branch at the interpreter's tiles: 16 channels, 32 tokens.
CONVOLUTIONS = (
    conv_case("one", channels=1, length=1),
    conv_case("plain", batch=2, channels=19, length=70, bias=False),
    conv_case("silu", batch=2, channels=19, length=64, activation="silu", wide=True),
    conv_case("state", batch=2, channels=17, length=45, activation="silu", state=True),
    conv_case("shorter-than-the-filter", batch=2, channels=5, length=2, state=True, activation="silu"),
    conv_case("width-1", channels=5, length=40, width=1, state=True),
    conv_case("width-9", channels=5, length=70, width=9, state=True, activation="silu"),
    conv_case("packed", channels=18, length=150, lengths=(33, 0, 1, 64, 40), activation="silu", state=True),
    conv_case("packed-rest", channels=5, length=90, lengths=(30, 1, 40), bias=False),
    conv_case("packed-none", channels=5, length=20, lengths=()),
    conv_case("layout-token-first", batch=2, channels=35, length=50, activation="silu", state=True,
              layout=cases.token_first),
    conv_case("layout-strided", channels=8, length=40, layout=cases.strided),
    conv_case("layout-padded", channels=8, length=40, layout=cases.padded, state=True),
    conv_case("large", channels=20, length=40, activation="silu", scale=1e3),
    conv_case("no-tokens", batch=2, channels=5, length=0, state=True),
    conv_case("no-batch", batch=0, channels=5, length=9, state=True),
)
STEPS = (
    conv_step_case("step", batch=3, channels=37, activation="silu"),
    conv_step_case("several-programs", batch=2, channels=150, wide=True, bias=False),
    conv_step_case("width-1", batch=2, channels=20, width=1),
    conv_step_case("tokens", batch=2, channels=20, tokens=3, activation="silu"),
    conv_step_case("many-tokens", batch=2, channels=33, tokens=11, width=6),
    conv_step_case("indexed", batch=4, channels=37, indices=(5, 0, -1, 2), slots=7, activation="silu"),
    conv_step_case("layout-token-first", batch=2, channels=40, tokens=2, layout=cases.token_first),
    conv_step_case("layout-strided", batch=2, channels=40, layout=cases.strided, indices=(1, 0)),
)


@interpreted
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("op, case", [pytest.param(op, case, id=f"{op.name}-{case}")
                                      for op, of_op in ((CAUSAL_CONV1D, CONVOLUTIONS), (CAUSAL_CONV1D_STEP,
                                                                                        STEPS)) for case in of_op])
def test_matches_the_float64_reference(op, case, dtype):
    errors = testing.check(op, case, dtype, Target("triton", "cpu"))
    assert {error.tensor for error in errors} >= {*op.outputs, *op.mutates}
    assert all(error.ok for error in errors), "\n".join(map(str, errors))


def _surrounded(x: torch.Tensor) -> torch.Tensor:
    """x [1, D, L] inside memory that is NaN on all sides, along time."""
    nothing = torch.full_like(x, torch.nan)
    return torch.cat([nothing, x, nothing], dim=2)[:, :, x.shape[2]:2 * x.shape[2]]


@interpreted
@pytest.mark.parametrize("offsets", [(0, 80, 20, 50), (-5, 20, 300, 50), (0, 2**31 - 1, -2**31, 50), (70, 30, 45, 60)])
def test_offsets_that_lie_do_not_reach_outside(offsets, monkeypatch):
    """Kernels clamp cu_seqlens: whatever these hold, nothing outside the tensors is read or written."""
    # The sequences overlap or leave gaps, so that some tokens have no owner: they keep what is in memory, here zeros.
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    x, dout = (_surrounded(torch.randn(1, 5, 50)) for _ in range(2))
    weight, bias, state = torch.randn(5, 4), torch.randn(5), torch.randn(3, 5, 3)
    inputs = x, weight, bias, state, torch.tensor(offsets, dtype=torch.int32), True
    out, final_state = torch.ops.pykernels.causal_conv1d_fwd_triton(*inputs)
    results = out, final_state, *torch.ops.pykernels.causal_conv1d_bwd_triton(dout, torch.randn(3, 5, 3), *inputs)
    for y in results:
        assert y.isfinite().all() and y.count_nonzero()


@interpreted
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "channels", "time"])
def test_offsets_pass_32_bits(axis):
    """Elements lie further apart than 2**31 elements, along each axis; the memory between is never touched."""
    shape, stride = [1, 1, 1], [1, 1, 1]
    shape[axis], stride[axis] = 3, 2**30 + 2**20
    x, dout = (torch.randn(shape, dtype=FP16) for _ in range(2))
    weight = torch.randn(shape[1], 4)
    fwd, bwd = torch.ops.pykernels.causal_conv1d_fwd_triton, torch.ops.pykernels.causal_conv1d_bwd_triton
    near = *fwd(x, weight, None, None, None, True), *bwd(dout, None, x, weight, None, None, None, True)
    x, dout = (torch.empty_strided(shape, stride, dtype=FP16).copy_(y) for y in (x, dout))
    far = *fwd(x, weight, None, None, None, True), *bwd(dout, None, x, weight, None, None, None, True)
    for y, z in zip(far, near):
        assert torch.equal(y, z) and (y.count_nonzero() or not y.numel())
