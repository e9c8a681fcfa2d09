"""`python -m pykernels verify`: the numbers of all that can run here, and its time beside PyTorch's own path."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _library
from .kit import Description, Error, Sample, check, cotangents, serves
from .targets import Target, choice, dtypes, targets

_SECONDS_PER_TIMING = 0.6


class _Progress:
    """One line that overwrites itself; silent where the output is no terminal."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()

    def show(self, text: str) -> None:
        if self._shown:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:width]:<{width}}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown:
            print(
                "\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r",
                end="",
                file=sys.stderr,
                flush=True,
            )


@dataclasses.dataclass
class _Result:
    """Of one op on one target in one dtype."""

    op: str
    target: str
    dtype: str
    calls: int
    worst: dict[str, tuple[Error, str]]  # tensor -> its error that came closest to the budget, and the case
    failures: list[str]
    times: dict[str, dict[str, float]]  # "forward", "forward and backward" -> {"seconds", "torch_seconds"}


def _share(error: Error) -> float:
    """Of the budget."""
    if error.problem is not None:
        return torch.inf
    return error.error / error.budget if error.budget > 0 else (torch.inf if error.error > 0 else 0.0)


def _check_all(op: Description, target: Target, dtype: torch.dtype, progress: _Progress) -> _Result:
    cases = [case for case in op.cases + op.extremes if serves(op, case, target, dtype)]
    result = _Result(op.name, str(target), str(dtype).removeprefix("torch."), len(cases), {}, [], {})
    for i, case in enumerate(cases):
        progress.show(f"{op} {target} {result.dtype}: {i + 1} of {len(cases)}, {case}")
        try:
            errors = check(op, case, dtype, target)
        except Exception as error:  # whatever it is, the other cases still tell more
            result.failures.append(f"{case}: {type(error).__name__}: {error}")
            continue
        for error in errors:
            if not error.ok:
                result.failures.append(f"{case}: {error}")
            if error.tensor not in result.worst or _share(error) > _share(result.worst[error.tensor][0]):
                result.worst[error.tensor] = (error, case.name)
    return result


def _interleaved(first: Callable[[], Any], second: Callable[[], Any], device: str) -> tuple[float, float]:
    """The median seconds of each, called in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    synchronize = (
        torch.cuda.synchronize
        if device == "cuda"
        else torch.xpu.synchronize
        if device == "xpu"
        else lambda: None
    )
    first(), second()
    deadline = time.perf_counter() + _SECONDS_PER_TIMING
    while len(times[0]) < 3 or time.perf_counter() < deadline and len(times[0]) < 200:
        for function, kept in zip((first, second), times):
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            kept.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def _time(op: Description, target: Target, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    sample = op.timing.make(dtype, target.device)
    peer = op.peer(sample)
    if peer is None:
        return {}

    def ours(**tensors: Tensor) -> Tensor:
        return op.function(**{**sample.args, **tensors}, backend=target.backend)

    result = {}
    with target.active():
        with torch.no_grad():
            pair = [lambda call=call: call(**sample.tensors()) for call in (ours, peer)]
            result["forward"] = dict(zip(("seconds", "torch_seconds"), _interleaved(*pair, target.device)))
        if sample.differentiable:
            pair = [_training(call, sample) for call in (ours, peer)]
            result["forward and backward"] = dict(
                zip(("seconds", "torch_seconds"), _interleaved(*pair, target.device))
            )
    return result


def _training(call: Callable[..., Tensor], sample: Sample) -> Callable[[], Any]:
    leaves = {name: sample.args[name].detach().requires_grad_() for name in sample.differentiable}
    tensors = {**sample.tensors(), **leaves}
    given = list(cotangents({"out": call(**tensors)}).values())
    return lambda: torch.autograd.grad([call(**tensors)], list(leaves.values()), given)


def _lines(result: _Result, heading: bool) -> list[str]:
    lines = []
    if heading:
        lines += [
            "",
            f"{result.op} on {result.target}",
            f"  {'':<10}{'tensor':<9}{'error':>9}{'budget':>10}{'share':>7}   worst in",
        ]
    for i, (tensor, (error, case)) in enumerate(result.worst.items()):
        share = "over" if not error.ok else f"{100 * _share(error):.0f}%"
        label = result.dtype if i == 0 else ""
        lines.append(f"  {label:<10}{tensor:<9}{error.error:>9.1e}{error.budget:>10.1e}{share:>7}   {case}")
    for direction, times in result.times.items():
        ratio = times["torch_seconds"] / times["seconds"]
        lines.append(
            f"  {'':<10}{direction}: {1e3 * times['seconds']:.3g} ms, PyTorch {1e3 * times['torch_seconds']:.3g} ms "
            f"({ratio:.2f}x)"
        )
    lines.append(
        f"  {'':<10}{result.calls} calls, "
        + (f"{len(result.failures)} WRONG:" if result.failures else "all right")
    )
    return lines + [f"  {'':<10}  {failure}" for failure in result.failures]


def verify(ops: Sequence[Description], backend: str | None, as_json: bool) -> int:
    """Checks and times `ops` on `backend` (None: all but the reference) and prints it; 1 if anything is wrong."""
    progress, results, start = _Progress(), [], time.perf_counter()
    if not as_json:
        threads = torch.get_num_threads()
        print(
            f"Every output and gradient against float64: error = max|delta| / max|reference|. Times on {threads} "
            f"thread{'s' if threads > 1 else ''} for one size, medians of interleaved calls.",
            flush=True,
        )
    for op in ops:
        # On the CPU the active instruction set; the tests go through all of them.
        chosen = [
            target
            for target in targets(op.op, every_isa=False)
            if target.backend == (backend or target.backend)
        ]
        for target in chosen:
            if target.backend == "reference" and backend is None:
                continue
            if target.backend == "cpu":
                target = dataclasses.replace(target, isa=_library.active_isa())
            for i, dtype in enumerate(dtypes(op.op, target)):
                result = _check_all(op, target, dtype, progress)
                if not result.failures and target.backend != "reference":
                    progress.show(f"{op} {target} {result.dtype}: timing")
                    result.times = _time(op, target, dtype)
                results.append(result)
                progress.clear()
                if not as_json:
                    print("\n".join(_lines(result, heading=i == 0)), flush=True)
    wrong = sum(len(result.failures) for result in results)
    if as_json:
        print(
            json.dumps(
                {
                    "ok": wrong == 0 and bool(results),
                    "seconds": round(time.perf_counter() - start, 1),
                    "results": [_as_json(result) for result in results],
                },
                indent=2,
            )
        )
    elif results:
        calls = sum(result.calls for result in results)
        print(
            f"\n{calls} calls in {time.perf_counter() - start:.0f} s: "
            + (f"{wrong} WRONG" if wrong else "all right")
        )
    if not results:
        # Nothing checked is nothing proven.
        op = ops[0].op
        reasons = choice(op, backend or "auto", "cpu", torch.float32).rejected
        print(
            f"no backend to verify for {op.name}: "
            + "; ".join(f"{name}: {why}" for name, why in reasons.items()),
            file=sys.stderr,
        )
    return 0 if results and not wrong else 1


def _as_json(result: _Result) -> dict[str, Any]:
    def number(x: float) -> float | None:  # JSON has no infinity
        return x if math.isfinite(x) else None

    errors = {
        tensor: {
            "error": number(error.error),
            "budget": number(error.budget),
            "ok": error.ok,
            "problem": error.problem,
            "case": case,
        }
        for tensor, (error, case) in result.worst.items()
    }
    return {**dataclasses.asdict(result), "worst": errors}
