"""What every `bench_<op>.py` uses: a case, its candidates, and `measure`, which checks them and times them in turn.

A benchmark file describes its op by a `Problem` (inputs, our call on a backend, the float64 reference) and a list of
`Case`s; peers are in peers/. A measurement is a plain dictionary, stored as pytest-benchmark's extra information and
read by report.py.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pykernels import backends, testing

from . import timer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LONG_ROUND = 3.0  # seconds, from which on three rounds are enough


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the results: what is computed, on what, and how much work that is."""

    op: str
    shape: str  # "B1 H8 T2048 D64", as in the tables
    options: str  # "causal"
    dtype: str  # a key of DTYPES
    direction: str  # "fwd", "fwd+bwd" or "step"
    device: str
    threads: int  # torch's intra-op threads; 1 on a GPU
    work: float  # what `limits` bound: FLOPs, or bytes moved
    limits: tuple[str, ...]  # the machine's limit to compare with (see limits.py): the first of these that it has
    beside: str | None = None  # what our time is also compared with: the name of the problem's `beside` call
    extra: bool = False  # measured with --full (or -k) alone
    tuned: bool = False  # measured where the allocator keeps freed memory (environment.allocator_tuned), else where not

    @property
    def backward(self) -> bool:
        return self.direction == "fwd+bwd"

    def __str__(self) -> str:
        threads = f" {self.threads} thread{'s' * (self.threads != 1)}" if self.device == "cpu" else ""
        return f"{self.op} {self.shape} {self.options} {self.dtype} {self.direction}{threads}"

    @property
    def id(self) -> str:
        return "-".join(str(self).split()[1:])


@dataclasses.dataclass(frozen=True)
class Call:
    """Something to time, and how its result reads as named tensors in our layout, to check."""

    run: Callable[[], Any]
    outputs: Callable[[Any], dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Expected:
    """Named parts of the outputs: in float64, and as the plain composition in the dtype has them (the yardstick)."""

    reference: Mapping[str, Tensor]
    yardstick: Mapping[str, Tensor]
    part: Callable[[str, Tensor], Tensor]  # the checked part of a whole output
    scope: str  # which part: "head 3 of 8", "everything"

    def errors(self, outputs: Mapping[str, Tensor]) -> list[testing.Error]:
        parts = {name: self.part(name, outputs[name].detach()) for name in self.reference}
        return [testing.compare(name, x, self.reference[name], self.yardstick[name]) for name, x in parts.items()]

    def of(self, case: Case) -> Expected:
        """What the case computes of it: without the gradients, if it is of the forward pass."""
        if case.backward:
            return self
        return dataclasses.replace(self, reference={"out": self.reference["out"]},
                                   yardstick={"out": self.yardstick["out"]})


class Problem(Protocol):
    """The inputs of a case, and what runs on them.

    Where the case names something to time `beside` ours (a plain call, say, next to one with an option), a method
    `beside(backend)` gives it, as a function; it is not checked.
    """

    op: backends.Op

    def ours(self, backend: str) -> Call: ...

    def expected(self) -> Expected: ...


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another implementation: None or why it can't run a problem, and its variants, of which the fastest is timed."""

    name: str
    op: str
    missing: Callable[[Case], str | None]
    variants: Callable[[Any, Case], Mapping[str, Call]]
    slow: bool = False  # takes long to set up for each case: measured on request


def step(function: Callable[..., Tensor], inputs: Iterable[Tensor],
         dout: Tensor | None) -> Callable[[], tuple[Tensor, ...]]:
    """A call of `function(*inputs)` -> (out,), or with `dout` forward and backward -> (out, gradients of inputs)."""
    if dout is None:
        inputs = tuple(x.detach() for x in inputs)

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(*inputs),)

        return forward
    inputs = tuple(x.detach().requires_grad_() for x in inputs)

    def both() -> tuple[Tensor, ...]:
        out = function(*inputs)
        return (out, *torch.autograd.grad(out, inputs, dout))

    return both


def step_of_layers(function: Callable[..., Tensor], layers: Sequence[Mapping[str, Tensor]],
                   first: Mapping[str, Tensor]) -> Call:
    """One token through `function(**arguments)` of all layers, whose states move on; `first` is a layer to check it
    on."""

    def run() -> None:
        with torch.no_grad():
            for arguments in layers:
                function(**arguments)

    def outputs(_: None) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"out": function(**{**first, "state": first["state"].clone()})}

    return Call(run, outputs)


def devices_and_threads() -> list[tuple[str, int]]:
    """Where to measure: the GPU if there is one; else the CPU on one thread and on all of them."""
    if torch.cuda.is_available():
        return [("cuda", 1)]
    return [("cpu", threads) for threads in sorted({1, torch.get_num_threads()})]


def is_extra(device: str, threads: int, places: Sequence[tuple[str, int]], main: bool) -> bool:
    """Whether a case of the grid on `places` is extra: on a CPU all that are not a file's main ones on all threads."""
    return device == "cpu" and not (main and (device, threads) == places[-1])


def our_backends(op: backends.Op, case: Case, wanted: Iterable[str] | None = None) -> tuple[list[str], dict[str, str]]:
    """(backends to measure, why not the others): those that run on the case's device, by default the compiled ones."""
    found, missing = [], {}
    for backend in wanted or ("cuda", "triton", "cpu"):
        choice = testing.choice(op, backend, case.device, DTYPES[case.dtype])
        if choice.backend is not None:
            found.append(backend)
        else:
            missing[f"pykernels {backend}"] = choice.reason
    return found, missing


def _candidate(name: str, variant: str | None, call: Call, case: Case, expected: Expected) -> tuple[dict, float]:
    """Runs a call once, checks what it returns -> (its entry in the record, the seconds it took)."""
    results = []
    seconds = timer.warm_up(lambda: results.append(call.run()), case.device)
    errors = expected.errors(call.outputs(results.pop()))
    entry = {"name": name, "variant": variant, "errors": {e.tensor: [e.error, e.budget] for e in errors},
             "problem": "; ".join(e.problem for e in errors if e.problem) or None}
    return entry, seconds


def measure(case: Case, problem: Problem, peers: Iterable[Peer], *, seconds: float, wanted: Iterable[str] | None = None,
            slow_peers: bool = False, min_rounds: int = 5) -> dict:
    """Checks our backends and the peers on `problem`, times them in turn for about `seconds` -> the case's record.

    A candidate of ours beyond its error budget, or a peer ten times beyond it (which then does not compute the same),
    has a "problem" in its entry and is not timed.
    """
    expected = problem.expected()
    backend_names, missing = our_backends(problem.op, case, wanted)
    entries: list[dict] = []
    runs: dict[str, Callable[[], Any]] = {}
    warm: dict[str, float] = {}

    def add(name: str, variant: str | None, call: Call, allowed: float) -> None:
        entry, took = _candidate(name, variant, call, case, expected)
        worst = max(entry["errors"].items(), key=lambda item: item[1][0] / max(item[1][1], 1e-300))
        if entry["problem"] is None and worst[1][0] > allowed * worst[1][1]:
            entry["problem"] = f"error of {worst[0]} is {worst[1][0]:.2e}, its budget {worst[1][1]:.2e}"
        entries.append(entry)
        if entry["problem"] is None:
            runs[name], warm[name] = call.run, took

    with testing.use_threads(case.threads):
        for backend in backend_names:
            add(f"pykernels {backend}", None, problem.ours(backend), allowed=1.0)
            if case.beside is not None and entries[-1]["problem"] is None:
                name = f"beside {backend}"
                runs[name] = problem.beside(backend)
                warm[name] = timer.warm_up(runs[name], case.device)
        for peer in peers:
            reason = peer.missing(case)
            if reason is None and peer.slow and not slow_peers:
                reason = "compiles for every case: measured with --slow-peers"
            if reason is not None:
                missing[peer.name] = reason
                continue
            variants = dict(peer.variants(problem, case))
            best = timer.fastest({name: call.run for name, call in variants.items()}, case.device)
            add(peer.name, best, variants[best], allowed=10.0)
        clock = timer.clock_for(case.device)
        if sum(warm.values()) > LONG_ROUND:
            min_rounds = min(min_rounds, 3)
        theirs = [name for name in runs if not name.startswith(("pykernels ", "beside "))]
        samples = timer.interleave(runs, clock, seconds=seconds, warm=warm, peers=theirs, min_rounds=min_rounds,
                                   seed=zlib.crc32(str(case).encode())) if runs else {}
    for entry in entries:
        taken = samples.get(entry["name"], [])
        entry["seconds"] = [time for time, _ in taken]
        if (beside := samples.get(f"beside {entry['name'].removeprefix('pykernels ')}")) is not None:
            entry["beside"] = [time for time, _ in beside]
        if case.device != "cpu":
            entry["call_seconds"] = [call for _, call in taken]
    return {**dataclasses.asdict(case), "limits": list(case.limits), "checked": expected.scope, "candidates": entries,
            "missing": missing}
