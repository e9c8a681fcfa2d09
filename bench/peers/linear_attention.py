"""Alternatives to linear_attention and linear_attention_step."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from pykernels.testing.linear_attention import chunkwise

from ..kit import Call, Case, Peer
from .common import needs, time_first


def _chunkwise(problem, case: Case, compiled: bool = False) -> Mapping[str, Call]:
    """Matrix products on chunks and a loop over their states, with several sizes of chunk."""
    # With a decay per channel a chunk must not decay by more than floats hold.
    sizes = (16, 32, 64) if case.options == "channel decay" else (64, 128, 256)
    function = torch.compile(chunkwise, dynamic=False) if compiled else chunkwise
    return {f"chunks of {size}": time_first(problem, functools.partial(function, decay=problem.decay, chunk=size))
            for size in sizes}


def _fla_linear(problem, case: Case) -> Mapping[str, Call]:
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    if case.options == "channel decay":
        return {"chunk_gla": time_first(problem, lambda q, k, v: chunk_gla(q, k, v, problem.decay)[0])}
    name = "g_gamma" if case.options == "head decay" else "g"
    return {"chunk_simple_gla": time_first(
        problem, lambda q, k, v: chunk_simple_gla(q, k, v, **{name: problem.decay})[0])}


PEERS = [
    Peer("torch chunkwise", "linear_attention", lambda case: None, _chunkwise),
    Peer("torch chunkwise, compiled", "linear_attention", lambda case: None,
         functools.partial(_chunkwise, compiled=True), slow=True),
    Peer("fla", "linear_attention", needs("fla"), _fla_linear),
]

# ---- linear_attention_step -----------------------------------------------------------------------------------------


def _in_place(q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor) -> Tensor:
    state.mul_(decay.exp()[:, None, None]).addcmul_(k.float()[..., None], v.float()[:, :, None])
    return ((q.float()[:, :, None] @ state)[:, :, 0] * q.shape[2] ** -0.5).to(q.dtype)


PEERS += [Peer("torch in place", "linear_attention_step", lambda case: None,
               lambda problem, case: {"eager": problem.call(_in_place)})]
