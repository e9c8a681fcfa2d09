"""Alternatives to causal_conv1d and causal_conv1d_step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn.functional import conv1d, silu

from pykernels.testing import CAUSAL_CONV1D_STEP, Sample

from ..kit import Call, Case, Peer
from .common import on_gpu


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return silu(conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[1])[..., :x.shape[2]])


def _causal_conv1d(problem, case: Case) -> Mapping[str, Call]:
    from causal_conv1d import causal_conv1d_fn

    return {"causal_conv1d_fn": problem.call(
        lambda x, weight, bias: causal_conv1d_fn(x, weight, bias, activation="silu"))}


def _causal_conv1d_update(problem, case: Case) -> Mapping[str, Call]:
    from causal_conv1d import causal_conv1d_update

    return {"causal_conv1d_update": problem.call(functools.partial(_updated, causal_conv1d_update))}


def _updated(update: Callable[..., Tensor], x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return update(x, state, weight, bias, "silu")


PEERS = [
    Peer("torch conv1d", "causal_conv1d", lambda case: None,
         lambda problem, case: {"depthwise": problem.call(_depthwise)}),
    Peer("causal-conv1d", "causal_conv1d", on_gpu("causal_conv1d"), _causal_conv1d),
    Peer("torch in place", "causal_conv1d_step", lambda case: None, lambda problem, case: {
        "eager": problem.call(CAUSAL_CONV1D_STEP.peer(Sample({**problem.first, "activation": "silu"})))}),
    Peer("causal-conv1d", "causal_conv1d_step", on_gpu("causal_conv1d"), _causal_conv1d_update),
]
