"""Flash attention, and its decode step."""

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
from .kit import DTYPES, Call, Case, Expected, devices_and_threads, step
from .limits import beyond_cache_bytes

# (B, H, T, D). On GPUs the usual grid: heads times size 2048, 16k tokens in all.
CPU_SHAPES = [(4, 8, 512, 64), (1, 8, 2048, 64), (1, 8, 2048, 128), (1, 4, 8192, 64)]
GPU_SHAPES = [(16384 // T, 2048 // D, T, D) for D in (64, 128, 256) for T in (512, 2048, 8192, 16384)]
DECODE_SHAPES = [(1, 32, 8, 4096, 128), (16, 32, 8, 4096, 128)]  # (B, heads, key heads, tokens in the cache, D)


Places = Sequence[tuple[str, int]]


def _flops(B: int, H: int, T: int, D: int, causal: bool, backward: bool) -> float:
    forward = 2 * B * H * T * (T / 2 if causal else T) * 2 * D
    return forward * (3.5 if backward else 1)  # the backward pass has five matrix products to the forward's two


def _attention_cases(places: Places) -> Iterator[tuple[Case, tuple]]:
    for device, threads in places:
        shapes = CPU_SHAPES if device == "cpu" else GPU_SHAPES
        for shape, causal, dtype, backward in itertools.product(shapes, (True, False), ("fp32", "bf16"), (False, True)):
            limits = ("bf16 tile", "bf16 dot", "fp32") if device == "cpu" and dtype == "bf16" else (dtype,)
            label, mask = "B{} H{} T{} D{}".format(*shape), "causal" if causal else "full"
            direction, work = "fwd+bwd" if backward else "fwd", _flops(*shape, causal, backward)
            yield Case("flash_attention", label, mask, dtype, direction, device, threads, work, limits), shape


def _decode_cases(places: Places) -> Iterator[tuple[Case, tuple]]:
    for (device, threads), shape, dtype in itertools.product(places, DECODE_SHAPES, ("fp32", "bf16")):
        B, H, Hk, T, D = shape
        moved = (2 * B * T * Hk * D + 2 * B * H * D) * DTYPES[dtype].itemsize  # the cache once, q and out
        yield Case("flash_attention_decode", f"B{B} H{H}/{Hk} T{T} D{D}", "full cache", dtype, "step", device, threads,
                   moved, ("copy",)), shape


def _order(entry: tuple[Case, tuple]) -> tuple:
    """Cases that share a reference side by side, small shapes first: what they leave of their time goes to the rest."""
    case, shape = entry
    return case.op, math.prod(shape) * shape[-2], case.shape, case.options, case.dtype


def cases(places: Places) -> list[tuple[Case, tuple]]:
    """The grid on (device, threads) pairs."""
    return sorted([*_attention_cases(places), *_decode_cases(places)], key=_order)


CASES = cases(devices_and_threads())


def _inputs(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes]


@functools.lru_cache(maxsize=1)
def _expected(shape: tuple, causal: bool, dtype: torch.dtype, device: str) -> Expected:
    """One head, whole: the reference takes T * T operations per head.

    Its queries in blocks, so that memory stays small; the keys of a causal block end at its last query, which is how
    causal attention aligns.
    """
    B, H, T, D = shape
    q, k, v, dout = _inputs([(B, T, H, D)] * 4, dtype, device)
    b, h = B - 1, (T // 512 + causal) % H  # not always the same head
    q, k, v, dout = (x[b:b + 1, :, h:h + 1] for x in (q, k, v, dout))

    def composition(compute: torch.dtype) -> dict[str, Tensor]:
        sums = torch.float64 if compute == torch.float64 else torch.float32
        parts = {"out": [], "dq": []}
        dk, dv = (torch.zeros_like(x, dtype=sums) for x in (k, v))
        for start in range(0, T, 1024):
            rows, end = slice(start, start + 1024), min(start + 1024, T) if causal else T
            args = {"q": q[:, rows], "k": k[:, :end], "v": v[:, :end], "causal": causal}
            block = testing.Sample(args, ("q", "k", "v"))
            result = testing.run(testing.FLASH_ATTENTION, block.map(lambda x: x.to(compute)), "reference",
                                 grad={"out": dout[:, rows].to(compute)})
            for name in parts:
                parts[name].append(result[name])
            dk[:, :end] += result["dk"]
            dv[:, :end] += result["dv"]
        return {**{name: torch.cat(x, dim=1) for name, x in parts.items()}, "dk": dk.to(compute), "dv": dv.to(compute)}

    return Expected(composition(torch.float64), composition(dtype), lambda name, x: x[b:b + 1, :, h:h + 1],
                    f"batch {b + 1} of {B}, head {h + 1} of {H}")


class Attention:
    op = testing.FLASH_ATTENTION.op

    def __init__(self, case: Case, shape: tuple) -> None:
        B, H, T, D = self.shape = shape
        self.case, self.causal = case, case.options == "causal"
        self.q, self.k, self.v, dout = _inputs([(B, T, H, D)] * 4, DTYPES[case.dtype], case.device)
        self.dout = dout if case.backward else None

    def ours(self, backend: str) -> Call:
        run = step(lambda q, k, v: pykernels.flash_attention(q, k, v, causal=self.causal, backend=backend),
                   (self.q, self.k, self.v), self.dout)
        return Call(run, lambda result: dict(zip(("out", "dq", "dk", "dv"), result)))

    def expected(self) -> Expected:
        return _expected(self.shape, self.causal, DTYPES[self.case.dtype], self.case.device).of(self.case)


class Decode:
    """Caches in turn, together too large for the machine's caches, as the layers of a model are."""

    op = testing.FLASH_ATTENTION_DECODE.op

    def __init__(self, case: Case, shape: tuple) -> None:
        B, H, Hk, T, D = shape
        dtype = DTYPES[case.dtype]
        count = 1  # on a GPU the timer flushes the cache
        if case.device == "cpu":
            count = max(1, min(64, math.ceil(beyond_cache_bytes() / (2 * B * T * Hk * D * dtype.itemsize))))
        self.q, k, v = _inputs([(B, 1, H, D), (B, T, Hk, D), (B, T, Hk, D)], dtype, case.device)
        # All hold the same values: only where they lie differs.
        self.caches = [(k, v), *((k.clone(), v.clone()) for _ in range(count - 1))]
        self.lengths = torch.full((B,), T, dtype=torch.int32, device=case.device)

    @staticmethod
    def in_turn(caches: list) -> Iterator:
        return itertools.cycle(caches)

    def ours(self, backend: str) -> Call:
        turns = self.in_turn(self.caches)

        def run() -> Tensor:
            with torch.no_grad():
                return pykernels.flash_attention_decode(self.q, *next(turns), self.lengths, backend=backend)

        return Call(run, lambda result: {"out": result})

    def expected(self) -> Expected:
        k, v = self.caches[0]

        def composition(compute: torch.dtype) -> dict[str, Tensor]:
            tensors = (x.to(compute) for x in (self.q, k, v))
            return {"out": pykernels.flash_attention_decode(*tensors, self.lengths, backend="reference")}

        return Expected(composition(torch.float64), composition(self.q.dtype), lambda name, x: x, "everything")


@pytest.mark.parametrize(("case", "shape"), CASES, ids=[f"{case.op}-{case.id}" for case, _ in CASES])
def bench_flash_attention(case: Case, shape: tuple, measure) -> None:
    problem = Attention(case, shape) if case.op == "flash_attention" else Decode(case, shape)
    measure(case, problem, peers.for_op(case.op))
