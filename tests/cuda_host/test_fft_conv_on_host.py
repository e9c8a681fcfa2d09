"""The CUDA kernels of the long convolution, executed on the host: the op's ordinary cases against the float64
definition."""

from __future__ import annotations

import fft_conv_ops
import host_build
import pytest
import torch
from host_backend import samples

from pykernels import BackendUnavailable, fft_conv
from pykernels.testing import FFT_CONV, Case, Description, Target, check
from pykernels.testing.fft_conv import conv_case
from pykernels.testing.kit import run, seed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ON_HOST = Target("cuda", "cpu")
_ALL = {"skip": True, "pre": True, "post": True}

# Around the number of taps that are summed directly; every size of a block's transform; rows of one and of two stages;
# groups whose rows are several parts, of several rows for each transform of a block and not as many for all.
SHAPES = [
    conv_case("direct-64", length=1100, taps=64, **_ALL),
    conv_case("windows-65", length=1100, taps=65, **_ALL),
    conv_case("points-2048", channels=1, length=2048, **_ALL),
    conv_case("points-4096", channels=1, length=4000, taps_rev=4000, **_ALL),
    conv_case("parts", batch=9, channels=4, groups=2, length=300, taps_rev=70, **_ALL),
    conv_case("parts-of-windows", batch=3, channels=4, groups=1, length=1400, taps=120, **_ALL),
    conv_case("stage", batch=3, channels=2, groups=1, length=4200, taps_rev=4100, **_ALL),
    conv_case("stage-circular", batch=2, channels=1, length=8000, taps_rev=300, mode="circular", lag=0, post=True),
    conv_case("stage-beyond", batch=1, channels=2, length=8200, taps=9000, **_ALL),
]
REPEATED = ("direct-64", "windows-65", "parts", "stage")
TWO_STAGES = conv_case("two-stages", channels=1, length=70000, dtypes=(torch.float32,), **_ALL)
MATRIX = [(FFT_CONV, case) for case in (*FFT_CONV.cases, *FFT_CONV.extremes, *SHAPES, TWO_STAGES)]


@pytest.fixture(autouse=True)
def on_the_host(host):
    with fft_conv_ops.on_the_host():
        yield host


def _check(op: Description, case: Case, dtype: torch.dtype) -> None:
    errors = check(op, case, dtype, ON_HOST)
    assert {error.tensor for error in errors} >= {*op.outputs}
    assert all(error.ok for error in errors), "\n".join(map(str, errors))


@samples(MATRIX, DTYPES)
def test_numbers(host, op: Description, case: Case, dtype: torch.dtype):
    host.set_seed(seed(case.name + str(dtype)))  # another order of events for each
    _check(op, case, dtype)


@pytest.mark.parametrize("rows", (1, 2, 5, 12))
@pytest.mark.parametrize("groups", (1, 2, 4))
def test_rows_that_come_in_parts(groups, rows):
    """Through scratch memory for so many rows: some of a group's, a whole group's, and those of several."""
    case = conv_case("parts", batch=2, channels=4, groups=groups, length=4500, taps_rev=40, **_ALL)
    with fft_conv_ops.on_the_host(part_bytes=rows * 8 * 8192):
        _check(FFT_CONV, case, torch.float32)


@pytest.mark.parametrize("case", [case for case in SHAPES if case.name in REPEATED], ids=str)
def test_bitwise_repeatable(host, case):
    """Whatever the order of the blocks and threads."""
    results = []
    for seed_ in range(3):
        host.set_seed(seed_)
        results.append(run(FFT_CONV, case.make(torch.bfloat16, "cpu"), "cuda"))
    for name, x in results[0].items():
        assert torch.equal(x, results[1][name]) and torch.equal(x, results[2][name]), name


@pytest.mark.parametrize("taps", (40, 300, 4500))
def test_rows_keep_to_themselves(taps):
    """What is not finite in one row reaches no other, and a row does not depend on how many there are."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(3, 2, max(taps, 400), generator=generator)
    k = torch.randn(2, taps, generator=generator)
    clean = fft_conv(u, k, backend="cuda")
    dirty = u.clone()
    dirty[1, 0, 7] = torch.nan
    after = fft_conv(dirty, k, backend="cuda")
    assert torch.equal(after[:, 1], clean[:, 1]) and torch.equal(after[[0, 2]], clean[[0, 2]])
    assert after[1, 0, 7:].isnan().any() and clean.isfinite().all()
    assert torch.equal(fft_conv(u[2:], k, backend="cuda"), clean[2:])


@pytest.mark.parametrize("wanted", ((True, False), (False, True), (False, False)))
@pytest.mark.parametrize("skip", (True, False))
@pytest.mark.parametrize("length, taps, circular", ((300, 30, False), (300, 200, False), (1200, 100, False),
                                                    (300, 200, True), (4200, 4200, False), (4200, 4200, True)))
def test_only_what_is_asked_for(length, taps, circular, skip, wanted):
    u, dout, pre, post = (torch.randn(2, 2, length) for _ in range(4))
    k, k_rev, D = torch.randn(2, taps), torch.randn(2, 20), torch.randn(2) if skip else None
    everything = fft_conv_ops.bwd(dout, u, k, k_rev, D, pre, post, 1, circular, True, True)
    some = fft_conv_ops.bwd(dout, u, k, k_rev, D, pre, post, 1, circular, *wanted)
    asked = (wanted[0], wanted[1], wanted[1], skip, wanted[0], True)
    for x, y, want in zip(everything, some, asked, strict=True):
        assert torch.equal(x, y) if want else y.numel() == 0


def test_what_is_not_served_is_named():
    x = torch.randn(1, 2, 5, dtype=torch.float64)
    with pytest.raises(BackendUnavailable, match="compute in float32"):
        fft_conv(x, torch.zeros(2, 3).double(), backend="cuda")
    far = torch.empty(1).expand(1, 1, 2**28 + 1)
    with pytest.raises(BackendUnavailable, match=f"rows of up to {2**28} samples"):
        fft_conv(far, torch.zeros(1, 3), backend="cuda")


SANITIZED = ("short-two-sided", "long-two-sided-lag-0", "windows-circular", "long-circular-beyond", "stage")


def test_under_the_sanitizers(compiler):
    tests = [f"test_numbers[fft_conv-{name}-{dtype}]" for name in SANITIZED
             for dtype in ("bfloat16", "float32")]
    host_build.check_sanitized(__file__, tests)
