"""fft_conv's ops on the host executor, as a backend "cuda_host", with what csrc/torch does around them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import host_backend
import host_build
from channel_ops import check_guards, fields, guarded
from pykernels import _dispatch
from pykernels.ops import fft_conv as conv
from pykernels.ops.fft_conv import registration

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_part_bytes: int | None = None  # of rows that go through memory in parts; None: as many as ever


def _rows(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _inputs(u, k, k_rev, D, pre_gate, post_gate, k_rev_lag, circular) -> tuple[dict[str, Any], list]:
    """-> (the fields of a call, the tensors that they point to)"""
    tensors = [_rows(u), *(None if x is None else x.contiguous() for x in (k, k_rev, D)),
               *map(_rows, (pre_gate, post_gate))]
    u, k, k_rev, D, pre_gate, post_gate = tensors
    batch, channels, length = u.shape
    f = {"dtype": _DTYPES[u.dtype], "batch": batch, "channels": channels, "length": length, "groups": k.shape[0],
         "taps": k.shape[1], "taps_rev": 0 if k_rev is None else k_rev.shape[1], "k_rev_lag": k_rev_lag,
         "circular": circular, **fields(u=u, k=k, k_rev=k_rev, D=D, pre_gate=pre_gate, post_gate=post_gate)}
    if _part_bytes is not None:
        f["part_bytes"] = _part_bytes
    return f, tensors


def fwd(u, *others):
    f, tensors = _inputs(u, *others)
    out = guarded(u.shape, u.dtype)
    f |= fields(out=out)
    scratch = guarded((host_build.load().fft_conv_fwd_scratch(f),), torch.float32)
    host_build.load().fft_conv_fwd(f | fields(scratch=scratch))
    check_guards(out, scratch)
    return out


def bwd(dout, u, k, k_rev, D, pre_gate, post_gate, k_rev_lag, circular, input_gradient, kernel_gradient):
    f, tensors = _inputs(u, k, k_rev, D, pre_gate, post_gate, k_rev_lag, circular)
    dout = _rows(dout)

    def like(x: Tensor | None, wanted: bool = True) -> Tensor:
        shape = (0,) if x is None else tuple(x.shape)
        return guarded(shape if wanted else (0, *shape[1:]), torch.float32 if x is None else x.dtype)

    gradients = {"du": like(u, input_gradient), "dk": like(k, kernel_gradient), "dk_rev": like(k_rev, kernel_gradient),
                 "dD": like(D), "dpre_gate": like(pre_gate, input_gradient), "dpost_gate": like(post_gate)}
    wanted = {"du": input_gradient, "dk": kernel_gradient, "dk_rev": kernel_gradient and k_rev is not None,
              "dD": D is not None, "dpre_gate": input_gradient and pre_gate is not None,
              "dpost_gate": post_gate is not None}
    f |= fields(dout=dout, **{name: x if wanted[name] else None for name, x in gradients.items()})
    scratch = guarded((host_build.load().fft_conv_bwd_scratch(f),), torch.float32)
    host_build.load().fft_conv_bwd(f | fields(scratch=scratch))
    check_guards(*gradients.values(), scratch)
    return tuple(gradients.values())


_dispatch.define("fft_conv_fwd_cuda_host", registration.SCHEMAS["fwd"], fwd)
_dispatch.define("fft_conv_bwd_cuda_host", registration.SCHEMAS["bwd"], bwd)


@contextlib.contextmanager
def on_the_host(part_bytes: int | None = None) -> Iterator[None]:
    """Calls with backend="cuda" run the kernels on the executor, if the backend would take the call on a GPU."""
    global _part_bytes
    _part_bytes = part_bytes
    try:
        with host_backend.on_the_host(conv):
            yield
    finally:
        _part_bytes = None
