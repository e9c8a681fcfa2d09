"""flash_attention's ops on the host executor, as a backend "cuda_host", with what csrc/torch does around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import host_build
from pykernels import _dispatch
from pykernels.ops.flash_attention import registration

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _with_guards(*shape: int, dtype: torch.dtype) -> Tensor:
    """An output full of NaN inside of a larger NaN buffer; `_check_guards` tells whether the rest was written to."""
    size = torch.Size(shape).numel()
    buffer = torch.full((size + 512,), torch.nan, dtype=dtype)
    return buffer[256:256 + size].view(shape)


def _check_guards(*outputs: Tensor) -> None:
    for x in outputs:
        buffer = torch.as_strided(x, (x.numel() + 512,), (1,), 0)
        outside = torch.cat([buffer[:256], buffer[256 + x.numel():]])
        assert outside.isnan().all(), "a kernel wrote outside of its output"


def _fields(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor | None,
            cu_seqlens_k: Tensor | None, scale: float, softcap: float, window_left: int, window_right: int,
            alibi_slopes: Tensor | None = None, bias: Tensor | None = None, sinks: Tensor | None = None,
            seed: Tensor | None = None, dropout_p: float = 0.0) -> dict[str, Any]:
    assert bias is None and seed is None and not dropout_p, "the CUDA kernels have no bias and no dropout"
    fields: dict[str, Any] = {"dtype": _DTYPES[q.dtype], "scale": scale, "softcap": softcap, "window_left": window_left,
                              "window_right": window_right, "lse": lse.data_ptr()}
    fields["batch"], fields["seqlen_q"], fields["heads_q"], fields["head_dim"] = q.shape
    _, fields["seqlen_k"], fields["heads_k"], fields["value_dim"] = v.shape
    fields |= _tensors(q=q, k=k, v=v, out=out)
    packed = cu_seqlens_q is not None
    fields["sequences"] = cu_seqlens_q.shape[0] - 1 if packed else 0
    fields["cu_seqlens_q"] = cu_seqlens_q.data_ptr() if packed else 0
    fields["cu_seqlens_k"] = cu_seqlens_k.data_ptr() if packed else 0
    if alibi_slopes is not None:
        fields |= {"alibi_slopes": alibi_slopes.data_ptr(), "alibi_stride": q.shape[2] * (alibi_slopes.dim() - 1)}
    if sinks is not None:
        fields["sinks"] = sinks.data_ptr()
    return fields


def _pages(block_table: Tensor | None, k_cache: Tensor) -> dict[str, Any]:
    """Of a paged cache, and how many tokens an entry's pages hold."""
    if block_table is None:
        return {}
    pages, page_size = k_cache.shape[:2]
    batch, per_entry = block_table.shape
    return {"block_table": block_table.data_ptr(), "block_table_stride": per_entry, "pages": pages, "batch": batch,
            "page_size": page_size, "seqlen_k": per_entry * page_size, "capacity": per_entry * page_size}


def _tensors(**tensors: Tensor) -> dict[str, Any]:
    pointers = {name: x.data_ptr() for name, x in tensors.items()}
    return pointers | {name + "_stride": tuple(x.stride()[:3]) for name, x in tensors.items()}


def fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, *options_and_extras):
    q, k, v = map(_last_contiguous, (q, k, v))
    out = _with_guards(*q.shape[:3], v.shape[3], dtype=q.dtype)
    lse = _with_guards(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    host_build.load().flash_attention_fwd(_fields(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k,
                                                  *options_and_extras))
    _check_guards(out, lse)
    return out, lse


def bwd(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, softcap, window_left, window_right,
        deterministic, alibi_slopes=None, bias=None, sinks=None, seed=None, dropout_p=0.0, bias_gradient=False):
    q, k, v, out, dout = map(_last_contiguous, (q, k, v, out, dout))
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    dq, dk, dv = (_with_guards(*x.shape, dtype=x.dtype) for x in (q, k, v))
    fields = _fields(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, softcap, window_left, window_right,
                     alibi_slopes, bias, sinks, seed, dropout_p) | _tensors(dout=dout, dq=dq, dk=dk, dv=dv)
    dsinks = _with_guards(0 if sinks is None else q.shape[2], dtype=torch.float32)
    fields |= {"dlse": 0 if dlse is None else dlse.data_ptr(), "deterministic": deterministic, "scratch": 0,
               "dsinks": 0 if sinks is None else dsinks.data_ptr()}
    scratch = _with_guards(host_build.load().flash_attention_bwd_scratch(fields), dtype=torch.float32)
    host_build.load().flash_attention_bwd(fields | {"scratch": scratch.data_ptr()})
    _check_guards(dq, dk, dv, dsinks, scratch)
    return dq, dk, dv, lse.new_empty(0), dsinks


def decode(q, k_cache, v_cache, cache_seqlens, new_tokens, scale, softcap, window_left, window_right, block_table=None,
           alibi_slopes=None, sinks=None):
    q, k, v = map(_last_contiguous, (q, k_cache, v_cache))
    out = _with_guards(*q.shape[:3], v.shape[3], dtype=q.dtype)
    lse = _with_guards(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    fields = _fields(q, k, v, out, lse, None, None, scale, softcap, window_left, window_right, alibi_slopes, None,
                     sinks)
    fields |= _pages(block_table, k) | {"cache_seqlens": cache_seqlens.data_ptr(), "new_tokens": new_tokens}
    _, floats = host_build.load().flash_attention_decode_splits(fields)
    scratch = _with_guards(floats, dtype=torch.float32)
    host_build.load().flash_attention_decode(fields | {"scratch": scratch.data_ptr()})
    _check_guards(out, lse, scratch)
    return out, lse


def append(k_cache, v_cache, k, v, cache_seqlens, block_table=None):
    k, v = map(_last_contiguous, (k, v))
    fields = _tensors(k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    fields["batch"], fields["capacity"], fields["heads"], fields["head_dim"] = k_cache.shape
    fields |= _pages(block_table, k_cache)
    fields |= {"element_size": k.element_size(), "new_tokens": k.shape[1], "value_dim": v.shape[3],
               "cache_seqlens": cache_seqlens.data_ptr()}
    host_build.load().flash_attention_append(fields)


_dispatch.define("flash_attention_bwd_cuda_host", registration.SCHEMAS["bwd"], bwd)
_dispatch.define("flash_attention_fwd_cuda_host", registration.SCHEMAS["fwd"], fwd)
