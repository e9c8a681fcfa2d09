"""Alternatives to fft_conv."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import conv1d

from pykernels.testing.fft_conv import torch_fft

from ..kit import Call, Case, Peer


def _long(tuned: bool) -> Callable[[Case], str | None]:
    """Torch's transforms lose most of their time to the page faults of fresh memory, unless glibc is told to keep it:
    both are measured, as cases of their own."""

    def missing(case: Case) -> str | None:
        if case.options in ("plain", "skip, spectrum kept"):
            return "measured with long kernels, transformed in every call"
        if case.tuned != tuned:
            return "measured by bench.run --allocator-tuned" if tuned else "measured without --allocator-tuned"
        return None

    return missing


def _rfft(problem, case: Case) -> Mapping[str, Call]:
    return {"rfft": problem.call(torch_fft)}


def _kept(problem, case: Case) -> Mapping[str, Call]:
    length = problem.args["u"].shape[2]
    spectrum = torch.fft.rfft(problem.args["k"], n=2 * length)

    def call(u: Tensor, k: Tensor, D: Tensor) -> Tensor:
        out = torch.fft.irfft(torch.fft.rfft(u.float(), n=2 * length) * spectrum, n=2 * length)[..., :length]
        return (out + u * D[:, None]).to(u.dtype)

    return {"rfft": problem.call(call)}


def _depthwise(problem, case: Case) -> Mapping[str, Call]:
    length, (channels, taps) = problem.args["u"].shape[2], problem.args["k"].shape

    def call(u: Tensor, k: Tensor) -> Tensor:
        weight = k.flip(-1)[:, None].to(u.dtype)
        return conv1d(u, weight, padding=taps - 1, groups=channels)[..., :length]

    return {"groups": problem.call(call)}


PEERS = [
    Peer("torch rfft", "fft_conv", _long(False), _rfft),
    Peer("torch rfft, allocator tuned", "fft_conv", _long(True), _rfft),
    Peer("torch rfft, spectrum kept", "fft_conv",
         lambda case: None if case.options == "skip, spectrum kept" else "measured where ours is kept", _kept),
    Peer("torch conv1d", "fft_conv", lambda case: None if case.options == "plain" else "measured with short kernels",
         _depthwise),
]
