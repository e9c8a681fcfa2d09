"""The selective scan with Mamba's options (softplus, bias, skip, gate), and one token of decoding through a model's
layers."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

import pykernels
from pykernels import testing

from . import peers
from .kit import DTYPES, Call, Case, Expected, devices_and_threads, is_extra, step, step_of_layers

# (B, D, L, N)
CPU_SHAPES = [(1, 1536, 2048, 16), (4, 768, 1024, 16), (1, 1536, 2048, 64)]
GPU_SHAPES = [(1, 1024, 512, 16), (1, 1024, 2**13, 16), (1, 1024, 2**17, 16), (1, 1024, 2**19, 16), (8, 2048, 4096, 16),
              (8, 4096, 2048, 16), (8, 2048, 4096, 64)]
LONG = (1, 32, 2**20, 16)  # the cost is linear in L
STEP_SHAPES = [(1, 1536, 16), (8, 1536, 16)]  # (B, D, N)
CPU_MAIN_SHAPES = {CPU_SHAPES[0], LONG, STEP_SHAPES[0]}  # the others are extra
LAYERS = 24  # of Mamba-130M
CHECKED = 4  # channels
TOKENS = 2048  # at most so many are checked: the reference goes token by token

Places = Sequence[tuple[str, int]]


def _flops(B: int, D: int, L: int, N: int, backward: bool) -> float:
    """Per state: exp2 (its polynomial, 12), its argument, input, recurrence, output; backward the adjoint's eight
    more."""
    return B * D * L * N * (18 + (18 + 15 if backward else 0))


def _scan_cases(places: Places) -> Iterator[tuple[Case, tuple]]:
    for device, threads in places:
        shapes = [*CPU_SHAPES, LONG] if device == "cpu" else GPU_SHAPES
        for shape, dtype, backward in itertools.product(shapes, ("fp32", "bf16"), (False, True)):
            if backward and device == "cpu" and (shape == LONG or shape[3] > 16):
                continue  # a call of the peers takes half a minute
            yield Case("selective_scan", "B{} D{} L{} N{}".format(*shape), "gated", dtype,
                       "fwd+bwd" if backward else "fwd", device,
                       threads, _flops(*shape, backward), ("fp32",),
                       extra=is_extra(device, threads, places, shape in CPU_MAIN_SHAPES)), shape


def _step_cases(places: Places) -> Iterator[tuple[Case, tuple]]:
    for (device, threads), shape, dtype in itertools.product(places, STEP_SHAPES, ("fp32", "bf16")):
        B, D, N = shape
        yield Case("selective_scan_step", f"B{B} D{D} N{N}", f"{LAYERS} layers", dtype, "step", device, threads,
                   LAYERS * 4 * (2 * B + 1) * D * N, ("copy",),  # states read and written, A read
                   extra=is_extra(device, threads, places, shape in CPU_MAIN_SHAPES)), shape


def cases(places: Places) -> list[tuple[Case, tuple]]:
    """The grid on (device, threads) pairs, cases that share inputs side by side."""
    return sorted([*_scan_cases(places), *_step_cases(places)], key=lambda entry: (entry[0].op, math.prod(entry[1]),
                                                                                   entry[0].dtype))


CASES = cases(devices_and_threads())
_NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def _parameters(D: int, N: int, generator: torch.Generator) -> dict[str, Tensor]:
    """As Mamba starts: A = -1 ... -N, steps of 0.001 to 0.1."""
    dt = torch.exp(torch.rand(D, generator=generator) * math.log(100) + math.log(1e-3))
    return {"A": -torch.arange(1.0, N + 1).repeat(D, 1), "D": torch.ones(D), "delta_bias": torch.log(torch.expm1(dt))}


@functools.lru_cache(maxsize=1)
def _inputs(shape: tuple, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], Tensor]:
    """-> the arguments, and a gradient of out at the checked channels alone, so that few channels make the others'
    sums."""
    B, D, L, N = shape
    generator = torch.Generator().manual_seed(0)
    u, delta, z, dout = (torch.randn(B, D, L, generator=generator).to(dtype) for _ in range(4))
    projections = {name: torch.randn(B, N, L, generator=generator).to(dtype) for name in "BC"}
    args = {"u": u, "delta": delta * 0.5, "z": z, **projections, **_parameters(D, N, generator)}
    dout[:, :-CHECKED] = 0
    dout[..., TOKENS:] = 0
    return {name: args[name].to(device) for name in _NAMES}, dout.to(device)


def _checked(name: str, x: Tensor) -> Tensor:
    """The part of an argument, output or gradient that is compared."""
    argument = name[1:] if name[1:] in _NAMES else name
    if argument in ("A", "D", "delta_bias"):
        return x[-CHECKED:]
    return x[..., :TOKENS] if argument in ("B", "C") else x[:, -CHECKED:, :TOKENS]


@functools.lru_cache(maxsize=1)
def _expected(shape: tuple, dtype: torch.dtype, device: str) -> Expected:
    args, dout = _inputs(shape, dtype, device)
    args = {name: _checked(name, x).contiguous() for name, x in args.items()}

    def composition(compute: torch.dtype) -> dict[str, Tensor]:
        wide = torch.promote_types(compute, torch.float32)
        cast = {name: x.to(compute if x.dtype == dtype else wide) for name, x in args.items()}
        sample = testing.Sample({**cast, "delta_softplus": True}, _NAMES)
        return testing.run(testing.SELECTIVE_SCAN, sample, "reference", grad={"out": _checked("out", dout).to(compute)})

    results = composition(torch.float64), composition(dtype)
    names = ("out", *("d" + name for name in _NAMES))
    return Expected(*({name: x[name] for name in names} for x in results), _checked,
                    f"{CHECKED} of {shape[1]} channels, their first {min(TOKENS, shape[2])} tokens")


class Scan:
    op = testing.SELECTIVE_SCAN.op

    def __init__(self, case: Case, shape: tuple) -> None:
        self.case, self.shape = case, shape
        self.args, dout = _inputs(shape, DTYPES[case.dtype], case.device)
        self.dout = dout if case.backward else None

    def call(self, function) -> Call:
        """Of a function of the arguments by name."""
        run = step(lambda *tensors: function(**dict(zip(_NAMES, tensors))), self.args.values(), self.dout)
        return Call(run, lambda result: dict(zip(("out", *("d" + name for name in _NAMES)), result)))

    def ours(self, backend: str) -> Call:
        return self.call(functools.partial(pykernels.selective_scan, delta_softplus=True, backend=backend))

    def expected(self) -> Expected:
        return _expected(self.shape, DTYPES[self.case.dtype], self.case.device).of(self.case)


class Step:
    """One token through the scans of all layers."""

    op = testing.SELECTIVE_SCAN_STEP.op

    def __init__(self, case: Case, shape: tuple) -> None:
        B, D, N = shape
        generator = torch.Generator().manual_seed(0)
        dtype = DTYPES[case.dtype]

        def layer() -> dict[str, Tensor]:
            args = {name: torch.randn(B, D, generator=generator).to(dtype) for name in ("x", "delta", "z")}
            args |= {name: torch.randn(B, N, generator=generator).to(dtype) for name in "BC"}
            args |= {**_parameters(D, N, generator), "state": torch.randn(B, D, N, generator=generator)}
            return {name: x.to(case.device) for name, x in args.items()}

        self.layers = [layer() for _ in range(LAYERS)]
        self.first = {**self.layers[0], "state": self.layers[0]["state"].clone()}

    def call(self, function) -> Call:
        return step_of_layers(function, self.layers, self.first)

    def ours(self, backend: str) -> Call:
        return self.call(functools.partial(pykernels.selective_scan_step, delta_softplus=True, backend=backend))

    def expected(self) -> Expected:
        def composition(compute: torch.dtype) -> dict[str, Tensor]:
            wide, dtype = torch.promote_types(compute, torch.float32), self.first["x"].dtype
            args = {name: x.to(compute if x.dtype == dtype and name != "state" else wide, copy=True) for name,
                    x in self.first.items()}
            return {"out": pykernels.selective_scan_step(**args, delta_softplus=True, backend="reference")}

        return Expected(composition(torch.float64), composition(self.first["x"].dtype), lambda name, x: x, "one layer")


@pytest.mark.parametrize(("case", "shape"), CASES, ids=[f"{case.op}-{case.id}" for case, _ in CASES])
def bench_selective_scan(case: Case, shape: tuple, measure) -> None:
    problem = Scan(case, shape) if case.op == "selective_scan" else Step(case, shape)
    measure(case, problem, peers.for_op(case.op))
