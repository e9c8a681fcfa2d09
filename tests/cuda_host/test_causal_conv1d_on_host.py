"""The CUDA kernels of the causal convolution, executed on the host: the op's ordinary cases against the float64
definition."""

from __future__ import annotations

import channel_ops
import host_build
import pytest
import torch
from host_backend import samples

from pykernels import BackendUnavailable, causal_conv1d, causal_conv1d_step
from pykernels.testing import CAUSAL_CONV1D, CAUSAL_CONV1D_STEP, Case, Description, Target, check
from pykernels.testing.causal_conv1d import conv_case, conv_step_case, padded, strided, token_first
from pykernels.testing.kit import run, seed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ON_HOST = Target("cuda", "cpu")

# Every width in both layouts: runs of 8 tokens across steps, tiles and blocks of channels, at every alignment, and the
# routes for what lies otherwise.
WIDTHS = [conv_case(f"width-{width}-{layout.__name__}", batch=2, channels=66, length=300 + width, width=width,
                    activation="silu" if width % 2 else None, state=True, wide=True, layout=layout)
          for width in (*range(1, 9), 11) for layout in (padded, token_first)]
SHAPES = [
    conv_case("tiles-of-tokens", channels=3, length=1100, activation="silu", state=True),
    conv_case("tiles-of-channels", batch=2, channels=130, length=270, activation="silu", layout=token_first),
    conv_case("any-tiles-of-channels", batch=2, channels=35, length=270, activation="silu", layout=token_first),
    conv_case("any-tiles-of-tokens", channels=3, length=1100, width=9, activation="silu", state=True),
    conv_case("packed-in-a-run", channels=6, length=60, lengths=(1, 2, 0, 3, 1, 1, 20, 8, 9, 7), activation="silu",
              state=True),
    conv_case("packed-in-a-run-token-first", channels=6, length=60, lengths=(1, 2, 0, 3, 1, 1, 20, 8, 9, 7),
              activation="silu", state=True, layout=token_first),
    conv_case("packed-wide", channels=5, length=60, width=12, lengths=(1, 2, 0, 30, 20), activation="silu", state=True),
    conv_case("strided-wide", channels=5, length=40, width=10, layout=strided, state=True),
]
STEPS = [conv_step_case(f"width-{width}", batch=2, channels=5, width=width, tokens=2, indices=(3, -1), slots=4,
                        activation="silu") for width in (1, 2, 3, 4, 5)]
MATRIX = [(CAUSAL_CONV1D, case) for case in (*CAUSAL_CONV1D.cases, *CAUSAL_CONV1D.extremes, *WIDTHS, *SHAPES)]
MATRIX += [(CAUSAL_CONV1D_STEP, case) for case in (*CAUSAL_CONV1D_STEP.cases, *CAUSAL_CONV1D_STEP.extremes, *STEPS)]


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


@pytest.mark.parametrize("case", [SHAPES[1], WIDTHS[6]], ids=str)
def test_bitwise_repeatable(host, case):
    """Whatever the order of the blocks and threads."""
    results = []
    for seed_ in range(3):
        host.set_seed(seed_)
        results.append(run(CAUSAL_CONV1D, case.make(torch.bfloat16, "cpu"), "cuda"))
    for name, x in results[0].items():
        assert torch.equal(x, results[1][name]) and torch.equal(x, results[2][name]), name


@pytest.mark.parametrize("layout", (padded, token_first))
def test_no_token_sees_a_later_one_another_channel_or_another_sequence(layout):
    """Not even values that are not finite."""
    generator = torch.Generator().manual_seed(0)
    x = layout(torch.randn(1, 4, 100, generator=generator))
    weight = torch.randn(4, 4, generator=generator)
    cu = torch.tensor([0, 33, 60, 100])
    dirty = x.clone(memory_format=torch.preserve_format)
    dirty[:, 1] = torch.inf
    dirty[:, 2, 40:] = torch.nan
    clean, after = (causal_conv1d(y, weight, activation="silu", cu_seqlens=cu, backend="cuda") for y in (x, dirty))
    assert torch.equal(after[:, [0, 3]], clean[:, [0, 3]]) and torch.equal(after[:, 2, :40], clean[:, 2, :40])
    dirty = x.clone(memory_format=torch.preserve_format)
    dirty[:, :, 33:60] = torch.nan
    after = causal_conv1d(dirty, weight, activation="silu", cu_seqlens=cu, backend="cuda")
    for part in (slice(0, 33), slice(60, 100)):
        assert torch.equal(after[:, :, part], clean[:, :, part]) and clean[:, :, part].isfinite().all()


@pytest.mark.parametrize("width", (4, 9))
@pytest.mark.parametrize("layout", (padded, token_first))
@pytest.mark.parametrize("offsets", [(0, 80, 20, 50), (-5, 20, 300, 50), (0, 2**31 - 1, -2**31, 50), (70, 30, 45, 60)])
def test_offsets_that_lie_do_not_reach_outside(offsets, layout, width):
    """Kernels clamp cu_seqlens: whatever these hold, nothing outside the tensors is read or written."""
    x, dout = (layout(torch.randn(1, 4, 50)) for _ in range(2))
    cu = torch.tensor(offsets, dtype=torch.int32)
    inputs = x, torch.randn(4, width), torch.randn(4), torch.randn(3, 4, width - 1), cu, True
    results = *channel_ops.conv_fwd(*inputs), *channel_ops.conv_bwd(dout, torch.randn(3, 4, width - 1), *inputs)
    for y in results:
        assert y.isfinite().all() and y.count_nonzero()


@pytest.mark.parametrize("width", (4, 9))
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "channels", "time"])
def test_offsets_pass_32_bits(axis, width):
    """Elements lie further apart than 2**31 elements, along each axis; the memory between is never touched."""
    shape, stride = [1, 2, 1], [1, 1, 1]
    shape[axis], stride[axis] = 4, 2**30 + 2**20
    if axis == 0:
        stride[1] = 1
    near = [torch.randn(shape).half() for _ in range(2)]
    far = [torch.empty_strided(shape, stride, dtype=torch.float16).copy_(x) for x in near]
    weight, state = torch.randn(shape[1], width), torch.randn(shape[0], shape[1], width - 1).half()
    results = []
    for x, dout in (near, far):
        inputs = x, weight, None, state, None, True
        results.append((*channel_ops.conv_fwd(*inputs), *channel_ops.conv_bwd(dout, None, *inputs)))
    for y, z in zip(*results):
        assert torch.allclose(y.float(), z.float(), rtol=2e-3, atol=1e-3) and (y.count_nonzero() or not y.numel())


def test_float64_is_named_as_unserved():
    x = torch.randn(1, 2, 5, dtype=torch.float64)
    with pytest.raises(BackendUnavailable, match="compute in float32"):
        causal_conv1d(x, torch.zeros(2, 3).double(), backend="cuda")
    with pytest.raises(BackendUnavailable, match="compute in float32"):
        causal_conv1d_step(x[..., 0], x[..., :2], torch.zeros(2, 3).double(), backend="cuda")


SANITIZED = ("plain", "width-8-padded", "width-8-token_first", "width-11-padded", "packed-in-a-run",
             "packed-in-a-run-token-first", "packed-wide", "layout-strided", "indexed-tokens")


def test_under_the_sanitizers(compiler):
    ops = {case.name: op.name for op, case in MATRIX}
    tests = [f"test_numbers[{ops[name]}-{name}-{dtype}]" for name in SANITIZED
             for dtype in ("bfloat16", "float32")]
    host_build.check_sanitized(__file__, tests)
