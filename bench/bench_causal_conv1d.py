"""The causal depthwise convolution as Mamba has it (width 4, bias, SiLU), and one token of it through a model's
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

WIDTH = 4
CPU_SHAPES = [(1, 1536, 2048), (8, 768, 1024)]  # (B, D, L)
GPU_SHAPES = [(1, 1024, 2**13), (1, 1024, 2**17), (8, 2048, 4096), (8, 4096, 2048)]
STEP_SHAPES = [(1, 1536), (8, 1536)]  # (B, D)
CPU_MAIN_SHAPES = {CPU_SHAPES[0], STEP_SHAPES[0]}  # the others are extra
LAYERS = 24  # of Mamba-130M
BYTES = {"fp32": 4, "bf16": 2}

Places = Sequence[tuple[str, int]]


def _conv_cases(places: Places) -> Iterator[tuple[Case, tuple]]:
    for device, threads in places:
        shapes = CPU_SHAPES if device == "cpu" else GPU_SHAPES
        for shape, dtype, backward in itertools.product(shapes, ("fp32", "bf16"), (False, True)):
            moved = math.prod(shape) * BYTES[dtype] * (5 if backward else 2)  # x, out; x, dout, dx again
            yield Case("causal_conv1d", "B{} D{} L{}".format(*shape) + f" W{WIDTH}", "silu", dtype,
                       "fwd+bwd" if backward else "fwd", device, threads, moved, ("copy",),
                       extra=is_extra(device, threads, places, shape in CPU_MAIN_SHAPES)), shape


def _step_cases(places: Places) -> Iterator[tuple[Case, tuple]]:
    for (device, threads), shape, dtype in itertools.product(places, STEP_SHAPES, ("fp32", "bf16")):
        moved = LAYERS * math.prod(shape) * BYTES[dtype] * 2 * WIDTH  # the states read and written, x, out
        yield Case("causal_conv1d_step", "B{} D{}".format(*shape) + f" W{WIDTH}", f"{LAYERS} layers", dtype, "step",
                   device, threads, moved, ("copy",),
                   extra=is_extra(device, threads, places, shape in CPU_MAIN_SHAPES)), shape


def cases(places: Places) -> list[tuple[Case, tuple]]:
    """The grid on (device, threads) pairs, cases that share inputs side by side."""
    return sorted([*_conv_cases(places), *_step_cases(places)], key=lambda entry: (entry[0].op, math.prod(entry[1]),
                                                                                   entry[0].dtype))


CASES = cases(devices_and_threads())
_NAMES = ("x", "weight", "bias")


@functools.lru_cache(maxsize=1)
def _inputs(shape: tuple, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], Tensor]:
    """-> the arguments, dout."""
    generator = torch.Generator().manual_seed(0)
    x, dout = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    weight, bias = (torch.randn(size, generator=generator).to(device, dtype) for size in ((shape[1], WIDTH),
                                                                                          (shape[1],)))
    return {"x": x, "weight": weight * WIDTH**-0.5, "bias": bias}, dout


@functools.lru_cache(maxsize=1)
def _expected(shape: tuple, dtype: torch.dtype, device: str) -> Expected:
    args, dout = _inputs(shape, dtype, device)

    def part(name: str, x: Tensor) -> Tensor:
        return x[:, -8:] if name in ("x", "out", "dx") else x[-8:]

    def composition(compute: torch.dtype) -> dict[str, Tensor]:
        sample = testing.Sample({**{n: part(n, x).to(compute) for n, x in args.items()}, "activation": "silu"}, _NAMES)
        result = testing.run(testing.CAUSAL_CONV1D, sample, "reference", grad={"out": part("out", dout).to(compute)})
        return {name: result[name] for name in ("out", "dx", "dweight", "dbias")}

    return Expected(composition(torch.float64), composition(dtype), part, f"8 of {shape[1]} channels")


class Convolution:
    op = testing.CAUSAL_CONV1D.op

    def __init__(self, case: Case, shape: tuple) -> None:
        self.case, self.shape = case, shape
        self.args, dout = _inputs(shape, DTYPES[case.dtype], case.device)
        self.dout = dout if case.backward else None

    def call(self, function) -> Call:
        """Of a function of x, weight and bias."""
        run = step(function, self.args.values(), self.dout)
        return Call(run, lambda result: dict(zip(("out", "dx", "dweight", "dbias"), result)))

    def ours(self, backend: str) -> Call:
        return self.call(lambda x, weight, bias: pykernels.causal_conv1d(x, weight, bias=bias, activation="silu",
                                                                         backend=backend))

    def expected(self) -> Expected:
        return _expected(self.shape, DTYPES[self.case.dtype], self.case.device).of(self.case)


class Step:
    """One token through the convolutions of all layers."""

    op = testing.CAUSAL_CONV1D_STEP.op

    def __init__(self, case: Case, shape: tuple) -> None:
        B, D = shape
        generator = torch.Generator().manual_seed(0)
        sizes = {"x": (B, D), "state": (B, D, WIDTH - 1), "weight": (D, WIDTH), "bias": (D,)}
        dtype = DTYPES[case.dtype]
        self.layers = [{name: torch.randn(size, generator=generator).to(case.device, dtype) for name,
                        size in sizes.items()}
                       for _ in range(LAYERS)]
        self.first = {**self.layers[0], "state": self.layers[0]["state"].clone()}

    def call(self, function) -> Call:
        return step_of_layers(function, self.layers, self.first)

    def ours(self, backend: str) -> Call:
        return self.call(functools.partial(pykernels.causal_conv1d_step, activation="silu", backend=backend))

    def expected(self) -> Expected:
        def composition(compute: torch.dtype) -> dict[str, Tensor]:
            args = {name: x.to(compute, copy=True) for name, x in self.first.items()}
            return {"out": pykernels.causal_conv1d_step(**args, activation="silu", backend="reference")}

        return Expected(composition(torch.float64), composition(self.first["x"].dtype), lambda name, x: x, "one layer")


@pytest.mark.parametrize(("case", "shape"), CASES, ids=[f"{case.op}-{case.id}" for case, _ in CASES])
def bench_causal_conv1d(case: Case, shape: tuple, measure) -> None:
    problem = Convolution(case, shape) if case.op == "causal_conv1d" else Step(case, shape)
    measure(case, problem, peers.for_op(case.op))
