"""Linear attention with a decay per head (retention's case), per token and per channel, and its step."""

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
from .kit import DTYPES, Call, Case, Expected, devices_and_threads, is_extra, step
from .limits import beyond_cache_bytes

# (B, T, H, D), K = V = D. On GPUs fla's six benchmark shapes.
CPU_SHAPES = [(1, 4096, 8, 128), (1, 4096, 16, 64), (1, 2048, 4, 256)]
GPU_SHAPES = [(1, 8192, 96, 128), (2, 16384, 16, 128), (4, 2048, 16, 128), (4, 4096, 64, 128), (8, 1024, 8, 64),
              (8, 2048, 32, 256)]
LONG = (1, 131072, 1, 64)  # the cost is linear in T
STEP_SHAPES = [(8, 16, 128), (1, 16, 256)]  # (B, H, D)
CPU_MAIN_SHAPES = {CPU_SHAPES[0], LONG, *STEP_SHAPES}  # the others are extra
CHUNK = 64  # of the operation count below

Places = Sequence[tuple[str, int]]


def _flops(B: int, T: int, H: int, D: int, backward: bool) -> float:
    """The chunked form's products: state read and update, and the visible half of a chunk's scores."""
    forward, backward_only = 4 * D * D + 2 * CHUNK * D, 10 * D * D + 5 * CHUNK * D
    return B * T * H * (forward + (backward_only if backward else 0))


def _attention_cases(places: Places) -> Iterator[tuple[Case, tuple]]:
    for device, threads in places:
        shapes = [*CPU_SHAPES, LONG] if device == "cpu" else GPU_SHAPES
        for shape, decay, dtype, backward in itertools.product(shapes, ("head", "token", "channel"), ("fp32", "bf16"),
                                                               (False, True)):
            if shape == LONG and (decay != "head" or backward):
                continue
            limits = ("bf16 tile", "bf16 dot", "fp32") if device == "cpu" and dtype == "bf16" else (dtype,)
            direction = "fwd+bwd" if backward else "fwd"
            yield Case("linear_attention", "B{} T{} H{} D{}".format(*shape), f"{decay} decay", dtype, direction, device,
                       threads, _flops(*shape, backward), limits,
                       extra=is_extra(device, threads, places, shape in CPU_MAIN_SHAPES and decay != "token")), shape


def _step_cases(places: Places) -> Iterator[tuple[Case, tuple]]:
    for (device, threads), shape, dtype in itertools.product(places, STEP_SHAPES, ("fp32", "bf16")):
        B, H, D = shape
        moved = 2 * 4 * B * H * D * D  # the state read and written
        yield Case("linear_attention_step", f"B{B} H{H} D{D}", "head decay", dtype, "step", device, threads, moved,
                   ("copy",), extra=is_extra(device, threads, places, shape in CPU_MAIN_SHAPES)), shape


def cases(places: Places) -> list[tuple[Case, tuple]]:
    """The grid on (device, threads) pairs, cases that share a reference side by side."""
    return sorted([*_attention_cases(places), *_step_cases(places)],
                  key=lambda entry: (entry[0].op, math.prod(entry[1]), entry[0].options, entry[0].dtype))


CASES = cases(devices_and_threads())


@functools.lru_cache(maxsize=1)
def _inputs(shape: tuple, options: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """-> q, k, v, dout, decay."""
    B, T, H, D = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    if options == "head decay":
        decay = torch.log1p(-torch.exp2(-5 - torch.arange(H) * 8 / H))
    else:
        decay = -0.1 * torch.rand(shape if options == "channel decay" else shape[:3], generator=generator)
    return q, k, v, dout, decay.to(device)


@functools.lru_cache(maxsize=1)
def _expected(shape: tuple, options: str, dtype: torch.dtype, device: str) -> Expected:
    """The last head's first tokens forward; backward from a gradient at those alone: the recurrence stays short."""
    tokens, h = 256, shape[2] - 1
    q, k, v, dout, decay = _inputs(shape, options, dtype, device)
    q, k, v, dout = (x[:1, :tokens, h:h + 1] for x in (q, k, v, dout))
    decay = decay[h:h + 1] if decay.dim() == 1 else decay[:1, :tokens, h:h + 1]

    def composition(compute: torch.dtype) -> dict[str, Tensor]:
        sample = testing.Sample({"q": q, "k": k, "v": v, "decay": decay.contiguous()}, ("q", "k", "v"))
        wide = torch.promote_types(compute, torch.float32)
        sample = testing.Sample({name: x.to(wide if name == "decay" else compute) for name, x in sample.args.items()},
                                sample.differentiable)
        result = testing.run(testing.LINEAR_ATTENTION, sample, "reference", grad={"out": dout.to(compute)})
        return {name: result[name] for name in ("out", "dq", "dk", "dv")}

    return Expected(composition(torch.float64), composition(dtype), lambda name, x: x[:1, :tokens, h:h + 1],
                    f"head {h + 1} of {shape[2]}, its first {tokens} tokens")


class Attention:
    op = testing.LINEAR_ATTENTION.op

    def __init__(self, case: Case, shape: tuple) -> None:
        self.case, self.shape = case, shape
        self.q, self.k, self.v, dout, self.decay = _inputs(shape, case.options, DTYPES[case.dtype], case.device)
        self.dout = None
        if case.backward:
            # Zero after the checked tokens, whose gradients then do not depend on the rest of the sequence.
            self.dout = dout.clone()
            self.dout[:, 256:] = 0

    def ours(self, backend: str) -> Call:
        run = step(lambda q, k, v: pykernels.linear_attention(q, k, v, decay=self.decay, backend=backend),
                   (self.q, self.k, self.v), self.dout)
        return Call(run, lambda result: dict(zip(("out", "dq", "dk", "dv"), result)))

    def expected(self) -> Expected:
        return _expected(self.shape, self.case.options, DTYPES[self.case.dtype], self.case.device).of(self.case)


class Step:
    """States in turn, together too large for the machine's caches, as the layers of a model are."""

    op = testing.LINEAR_ATTENTION_STEP.op

    def __init__(self, case: Case, shape: tuple) -> None:
        B, H, D = shape
        generator = torch.Generator().manual_seed(0)
        self.q, self.k, self.v = (torch.randn(B, H, D, generator=generator).to(case.device, DTYPES[case.dtype])
                                  for _ in range(3))
        self.decay = torch.log1p(-torch.exp2(-5 - torch.arange(H) * 8 / H)).to(case.device)
        state = torch.randn(B, H, D, D, generator=generator).to(case.device)
        count = 1  # on a GPU the timer flushes the cache
        if case.device == "cpu":
            count = max(1, min(64, math.ceil(beyond_cache_bytes() / (4 * state.numel()))))
        self.first = state
        self.states = [state.clone() for _ in range(count)]

    def call(self, function) -> Call:
        turns = itertools.cycle(self.states)

        def run() -> Tensor:
            with torch.no_grad():
                return function(self.q, self.k, self.v, next(turns), self.decay)

        def outputs(_: Tensor) -> dict[str, Tensor]:
            # The states have moved on since the first call, so the checked output is of a state of its own.
            with torch.no_grad():
                return {"out": function(self.q, self.k, self.v, self.first.clone(), self.decay)}

        return Call(run, outputs)

    def ours(self, backend: str) -> Call:
        return self.call(lambda q, k, v, state, decay: pykernels.linear_attention_step(
            q, k, v, state, decay=decay, backend=backend))

    def expected(self) -> Expected:
        def composition(compute: torch.dtype) -> dict[str, Tensor]:
            wide = torch.promote_types(compute, torch.float32)
            q, k, v = (x.to(compute) for x in (self.q, self.k, self.v))
            return {"out": pykernels.linear_attention_step(q, k, v, self.first.to(wide, copy=True),
                                                           decay=self.decay.to(wide), backend="reference")}

        return Expected(composition(torch.float64), composition(self.q.dtype), lambda name, x: x, "everything")


@pytest.mark.parametrize(("case", "shape"), CASES, ids=[f"{case.op}-{case.id}" for case, _ in CASES])
def bench_linear_attention(case: Case, shape: tuple, measure) -> None:
    problem = Attention(case, shape) if case.op == "linear_attention" else Step(case, shape)
    measure(case, problem, peers.for_op(case.op))
