"""Flash attention: exact softmax attention in memory linear in the sequence length.

The definition is `reference.py`; `registration.py` makes ops of the backends; README.md derives the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks
from ..._autograd import apart, followed
from ...backends import Op, Query, resolve
from . import reference, registration

__all__ = ["DECODE_OP", "OP", "flash_attention", "flash_attention_decode"]

_MAX_HEAD_DIM = 512
_MAX_DECODE_KEY_DIM = 576  # of latent attention: 512 compressed dimensions and 64 with positions


def _lacks(query: Query, kernels: str, options: tuple[str, ...]) -> str | None:
    """Why kernels that lack `options` can't serve the call."""
    used = [name for name in options if name in query.options]
    return f"the {kernels} kernels have no {' and no '.join(used)}" if used else None


def _cpu(query: Query) -> str | None:
    return None


def _triton(query: Query) -> str | None:
    if query.dtype == torch.float64:
        return "Triton's matrix instructions have no float64"
    return None


def _cuda_decode(query: Query) -> str | None:
    if query.dtype not in (torch.bfloat16, torch.float16):
        return "the CUDA kernels take bfloat16 and float16"
    return None


def _cuda(query: Query) -> str | None:
    if (reason := _cuda_decode(query)) is not None:
        return reason
    if max(query.sizes["head_dim"], query.sizes["value_dim"]) > 256:
        return "the CUDA kernels take head sizes up to 256"
    return _lacks(query, "CUDA", ("bias", "dropout_p"))


def _reference(query: Query) -> str | None:
    return None


_BACKENDS = {"cuda": _cuda, "triton": _triton, "cpu": _cpu, "reference": _reference}
_UNMEASURED = {"cuda": "not yet measured against Triton on a GPU, so only on request"}
OP = Op("flash_attention", _BACKENDS, explicit_only=_UNMEASURED)
DECODE_OP = Op("flash_attention_decode", _BACKENDS | {"cuda": _cuda_decode}, explicit_only=_UNMEASURED)


def _check_qkv(q: object, k: object, v: object, k_name: str, v_name: str, largest: int, paged: bool = False) -> None:
    """`paged`: the axes B and T of k and v are pages and their tokens."""
    _checks.tensor("q", q, "B T H K")
    _checks.tensor(k_name, k, "B T H K")
    _checks.tensor(v_name, v, "B T H V")
    _checks.main_dtype("q", q)
    for name, x in ((k_name, k), (v_name, v)):
        _checks.same_dtype(name, x, "q", q)
        _checks.same_device(name, x, "q", q)
    batch, _, heads, head_dim = q.shape
    first, second = ("pages", "page size") if paged else ("B", "T")
    _checks.shape(k_name, k, {first: None if paged else batch, second: None, "H": None, "K": head_dim})
    _checks.shape(v_name, v, {first: k.shape[0], second: k.shape[1], "H": k.shape[2], "V": None})
    if k.shape[2] == 0 or heads % k.shape[2] != 0:
        raise ValueError(f"q must have a multiple of {k_name}'s heads: q has {heads} heads, {k_name} has {k.shape[2]}")
    for name, size, limit in (("q", head_dim, largest), (v_name, v.shape[3], _MAX_HEAD_DIM)):
        if not 1 <= size <= limit:
            raise ValueError(f"{name} must have a head size from 1 to {limit}, got {size}")


def _check_options(causal: object, window: object, scale: object, softcap: object, head_dim: int) -> tuple:
    """-> (scale, softcap, window_left, window_right); -1 is unbounded, causal has become a bound on the right."""
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


def _check_slopes(slopes: object, q: Tensor, sequences: int, axis: str) -> Tensor:
    """ALiBi's slopes [Hq] or [`axis`, Hq], in the accumulator's dtype."""
    if not isinstance(slopes, Tensor):
        raise TypeError(f"alibi_slopes must be a tensor [H] or [{axis}, H], got {type(slopes).__name__}")
    if slopes.dim() not in (1, 2):
        raise ValueError(f"alibi_slopes must have axes [H] or [{axis}, H], got shape {list(slopes.shape)}")
    rows = {axis: sequences} if slopes.dim() == 2 else {}
    _checks.shape("alibi_slopes", slopes, {**rows, "H": q.shape[2]})
    _checks.parameter("alibi_slopes", slopes, "q", q)
    if slopes.requires_grad:
        raise ValueError("alibi_slopes must not require grad: no gradient is computed for it (a bias has one)")
    return slopes.to(registration.accumulator(q.dtype)).contiguous()


def _check_bias(bias: object, q: Tensor, tk: int) -> Tensor:
    """The bias with 4 axes."""
    batch, tq, heads, _ = q.shape
    wanted = {"B": batch, "H": heads, "Tq": tq, "Tk": tk}
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor [B, H, Tq, Tk], got {type(bias).__name__}")
    sizes = zip(reversed(bias.shape), reversed(wanted.values()))
    if bias.dim() > 4 or any(size != 1 and size != full for size, full in sizes):
        labels = ", ".join(f"{label}={size}" for label, size in wanted.items())
        raise ValueError(f"bias must be broadcastable to [{labels}], got shape {list(bias.shape)}")
    if bias.dtype not in (torch.bool, q.dtype, torch.float32):
        raise TypeError(f"bias must be bool, float32 or q's dtype {q.dtype}, got {bias.dtype}")
    _checks.same_device("bias", bias, "q", q)
    bias = bias[(None,) * (4 - bias.dim())]
    return bias.double() if q.dtype == torch.float64 and bias.dtype == torch.float32 else bias


def _check_sinks(sinks: object, q: Tensor) -> Tensor:
    """Sinks [Hq], in the accumulator's dtype."""
    _checks.tensor("sinks", sinks, "H")
    _checks.shape("sinks", sinks, {"H": q.shape[2]})
    _checks.parameter("sinks", sinks, "q", q)
    return sinks.to(registration.accumulator(q.dtype)).contiguous()


def _query(q: Tensor, v: Tensor, options: tuple, grad: bool, **used: bool) -> Query:
    _, softcap, left, right = options
    used = {"softcap": softcap > 0, "window": left >= 0 or right >= 0, **used}
    return Query(q.device.type, q.dtype, {"head_dim": q.shape[3], "value_dim": v.shape[3]},
                 frozenset(name for name, on in used.items() if on), grad)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False,
                    window: tuple[int | None, int | None] | None = None, scale: float | None = None,
                    softcap: float = 0.0, alibi_slopes: Tensor | None = None, bias: Tensor | None = None,
                    sinks: Tensor | None = None, dropout_p: float = 0.0, cu_seqlens_q: Tensor | None = None,
                    cu_seqlens_k: Tensor | None = None, return_lse: bool = False, deterministic: bool | None = None,
                    backend: str = "auto") -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention, exact, in memory linear in T.

    .. math::
        s_{ij} = \mathrm{softcap}(scale \cdot q_i k_j^T) - slope_h |p_i - j| + bias_{ij}, \qquad
        out_i = \sum_{j\ \mathrm{visible}} \frac{e^{s_{ij}}}{e^{sink_h} + \sum_{j'} e^{s_{ij'}}} v_j

    Args:
        q: queries [B, Tq, Hq, K], float32, bfloat16, float16, or float64 on the CPU; any strides.
        k: keys [B, Tk, Hk, K], q's dtype. Hq is a multiple of Hk: query head h reads key head h // (Hq // Hk).
        v: values [B, Tk, Hk, V]. K and V are 1 to 512 and may differ.
        causal: query i sees keys up to i + Tk - Tq (the last query sees the last key).
        window: (left, right): query i, at position p = i + Tk - Tq, sees keys p - left to p + right; None is unbounded.
        scale: factor on q k^T; None is K ** -0.5.
        softcap: if positive, scores become softcap * tanh(score / softcap).
        alibi_slopes: [Hq] or [B, Hq] ([sequences, Hq] for packed input), q's dtype or float32: the score of query i (at
            position p) and key j is lowered by slope * abs(p - j). No gradient: it must not require one.
        bias: added to the scores after the softcap; broadcastable to [B, Hq, Tq, Tk], in q's dtype or float32, or
            boolean: then a key is visible where True, as with -inf where False. Packed input: Tq and Tk are the packed
            tokens.
        sinks: [Hq], q's dtype or float32: a score per head that takes part in the softmax, whose value is zero.
        dropout_p: in [0, 1): each weight is zeroed with this probability, the others divided by 1 - dropout_p; lse is
            of all. The seed is drawn from torch's generator for q's device. Which weights are zeroed depends on it, and
            on head, query and key (the definition is in reference.py), on no backend.
        cu_seqlens_q: int32 or int64 [sequences + 1], token offsets of the sequences packed along T (then B is 1),
            starting at 0. Tokens after the last offset belong to no sequence and give zeros.
        cu_seqlens_k: the same for k and v; None takes cu_seqlens_q.
        return_lse: also return the log-sum-exp of each row's scores, differentiable.
        deterministic: bitwise repeatable gradients; None follows torch.use_deterministic_algorithms.
        backend: "auto", "cpu", "triton", "cuda" or "reference" (see pykernels.backends).

    Returns:
        out [B, Tq, Hq, V] in q's dtype, or (out, lse) with lse [B, Hq, Tq] in float32 (float64 for float64), natural
        log. A row that sees no key is zero, its lse is -inf, or its head's sink.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value; the message names it.
        BackendUnavailable: the backend asked for can't serve this call.

    Derivatives of first and second order exist with respect to q, k, v, bias and sinks (through out and lse); the
    second in eager mode only, computed by the quadratic reference.

    Source: Dao et al., FlashAttention (arXiv:2205.14135) and FlashAttention-2 (arXiv:2307.08691); Press et al., ALiBi
    (arXiv:2108.12409); Xiao et al., attention sinks (arXiv:2309.17453); Salmon et al., Philox (SC 2011).
    """
    q, k, v = _checks.autocast(q, k, v)
    _check_qkv(q, k, v, "k", "v", _MAX_HEAD_DIM)
    options = _check_options(causal, window, scale, softcap, q.shape[3])
    dropout_p = float(_checks.number("dropout_p", dropout_p))
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and less than 1, got {dropout_p}")
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
        cu_seqlens_q = _checks.cu_seqlens("cu_seqlens_q", cu_seqlens_q, min(total_q, total_k) if same else total_q,
                                          q.device)
        cu_seqlens_k = cu_seqlens_q if same else _checks.cu_seqlens("cu_seqlens_k", cu_seqlens_k, total_k, q.device)
        if cu_seqlens_k.shape != cu_seqlens_q.shape:
            raise ValueError(f"cu_seqlens_k must have as many offsets as cu_seqlens_q ({cu_seqlens_q.shape[0]}), "
                             f"got {cu_seqlens_k.shape[0]}")
    if alibi_slopes is not None:
        packed = cu_seqlens_q is not None
        alibi_slopes = _check_slopes(alibi_slopes, q, cu_seqlens_q.shape[0] - 1 if packed else q.shape[0],
                                     "sequences" if packed else "B")
    bias = None if bias is None else _check_bias(bias, q, k.shape[1])
    sinks = None if sinks is None else _check_sinks(sinks, q)
    grad = followed(q, k, v, bias, sinks)
    chosen = resolve(OP, _query(q, v, options, grad, varlen=cu_seqlens_q is not None,
                                alibi_slopes=alibi_slopes is not None, bias=bias is not None, sinks=sinks is not None,
                                dropout_p=dropout_p > 0), backend)
    seed = torch.randint(2 ** 63 - 1, (1,), dtype=torch.int64, device=q.device) if dropout_p > 0 else None
    if chosen == "reference":
        out, lse = reference.flash_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, *options, alibi_slopes, bias, sinks,
                                             seed, dropout_p)
    elif grad:
        tensors = apart(q, k, v, bias, sinks, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed)
        out, lse = registration.FlashAttention.apply(*tensors, options, dropout_p, deterministic, chosen)
    else:
        out, lse = registration.run("fwd", chosen, q, k, v, cu_seqlens_q, cu_seqlens_k, *options, alibi_slopes, bias,
                                    sinks, seed, dropout_p)
    return (out, lse) if return_lse else out


def flash_attention_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, *,
                           k: Tensor | None = None, v: Tensor | None = None, block_table: Tensor | None = None,
                           causal: bool = True, window: tuple[int | None, int | None] | None = None,
                           scale: float | None = None, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
                           sinks: Tensor | None = None, return_lse: bool = False,
                           backend: str = "auto") -> Tensor | tuple[Tensor, Tensor]:
    """One step of generation: appends new keys and values to the cache in place, then attends to all of it.

    Args:
        q: queries of the newest tokens [B, Tq, Hq, K]; Tq is usually 1, a few when verifying drafts, many for a prompt.
            K is 1 to 576 here: latent attention has 512 compressed dimensions, which are the values, and 64 more.
        k_cache: [B, Tmax, Hk, K], q's dtype; entry b holds cache_seqlens[b] valid tokens, the rest is never read.
        v_cache: [B, Tmax, Hk, V].
        cache_seqlens: int32 or int64 [B], valid tokens *before* the append; not changed.
        k, v: new tokens [B, Tnew, Hk, K] and [B, Tnew, Hk, V], written at cache_seqlens[b]; both or neither.
        block_table: int32 or int64 [B, pages of an entry]: the cache is paged, k_cache [pages, page size, Hk, K] and
            v_cache [pages, page size, Hk, V], and token t of entry b lies in page block_table[b, t // page size] at t %
            page size. Pages may be shared and in any order; what lies behind the last token's page is never looked at.
        causal, window: positions align so that the last query sits at the last valid key, cache_seqlens[b] + Tnew - 1.
        scale, softcap, alibi_slopes, sinks, return_lse, backend: as in `flash_attention`.

    Returns:
        out [B, Tq, Hq, V], or (out, lse) with lse [B, Hq, Tq].

    Raises:
        TypeError, ValueError: as in `flash_attention`; also when the append would overrun the cache (nothing is
            written).
        RuntimeError: grad mode is on and an input requires grad: this function is for inference, its cache is
            overwritten.
        BackendUnavailable: the backend asked for can't serve this call.
    """
    options, new_tokens, capacity, chosen = _check_decode(
        q, k_cache, v_cache, cache_seqlens, k, v, block_table, causal, window, scale, softcap, alibi_slopes is not None,
        sinks is not None, return_lse, backend)
    alibi_slopes = None if alibi_slopes is None else _check_slopes(alibi_slopes, q, q.shape[0], "B")
    sinks = None if sinks is None else _check_sinks(sinks, q)
    if torch.is_grad_enabled():
        named = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "sinks": sinks}
        for name, x in named.items():
            if x is not None and x.requires_grad:
                raise RuntimeError(f"{name} requires grad, but flash_attention_decode is for inference (it writes the "
                                   "cache in place): call it under torch.no_grad(), or use flash_attention")
    if _checks.values_checked(cache_seqlens):
        for b, length in enumerate(cache_seqlens.tolist()):
            if length < 0 or length + new_tokens > capacity:
                raise ValueError(f"cache_seqlens must leave room for {new_tokens} new tokens in a cache of {capacity}, "
                                 f"got {length} for batch entry {b}")
        if block_table is not None:
            _check_pages(block_table, cache_seqlens, new_tokens, k_cache)
    cache_seqlens = cache_seqlens.to(torch.int32).contiguous()
    block_table = None if block_table is None else block_table.to(torch.int32).contiguous()
    extras = block_table, alibi_slopes, sinks
    if chosen == "reference":
        if k is not None:
            reference.flash_attention_append(k_cache, v_cache, k, v, cache_seqlens, block_table)
        out, lse = reference.flash_attention_decode(q, k_cache, v_cache, cache_seqlens, new_tokens, *options, *extras)
    else:
        if k is not None:
            registration.run("append", chosen, k_cache, v_cache, k, v, cache_seqlens, block_table)
        out, lse = registration.run("decode", chosen, q, k_cache, v_cache, cache_seqlens, new_tokens, *options, *extras)
    return (out, lse) if return_lse else out


@_checks.by_metadata
def _check_decode(q: object, k_cache: object, v_cache: object, cache_seqlens: object, k: object, v: object,
                  block_table: object, causal: object, window: object, scale: object, softcap: object, slopes: bool,
                  sinks: bool, return_lse: object, backend: object) -> tuple[tuple, int, int, str]:
    """-> options, new tokens, tokens that an entry has room for, the backend that serves."""
    _check_qkv(q, k_cache, v_cache, "k_cache", "v_cache", _MAX_DECODE_KEY_DIM, block_table is not None)
    options = _check_options(causal, window, scale, softcap, q.shape[3])
    _checks.flag("return_lse", return_lse)
    (batch, _, _, head_dim), (_, capacity, heads, _) = q.shape, k_cache.shape
    if block_table is not None:
        _checks.tensor("block_table", block_table, "B pages")
        _checks.integer("block_table", block_table)
        _checks.same_device("block_table", block_table, "q", q)
        _checks.shape("block_table", block_table, {"B": batch, "pages": None})
        capacity *= block_table.shape[1]
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
            if x.shape[3] > 1 and x.stride(3) != 1:
                raise ValueError(f"{name} must be contiguous in its last axis to be appended to, "
                                 f"got strides {x.stride()}")
            _checks.writable(name, x)
    query = _query(q, v_cache, options, False, block_table=block_table is not None, alibi_slopes=slopes, sinks=sinks)
    return options, new_tokens, capacity, resolve(DECODE_OP, query, backend)


def _check_pages(block_table: Tensor, cache_seqlens: Tensor, new_tokens: int, k_cache: Tensor) -> None:
    """Checks that the pages in use exist, and that no page is written for two entries."""
    pages, size = k_cache.shape[:2]
    written: dict[int, int] = {}
    for b, (row, length) in enumerate(zip(block_table.tolist(), cache_seqlens.tolist())):
        end = -(-(length + new_tokens) // size) if size else 0
        for i, page in enumerate(row[:end]):
            if not 0 <= page < pages:
                raise ValueError(f"block_table must hold pages below {pages} where tokens are, "
                                 f"got {page} at [{b}, {i}]")
        for page in row[length // size:end] if new_tokens and size else ():
            if written.setdefault(page, b) != b:
                raise ValueError(f"block_table must give each entry pages of its own to append to, "
                                 f"got page {page} for batch entries {written[page]} and {b}")
