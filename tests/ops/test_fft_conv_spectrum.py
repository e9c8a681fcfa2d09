"""fft_conv_spectrum: kernels prepared once serve any batch and any shorter sequence, and never a wrong call."""

from __future__ import annotations

import time

import pytest
import torch

import pykernels
from pykernels import BackendUnavailable, _library, fft_conv, fft_conv_spectrum, testing

BACKENDS = ("cpu", "reference")
on_backends = pytest.mark.parametrize("backend", BACKENDS)
F64 = torch.float64


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def near(actual, expected, tolerance) -> None:
    assert actual.shape == expected.shape and expected.norm() > 0
    assert float((actual - expected).norm() / expected.norm()) < tolerance


# One way each: summed directly, windows, blocks, one transform, also of 3 2^a points, taps beyond the sequence, both
# sides, and what wraps.
KERNELS = [
    (1200, 20, {}), (5000, 150, {}), (1024, 1024, {}), (8192, 8192, {}), (11000, 11000, {}), (400, 1000, {}),
    (600, 600, {"taps_rev": 500, "k_rev_lag": 0}), (600, 5, {"taps_rev": 7}), (512, 700, {"mode": "circular"}),
    (4000, 170, {"mode": "circular", "taps_rev": 60}),
]


@pytest.mark.parametrize("isa", _library.machine_isas())
@pytest.mark.parametrize("dtype", (F64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("length, taps, options", KERNELS, ids=lambda x: str(x).replace(" ", ""))
def test_same_as_without(isa, dtype, length, taps, options):
    options = dict(options)
    taps_rev, mode = options.pop("taps_rev", None), options.get("mode", "causal")
    wide = F64 if dtype == F64 else torch.float32
    k, D = torch.randn(2, taps, dtype=wide), torch.randn(4, dtype=wide)
    if taps_rev is not None:
        options["k_rev"] = torch.randn(2, taps_rev, dtype=wide)
    with testing.use_isa(isa):
        spectrum = fft_conv_spectrum(k, length, **options, backend="cpu")
        for batch, here in ((3, length),) if mode == "circular" else ((3, length), (1, length // 3 + 1), (2, 1)):
            u, pre, post = torch.randn(3, batch, 4, here).to(dtype)
            rest = {"D": D, "pre_gate": pre, "post_gate": post}
            out = fft_conv(u, spectrum, **rest, mode=mode)
            exact = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in (options | rest).items()}
            assert out.dtype == dtype
            near(out.double(), fft_conv(u.double(), k.double(), **exact, backend="reference"),
                 {F64: 1e-12, torch.float32: 1e-6}.get(dtype, 4e-3))


@on_backends
def test_holds_copies(backend):
    u, k, k_rev = torch.randn(2, 4, 300), torch.randn(4, 300), torch.randn(4, 9)
    with torch.inference_mode():
        expected = fft_conv(u, k, k_rev=k_rev, backend=backend)
        for taps in (k, k[:, :5]):  # as a transform, and as they are
            spectrum = fft_conv_spectrum(taps, 300, k_rev=k_rev, backend=backend)
            before = fft_conv(u, spectrum)
            taps.zero_(), k_rev.zero_()
            assert torch.equal(fft_conv(u, spectrum), before)
            if taps is k:
                near(before, expected, 1e-6)
            k.normal_(), k_rev.normal_()


def test_rows_do_not_depend_on_the_batch_or_the_threads():
    u = torch.randn(5, 6, 900)
    spectrum = fft_conv_spectrum(torch.randn(3, 900), 1000, backend="cpu")
    results = []
    for threads in (1, 2):
        with testing.use_threads(threads):
            results.append(fft_conv(u, spectrum))
    assert torch.equal(*results)
    assert torch.equal(torch.cat([fft_conv(row, spectrum) for row in u.split(1)]), results[0])


def test_kernels_are_not_transformed_again():
    """At batch 1 the kernels' transform is part of every call; without it there is less to do."""
    u, k = torch.randn(1, 64, 8192), torch.randn(64, 8192)
    spectrum = fft_conv_spectrum(k, 8192, backend="cpu")

    def seconds(kernels):
        best = float("inf")
        for _ in range(20):
            start = time.perf_counter()
            fft_conv(u, kernels, backend="cpu")
            best = min(best, time.perf_counter() - start)
        return best

    with testing.use_threads(1):
        assert any(seconds(spectrum) < 0.9 * seconds(k) for _ in range(3))


def test_nothing_to_convolve():
    for shape, groups in (((0, 4, 30), 4), ((2, 0, 30), 0), ((2, 4, 0), 2)):
        out = fft_conv(torch.randn(shape), fft_conv_spectrum(torch.randn(groups, 30), 30, backend="cpu"))
        assert out.shape == shape


def test_under_autocast_and_compile():
    u, k = torch.randn(2, 4, 300), torch.randn(4, 300)
    spectrum = fft_conv_spectrum(k, 300, backend="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fft_conv(u, spectrum)
    assert out.dtype == torch.bfloat16 and torch.equal(out, fft_conv(u.bfloat16(), k, backend="cpu"))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: fft_conv(x, spectrum), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(u), fft_conv(u, spectrum))


def test_opcheck():
    ops = torch.ops.pykernels
    arguments = torch.randn(2, 300), torch.randn(2, 20), 1, False, 300, 0
    torch.library.opcheck(ops.fft_conv_spectrum_cpu.default, arguments)
    u, pre, post = torch.randn(3, 3, 4, 290)
    arguments = u, ops.fft_conv_spectrum_cpu(*arguments), torch.randn(4), pre, post, 2, 300, 20, 1, False, 300
    torch.library.opcheck(ops.fft_conv_fwd_spectrum_cpu.default, arguments)


def test_the_op_refuses_what_it_would_read_wrongly():
    ops = torch.ops.pykernels
    spectrum = ops.fft_conv_spectrum_cpu(torch.randn(2, 300), None, 1, False, 300, 0)
    arguments = torch.randn(1, 4, 300), spectrum, None, None, None, 2, 300, 0, 1, False, 300
    for i, wrong, match in (
        (0, torch.randn(1, 4, 301), "300 samples, u has 301"),
        (0, torch.randn(1, 3, 300), "no multiple"),
        (1, spectrum[:-1], "make it again"),
        (1, spectrum.double(), "wrong dtype"),
        (5, 4, "make it again"),
        (6, 0, "no such kernel"),
        (10, 5000, "make it again"),
    ):
        with pytest.raises(RuntimeError, match=match):
            ops.fft_conv_fwd_spectrum_cpu(*arguments[:i], wrong, *arguments[i + 1 :])
    isas = _library.machine_isas()
    with (
        testing.use_isa(isas[0] if _library.active_isa() != isas[0] else isas[-1]),
        pytest.raises(RuntimeError, match="another instruction set"),
    ):
        ops.fft_conv_fwd_spectrum_cpu(*arguments)


@on_backends
def test_is_for_inference(backend):
    u, k = torch.randn(1, 2, 300, requires_grad=True), torch.randn(2, 300, requires_grad=True)
    with pytest.raises(RuntimeError, match="k requires grad.*no_grad"):
        fft_conv_spectrum(k, 300, backend=backend)
    spectrum = fft_conv_spectrum(k.detach(), 300, backend=backend)
    with pytest.raises(RuntimeError, match="u requires grad.*no_grad"):
        fft_conv(u, spectrum)
    with torch.no_grad():
        near(fft_conv(u, spectrum), fft_conv(u, fft_conv_spectrum(k, 300, backend=backend)), 1e-6)


@pytest.mark.parametrize("backend", ("triton", "cuda"))
def test_backends_that_keep_none_say_so(backend, monkeypatch):
    with pytest.raises(BackendUnavailable, match="backend='cpu' can"):
        fft_conv_spectrum(torch.randn(2, 300), 300, backend=backend)
    query = pykernels.backends.Query("cuda", torch.float32, {"length": 300, "taps": 300}, frozenset({"spectrum"}))
    assert "pass k itself" in testing.FFT_CONV.op.backends[backend](query)


@pytest.mark.parametrize(
    "args, exception, match",
    (
        ({"k": torch.zeros(2, 0)}, ValueError, "k must have at least one tap"),
        ({"k": torch.zeros(2)}, ValueError, "k must have 2 axes"),
        ({"k": torch.zeros(2, 9, dtype=torch.int32)}, TypeError, "k must be float32.*int32"),
        ({"length": 0}, ValueError, "length must be an integer >= 1, got 0"),
        ({"length": 2.0}, ValueError, "length must be an integer >= 1, got 2.0"),
        ({"mode": "full"}, ValueError, "mode must be.*full"),
        ({"k_rev": torch.zeros(3, 4)}, ValueError, "k_rev must have shape.*G=2"),
        ({"k_rev_lag": 2}, ValueError, "k_rev_lag must be 0 or 1, got 2"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ),
)
def test_bad_input_of_the_spectrum(args, exception, match):
    with pytest.raises(exception, match=match):
        fft_conv_spectrum(**{"k": torch.zeros(2, 9), "length": 20} | args)


@pytest.mark.parametrize(
    "args, exception, match",
    (
        ({"u": torch.zeros(1, 2, 21)}, ValueError, "at most as many samples.*20, got 21"),
        ({"u": torch.zeros(1, 3, 20)}, ValueError, "3 channels, k 2 rows"),
        ({"u": torch.zeros(1, 2, 20, dtype=F64)}, TypeError, "spectrum in torch.float64.*got one in torch.float32"),
        ({"u": torch.zeros(1, 2, 20, device="meta")}, ValueError, "on u's device meta, got a spectrum on cpu"),
        ({"k_rev": torch.zeros(2, 9)}, ValueError, "k_rev must be None"),
        ({"mode": "circular"}, ValueError, "mode must be 'causal'.*'circular'"),
        ({"D": torch.zeros(3)}, ValueError, "D must have shape"),
        ({"backend": "reference"}, ValueError, "backend must be 'auto' or.*'cpu', got 'reference'"),
    ),
)
def test_bad_input_of_calls(args, exception, match):
    spectrum = fft_conv_spectrum(torch.zeros(2, 9), 20, backend="cpu")
    with pytest.raises(exception, match=match):
        fft_conv(**{"u": torch.zeros(1, 2, 20), "k": spectrum} | args)
    circular = fft_conv_spectrum(torch.zeros(2, 9), 20, mode="circular", backend="cpu")
    with pytest.raises(ValueError, match="u must have as many samples.*20, got 19"):
        fft_conv(torch.zeros(1, 2, 19), circular, mode="circular")
