"""Long convolution with kernels as long as the sequence, gated and with a skip alone, and with short kernels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import pykernels
from pykernels import testing

from . import peers
from .kit import DTYPES, Call, Case, Expected, devices_and_threads, is_extra, step

# (B, D, L, K). On GPUs FlashFFTConv's benchmark sizes.
CPU_SHAPES = [
    (8, 64, 1024, 1024),
    (8, 64, 4096, 4096),
    (8, 32, 16384, 16384),
    (4, 32, 65536, 65536),
    (4, 8, 262144, 262144),
    (4, 2, 1048576, 1048576),
    (8, 64, 5000, 5000),
]
SHORT_SHAPES = [(8, 64, 4096, 16), (8, 64, 4096, 64), (8, 64, 4096, 128)]
CPU_MAIN_SHAPES = {*CPU_SHAPES[0:4:2], CPU_SHAPES[4], SHORT_SHAPES[1]}  # the others are extra
GPU_SHAPES = [(64, 768, 1 << i, 1 << i) for i in (8, 10, 12, 13, 14, 15)]
TUNED = "skip, allocator tuned"
# Kernels transformed beforehand, by us and by the peer, at the batch where that is most of what can be saved.
KEPT = "skip, spectrum kept"
KEPT_SHAPES = [(1, 64, 4096, 4096), (1, 32, 65536, 65536)]

Places = Sequence[tuple[str, int]]


def _bytes(B: int, D: int, L: int, K: int, gated: bool, dtype: str, backward: bool) -> float:
    """Each row in once and out once, in forward and in backward."""
    rows = 2 + 2 * gated
    if backward:
        rows += 3 + 4 * gated  # u and dout in, du out; the gates in, their gradients out
    return rows * B * D * L * (4 if dtype == "fp32" else 2)


def cases(places: Places) -> list[tuple[Case, tuple]]:
    """The grid on (device, threads) pairs."""
    found = []
    for device, threads in places:
        long = CPU_SHAPES if device == "cpu" else GPU_SHAPES
        grid = itertools.chain(
            itertools.product(long, ("skip", "gated"), ("fp32", "bf16"), (False, True)),
            itertools.product(long if device == "cpu" else (), (TUNED,), ("fp32", "bf16"), (False, True)),
            itertools.product(SHORT_SHAPES, ("plain",), ("fp32", "bf16"), (False, True)),
            itertools.product(KEPT_SHAPES if device == "cpu" else (), (KEPT,), ("fp32", "bf16"), (False,)),
        )
        for shape, options, dtype, backward in grid:
            if options == "gated" and device == "cpu" and shape[2] not in (1024, 16384):
                continue
            extra = is_extra(device, threads, places, shape in CPU_MAIN_SHAPES and options in ("skip", "plain"))
            case = Case("fft_conv", "B{} D{} L{} K{}".format(*shape), options, dtype, "fwd+bwd" if backward else "fwd",
                        device, threads, _bytes(*shape, options == "gated", dtype, backward), ("copy",), extra=extra,
                        tuned=options == TUNED)
            found.append((case, shape))
    return sorted(found, key=lambda entry: (entry[1], entry[0].options, entry[0].dtype))


CASES = cases(devices_and_threads())


@functools.lru_cache(maxsize=1)
def _inputs(shape: tuple, options: str, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], Tensor]:
    """-> the arguments of fft_conv, dout."""
    B, D, L, K = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    args = {"u": normal(B, D, L).to(dtype), "k": normal(D, K)}
    if options != "plain":
        args["D"] = normal(D)
    if options == "gated":
        args |= {name: normal(B, D, L).to(dtype) for name in ("pre_gate", "post_gate")}
    return args, normal(B, D, L).to(dtype)


def _last_channel(name: str, x: Tensor) -> Tensor:
    return x[-1:] if x.dim() < 3 else x[:, -1:]


@functools.lru_cache(maxsize=1)
def _expected(shape: tuple, options: str, dtype: torch.dtype, device: str) -> Expected:
    args, dout = _inputs(shape, options, dtype, device)
    sample = testing.Sample({name: _last_channel(name, x) for name, x in args.items()}, tuple(args))

    def composition(wide: bool) -> dict[str, Tensor]:
        chosen = sample.map(Tensor.double) if wide else sample
        given = _last_channel("dout", dout)
        return testing.run(testing.FFT_CONV, chosen, "reference", grad={"out": given.double() if wide else given})

    return Expected(composition(True), composition(False), _last_channel, f"channel {shape[1]} of {shape[1]}")


class Convolution:
    op = testing.FFT_CONV.op

    def __init__(self, case: Case, shape: tuple) -> None:
        self.case, self.shape = case, shape
        self.args, dout = _inputs(shape, case.options, DTYPES[case.dtype], case.device)
        self.dout = dout if case.backward else None

    def call(self, function) -> Call:
        """Of a function of the arguments by name."""
        names = list(self.args)
        run = step(lambda *tensors: function(**dict(zip(names, tensors))), self.args.values(), self.dout)
        return Call(run, lambda result: dict(zip(("out", *("d" + name for name in names)), result)))

    def ours(self, backend: str) -> Call:
        if self.case.options == KEPT:
            spectrum = pykernels.fft_conv_spectrum(self.args["k"], self.shape[2], backend=backend)
            return self.call(lambda u, k, D: pykernels.fft_conv(u, spectrum, D=D))
        return self.call(functools.partial(pykernels.fft_conv, backend=backend))

    def expected(self) -> Expected:
        return _expected(self.shape, self.case.options, DTYPES[self.case.dtype], self.case.device).of(self.case)


@pytest.mark.parametrize(("case", "shape"), CASES, ids=[f"{case.op}-{case.id}" for case, _ in CASES])
def bench_fft_conv(case: Case, shape: tuple, measure) -> None:
    measure(case, Convolution(case, shape), peers.for_op(case.op))
