"""The CUDA kernels of the selective scan, executed on the host: the op's ordinary cases against the float64
definition."""

from __future__ import annotations

import channel_ops
import host_build
import pytest
import torch
from host_backend import samples

from pykernels import BackendUnavailable, selective_scan
from pykernels.testing import SELECTIVE_SCAN, SELECTIVE_SCAN_STEP, Case, Description, Target, check
from pykernels.testing.kit import run, seed
from pykernels.testing.selective_scan import scan_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ON_HOST = Target("cuda", "cpu")

# The modelled GPU has 3 multiprocessors, so a call of fewer than 6 blocks is split into segments of 256 tokens or more.
SPLITS = [
    scan_case("split", channels=18, length=600, state=3),
    scan_case("split-ragged", batch=2, channels=3, length=1100, state=2, wide=True),
    scan_case("split-constant", channels=20, length=520, state=2, B="constant", C="constant"),
    scan_case("split-without-states", channels=5, length=513, state=2, given=("D", "z")),
    scan_case("split-packed", channels=18, length=900, state=2, lengths=(300, 0, 1, 255, 256, 80)),
    scan_case("split-packed-alone", channels=4, length=900, state=2, lengths=(890,)),
    scan_case("whole", batch=3, channels=70, length=300, state=2),
    scan_case("whole-groups", batch=2, channels=70, length=130, state=2, B="group", C="group"),
]
MATRIX = [(SELECTIVE_SCAN, case) for case in (*SELECTIVE_SCAN.cases, *SELECTIVE_SCAN.extremes, *SPLITS)]
MATRIX += [(SELECTIVE_SCAN_STEP, case) for case in (*SELECTIVE_SCAN_STEP.cases, *SELECTIVE_SCAN_STEP.extremes)]


@pytest.fixture(autouse=True)
def on_the_host(host):
    with channel_ops.on_the_host():
        yield host


@samples(MATRIX, DTYPES)
def test_numbers(host, op: Description, case: Case, dtype: torch.dtype):
    host.set_seed(seed(case.name + str(dtype)))  # another order of events for each
    errors = check(op, case, dtype, ON_HOST)
    assert {error.tensor for error in errors} >= {*op.outputs, *op.mutates}
    assert all(error.ok for error in errors), "\n".join(map(str, errors))


@pytest.mark.parametrize("case", [SPLITS[0], SPLITS[4], SPLITS[6]], ids=str)
def test_bitwise_repeatable(host, case):
    """Whatever the order of the blocks and threads."""
    results = []
    for seed_ in range(3):
        host.set_seed(seed_)
        results.append(run(SELECTIVE_SCAN, case.make(torch.bfloat16, "cpu"), "cuda"))
    for name, x in results[0].items():
        assert torch.equal(x, results[1][name]) and torch.equal(x, results[2][name]), name


def test_splitting_happens_and_changes_nothing_but_rounding(host):
    case = SPLITS[0]
    args = dict(case.make(torch.float32, "cpu").args)
    whole, state = selective_scan(**args, return_final_state=True, backend="cuda")
    entering, parts = args.pop("initial_state"), []
    for piece in (slice(0, 250), slice(250, 600)):
        tokens = {name: x[..., piece] if name in ("u", "delta", "z", "B", "C") else x for name, x in args.items()}
        out, entering = selective_scan(**tokens, initial_state=entering, return_final_state=True, backend="cuda")
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, -1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entering, state, rtol=1e-4, atol=1e-5)
    scratch = []
    for length in (256, 600):
        u = torch.randn(1, 18, length)
        B = torch.randn(1, 1, 3, length)
        inputs = u, u, torch.zeros(18, 3), B, B, None, None, None, None, None, True
        scratch.append(host.selective_scan_fwd_scratch(channel_ops._scan_fields(*inputs)))
    assert scratch[0] == 0 < scratch[1]


def _surrounded(x: torch.Tensor) -> torch.Tensor:
    """x [1, ..., L] inside memory that is NaN on all sides, along time."""
    nothing = torch.full_like(x, torch.nan)
    return torch.cat([nothing, x, nothing], dim=-1)[..., x.shape[-1]:2 * x.shape[-1]]


@pytest.mark.parametrize("length", (50, 600))
@pytest.mark.parametrize("offsets", [(0, 80, 20, 50), (-5, 20, 300, 50), (0, 2**31 - 1, -2**31, 50), (70, 30, 45, 60)])
def test_offsets_that_lie_do_not_reach_outside(offsets, length, monkeypatch):
    """Kernels clamp cu_seqlens: whatever these hold, nothing outside the tensors is read or written."""
    # The sequences overlap or leave gaps, so that some tokens have no owner: they keep what is in memory, here zeros.
    guarded = channel_ops.guarded

    def zeros(shape, *args):
        states = len(shape) == 3 and shape[0] == 3  # those have no excuse
        return guarded(shape, *args) if states else guarded(shape, *args).zero_()

    monkeypatch.setattr(channel_ops, "guarded", zeros)
    u, delta, z, dout = (_surrounded(torch.randn(1, 2, length)) for _ in range(4))
    B, C = (_surrounded(torch.randn(1, 1, 2, length)) for _ in "BC")
    inputs = (u, delta, -torch.rand(2, 2), B, C, torch.randn(2), z, torch.randn(2), torch.randn(3, 2, 2),
              torch.tensor(offsets, dtype=torch.int32), True)
    out, final_state, states = channel_ops.scan_fwd(*inputs, True)
    results = out, final_state, *channel_ops.scan_bwd(dout, torch.randn(3, 2, 2), *inputs, states)
    for y in results:
        assert y.isfinite().all() and y.count_nonzero()


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "channels", "time"])
def test_offsets_pass_32_bits(axis):
    """Elements lie further apart than 2**31 elements, along each axis; the memory between is never touched."""
    shape, stride = [1, 1, 1], [1, 1, 1]
    shape[axis], stride[axis] = 3, 2**30 + 2**20
    near = [torch.randn(shape, dtype=torch.float16) for _ in range(4)]
    far = [torch.empty_strided(shape, stride, dtype=torch.float16).copy_(x) for x in near]
    batch, channels, length = shape
    B, state = torch.randn(batch, 1, 2, length), torch.randn(batch, channels, 2)
    results = []
    for u, delta, z, dout in (near, far):
        inputs = u, delta, -torch.ones(channels, 2), B, B, None, z, None, state, None, True
        out, final_state, states = channel_ops.scan_fwd(*inputs, True)
        results.append((out, final_state, *channel_ops.scan_bwd(dout, None, *inputs, states)))
    for x, y in zip(*results):
        assert torch.equal(x, y) and (x.count_nonzero() or not x.numel())


def test_a_rate_of_minus_infinity_forgets_without_a_trace():
    u, B = torch.randn(1, 2, 70), torch.randn(1, 3, 70)
    A = torch.full((2, 3), -torch.inf)
    out, state = selective_scan(u, u, A, B, B, delta_softplus=True, return_final_state=True, backend="cuda")
    expected, expected_state = selective_scan(u, u, A, B, B, delta_softplus=True, return_final_state=True,
                                              backend="reference")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(state, expected_state)


def test_complex_states_and_float64_are_named_as_unserved():
    u, B = torch.randn(1, 2, 5), torch.randn(1, 3, 5)
    with pytest.raises(BackendUnavailable, match="take a real A"):
        selective_scan(u, u, torch.zeros(2, 3, dtype=torch.complex64), B, B, backend="cuda")
    with pytest.raises(BackendUnavailable, match="compute in float32"):
        selective_scan(u.double(), u.double(), torch.zeros(2, 3).double(), B.double(), B.double(), backend="cuda")


SANITIZED = ("mamba", "state-7", "constant-B", "groups", "packed", "packed-rest", "layout-token-first",
             "layout-strided", "split-ragged", "split-packed")


def test_under_the_sanitizers(compiler):
    tests = [f"test_numbers[{op.name}-{name}-{dtype}]"
             for op, names in ((SELECTIVE_SCAN, SANITIZED), (SELECTIVE_SCAN_STEP, ("groups", "indexed-heads")))
             for name in names for dtype in ("bfloat16", "float32")]
    host_build.check_sanitized(__file__, tests)
