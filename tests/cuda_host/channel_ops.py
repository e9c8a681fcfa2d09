"""The channel-first ops on the host executor, as a backend "cuda_host", with what csrc/torch does around them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import host_backend
import host_build
from pykernels import _dispatch
from pykernels.ops import causal_conv1d as conv
from pykernels.ops import selective_scan as scan
from pykernels.ops.causal_conv1d import registration as conv_registration
from pykernels.ops.selective_scan import registration as scan_registration

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_GUARD = 256  # elements


def guarded(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor | None = None) -> Tensor:
    """An output full of NaN inside of a larger NaN buffer, token by token if `like` is."""
    size = torch.Size(shape).numel()
    x = torch.full((size + 2 * _GUARD,), torch.nan, dtype=dtype)[_GUARD:_GUARD + size]
    if like is not None and like.stride(1) == 1 and like.stride(2) != 1:
        return x.view(shape[0], shape[2], shape[1]).transpose(1, 2)
    return x.view(shape)


def check_guards(*outputs: Tensor) -> None:
    """That nothing around outputs of `guarded` was written to."""
    for x in outputs:
        buffer = torch.as_strided(x, (x.numel() + 2 * _GUARD,), (1,), 0)
        outside = torch.cat([buffer[:_GUARD], buffer[_GUARD + x.numel():]])
        assert outside.isnan().all(), "a kernel wrote outside of its output"


def fields(**tensors: Tensor | None) -> dict[str, Any]:
    """Addresses, 0 for None, and strides where there are three axes or four."""
    result: dict[str, Any] = {}
    for name, x in tensors.items():
        result[name] = 0 if x is None else x.data_ptr()
        if x is not None and x.dim() in (3, 4):
            result[name + "_stride"] = tuple(x.stride())
    return result


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


# ---- causal_conv1d ---------------------------------------------------------------------------------------------------


def _conv_fields(x, weight, bias, initial_state, cu_seqlens, silu) -> dict[str, Any]:
    batch, channels, length = x.shape
    return {"dtype": _DTYPES[x.dtype], "batch": batch, "channels": channels, "length": length, "width": weight.shape[1],
            "sequences": batch if cu_seqlens is None else cu_seqlens.shape[0] - 1, "silu": silu,
            **fields(x=x, weight=weight, bias=bias, initial_state=initial_state, cu_seqlens=cu_seqlens)}


def conv_fwd(x, weight, bias, initial_state, cu_seqlens, silu):
    weight, bias, initial_state = _contiguous(weight, bias, initial_state)
    f = _conv_fields(x, weight, bias, initial_state, cu_seqlens, silu)
    out = guarded(x.shape, x.dtype, x)
    final_state = guarded((f["sequences"], x.shape[1], f["width"] - 1), x.dtype)
    host_build.load().causal_conv1d_fwd(f | fields(out=out, final_state=final_state))
    check_guards(out, final_state)
    return out, final_state


def conv_bwd(dout, dfinal_state, x, weight, bias, initial_state, cu_seqlens, silu):
    weight, bias, initial_state, dfinal_state = _contiguous(weight, bias, initial_state, dfinal_state)
    f = _conv_fields(x, weight, bias, initial_state, cu_seqlens, silu)
    dx = guarded(x.shape, x.dtype, x)
    dweight, dbias = guarded(tuple(weight.shape), torch.float32), guarded((x.shape[1],), torch.float32)
    dinitial_state = guarded((0 if initial_state is None else f["sequences"], x.shape[1], f["width"] - 1), x.dtype)
    f |= fields(dout=dout, dfinal_state=dfinal_state, dx=dx, dweight=dweight, dbias=dbias,
                dinitial_state=dinitial_state)
    if initial_state is None:
        f["dinitial_state"] = 0
    scratch = guarded((host_build.load().causal_conv1d_bwd_scratch(f),), torch.float32)
    host_build.load().causal_conv1d_bwd(f | fields(scratch=scratch))
    check_guards(dx, dweight, dbias, dinitial_state, scratch)
    return dx, dweight, dbias, dinitial_state


def conv_step(x, state, weight, bias, state_indices, silu):
    if x.dim() == 2:
        return conv_step(x[..., None], state, weight, bias, state_indices, silu)[..., 0]
    weight, bias = _contiguous(weight, bias)
    batch, channels, tokens = x.shape
    out = guarded(x.shape, x.dtype, x)
    host_build.load().causal_conv1d_step({
        "dtype": _DTYPES[x.dtype], "batch": batch, "channels": channels, "tokens": tokens, "width": weight.shape[1],
        "slots": state.shape[0], "silu": silu, "weight_dtype": _DTYPES[weight.dtype],
        "bias_dtype": _DTYPES[(weight if bias is None else bias).dtype],
        **fields(x=x, state=state, weight=weight, bias=bias, state_indices=state_indices, out=out)})
    check_guards(out)
    return out


for _part, _run in (("fwd", conv_fwd), ("bwd", conv_bwd), ("step", conv_step)):
    _dispatch.define(f"causal_conv1d_{_part}_cuda_host", conv_registration.SCHEMAS[_part], _run)


# ---- selective_scan --------------------------------------------------------------------------------------------------


def _chunks(u: Tensor, cu_seqlens: Tensor | None) -> int:
    chunks = u.shape[2] // scan_registration.CHUNK
    return u.shape[0] * (chunks + 1) if cu_seqlens is None else chunks + cu_seqlens.shape[0]


def _scan_fields(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus) -> dict[str, Any]:
    batch, channels, length = u.shape
    return {"dtype": _DTYPES[u.dtype], "delta_dtype": _DTYPES[delta.dtype], "B_dtype": _DTYPES[B.dtype],
            "C_dtype": _DTYPES[C.dtype], "batch": batch, "channels": channels, "length": length, "state": A.shape[1],
            "groups": next((x.shape[1] for x in (B, C) if x.dim() == 4), 1),
            "sequences": batch if cu_seqlens is None else cu_seqlens.shape[0] - 1, "delta_softplus": delta_softplus,
            **fields(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state,
                     cu_seqlens=cu_seqlens)}


def _scan_inputs(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus) -> tuple:
    A, D, delta_bias, initial_state = _contiguous(A, D, delta_bias, initial_state)
    B, C = (x.contiguous() if x.dim() == 2 else x for x in (B, C))
    return u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus


def scan_fwd(*inputs):
    *inputs, keep_states = inputs
    inputs = _scan_inputs(*inputs)
    u, A, cu_seqlens = inputs[0], inputs[2], inputs[9]
    f = _scan_fields(*inputs)
    out, final_state = guarded(u.shape, u.dtype, u), guarded((f["sequences"], *A.shape), torch.float32)
    states = guarded((_chunks(u, cu_seqlens) if keep_states else 0, A.shape[1], A.shape[0]), torch.float32)
    f |= fields(out=out, final_state=final_state, chunk_states=states if keep_states else None)
    scratch = guarded((host_build.load().selective_scan_fwd_scratch(f),), torch.float32)
    host_build.load().selective_scan_fwd(f | fields(scratch=scratch))
    check_guards(out, final_state, states, scratch)
    return out, final_state, states


def scan_bwd(dout, dfinal_state, *inputs):
    *inputs, states = inputs
    inputs = _scan_inputs(*inputs)
    u, delta, A, B, C, D, z, delta_bias, initial_state, *_ = inputs
    dfinal_state, states = _contiguous(dfinal_state, states)
    f = _scan_fields(*inputs) | fields(dout=dout, dfinal_state=dfinal_state, chunk_states=states)

    def like(x: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
        return guarded((0,) if x is None else tuple(x.shape), dtype, x if x is not None and x.dim() == 3 else None)

    gradients = {"du": like(u, u.dtype), "ddelta": like(delta, delta.dtype), "dA": like(A), "dB": like(B),
                 "dC": like(C), "dD": like(D), "dz": like(z, u.dtype), "ddelta_bias": like(delta_bias),
                 "dinitial_state": guarded((0 if initial_state is None else f["sequences"], *A.shape), torch.float32)}
    if u.shape[1] == 0:
        gradients["dB"].zero_(), gradients["dC"].zero_()
    absent = {"dD": D, "dz": z, "ddelta_bias": delta_bias, "dinitial_state": initial_state}
    f |= fields(**{name: None if name in absent and absent[name] is None else x for name, x in gradients.items()})
    scratch = guarded((host_build.load().selective_scan_bwd_scratch(f),), torch.float32)
    host_build.load().selective_scan_bwd(f | fields(scratch=scratch))
    check_guards(*gradients.values(), scratch)
    return tuple(gradients.values())


def scan_step(*arguments):
    shape = arguments[0].shape
    x, state, delta, A, B, C, D, z, delta_bias, state_indices, delta_softplus = scan_registration.in_heads(*arguments)
    batch, heads, channels = x.shape
    out = guarded(x.shape, x.dtype)
    f = {"dtype": _DTYPES[x.dtype], "delta_dtype": _DTYPES[delta.dtype], "B_dtype": _DTYPES[B.dtype],
         "C_dtype": _DTYPES[C.dtype], "D_dtype": _DTYPES[(x if D is None else D).dtype],
         "delta_bias_dtype": _DTYPES[(x if delta_bias is None else delta_bias).dtype],
         "batch": batch, "heads": heads, "channels": channels, "state": A.shape[2], "groups": B.shape[1],
         "slots": state.shape[0], "delta_softplus": delta_softplus,
         "state_indices": 0 if state_indices is None else state_indices.data_ptr()}
    # The axes that each has of batch, head, channel and state.
    for axes, tensors in {"bhc": {"x": x, "delta": delta, "z": z, "out": out}, "bhcn": {"states": state},
                          "hcn": {"A": A}, "bhn": {"B": B, "C": C}, "hc": {"D": D, "delta_bias": delta_bias}}.items():
        for name, tensor in tensors.items():
            f[name] = 0 if tensor is None else tensor.data_ptr()
            if tensor is not None:
                f[name + "_stride"] = [tensor.stride(axes.index(axis)) if axis in axes else 0 for axis in "bhcn"]
    host_build.load().selective_scan_step(f)
    check_guards(out)
    return out.view(shape)


for _part, _run in (("fwd", scan_fwd), ("bwd", scan_bwd), ("step", scan_step)):
    _dispatch.define(f"selective_scan_{_part}_cuda_host", scan_registration.SCHEMAS[_part], _run)


@contextlib.contextmanager
def on_the_host() -> Iterator[None]:
    """Calls with backend="cuda" run the kernels on the executor, if the backend would take the call on a GPU."""
    with host_backend.on_the_host(conv, scan):
        yield
