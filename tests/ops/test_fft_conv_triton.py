"""The long convolution's Triton kernels under the interpreter, on the CPU."""

from __future__ import annotations

import pytest
import torch
from isolated import isolated

triton = pytest.importorskip("triton")

from pykernels import fft_conv, testing  # noqa: E402
from pykernels.backends import BackendUnavailable  # noqa: E402
from pykernels.testing import FFT_CONV, Target  # noqa: E402
from pykernels.testing import fft_conv as cases, layouts  # noqa: E402
from pykernels.testing.fft_conv import conv_case  # noqa: E402

interpreted = isolated(TRITON_INTERPRET="1")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_ALL = {"skip": True, "pre": True, "post": True}

# Between them these use every option, on every way that `plan` may choose; names say which.
CASES = (
    conv_case("direct-one", length=1, channels=1, **_ALL),
    conv_case("direct", batch=2, channels=3, length=150, taps=4, **_ALL),
    conv_case("direct-two-sided", length=330, taps=40, taps_rev=70, **_ALL),
    conv_case("direct-lag-0", batch=2, length=90, taps=3, taps_rev=8, lag=0),
    conv_case("direct-beyond", length=11, taps=400, taps_rev=30, **_ALL),
    conv_case("direct-circular", length=200, taps=12, taps_rev=9, mode="circular", **_ALL),
    conv_case("direct-circular-beyond", length=10, taps=37, taps_rev=4, mode="circular"),
    conv_case("direct-groups", batch=2, channels=6, groups=2, length=60, taps=7, taps_rev=3, **_ALL),
    conv_case("row-256", batch=2, channels=3, length=256, **_ALL),
    conv_case("row-512", batch=3, length=401, **_ALL),
    conv_case("row-1024", length=777, taps=900, taps_rev=300, lag=0, **_ALL),
    conv_case("row-2048", batch=2, length=1200, skip=True),
    conv_case("row-4096", length=2500, post=True),
    conv_case("row-beyond", length=200, taps=1000, taps_rev=400, pre=True),
    conv_case("row-circular", batch=2, length=256, mode="circular", **_ALL),
    conv_case("row-circular-two-sided", length=300, taps=200, taps_rev=100, lag=0, mode="circular", **_ALL),
    conv_case("row-circular-beyond", length=180, taps=500, taps_rev=190, mode="circular", **_ALL),
    conv_case("row-groups", batch=2, channels=6, groups=2, length=200, taps_rev=130, **_ALL),
    conv_case("windows", length=3000, taps=150, **_ALL),
    conv_case("windows-two-sided", length=2500, taps=100, taps_rev=130, channels=1, **_ALL),
    conv_case("windows-circular", length=2200, taps=170, taps_rev=60, channels=1, mode="circular", **_ALL),
    conv_case("narrow", batch=2, length=180, narrow=True, taps_rev=30, **_ALL),
    conv_case("wide-gates", batch=2, length=180, wide_gates=True, **_ALL),
    conv_case("layout-channels-last", batch=2, length=160, layout=cases._channels_last, taps_rev=20, **_ALL),
    conv_case("layout-strided-last", batch=2, length=60, taps=20, layout=layouts.strided, **_ALL),
    conv_case("layout-padded", batch=2, length=201, layout=layouts.padded, **_ALL),
    conv_case("layout-expanded", batch=3, length=160, layout=layouts.expanded, groups=2, **_ALL),
    *(case for case in cases.EXTREMES if "channels" not in case.name),
)
# Kernels too long for a program: forced, since the interpreter is slow.
STAGED = (
    conv_case("plain", batch=2, length=256, channels=3, **_ALL),
    conv_case("two-sided", batch=2, length=200, taps_rev=150, channels=4, groups=2, **_ALL),
    conv_case("lag-0", length=180, taps=300, taps_rev=250, lag=0, post=True),
    conv_case("circular", batch=2, length=256, taps_rev=30, mode="circular", **_ALL),
    conv_case("circular-lag-0", length=301, taps=280, taps_rev=20, lag=0, mode="circular", skip=True),
)


def _check(case, dtype) -> None:
    errors = testing.check(FFT_CONV, case, dtype, Target("triton", "cpu"))
    assert {error.tensor for error in errors} >= {"out", "du", "dk"}
    assert all(error.ok for error in errors), "\n".join(map(str, errors))


# 16-bit rows are widened as they are read and rounded as they are written, which these do in each kernel.
NARROW = ("direct", "direct-circular", "row-256", "row-circular", "windows", "narrow", "wide-gates", "layout-padded")


@interpreted
@pytest.mark.parametrize("case, dtype", [pytest.param(case, dtype, id=f"{case}-{dtype}") for case in CASES
                                         for dtype in (FP32, FP16, BF16)
                                         if dtype in case.dtypes and (dtype == FP32 or case.name in NARROW)])
def test_matches_the_float64_reference(case, dtype):
    _check(case, dtype)


@pytest.fixture
def staged(monkeypatch):
    """Makes every row pass through memory, at these numbers of points, a few rows at a time."""
    from pykernels.ops.fft_conv import triton as module

    def force(total: int, rows: int) -> None:
        def plan(length, taps, circular):
            _, radices = module._stages(total)
            assert radices and 2 * total >= length + min(taps, length) - 1
            return module._Plan(total // 16 ** len(radices), radices, 1, length, not circular)

        monkeypatch.setattr(module, "plan", plan)
        monkeypatch.setattr(module, "_SCRATCH", 8 * total * rows)

    return force


@interpreted
@pytest.mark.parametrize("case, rows", [*((case, 100) for case in STAGED), (STAGED[1], 1), (STAGED[1], 3)], ids=str)
def test_rows_that_pass_through_memory(case, rows, staged):
    """A stage; all rows at a time, one, or some of a group."""
    staged(8192, rows)
    _check(case, FP32)


@interpreted
def test_two_stages(staged):
    staged(131072, 5)
    u, k = torch.randn(1, 1, 200), torch.randn(1, 200)
    exact = fft_conv(u.double(), k.double(), backend="reference")
    out = fft_conv(u, k, backend="triton")
    assert float((out - exact).norm() / exact.norm()) < 1e-6


@interpreted
def test_a_long_row():
    """Three taps far apart, so that the result is known without a transform; `plan` itself takes the stages."""
    from pykernels.ops.fft_conv import triton as module

    length, lags = 20_001, (0, 12_345, 19_999)
    assert module.plan(length, length, False).stages
    u, k, expected = torch.randn(1, 1, length), torch.zeros(1, length), torch.zeros(1, 1, length)
    for lag, weight in zip(lags, (0.5, -2.0, 1.5)):
        k[0, lag] = weight
        expected[..., lag:] += weight * u[..., : length - lag]
    out = fft_conv(u, k, backend="triton")
    assert float((out - expected).norm() / expected.norm()) < 1e-6


@interpreted
def test_relative_l2_error_is_that_of_fp32():
    """The product of 4096 terms each, against float64."""
    u, k = torch.randn(1, 2, 4096), torch.randn(2, 4096)
    exact = fft_conv(u.double(), k.double(), backend="reference")
    out = fft_conv(u, k, backend="triton")
    assert float((out - exact).norm() / exact.norm()) < 1e-6


@interpreted
@pytest.mark.parametrize("length, taps", [(300, 300), (300, 9), (1500, 150)])
def test_a_row_does_not_depend_on_the_others(length, taps):
    """Neither on values that are not finite nor on their number."""
    u, k, dy = torch.randn(3, 2, length), torch.randn(2, taps), torch.randn(3, 2, length)

    def run(u, dy):
        u = u.clone().requires_grad_()
        out = fft_conv(u, k, backend="triton")
        return out.detach(), *torch.autograd.grad(out, u, dy)

    before = run(u, dy)
    spoiled = u.clone()
    spoiled[1, 0, length // 2] = torch.nan
    after, alone = run(spoiled, dy), run(u[2:], dy[2:])
    others = torch.tensor([[True, True], [False, True], [True, True]])
    for x, y, z in zip(before, after, alone):
        assert torch.equal(x[others], y[others]) and torch.equal(x[2:], z)
    assert not torch.equal(before[0][1, 0], after[0][1, 0])


@interpreted
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "channels", "time"])
@pytest.mark.parametrize("taps", [3, 140])
def test_offsets_pass_32_bits(axis, taps):
    """Elements lie further apart than 2**31 elements, along each axis; the memory between is never touched."""
    shape, stride = [1, 1, 1], [1, 1, 1]
    shape[axis], stride[axis] = 3, 2**30 + 2**20
    x, dout = (torch.randn(shape, dtype=FP16) for _ in range(2))
    k = torch.randn(shape[1], taps)
    options = (k, None, torch.randn(shape[1]), None, None, 1, axis == 2)
    fwd, bwd = torch.ops.pykernels.fft_conv_fwd_triton, torch.ops.pykernels.fft_conv_bwd_triton
    near = fwd(x, *options), *bwd(dout, x, *options, True, True)
    x, dout = (torch.empty_strided(shape, stride, dtype=FP16).copy_(y) for y in (x, dout))
    far = fwd(x, *options), *bwd(dout, x, *options, True, True)
    for y, z in zip(far, near):
        assert torch.equal(y, z) and (y.count_nonzero() or not y.numel())


@interpreted
def test_what_it_does_not_serve_names_a_backend_that_does():
    with pytest.raises(BackendUnavailable, match=r"float32.*backend='cpu' can"):
        fft_conv(torch.randn(1, 1, 5, dtype=torch.float64), torch.randn(1, 5, dtype=torch.float64), backend="triton")


def test_plans_cover_every_length():
    """Every length up to 2**28 has a plan whose transform holds what it must; and long rows take few stages."""
    from pykernels.ops.fft_conv import triton as module

    for length in (*range(1, 300), 1000, 4096, 4097, 8191, 8193, 65536, 65537, 10**6, 2**20, 2**24, 2**28):
        for taps in {1, 128, 129, min(length, 1000), length}:
            for circular in (False, True):
                taps = min(taps, length)
                plan = module.plan(length, taps, circular)
                if plan.points:
                    assert plan.windows * plan.step >= length
                    least = length if plan.real else -(-(plan.step + taps - 1) // 2)
                    assert plan.total >= least and len(plan.stages) <= 5
                    assert not plan.stages or plan.windows == 1
                else:
                    assert taps <= 128
