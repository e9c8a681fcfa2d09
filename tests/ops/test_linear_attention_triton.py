"""Linear attention's Triton kernels under the interpreter, on the CPU: numbers, segments, limits, strong decay."""

from __future__ import annotations

import pytest
import torch
from isolated import isolated

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from pykernels import linear_attention, testing  # noqa: E402
from pykernels.ops.linear_attention.triton import _exp  # noqa: E402
from pykernels.testing import LINEAR_ATTENTION, LINEAR_ATTENTION_STEP, RETENTION, RETENTION_STEP, Target  # noqa: E402
from pykernels.testing.linear_attention import linear_case  # noqa: E402

interpreted = isolated(TRITON_INTERPRET="1")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TRITON = Target("triton", "cpu")

# At 64 tokens to a segment: sequences of several, whose states a scan joins.
SEGMENTS = (
    linear_case("segments-head", batch=2, tokens=150, heads=3, key_dim=20, value_dim=40, decay="head", state=True),
    linear_case("segments-token-reverse", tokens=200, key_dim=16, decay="token", state=True, reverse=True),
    linear_case("segments-channel", tokens=140, heads=1, key_dim=16, value_dim=20, decay="channel", state=True),
    linear_case("segments-normalize", tokens=150, key_dim=20, value_dim=35, decay="token", normalize=True, state=True),
    linear_case("segments-bonus", tokens=130, heads=2, heads_k=1, key_dim=40, value_dim=16, decay="token", bonus=True,
                state=True),
    linear_case("segments-packed", tokens=250, key_dim=16, decay="head", lengths=(70, 0, 64, 1, 100), state=True),
    linear_case("segments-packed-normalize", tokens=160, heads=1, key_dim=16, lengths=(30, 128), normalize=True),
)
# The shapes and options that float16 and bfloat16 run; a decay per channel is slow here, an operation at a time.
HALF = ("tiny", "head-decay", "token-decay", "leaf-edges", "key-33-value-70", "grouped", "bonus-token",
        "normalize-decay", "reverse", "narrow", "packed", "layout-expanded")


def _checked(op, case, dtype):
    errors = testing.check(op, case, dtype, TRITON)
    assert {error.tensor for error in errors} >= {*op.outputs, *op.mutates}
    assert all(error.ok for error in errors), "\n".join(map(str, errors))


def _params(ops, dtypes, of):
    return [pytest.param(op, case, dtype, id=f"{op.name}-{case}-{str(dtype).removeprefix('torch.')}")
            for op in ops for case in of(op) for dtype in dtypes if dtype in case.dtypes]


@interpreted
@pytest.mark.parametrize("op, case, dtype", [
    *_params((LINEAR_ATTENTION, LINEAR_ATTENTION_STEP), (FP32,), lambda op: op.cases + op.extremes),
    *_params((LINEAR_ATTENTION,), (FP16, BF16), lambda op: [case for case in op.cases if case.name in HALF]),
    *_params((LINEAR_ATTENTION_STEP,), (FP16, BF16), lambda op: op.cases),
    *_params((RETENTION, RETENTION_STEP), (FP32, FP16), lambda op: op.cases),
])
def test_matches_the_float64_reference(op, case, dtype):
    _checked(op, case, dtype)


@pytest.fixture
def short_segments(monkeypatch):
    from pykernels.ops.linear_attention import registration

    monkeypatch.setattr(registration, "SEGMENT", 64)


@interpreted
@pytest.mark.parametrize("dtype", (FP32, FP16), ids=str)
@pytest.mark.parametrize("case", SEGMENTS, ids=str)
def test_several_segments(case, dtype, short_segments):
    _checked(LINEAR_ATTENTION, case, dtype)


@interpreted
def test_several_segments_without_a_gradient(short_segments):
    """Forward keeps no states for backward then, but needs them between segments."""
    args = SEGMENTS[1].make(FP32, "cpu").args
    out, final = linear_attention(**args, return_final_state=True, backend="triton")
    leaves = {name: x.requires_grad_() if name == "q" else x for name, x in args.items()}
    for x, y in zip((out, final), linear_attention(**leaves, return_final_state=True, backend="triton")):
        assert torch.equal(x, y) and x.count_nonzero()


@interpreted
@pytest.mark.parametrize("decay", ("token", "channel"))
def test_a_sequence_gets_the_same_bits_in_every_batch(decay):
    case = linear_case(f"batch-{decay}", batch=3, tokens=70, heads=2, key_dim=16, decay=decay, state=True)
    args = dict(case.make(FP32, "cpu").args)
    alone = {name: x[1:2] for name, x in args.items()}
    together, one = (testing.run(LINEAR_ATTENTION, testing.Sample(x, tuple(x)), "triton",
                                 grad={"out": torch.ones_like(x["v"])}) for x in (args, alone))
    for name, x in one.items():
        assert torch.equal(x, together[name][1:2]) and x.count_nonzero(), name


@interpreted
def test_float16_states_may_exceed_its_range():
    """The state adds up to 300 000 here; what is read of it is small again."""
    q, k = torch.full((1, 150, 1, 16), 2.0 ** -10, dtype=FP16), torch.full((1, 150, 1, 16), 50.0, dtype=FP16)
    v = torch.full((1, 150, 1, 16), 40.0, dtype=FP16)
    out, state = linear_attention(q, k, v, return_final_state=True, backend="triton")
    assert float(state.min()) == 150 * 2000.0
    torch.testing.assert_close(out, linear_attention(q.float(), k.float(), v.float(), backend="reference").half())


def _surrounded(x: torch.Tensor) -> torch.Tensor:
    """x inside memory that is NaN on all sides, along time."""
    nothing = torch.full_like(x, torch.nan)
    return torch.cat([nothing, x, nothing], dim=1)[:, x.shape[1]:2 * x.shape[1]]


@interpreted
@pytest.mark.parametrize("offsets", [(0, 80, 20, 50), (-5, 20, 300, 50), (0, 2**31 - 1, -2**31, 50), (70, 30, 45, 60)])
@pytest.mark.parametrize("decay", ("token", "channel"))
def test_offsets_that_lie_do_not_reach_outside(offsets, decay, short_segments):
    """Kernels clamp cu_seqlens: whatever these hold, nothing outside the tensors is read or written."""
    q, k, v, dout = (_surrounded(torch.randn(1, 90, 2, 16)) for _ in range(4))
    g = _surrounded(-torch.rand(1, 90, 2) if decay == "token" else -torch.rand(1, 90, 2, 16))
    cu = torch.tensor(offsets, dtype=torch.int32)
    options = 0.25, False, False
    out, final, *kept = torch.ops.pykernels.linear_attention_fwd_triton(q, k, v, g, None, None, cu, *options, True)
    gradients = torch.ops.pykernels.linear_attention_bwd_triton(dout, final, q, k, v, g, None, cu, out, *kept,
                                                                *options, True)
    for x in (out, final, *gradients[:4], gradients[5]):
        assert x.isfinite().all() and x.count_nonzero()


@interpreted
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "time", "heads"])
def test_offsets_pass_32_bits(axis):
    """Elements lie further apart than 2**31 elements, along each axis; the memory between is never touched."""
    shape = [1, 1, 1, 16]
    shape[axis] = 3
    stride = [16, 16, 16, 1]
    stride[axis] = 2**30 + 2**20

    def far(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(shape, stride, dtype=FP16).copy_(x)

    q, k, v, dout = (torch.randn(shape, dtype=FP16) for _ in range(4))
    g, state = -torch.rand(shape[:3]), torch.randn(shape[0], shape[2], 16, 16)
    options = 0.25, False, False
    fwd, bwd = torch.ops.pykernels.linear_attention_fwd_triton, torch.ops.pykernels.linear_attention_bwd_triton

    def results(q, k, v, dout):
        out, final, *kept = fwd(q, k, v, g, None, state, None, *options, True)
        return out, final, *bwd(dout, final, q, k, v, g, None, None, out, *kept, *options, True)

    for x, y in zip(results(*map(far, (q, k, v, dout))), results(q, k, v, dout), strict=True):
        assert torch.equal(x, y) and (x.count_nonzero() or not x.numel())


@interpreted
def test_a_step_leaves_slots_that_do_not_exist_alone():
    q, k, v = torch.randn(3, 2, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 5)
    state = torch.randn(4, 2, 8, 5)
    before, wanted = state.clone(), state.clone()
    slots = torch.tensor([-1, 2, 4], dtype=torch.int32)
    out = torch.ops.pykernels.linear_attention_step_triton(state, q, k, v, None, None, slots, 0.5, False)
    expected = torch.ops.pykernels.linear_attention_step_triton(wanted[2:3], q[1:2], k[1:2], v[1:2], None, None, None,
                                                                0.5, False)
    assert torch.equal(out[1:2], expected) and torch.equal(state[2], wanted[2]) and not torch.equal(state[2], before[2])
    assert not out[::2].any() and torch.equal(state[[0, 1, 3]], before[[0, 1, 3]])


@triton.jit
def _exp_kernel(x, y, N: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(y + o_n, _exp(tl.load(x + o_n)))


@interpreted
def test_exponentials_of_strong_decays_are_as_exact_as_those_of_weak_ones():
    x = -torch.cat([torch.zeros(1), torch.logspace(-9, 1.9, 2043), torch.tensor([86.0, 110.0, 1e30, torch.inf])])
    y = torch.empty_like(x)
    _exp_kernel[1,](x, y, N=2048)
    exact = x.double().exp()
    normal = exact > torch.finfo(FP32).tiny
    assert ((y - exact) / exact)[normal].abs().max() < 2 * torch.finfo(FP32).eps
    assert y[0] == 1.0 and not y[-3:].any()
