"""The timer: candidates take turns, so that whatever else the machine does falls on all of them alike.

One round runs each candidate once, in an order drawn anew for each round. A candidate's time is the median over rounds.
The ratio of two candidates is given twice: of their medians, and as the median (with quantiles) of the ratios within
each round, which noise that lasts longer than a round can't move.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

LOW, HIGH = 0.1, 0.9  # the quantiles given as spread
FAR_BEHIND = 3.0  # times the fastest peer's time


def quantile(values: Sequence[float], p: float) -> float:
    """The p-quantile, linear between order statistics."""
    ordered = sorted(values)
    position = p * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


@dataclasses.dataclass(frozen=True)
class Spread:
    """A median and its 10% and 90% quantiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(quantile(values, 0.5), quantile(values, LOW), quantile(values, HIGH))


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times as long `theirs` took as `ours`: above 1, ours is faster."""

    of_medians: float
    per_round: Spread

    @classmethod
    def of(cls, theirs: Sequence[float], ours: Sequence[float]) -> Ratio:
        if len(theirs) != len(ours):
            raise ValueError(f"theirs and ours must be of the same rounds, got {len(theirs)} and {len(ours)} samples")
        return cls(quantile(theirs, 0.5) / quantile(ours, 0.5), Spread.of([a / b for a, b in zip(theirs, ours)]))


class CpuClock:
    """Wall time of a call, averaged over as many calls as make a sample long enough to time well."""

    sample_seconds = 2e-3

    def calls(self, warm_up_seconds: float) -> int:
        """How many calls make one sample, for a candidate that takes about so long."""
        return max(1, min(1000, round(self.sample_seconds / max(warm_up_seconds, 1e-7))))

    def sample(self, run: Callable[[], object], calls: int) -> tuple[float, float]:
        """-> (seconds of one call, the same: on a CPU there is nothing to wait for)."""
        start = time.perf_counter()
        for _ in range(calls):
            run()
        seconds = (time.perf_counter() - start) / calls
        return seconds, seconds


class CudaClock:
    """Time on the GPU between two events with a cold L2, and the whole call's as its caller sees it."""

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(max(4 * l2, 256 << 20), dtype=torch.uint8, device="cuda")

    def calls(self, warm_up_seconds: float) -> int:
        return 1  # a second call would find a warm cache

    def sample(self, run: Callable[[], object], calls: int) -> tuple[float, float]:
        """-> (seconds between events around the call, seconds until the caller has its result)."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        # Holds the stream for about a millisecond, so that the CPU has issued the whole call before its first kernel.
        torch.cuda._sleep(2_000_000)
        start.record()
        run()
        end.record()
        end.synchronize()
        kernel = start.elapsed_time(end) / 1e3
        self._flush.zero_()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return kernel, time.perf_counter() - begin


def clock_for(device: str) -> CpuClock | CudaClock:
    return CudaClock() if device == "cuda" else CpuClock()


def warm_up(run: Callable[[], object], device: str) -> float:
    """Seconds of one untimed call."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def fastest(variants: Mapping[str, Callable[[], object]], device: str) -> str:
    """The name of the fastest variant, by elimination: each round drops those far behind, two rounds decide.

    For choosing between a peer's own backends; the winner is then timed with the others.
    """
    best: dict[str, float] = {name: float("inf") for name in variants}
    for margin in (2.0, 1.0):
        if len(best) == 1:
            break
        best = {name: min(before, warm_up(variants[name], device)) for name, before in best.items()}
        limit = margin * min(best.values())
        best = {name: seconds for name, seconds in best.items() if seconds <= limit}
    return min(best, key=best.get)


def interleave(candidates: Mapping[str, Callable[[], object]], clock: CpuClock | CudaClock, *, seconds: float,
               warm: Mapping[str, float], peers: Collection[str] = (), min_rounds: int = 5, max_rounds: int = 50,
               seed: int = 0) -> dict[str, list[tuple[float, float]]]:
    """Times every candidate once per round, in random order -> per candidate its samples (time, whole-call time).

    Goes on for about `seconds` but for at least `min_rounds`, at most `max_rounds`. `warm` holds each candidate's
    seconds in its untimed first call. Of `peers`, those that the first round shows far behind the fastest of them stay
    out of the other rounds: they decide nothing, and some take seconds.
    """
    order = list(candidates)
    calls = {name: clock.calls(warm[name]) for name in order}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in order}
    shuffle = random.Random(seed).shuffle
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start, rounds = time.perf_counter(), 0
        while rounds < max_rounds:
            elapsed = time.perf_counter() - start
            # Another round must be due, and, past the minimum, likely to end in time.
            if rounds >= min_rounds and elapsed * (rounds + 1) / rounds > seconds:
                break
            shuffle(order)
            for name in order:
                samples[name].append(clock.sample(candidates[name], calls[name]))
            if rounds == 0:
                limit = FAR_BEHIND * min((samples[name][0][0] for name in peers), default=0.0)
                order = [name for name in order if name not in peers or samples[name][0][0] <= limit]
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return samples
