"""Alternatives to selective_scan and selective_scan_step."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

from torch import Tensor

from pykernels.testing import SELECTIVE_SCAN_STEP, Sample
from pykernels.testing.selective_scan import composed, parallel_scan, sequential_scan

from ..kit import Call, Case, Peer
from .common import on_gpu

_STATES_LIMIT = 1 << 30  # bytes: both scans in PyTorch keep the states of all tokens, several times over


def _states_too_large(case: Case) -> str | None:
    size = 4 * math.prod(int(word[1:]) for word in case.shape.split())
    return f"its states of all tokens take {size / 2**30:.0f} GiB, several times over" if size > _STATES_LIMIT else None


def _mamba_scan(problem, case: Case) -> Mapping[str, Call]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return {"selective_scan_fn": problem.call(functools.partial(selective_scan_fn, delta_softplus=True))}


PEERS = [
    Peer("torch pscan", "selective_scan", _states_too_large,
         lambda problem, case: {"eager": problem.call(functools.partial(composed, parallel_scan))}),
    Peer("torch loop", "selective_scan", _states_too_large,
         lambda problem, case: {"eager": problem.call(functools.partial(composed, sequential_scan))}),
    Peer("mamba_ssm", "selective_scan", on_gpu("mamba_ssm"), _mamba_scan),
]


def _mamba_step(problem, case: Case) -> Mapping[str, Call]:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    def call(x: Tensor, state: Tensor, delta: Tensor, delta_bias: Tensor, **others: Tensor) -> Tensor:
        return selective_state_update(state, x, delta, dt_bias=delta_bias, dt_softplus=True, **others)

    return {"selective_state_update": problem.call(call)}


PEERS += [
    Peer("torch in place", "selective_scan_step", lambda case: None, lambda problem, case: {
        "eager": problem.call(SELECTIVE_SCAN_STEP.peer(Sample({**problem.first, "delta_softplus": True})))}),
    Peer("mamba_ssm", "selective_scan_step", on_gpu("mamba_ssm"), _mamba_step),
]
