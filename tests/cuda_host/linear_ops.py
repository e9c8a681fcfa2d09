"""linear_attention on the host executor, as a backend "cuda_host", with what csrc/torch does around the kernels."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import host_backend
import host_build
from pykernels import _dispatch
from pykernels.ops.linear_attention import registration

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_GUARD = 256  # elements


def _guarded(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output full of NaN inside of a larger NaN buffer."""
    size = torch.Size(shape).numel()
    return torch.full((size + 2 * _GUARD,), torch.nan, dtype=dtype)[_GUARD:_GUARD + size].view(shape)


def _check_guards(*outputs: Tensor) -> None:
    for x in outputs:
        buffer = torch.as_strided(x, (x.numel() + 2 * _GUARD,), (1,), 0)
        outside = torch.cat([buffer[:_GUARD], buffer[_GUARD + x.numel():]])
        assert outside.isnan().all(), "a kernel wrote outside of its output"


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _addresses(**tensors: Tensor | None) -> dict[str, int]:
    # A tensor without elements has no address of its own, and null would say that it is not there.
    return {name: 0 if x is None else x.data_ptr() or 16 for name, x in tensors.items()}


def _strided(**tensors: Tensor) -> dict[str, Any]:
    return _addresses(**tensors) | {name + "_stride": tuple(x.stride()[:3]) for name, x in tensors.items()}


def _fields(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, bonus: Tensor | None, cu_seqlens: Tensor | None,
            scale: float, normalize: bool, reverse: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {"dtype": _DTYPES[q.dtype], "scale": scale, "normalize": normalize, "reverse": reverse}
    fields["batch"], fields["tokens"], fields["heads"], fields["value_dim"] = v.shape
    fields["heads_k"], fields["key_dim"] = q.shape[2:]
    fields["decay_kind"], fields["decay_stride"] = 0, (0, 0, 0)
    if decay is not None:
        fields["decay_kind"] = {1: 1, 3: 2, 4: 3}[decay.dim()]
        fields["decay_stride"] = (0, 0, decay.stride(0)) if decay.dim() == 1 else tuple(decay.stride()[:3])
    fields["sequences"] = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return fields | _strided(q=q, k=k, v=v) | _addresses(decay=decay, bonus=bonus, cu_seqlens=cu_seqlens)


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _shapes(fake: Callable, *args: Any) -> list[Tensor]:
    """Outputs of the shapes and dtypes that the op's fake promises, full of NaN."""
    promised = fake(*(x.to("meta") if isinstance(x, Tensor) else x for x in args))
    return [_guarded(*x.shape, dtype=x.dtype) for x in promised]


def fwd(q, k, v, decay, bonus, initial_state, cu_seqlens, scale, normalize, reverse, checkpoint):
    q, k, v = map(_last_contiguous, (q, k, v))
    decay = decay if decay is None or decay.dim() < 4 else _last_contiguous(decay)
    bonus, initial_state = _optional(bonus), _optional(initial_state)
    outputs = _shapes(registration._fake_fwd, q, k, v, decay, bonus, initial_state, cu_seqlens, scale, normalize,
                      reverse, checkpoint)
    out, final_state, checkpoints, denominator = outputs
    fields = _fields(q, k, v, decay, bonus, cu_seqlens, scale, normalize, reverse) | _strided(out=out)
    fields |= _addresses(initial_state=initial_state, final_state=final_state, denominator=denominator,
                         checkpoints=checkpoints if checkpoint else None)
    host = host_build.load()
    scratch = _guarded(host.linear_attention_fwd_scratch(fields))
    host.linear_attention_fwd(fields | {"scratch": scratch.data_ptr()})
    _check_guards(*outputs, scratch)
    return tuple(outputs)


def bwd(dout, dfinal_state, q, k, v, decay, bonus, cu_seqlens, out, checkpoints, denominator, scale, normalize, reverse,
        decay_gradient):
    outputs = _shapes(registration._fake_bwd, dout, dfinal_state, q, k, v, decay, bonus, cu_seqlens, out, checkpoints,
                      denominator, scale, normalize, reverse, decay_gradient)
    q, k, v, dout = map(_last_contiguous, (q, k, v, dout))
    decay = decay if decay is None or decay.dim() < 4 else _last_contiguous(decay)
    bonus, dfinal_state = _optional(bonus), _optional(dfinal_state)
    fields = _fields(q, k, v, decay, bonus, cu_seqlens, scale, normalize, reverse) | _strided(dout=dout)
    if normalize:
        out = _last_contiguous(out)
        fields |= _strided(out=out)
    dq, dk, dv, ddecay, dbonus, dinitial_state = outputs
    fields |= _addresses(dfinal_state=dfinal_state, checkpoints=checkpoints, denominator=denominator,
                         dq=dq, dk=dk, dv=dv, ddecay=ddecay if decay_gradient else None,
                         dbonus=None if bonus is None else dbonus, dinitial_state=dinitial_state)
    host = host_build.load()
    scratch = _guarded(host.linear_attention_bwd_scratch(fields))
    host.linear_attention_bwd(fields | {"scratch": scratch.data_ptr()})
    _check_guards(*outputs, scratch)
    return tuple(outputs)


def step(state, q, k, v, decay, bonus, state_indices, scale, normalize):
    q, k, v = (_last_contiguous(x).unsqueeze(1) for x in (q, k, v))
    if decay is not None and decay.dim() > 1:
        decay = (decay if decay.dim() < 3 else _last_contiguous(decay)).unsqueeze(1)
    bonus = _optional(bonus)
    out = _guarded(v.shape[0], *v.shape[2:], dtype=v.dtype)
    fields = _fields(q, k, v, decay, bonus, None, scale, normalize, False) | _addresses(
        out=out, state=state, state_indices=state_indices)
    fields |= {"out_stride": (out.stride(0), 0, out.stride(1)), "slots": state.shape[0], "slot_stride": state.stride(0),
               "head_stride": state.stride(1)}
    host_build.load().linear_attention_step(fields)
    _check_guards(out)
    return out


for _part, _run in {"fwd": fwd, "bwd": bwd, "step": step}.items():
    _dispatch.define(f"linear_attention_{_part}_cuda_host", registration.SCHEMAS[_part], _run)


@contextlib.contextmanager
def on_the_host() -> Iterator[None]:
    """Calls with backend="cuda" run the kernels on the executor, if the backend would take the call on a GPU."""
    with host_backend.on_the_host(importlib.import_module("pykernels.ops.linear_attention")):
        yield
