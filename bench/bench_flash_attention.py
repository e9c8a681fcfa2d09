"""Flash attention, and its decode step."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

import pykernels
from pykernels import testing

from . import peers
from .kit import DTYPES, Call, Case, Expected, devices_and_threads, is_extra, step
from .limits import beyond_cache_bytes

# (B, H, T, D). On GPUs the usual grid: heads times size 2048, 16k tokens in all.
CPU_SHAPES = [(4, 8, 512, 64), (1, 8, 2048, 64), (1, 8, 2048, 128), (1, 4, 8192, 64)]
GPU_SHAPES = [(16384 // T, 2048 // D, T, D) for D in (64, 128, 256) for T in (512, 2048, 8192, 16384)]
# What options cost: beside the plain causal rows of the same shape. "bias" is one matrix per head, without a gradient.
OPTION_SHAPES = {"cpu": (1, 8, 2048, 64), "cuda": (2, 16, 8192, 128)}
OPTION_ROWS = [("causal alibi", False), ("causal alibi", True), ("causal bias", False), ("causal bias", True),
               ("causal softcap 20", False), ("causal window 512", False)]
# Short sequences beside a long one, in one packed call: (H, D, lengths).
PACKED = (8, 64, (4096, *[96] * 24, *[160] * 8))
# (B, heads, key heads, tokens in the cache, D)
DECODE_SHAPES = [(1, 32, 8, 4096, 128), (16, 32, 8, 4096, 128), (1, 32, 8, 32768, 128), (16, 32, 8, 32768, 128)]
CPU_MAIN_SHAPES = {(1, 8, 2048, 64), (1, 8, 2048, 128), *DECODE_SHAPES[:2]}  # the others are extra
PAGE = 64


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
            yield Case("flash_attention", label, mask, dtype, direction, device, threads, work, limits,
                       extra=is_extra(device, threads, places, shape in CPU_MAIN_SHAPES)), shape


def _option_cases(places: Places) -> Iterator[tuple[Case, tuple]]:
    for (device, threads), (options, backward), dtype in itertools.product(places, OPTION_ROWS, ("fp32", "bf16")):
        shape = OPTION_SHAPES["cpu" if device == "cpu" else "cuda"]
        B, H, T, D = shape
        # A window of w keys: all but the first queries see w of them.
        work = _flops(*shape, True, backward) * (1 if "window" not in options else 2 * 512 * (T - 256) / T**2)
        limits = ("bf16 tile", "bf16 dot", "fp32") if device == "cpu" and dtype == "bf16" else (dtype,)
        direction = "fwd+bwd" if backward else "fwd"
        extra = is_extra(device, threads, places, not backward)
        yield Case("flash_attention", "B{} H{} T{} D{}".format(*shape), options, dtype, direction, device, threads,
                   work, limits, beside="the plain call", extra=extra), shape


def _packed_cases(places: Places) -> Iterator[tuple[Case, tuple]]:
    H, D, lengths = PACKED
    work = sum(_flops(1, H, T, D, True, False) for T in lengths)
    for (device, threads), dtype in itertools.product(places, ("fp32", "bf16")):
        limits = ("bf16 tile", "bf16 dot", "fp32") if device == "cpu" and dtype == "bf16" else (dtype,)
        yield Case("flash_attention", f"H{H} D{D} {len(lengths)} sequences of {min(lengths)} to {max(lengths)}",
                   "packed causal", dtype, "fwd", device, threads, work, limits, beside="its parts",
                   extra=is_extra(device, threads, places, True)), (1, H, sum(lengths), D)


def _arguments(case_options: str, heads: int, tokens: int, dtype: torch.dtype, device: str) -> dict:
    """The arguments of flash_attention that a row's options mean."""
    arguments: dict = {"causal": case_options.startswith("causal")}
    if "alibi" in case_options:
        arguments["alibi_slopes"] = 2 ** (-8 * torch.arange(1, heads + 1, device=device) / heads)
    if "bias" in case_options:
        arguments["bias"] = _inputs([(heads, tokens, tokens)], dtype, device)[0]
    if "softcap" in case_options:
        arguments["softcap"] = 20.0
    if "window" in case_options:
        arguments["window"] = (511, 0)
    return arguments


def _decode_cases(places: Places) -> Iterator[tuple[Case, tuple]]:
    grid = itertools.product(places, DECODE_SHAPES, ("full cache", "paged cache"), ("fp32", "bf16"))
    for (device, threads), shape, options, dtype in grid:
        B, H, Hk, T, D = shape
        moved = (2 * B * T * Hk * D + 2 * B * H * D) * DTYPES[dtype].itemsize  # the cache once, q and out
        yield Case("flash_attention_decode", f"B{B} H{H}/{Hk} T{T} D{D}", options, dtype, "step", device, threads,
                   moved, ("copy",), extra=is_extra(device, threads, places, shape in CPU_MAIN_SHAPES)), shape


def _order(entry: tuple[Case, tuple]) -> tuple:
    """Cases that share a reference side by side, small shapes first: what they leave of their time goes to the rest."""
    case, shape = entry
    return case.op, math.prod(shape) * shape[-2], case.shape, case.options, case.dtype


def cases(places: Places) -> list[tuple[Case, tuple]]:
    """The grid on (device, threads) pairs."""
    return sorted([*_attention_cases(places), *_option_cases(places), *_packed_cases(places), *_decode_cases(places)],
                  key=_order)


CASES = cases(devices_and_threads())


def _inputs(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes]


@functools.lru_cache(maxsize=1)
def _expected(shape: tuple, options: str, dtype: torch.dtype, device: str) -> Expected:
    """One head, whole: the reference takes T * T operations per head.

    Its queries in blocks, so that memory stays small; the keys of a causal block end at its last query, which is how
    causal attention aligns.
    """
    B, H, T, D = shape
    q, k, v, dout = _inputs([(B, T, H, D)] * 4, dtype, device)
    arguments = _arguments(options, H, T, dtype, device)
    causal = arguments["causal"]
    b, h = B - 1, (T // 512 + causal) % H  # not always the same head
    q, k, v, dout = (x[b:b + 1, :, h:h + 1] for x in (q, k, v, dout))
    if "alibi_slopes" in arguments:
        arguments["alibi_slopes"] = arguments["alibi_slopes"][h:h + 1]

    def composition(compute: torch.dtype) -> dict[str, Tensor]:
        sums = torch.float64 if compute == torch.float64 else torch.float32
        parts = {"out": [], "dq": []}
        dk, dv = (torch.zeros_like(x, dtype=sums) for x in (k, v))
        for start in range(0, T, 1024):
            rows, end = slice(start, start + 1024), min(start + 1024, T) if causal else T
            args = {**arguments, "q": q[:, rows], "k": k[:, :end], "v": v[:, :end]}
            if "bias" in args:
                args["bias"] = args["bias"][h:h + 1, rows, :end]
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
        self.case, dtype = case, DTYPES[case.dtype]
        self.options = _arguments(case.options, H, T, dtype, case.device)
        self.causal = self.options["causal"]
        self.q, self.k, self.v, dout = _inputs([(B, T, H, D)] * 4, dtype, case.device)
        self.dout = dout if case.backward else None

    def ours(self, backend: str) -> Call:
        run = step(lambda q, k, v: pykernels.flash_attention(q, k, v, **self.options, backend=backend),
                   (self.q, self.k, self.v), self.dout)
        return Call(run, lambda result: dict(zip(("out", "dq", "dk", "dv"), result)))

    def beside(self, backend: str) -> Callable[[], object]:
        """Without the options but the mask."""
        return step(lambda q, k, v: pykernels.flash_attention(q, k, v, causal=self.causal, backend=backend),
                    (self.q, self.k, self.v), self.dout)

    def expected(self) -> Expected:
        return _expected(self.shape, self.case.options, DTYPES[self.case.dtype], self.case.device).of(self.case)


class Packed:
    """Sequences of PACKED's lengths in one call; beside it a call for each."""

    op = testing.FLASH_ATTENTION.op
    dout = None

    def __init__(self, case: Case, shape: tuple) -> None:
        self.case, self.lengths = case, PACKED[2]
        self.q, self.k, self.v = _inputs([(1, shape[2], shape[1], shape[3])] * 3, DTYPES[case.dtype], case.device)
        ends = torch.tensor((0, *self.lengths)).cumsum(0)
        self.starts = ends.to(case.device, torch.int32)
        self.parts = [tuple(x[:, a:b] for x in (self.q, self.k, self.v)) for a, b in itertools.pairwise(ends.tolist())]

    def ours(self, backend: str) -> Call:
        function = functools.partial(pykernels.flash_attention, causal=True, cu_seqlens_q=self.starts,
                                     cu_seqlens_k=self.starts, backend=backend)
        return Call(step(function, (self.q, self.k, self.v), None), lambda result: {"out": result[0]})

    def beside(self, backend: str) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                for part in self.parts:
                    pykernels.flash_attention(*part, causal=True, backend=backend)

        return run

    def expected(self) -> Expected:
        def composition(compute: torch.dtype) -> dict[str, Tensor]:
            parts = (tuple(x[:, :, :1].to(compute) for x in part) for part in self.parts)
            outs = [pykernels.flash_attention(*part, causal=True, backend="reference") for part in parts]
            return {"out": torch.cat(outs, dim=1)}

        return Expected(composition(torch.float64), composition(self.q.dtype), lambda name, x: x[:, :, :1],
                        f"head 1 of {self.q.shape[2]}")


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
        self.table = None
        if case.options == "paged cache":
            order = torch.randperm(B * T // PAGE, generator=torch.Generator().manual_seed(0))
            self.table = order.view(B, -1).to(case.device, torch.int32)

    def _paged(self, cache: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """The cache in pages, of which a sequence's lie where its row of the table says."""
        pages = self.table.flatten().argsort()
        return tuple(x.unflatten(1, (-1, PAGE)).flatten(0, 1)[pages] for x in cache)

    @staticmethod
    def in_turn(caches: list) -> Iterator:
        return itertools.cycle(caches)

    def ours(self, backend: str) -> Call:
        caches = self.caches if self.table is None else [self._paged(cache) for cache in self.caches]
        turns = self.in_turn(caches)

        def run() -> Tensor:
            with torch.no_grad():
                return pykernels.flash_attention_decode(self.q, *next(turns), self.lengths, block_table=self.table,
                                                        backend=backend)

        return Call(run, lambda result: {"out": result})

    def expected(self) -> Expected:
        k, v = self.caches[0]

        def composition(compute: torch.dtype) -> dict[str, Tensor]:
            tensors = (x[-1:].to(compute) for x in (self.q, k, v))
            return {"out": pykernels.flash_attention_decode(*tensors, self.lengths[-1:], backend="reference")}

        return Expected(composition(torch.float64), composition(self.q.dtype), lambda name, x: x[-1:],
                        f"batch {len(self.q)} of {len(self.q)}")


@pytest.mark.parametrize(("case", "shape"), CASES, ids=[f"{case.op}-{case.id}" for case, _ in CASES])
def bench_flash_attention(case: Case, shape: tuple, measure) -> None:
    kind = Decode if case.op == "flash_attention_decode" else Packed if "packed" in case.options else Attention
    measure(case, kind(case, shape), peers.for_op(case.op))
