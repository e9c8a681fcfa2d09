"""Flash attention: exact softmax attention in memory linear in the sequence length.

The definition is `reference.py`; `registration.py` makes ops of the backends; README.md derives the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks
from ..._autograd import followed
from ...backends import Op, Query, resolve
from . import reference, registration

__all__ = ["DECODE_OP", "OP", "flash_attention", "flash_attention_decode"]

_MAX_HEAD_DIM = 512
# Options of the public signature that no backend serves yet; giving one raises.
_UNSERVED = ("alibi_slopes", "bias", "sinks", "dropout_p", "block_table")


def _cpu(query: Query) -> str | None:
    return None


def _triton(query: Query) -> str | None:
    if query.dtype == torch.float64:
        return "Triton's matrix instructions have no float64"
    return None


def _cuda(query: Query) -> str | None:
    if query.dtype not in (torch.bfloat16, torch.float16):
        return "the CUDA kernels take bfloat16 and float16"
    if max(query.sizes["head_dim"], query.sizes["value_dim"]) > 256:
        return "the CUDA kernels take head sizes up to 256"
    return None


def _reference(query: Query) -> str | None:
    return None


_BACKENDS = {"cuda": _cuda, "triton": _triton, "cpu": _cpu, "reference": _reference}
_UNMEASURED = {"cuda": "not yet measured against Triton on a GPU, so only on request"}
OP = Op("flash_attention", _BACKENDS, explicit_only=_UNMEASURED)
DECODE_OP = Op("flash_attention_decode", _BACKENDS, explicit_only=_UNMEASURED)


def _check_qkv(q: object, k: object, v: object, k_name: str, v_name: str) -> None:
    _checks.tensor("q", q, "B T H K")
    _checks.tensor(k_name, k, "B T H K")
    _checks.tensor(v_name, v, "B T H V")
    _checks.main_dtype("q", q)
    for name, x in ((k_name, k), (v_name, v)):
        _checks.same_dtype(name, x, "q", q)
        _checks.same_device(name, x, "q", q)
    batch, _, heads, head_dim = q.shape
    _checks.shape(k_name, k, {"B": batch, "T": None, "H": None, "K": head_dim})
    _checks.shape(v_name, v, {"B": batch, "T": k.shape[1], "H": k.shape[2], "V": None})
    if k.shape[2] == 0 or heads % k.shape[2] != 0:
        raise ValueError(f"q must have a multiple of {k_name}'s heads: q has {heads} heads, {k_name} has {k.shape[2]}")
    for name, size in (("q", head_dim), (v_name, v.shape[3])):
        if not 1 <= size <= _MAX_HEAD_DIM:
            raise ValueError(f"{name} must have a head size from 1 to {_MAX_HEAD_DIM}, got {size}")


def _check_options(causal: object, window: object, scale: object, softcap: object, head_dim: int) -> tuple:
    """-> (scale, softcap, window_left, window_right), where -1 is unbounded and causal has become a bound on the right."""
    _checks.flag("causal", causal)
    left = right = -1
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise TypeError(f"window must be None or (left, right), got {window!r}")
        for side in window:
            if side is not None and (isinstance(side, bool) or not isinstance(side, (int, torch.SymInt))):
                raise TypeError(f"window must hold integers or None, got {window!r}")
            if side is not None and side < 0:
                raise ValueError(f"window must hold bounds >= 0 or None (unbounded), got {tuple(window)}")
        left, right = (-1 if side is None else side for side in window)
    if causal:
        right = 0
    scale = head_dim ** -0.5 if scale is None else _checks.number("scale", scale)
    softcap = _checks.number("softcap", softcap)
    if softcap < 0:
        raise ValueError(f"softcap must be positive, or 0 for none, got {softcap}")
    return float(scale), float(softcap), left, right


def _reject_unserved(**options: object) -> None:
    for name, value in options.items():
        if value is not None and not (name == "dropout_p" and value == 0):
            raise ValueError(f"{name} is not served by any backend of this version of pykernels, got {value!r:.60}; leave it out")


def _query(q: Tensor, v: Tensor, options: tuple, varlen: bool, grad: bool) -> Query:
    _, softcap, left, right = options
    used = {"softcap": softcap > 0, "window": left >= 0 or right >= 0, "varlen": varlen}
    return Query(q.device.type, q.dtype, {"head_dim": q.shape[3], "value_dim": v.shape[3]},
                 frozenset(name for name, on in used.items() if on), grad)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: tuple[int | None, int | None] | None = None,
                    scale: float | None = None, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
                    bias: Tensor | None = None, sinks: Tensor | None = None, dropout_p: float = 0.0,
                    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, return_lse: bool = False,
                    deterministic: bool | None = None, backend: str = "auto") -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention, exact, in memory linear in T.

    .. math::
        s_{ij} = \mathrm{softcap}(scale \cdot q_i k_j^T), \qquad
        out_i = \sum_{j\ \mathrm{visible}} \frac{e^{s_{ij}}}{\sum_{j'} e^{s_{ij'}}} v_j

    Args:
        q: queries [B, Tq, Hq, K], float32, bfloat16, float16, or float64 on the CPU; any strides.
        k: keys [B, Tk, Hk, K], q's dtype. Hq is a multiple of Hk: query head h reads key head h // (Hq // Hk).
        v: values [B, Tk, Hk, V]. K and V are 1 to 512 and may differ.
        causal: query i sees keys up to i + Tk - Tq (the last query sees the last key).
        window: (left, right): query i, at position p = i + Tk - Tq, sees keys p - left to p + right; None is unbounded.
        scale: factor on q k^T; None is K ** -0.5.
        softcap: if positive, scores become softcap * tanh(score / softcap).
        alibi_slopes, bias, sinks, dropout_p: not served yet; giving one raises ValueError.
        cu_seqlens_q: int32 or int64 [sequences + 1], token offsets of the sequences packed along T (then B is 1), starting
            at 0. Tokens after the last offset belong to no sequence and give zeros.
        cu_seqlens_k: the same for k and v; None takes cu_seqlens_q.
        return_lse: also return the log-sum-exp of each row's scores, differentiable.
        deterministic: bitwise repeatable gradients; None follows torch.use_deterministic_algorithms.
        backend: "auto", "cpu", "triton", "cuda" or "reference" (see pykernels.backends).

    Returns:
        out [B, Tq, Hq, V] in q's dtype, or (out, lse) with lse [B, Hq, Tq] in float32 (float64 for float64), natural log.
        A row that sees no key is zero, its lse is -inf.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value; the message names it.
        BackendUnavailable: the backend asked for can't serve this call.

    Derivatives of first and second order exist with respect to q, k, v (through out and lse); the second in eager mode only,
    computed by the quadratic reference.

    Source: Dao et al., FlashAttention (arXiv:2205.14135) and FlashAttention-2 (arXiv:2307.08691).
    """
    q, k, v = _checks.autocast(q, k, v)
    _check_qkv(q, k, v, "k", "v")
    options = _check_options(causal, window, scale, softcap, q.shape[3])
    _reject_unserved(alibi_slopes=alibi_slopes, bias=bias, sinks=sinks, dropout_p=dropout_p)
    _checks.flag("return_lse", return_lse)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    _checks.flag("deterministic", deterministic)
    if cu_seqlens_q is None and cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_q must be given when cu_seqlens_k is, got None")
    if cu_seqlens_q is not None:
        if q.shape[0] != 1:
            raise ValueError(f"q must have batch 1 when cu_seqlens_q packs sequences, got shape {list(q.shape)}")
        same = cu_seqlens_k is None or cu_seqlens_k is cu_seqlens_q
        total_q, total_k = q.shape[1], k.shape[1]
        cu_seqlens_q = _checks.cu_seqlens("cu_seqlens_q", cu_seqlens_q, min(total_q, total_k) if same else total_q, q.device)
        cu_seqlens_k = cu_seqlens_q if same else _checks.cu_seqlens("cu_seqlens_k", cu_seqlens_k, total_k, q.device)
        if cu_seqlens_k.shape != cu_seqlens_q.shape:
            raise ValueError(f"cu_seqlens_k must have as many offsets as cu_seqlens_q ({cu_seqlens_q.shape[0]}), "
                             f"got {cu_seqlens_k.shape[0]}")
    grad = followed(q, k, v)
    chosen = resolve(OP, _query(q, v, options, cu_seqlens_q is not None, grad), backend)
    if chosen == "reference":
        out, lse = reference.flash_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, *options)
    elif grad:
        out, lse = registration.FlashAttention.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, options, deterministic, chosen)
    else:
        out, lse = registration.run("fwd", chosen, q, k, v, cu_seqlens_q, cu_seqlens_k, *options)
    return (out, lse) if return_lse else out


def flash_attention_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, *, k: Tensor | None = None,
                           v: Tensor | None = None, block_table: Tensor | None = None, causal: bool = True,
                           window: tuple[int | None, int | None] | None = None, scale: float | None = None, softcap: float = 0.0,
                           alibi_slopes: Tensor | None = None, sinks: Tensor | None = None, return_lse: bool = False,
                           backend: str = "auto") -> Tensor | tuple[Tensor, Tensor]:
    """One step of generation: appends new keys and values to the cache in place, then attends to all of it.

    Args:
        q: queries of the newest tokens [B, Tq, Hq, K]; Tq is usually 1, a few when verifying drafts, many for a prompt.
        k_cache: [B, Tmax, Hk, K], q's dtype; entry b holds cache_seqlens[b] valid tokens, the rest is never read.
        v_cache: [B, Tmax, Hk, V].
        cache_seqlens: int32 or int64 [B], valid tokens *before* the append; not changed.
        k, v: new tokens [B, Tnew, Hk, K] and [B, Tnew, Hk, V], written at cache_seqlens[b]; both or neither.
        causal, window: positions align so that the last query sits at the last valid key, cache_seqlens[b] + Tnew - 1.
        scale, softcap, return_lse, backend: as in `flash_attention`.
        block_table, alibi_slopes, sinks: not served yet; giving one raises ValueError.

    Returns:
        out [B, Tq, Hq, V], or (out, lse) with lse [B, Hq, Tq].

    Raises:
        TypeError, ValueError: as in `flash_attention`; also when the append would overrun the cache (nothing is written).
        RuntimeError: grad mode is on and an input requires grad: this function is for inference, its cache is overwritten.
        BackendUnavailable: the backend asked for can't serve this call.
    """
    _check_qkv(q, k_cache, v_cache, "k_cache", "v_cache")
    options = _check_options(causal, window, scale, softcap, q.shape[3])
    _reject_unserved(block_table=block_table, alibi_slopes=alibi_slopes, sinks=sinks)
    _checks.flag("return_lse", return_lse)
    batch, capacity, heads, head_dim = k_cache.shape
    _checks.tensor("cache_seqlens", cache_seqlens, "B")
    _checks.integer("cache_seqlens", cache_seqlens)
    _checks.same_device("cache_seqlens", cache_seqlens, "q", q)
    _checks.shape("cache_seqlens", cache_seqlens, {"B": batch})
    if (k is None) != (v is None):
        raise ValueError(f"{'k' if k is None else 'v'} must be given with {'v' if k is None else 'k'}, got None")
    new_tokens = 0
    if k is not None:
        for name, x in (("k", k), ("v", v)):
            _checks.tensor(name, x, "B T H " + name.upper())
            _checks.same_dtype(name, x, "q", q)
            _checks.same_device(name, x, "q", q)
        new_tokens = k.shape[1]
        _checks.shape("k", k, {"B": batch, "Tnew": None, "H": heads, "K": head_dim})
        _checks.shape("v", v, {"B": batch, "Tnew": new_tokens, "H": heads, "V": v_cache.shape[3]})
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if k is not None and x.shape[3] > 1 and x.stride(3) != 1:
            raise ValueError(f"{name} must be contiguous in its last axis to be appended to, got strides {x.stride()}")
    if torch.is_grad_enabled():
        named = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
        for name, x in named.items():
            if x is not None and x.requires_grad:
                raise RuntimeError(f"{name} requires grad, but flash_attention_decode is for inference (it writes the cache in "
                                   "place): call it under torch.no_grad(), or use flash_attention")
    if _checks.values_checked(q.device):
        for b, length in enumerate(cache_seqlens.tolist()):
            if length < 0 or length + new_tokens > capacity:
                raise ValueError(f"cache_seqlens must leave room for {new_tokens} new tokens in a cache of {capacity}, "
                                 f"got {length} for batch entry {b}")
    cache_seqlens = cache_seqlens.to(torch.int32).contiguous()
    chosen = resolve(DECODE_OP, _query(q, v_cache, options, False, False), backend)
    if chosen == "reference":
        if k is not None:
            reference.flash_attention_append(k_cache, v_cache, k, v, cache_seqlens)
        out, lse = reference.flash_attention_decode(q, k_cache, v_cache, cache_seqlens, new_tokens, *options)
    else:
        if k is not None:
            registration.run("append", chosen, k_cache, v_cache, k, v, cache_seqlens)
        out, lse = registration.run("decode", chosen, q, k_cache, v_cache, cache_seqlens, new_tokens, *options)
    return (out, lse) if return_lse else out
