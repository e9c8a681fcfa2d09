"""fft_conv: explicit sums for every convention, all lengths and kernel lengths, rows on their own, derivatives.

Errors against the float64 reference, determinism and bad input are in tests/test_ops.py, from the op's description.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pykernels
from pykernels import _checks, _library, fft_conv, testing
from pykernels.testing.fft_conv import conv_case

TARGETS = [t for t in testing.targets(testing.FFT_CONV.op, every_isa=False) if t.device == "cpu"]
on_targets = pytest.mark.parametrize("target", TARGETS, ids=str)
F64 = torch.float64


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """In relative L2."""
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape and expected.norm() > 0
    assert float((actual - expected).norm() / expected.norm()) < tolerance


def explicit(u: Tensor, k: Tensor, k_rev: Tensor | None = None, lag: int = 1, circular: bool = False) -> Tensor:
    """One term after the other; k and k_rev [D, .]."""
    length = u.shape[2]
    out = torch.zeros_like(u)
    taps = [(i, k[:, i]) for i in range(k.shape[1])]
    if k_rev is not None:
        taps += [(-(i + lag), k_rev[:, i]) for i in range(k_rev.shape[1])]
    for distance, w in taps:
        for n in range(length):
            source = n - distance
            if circular or 0 <= source < length:
                out[:, :, n] += w * u[:, :, source % length]
    return out


def by_torch(u: Tensor, k: Tensor) -> Tensor:
    """Causal, in float64, with padding to a power of two."""
    length = u.shape[-1]
    size = 1 << (length + k.shape[-1]).bit_length()
    return torch.fft.irfft(torch.fft.rfft(u.double(), n=size) * torch.fft.rfft(k.double(), n=size), n=size)[
        ..., :length
    ]


# ---- the definition --------------------------------------------------------------------------------------------------


@on_targets
@pytest.mark.parametrize("mode", ("causal", "circular"))
@pytest.mark.parametrize("lag", (None, 0, 1), ids=("causal-kernel", "lag-0", "lag-1"))
@pytest.mark.parametrize("length, taps, taps_rev", ((7, 3, 2), (5, 9, 12), (1, 2, 3), (30, 30, 30), (90, 70, 88)))
def test_explicit_sums(target, mode, lag, length, taps, taps_rev):
    u, k, k_rev = (
        torch.randn(2, 3, length, dtype=F64),
        torch.randn(3, taps, dtype=F64),
        torch.randn(3, taps_rev, dtype=F64),
    )
    if lag is None:
        out = fft_conv(u, k, mode=mode, backend=target.backend)
        near(out, explicit(u, k, circular=mode == "circular"))
    else:
        out = fft_conv(u, k, k_rev=k_rev, k_rev_lag=lag, mode=mode, backend=target.backend)
        near(out, explicit(u, k, k_rev, lag, mode == "circular"))


@on_targets
def test_s4_and_safari_conventions(target):
    """pad(k) + pad(flip(k_rev)) in time (S4, lag 1) and K + conj(K_rev) in frequency (safari and H3, lag 0)."""
    length = 50
    u, k, k_rev = torch.randn(2, 3, length, dtype=F64), *torch.randn(2, 3, length, dtype=F64)
    size = 2 * length
    u_f = torch.fft.rfft(u, n=size)
    s4 = torch.nn.functional.pad(k, (0, length)) + torch.nn.functional.pad(k_rev.flip(-1), (length, 0))
    near(
        fft_conv(u, k, k_rev=k_rev, backend=target.backend),
        torch.fft.irfft(u_f * torch.fft.rfft(s4), n=size)[..., :length],
    )
    safari = torch.fft.rfft(k, n=size) + torch.fft.rfft(k_rev, n=size).conj()
    near(
        fft_conv(u, k, k_rev=k_rev, k_rev_lag=0, backend=target.backend),
        torch.fft.irfft(u_f * safari, n=size)[..., :length],
    )


@on_targets
def test_hyena_order_2(target):
    """Gate, convolution with a skip on the gated input, gate."""
    u, v, x = torch.randn(3, 2, 6, 100, dtype=F64)
    k, D = torch.randn(6, 100, dtype=F64), torch.randn(6, dtype=F64)
    y = fft_conv(v, k, D=D, pre_gate=u, post_gate=x, backend=target.backend)
    near(y, x * (explicit(u * v, k) + D[:, None] * (u * v)))


@on_targets
def test_groups_share_their_kernel(target):
    u, k, k_rev = torch.randn(2, 12, 80, dtype=F64), torch.randn(4, 80, dtype=F64), torch.randn(4, 20, dtype=F64)
    each = fft_conv(u, k.repeat_interleave(3, 0), k_rev=k_rev.repeat_interleave(3, 0), backend=target.backend)
    near(fft_conv(u, k, k_rev=k_rev, backend=target.backend), each)


# ---- lengths ---------------------------------------------------------------------------------------------------------


def test_every_short_length():
    for length in range(1, 65):
        for taps in {1, length // 2 + 1, length, 2 * length + 3}:
            u, k = torch.randn(2, 2, length), torch.randn(2, taps)
            near(fft_conv(u, k, backend="cpu"), by_torch(u, k), 5e-7)


@pytest.mark.parametrize(
    "length", (255, 257, 511, 769, 1021, 3071, 4097, 8191, 12289, 20011, 33331, 49157, 65536, 69997)
)
def test_long_lengths(length):
    """Kernels as long as the sequence, somewhat shorter, and beyond it; inputs of unit scale."""
    for taps in (length, length // 3, length + 100):
        u, k = torch.randn(1, 2, length), torch.randn(2, taps)
        near(fft_conv(u, k, backend="cpu"), by_torch(u, k), 1e-6)


@pytest.mark.parametrize("taps", (1, 2, 7, 8, 9, 17, 33, 64, 65, 100, 128, 129, 200, 333, 512, 1000, 2000, 4000))
@pytest.mark.parametrize("mode", ("causal", "circular"))
def test_kernel_lengths_on_one_sequence(taps, mode):
    """All ways to compute it, and their seams; one way's result is another's with zeros appended to the kernel."""
    u, k = torch.randn(1, 2, 5000, dtype=F64), torch.randn(2, taps, dtype=F64)
    dy = torch.randn_like(u)
    results = []
    for kernel in (k, torch.nn.functional.pad(k, (0, 5000 - taps))):
        leaves = u.clone().requires_grad_(), kernel.clone().requires_grad_()
        out = fft_conv(*leaves, mode=mode, backend="cpu")
        du, dk = torch.autograd.grad(out, leaves, dy)
        results.append((out, du, dk[:, :taps]))
    for x, y in zip(*results):
        near(x, y)
    if mode == "causal":
        near(results[0][0], by_torch(u, k))


@pytest.mark.parametrize("isa", _library.machine_isas())
@pytest.mark.parametrize(
    "length, taps, taps_rev",
    (
        (255, 255, 0), (256, 256, 255), (257, 257, 0), (300, 400, 256), (511, 512, 257), (512, 256, 0), (513, 257, 513),
        (767, 258, 0), (769, 768, 1), (1024, 1024, 0), (1025, 513, 512), (1500, 5, 1300), (2049, 2048, 0),
    ),
)  # fmt: skip
def test_around_blocks_of_256(isa, length, taps, taps_rev):
    """Where 16 floats are a vector, rows of this size go by blocks, whose seams are at multiples of 256."""
    u, pre, post = torch.randn(3, 2, 4, length)
    k, D = torch.randn(2, taps), torch.randn(4)
    for lag, gates in ((0, {}), (1, {"pre_gate": pre, "post_gate": post, "D": D})):
        options = dict(gates, k_rev=torch.randn(2, taps_rev), k_rev_lag=lag) if taps_rev else gates
        exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
        expected = fft_conv(u.double(), k.double(), **exact, backend="reference")
        with testing.use_isa(isa), testing.use_threads(1):
            out = fft_conv(u, k, **options, backend="cpu")
        near(out.double(), expected, 4e-7)
        with testing.use_isa(isa), testing.use_threads(2):
            assert torch.equal(fft_conv(u, k, **options, backend="cpu"), out)
            if not gates:  # no step on the way is much larger than what comes out
                assert torch.equal(fft_conv(u * 2.0**100, k, **options, backend="cpu"), out * 2.0**100)


def test_taps_beyond_the_sequence_have_no_effect_and_no_gradient():
    u, k = torch.randn(2, 3, 100), torch.randn(3, 400, requires_grad=True)
    out = fft_conv(u, k, backend="cpu")
    near(out, fft_conv(u, k[:, :100], backend="cpu"), 1e-6)
    (dk,) = torch.autograd.grad(out.sin().sum(), k)
    assert not dk[:, 100:].any() and dk[:, :100].all()


def test_millions_of_samples():
    """Three taps far apart, so that the result is known without a transform."""
    length = 4_500_001
    u, lags, weights = torch.randn(1, 1, length), (0, 123_456, 4_000_001), (0.5, -2.0, 1.5)
    k = torch.zeros(1, length)
    expected = torch.zeros_like(u)
    for lag, weight in zip(lags, weights):
        k[0, lag] = weight
        expected[..., lag:] += weight * u[..., : length - lag]
    near(fft_conv(u, k, backend="cpu"), expected, 1e-6)


@settings(max_examples=60)
@given(
    st.integers(1, 1500),
    st.integers(1, 1600),
    st.integers(0, 900),
    st.sampled_from((0, 1)),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from(("causal", "circular")),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_any_shape(length, taps, taps_rev, lag, batch, groups, per_group, mode, skip, pre, post):
    case = conv_case(
        f"any-{length}-{taps}",
        batch=batch,
        channels=groups * per_group,
        groups=groups,
        length=length,
        taps=taps,
        taps_rev=taps_rev or None,
        lag=lag,
        mode=mode,
        skip=skip,
        pre=pre,
        post=post,
    )
    sample = case.make(F64, "cpu")
    ours, reference = (testing.run(testing.FFT_CONV, sample, backend) for backend in ("cpu", "reference"))
    for name, x in reference.items():
        assert float((ours[name] - x).abs().max()) <= 1e-12 * max(float(x.abs().max()), 1.0), name


# ---- rows on their own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length, taps", ((700, 700), (700, 9), (6000, 150)))
@pytest.mark.parametrize("value", (torch.nan, torch.inf, 1e30), ids=str)
def test_a_row_does_not_depend_on_the_others(length, taps, value):
    """Neither on values that are not finite nor on their number: every row is a transform of its own."""
    u, k = torch.randn(3, 2, length), torch.randn(2, taps)
    dy = torch.randn_like(u)

    def run(u, dy):
        u = u.clone().requires_grad_()
        out = fft_conv(u, k, backend="cpu")
        return out.detach(), *torch.autograd.grad(out, u, dy)

    before = run(u, dy)
    spoiled = u.clone()
    spoiled[1, 0, length // 2] = value
    after = run(spoiled, dy)
    others = torch.ones(3, 2, dtype=torch.bool)
    others[1, 0] = False
    for x, y in zip(before, after):
        assert torch.equal(x[others], y[others])
    assert not torch.equal(before[0][1, 0], after[0][1, 0])
    for x, y in zip(before, run(u[2:], dy[2:])):
        assert torch.equal(x[2:], y)


# ---- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_16_bit_input_is_computed_in_float32(dtype):
    u, gate = torch.randn(2, 2, 3, 400).to(dtype)
    k, D = torch.randn(3, 400), torch.randn(3)
    for pre in (gate, gate.float()):
        out = fft_conv(u, k, D=D, pre_gate=pre, backend="cpu")
        assert out.dtype == dtype
        assert torch.equal(out, fft_conv(u.float(), k, D=D, pre_gate=gate.float(), backend="cpu").to(dtype))


def test_autocast_narrows_the_rows_and_leaves_the_kernel():
    u, gate, k = torch.randn(2, 3, 300), torch.randn(2, 3, 300), torch.randn(3, 300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fft_conv(u, k, pre_gate=gate, backend="cpu")
    assert (
        torch.equal(out, fft_conv(u.bfloat16(), k, pre_gate=gate.bfloat16(), backend="cpu"))
        and out.dtype == torch.bfloat16
    )


# ---- derivatives -----------------------------------------------------------------------------------------------------

_ALL = {"skip": True, "pre": True, "post": True}


@pytest.mark.parametrize(
    "options",
    (
        {"length": 12, **_ALL},
        {"length": 12, "taps": 40, "taps_rev": 9, "lag": 0, **_ALL},
        {"length": 9, "mode": "circular", "taps": 20, **_ALL},
        {"length": 130, "taps": 130, "taps_rev": 120, **_ALL},
        {"length": 140, "mode": "circular", **_ALL},
        {"length": 120, "channels": 4, "groups": 2, **_ALL},
    ),
    ids=str,
)
def test_gradcheck(options):
    args = dict(conv_case(f"gradcheck-{options}", batch=2, **options).make(F64, "cpu").args)
    names = [name for name, x in args.items() if isinstance(x, Tensor)]
    leaves = [args[name].requires_grad_() for name in names]

    def function(*tensors):
        return fft_conv(**{**args, **dict(zip(names, tensors))}, backend="cpu")

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize(
    "options",
    ({"length": 8, "taps_rev": 5, **_ALL}, {"length": 100, "post": True}, {"length": 90, "mode": "circular"}),
    ids=str,
)
def test_gradgradcheck(options):
    args = dict(conv_case(f"gradgradcheck-{options}", **options).make(F64, "cpu").args)
    names = [name for name, x in args.items() if isinstance(x, Tensor)]
    leaves = [args[name].requires_grad_() for name in names]

    def function(*tensors):
        return fft_conv(**{**args, **dict(zip(names, tensors))}, backend="cpu")

    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("taps", (6, 300))
def test_gradients_of_some_inputs_are_those_of_all(taps):
    """Each alone: what is not needed is not computed, and changes nothing."""
    args = dict(conv_case("some", batch=2, length=300, taps=taps, taps_rev=taps, **_ALL).make(F64, "cpu").args)
    dy = torch.randn_like(args["u"])

    def gradients(names):
        leaves = {name: args[name].detach().requires_grad_() for name in names}
        return dict(
            zip(names, torch.autograd.grad(fft_conv(**{**args, **leaves}, backend="cpu"), list(leaves.values()), dy))
        )

    whole = gradients(list(args))
    for name in args:
        assert torch.equal(gradients([name])[name], whole[name]), name


def test_func_grad():
    u, k, gate = torch.randn(2, 3, 150, dtype=F64), torch.randn(3, 150, dtype=F64), torch.randn(2, 3, 150, dtype=F64)

    def loss(u, k, gate):
        return fft_conv(u, k, post_gate=gate, backend="cpu").sin().sum()

    ours = torch.func.grad(loss, argnums=(0, 1, 2))(u, k, gate)
    leaves = [x.clone().requires_grad_() for x in (u, k, gate)]
    for x, y in zip(ours, torch.autograd.grad(loss(*leaves), leaves)):
        near(x, y)


def test_nothing_but_the_inputs_is_kept_for_backward():
    u, k = torch.randn(2, 3, 500, requires_grad=True), torch.randn(3, 500, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        fft_conv(u, k, backend="cpu")
    assert {x.data_ptr() for x in kept} <= {u.data_ptr(), k.data_ptr()}


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def test_compile_forward_and_backward_with_dynamic_shapes():
    def step(u, k, D, gate):
        return fft_conv(u, k, D=D, pre_gate=gate, backend="cpu").sin().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    for length in (90, 301):
        leaves = [
            x.requires_grad_()
            for x in (torch.randn(2, 4, length), torch.randn(4, length), torch.randn(4), torch.randn(2, 4, length))
        ]
        eager, fast = step(*leaves), compiled(*leaves)
        torch.testing.assert_close(fast, eager)
        for x, y in zip(torch.autograd.grad(fast, leaves), torch.autograd.grad(eager, leaves)):
            torch.testing.assert_close(x, y)
            assert y.abs().max() > 0


def test_checks_are_remembered_for_calls_that_look_alike():
    u, k, D, gate = torch.randn(2, 3, 40), torch.randn(3, 12), torch.randn(3), torch.randn(2, 3, 40)

    def call(**changes):
        return fft_conv(**{"u": u, "k": k, "D": D, "pre_gate": gate, **changes})

    _checks.forget()
    out = call()
    near(call(u=-u), -out)
    assert len(_checks._remembered) == 1
    # Not alike: computed, or refused, as it is the first time.
    near(call(D=None, pre_gate=None, post_gate=gate), gate * fft_conv(u, k), 1e-6)
    assert call(u=u.bfloat16()).dtype == torch.bfloat16 and len(_checks._remembered) == 4
    assert len({float(call(k_rev=k, k_rev_lag=lag).norm()) for lag in (0, 1)}) == 2
    for changes, error, message in (
        ({"k_rev": k, "k_rev_lag": True}, ValueError, "k_rev_lag"), ({"mode": "Causal"}, ValueError, "mode"),
        ({"k": k.double()}, TypeError, "k must be"), ({"D": D[:2]}, ValueError, "D must have shape"),
        ({"u": u[:1]}, ValueError, "pre_gate must have shape"), ({"backend": "cpus"}, ValueError, "backend"),
        ({"u": u.to_mkldnn()}, TypeError, "u must be a strided tensor"),
        ({"k": k.to_sparse()}, TypeError, "k must be a strided tensor"),
    ):
        with pytest.raises(error, match=message):
            call(**changes)
    assert call(u=u.clone().requires_grad_()).requires_grad
    with pykernels.use_backend("reference"):
        near(call(), out, 1e-6)
    assert len(_checks._remembered) == 7


# ---- memory ----------------------------------------------------------------------------------------------------------

_PEAK = """
import re, torch
from pykernels import fft_conv, fft_conv_spectrum

def peak():
    # MiB, of this program alone: ru_maxrss starts from the size of the process that started it.
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

torch.set_num_threads(2)
fft_conv(torch.randn(1, 2, 5000), torch.randn(2, 5000), backend="cpu")  # loads all there is to load
"""

_PEAK_OF_GRADIENTS = _PEAK + """
u, k, dy = torch.randn(8, 32, 65536), torch.randn(32, 65536), torch.randn(8, 32, 65536)  # 64, 8 and 64 MiB
u.requires_grad_(), k.requires_grad_()
before = peak()
torch.autograd.grad(fft_conv(u, k, backend="cpu"), (u, k), dy)
print(peak() - before)
"""


def test_memory_is_that_of_the_outputs():
    """136 MiB of outputs and gradients, and per thread the spectra of a row; all spectra would be 272 MiB more."""
    process = subprocess.run([sys.executable, "-c", _PEAK_OF_GRADIENTS], capture_output=True, text=True, check=True)
    assert 64 < float(process.stdout) < 136 + 60, process.stdout


_PEAK_OF_SPECTRA = _PEAK + """
u, k = torch.randn(4, 32, 65536), torch.randn(32, 65536)  # 32 and 8 MiB
before = peak()
spectrum = fft_conv_spectrum(k, 65536, backend="cpu")
made = peak()
fft_conv(u, spectrum)
print(made - before, peak() - made)
"""


def test_memory_is_that_of_the_spectra():
    """16 MiB of spectra kept between calls, and per thread a row's; then 32 MiB of outputs."""
    process = subprocess.run([sys.executable, "-c", _PEAK_OF_SPECTRA], capture_output=True, text=True, check=True)
    made, convolved = map(float, process.stdout.split())
    assert 14 < made < 16 + 12 and 28 < convolved < 32 + 12, process.stdout
