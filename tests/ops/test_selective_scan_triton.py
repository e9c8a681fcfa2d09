"""The selective scan's Triton kernels under the interpreter, which takes scans element by element: small cases."""

from __future__ import annotations

import pytest
import torch
from isolated import isolated

triton = pytest.importorskip("triton")

from pykernels import BackendUnavailable, selective_scan, testing  # noqa: E402
from pykernels.testing import SELECTIVE_SCAN, SELECTIVE_SCAN_STEP, Target  # noqa: E402
from pykernels.testing import causal_conv1d as layouts  # noqa: E402
from pykernels.testing.selective_scan import scan_case, scan_step_case  # noqa: E402

interpreted = isolated(TRITON_INTERPRET="1")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Between them these use every option and branch at the interpreter's blocks: 4 channels, chunks of 64 tokens.
SCANS = (
    scan_case("one", channels=1, length=1, state=1, given=()),
    scan_case("plain", channels=3, length=64, state=2, given=()),
    scan_case("mamba", batch=2, channels=5, length=66, state=2, wide=True),
    scan_case("long", channels=2, length=130, state=2, given=("D", "z", "initial_state")),
    scan_case("all-but-softplus", channels=3, length=20, state=3, delta_softplus=False),
    scan_case("constant-B", channels=3, length=70, state=2, B="constant"),
    scan_case("constant-C", channels=3, length=70, state=2, C="constant", given=("z",)),
    scan_case("groups", batch=2, channels=10, length=20, state=2, B="group", C="group"),
    scan_case("groups-and-constant", channels=4, length=20, state=2, B="constant", C="group"),
    scan_case("packed", channels=2, length=90, state=2, lengths=(65, 0, 1, 24)),
    scan_case("packed-rest", channels=2, length=90, state=1, lengths=(20, 64), given=("D", "delta_bias")),
    scan_case("packed-none", channels=2, length=10, state=1, lengths=(), given=("D",)),
    scan_case("layout-token-first", batch=2, channels=5, length=20, state=2, layout=layouts.token_first),
    scan_case("layout-strided", channels=3, length=20, state=2, layout=layouts.strided),
    scan_case("tiny-delta", channels=3, length=20, state=2, values=lambda t: {**t, "delta": t["delta"] - 12}),
    scan_case("large-delta", channels=3, length=20, state=2, values=lambda t: {**t, "delta": t["delta"] + 60}),
    scan_case("no-tokens", channels=3, length=0, state=2),
    scan_case("no-batch", batch=0, channels=3, length=9, state=2),
)
STEPS = (
    scan_step_case("mamba", batch=3, axes=(70,), wide=True),
    scan_step_case("one", batch=1, axes=(1,), state=1, given=(), delta_softplus=False),
    scan_step_case("groups", batch=2, axes=(36,), groups=3, state=7),
    scan_step_case("heads-groups", batch=2, axes=(6, 5), groups=2, state=64),
    scan_step_case("mamba-2", batch=2, axes=(4, 16), groups=1, state=128, tied=True, wide=True),
    scan_step_case("indexed", batch=4, axes=(37,), indices=(5, 0, -1, 2), slots=7),
    scan_step_case("layout-strided-state", batch=2, axes=(3, 8), strided_state=True, state=5),
)


def _matrix():
    for op, cases in ((SELECTIVE_SCAN, SCANS), (SELECTIVE_SCAN_STEP, STEPS)):
        for case in cases:
            # Dtypes differ in loads and stores alone; float16's are everybody's, bfloat16's the interpreter's own.
            for dtype in (FP32, BF16, FP16) if op is SELECTIVE_SCAN_STEP or case.name == "mamba" else (FP32, BF16):
                yield pytest.param(op, case, dtype, id=f"{op.name}-{case}-{dtype}")


@interpreted
@pytest.mark.parametrize("op, case, dtype", list(_matrix()))
def test_matches_the_float64_reference(op, case, dtype):
    errors = testing.check(op, case, dtype, Target("triton", "cpu"))
    assert {error.tensor for error in errors} >= {*op.outputs, *op.mutates}
    assert all(error.ok for error in errors), "\n".join(map(str, errors))


def _surrounded(x: torch.Tensor) -> torch.Tensor:
    """x [1, ..., L] inside memory that is NaN on all sides, along time."""
    nothing = torch.full_like(x, torch.nan)
    return torch.cat([nothing, x, nothing], dim=-1)[..., x.shape[-1]:2 * x.shape[-1]]


@interpreted
@pytest.mark.parametrize("offsets", [(0, 80, 20, 50), (-5, 20, 300, 50), (0, 2**31 - 1, -2**31, 50), (70, 30, 45, 60)])
def test_offsets_that_lie_do_not_reach_outside(offsets, monkeypatch):
    """Kernels clamp cu_seqlens: whatever these hold, nothing outside the tensors is read or written."""
    # The sequences overlap or leave gaps, so that some tokens have no owner: they keep what is in memory, here zeros.
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    u, delta, z, dout = (_surrounded(torch.randn(1, 2, 50)) for _ in range(4))
    B, C = (_surrounded(torch.randn(1, 1, 2, 50)) for _ in "BC")
    inputs = (u, delta, -torch.rand(2, 2), B, C, torch.randn(2), z, torch.randn(2), torch.randn(3, 2, 2),
              torch.tensor(offsets, dtype=torch.int32), True)
    out, final_state, states = torch.ops.pykernels.selective_scan_fwd_triton(*inputs, True)
    bwd = torch.ops.pykernels.selective_scan_bwd_triton
    for y in (out, final_state, *bwd(dout, torch.randn(3, 2, 2), *inputs, states)):
        assert y.isfinite().all() and y.count_nonzero()


@interpreted
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "channels", "time"])
def test_offsets_pass_32_bits(axis):
    """Elements lie further apart than 2**31 elements, along each axis; the memory between is never touched."""
    shape, stride = [1, 1, 1], [1, 1, 1]
    shape[axis], stride[axis] = 3, 2**30 + 2**20
    near = [torch.randn(shape, dtype=FP16) for _ in range(4)]
    far = [torch.empty_strided(shape, stride, dtype=FP16).copy_(x) for x in near]
    batch, channels, length = shape
    B, state = torch.randn(batch, 1, 2, length), torch.randn(batch, channels, 2)
    results = []
    for u, delta, z, dout in (near, far):
        inputs = u, delta, -torch.ones(channels, 2), B, B, None, z, None, state, None, True
        out, final_state, states = torch.ops.pykernels.selective_scan_fwd_triton(*inputs, True)
        results.append((out, final_state, *torch.ops.pykernels.selective_scan_bwd_triton(dout, None, *inputs, states)))
    for x, y in zip(*results):
        assert torch.equal(x, y) and (x.count_nonzero() or not x.numel())


@interpreted
def test_complex_states_and_float64_are_named_as_unserved():
    u, B = torch.randn(1, 2, 5), torch.randn(1, 3, 5)
    with pytest.raises(BackendUnavailable, match="take a real A.*'cpu' can"):
        selective_scan(u, u, torch.zeros(2, 3, dtype=torch.complex64), B, B, backend="triton")
    with pytest.raises(BackendUnavailable, match="compute in float32.*'cpu' can"):
        selective_scan(u.double(), u.double(), torch.zeros(2, 3).double(), B.double(), B.double(), backend="triton")
