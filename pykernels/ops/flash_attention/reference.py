"""The definition of flash attention: plain differentiable PyTorch, quadratic in memory, exact in float64.

For query head h of sequence b (its key head is h // (Hq // Hk)), query i and key j, with p = i + Tk - Tq:

    s_ij = scale * q_i . k_j                          then, if softcap > 0,  s_ij = softcap * tanh(s_ij / softcap)
    visible(i, j) = p - left <= j <= p + right        (an unbounded side always holds; causal is right = 0)
    lse_i = log sum_{j visible} exp(s_ij)             (-inf when nothing is visible)
    out_i = sum_{j visible} exp(s_ij - lse_i) v_j     (zero when nothing is visible)
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(tq: int, tk: int, left: int, right: int, device: torch.device) -> Tensor:
    """The mask [tq, tk], True where query i sees key j; a negative bound is unbounded."""
    distance = torch.arange(tk, device=device) - torch.arange(tq, device=device)[:, None] - (tk - tq)  # j - p
    mask = torch.ones(tq, tk, dtype=torch.bool, device=device)
    if left >= 0:
        mask &= distance >= -left
    if right >= 0:
        mask &= distance <= right
    return mask


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, left: int, right: int) -> tuple[Tensor, Tensor]:
    """q [B, Tq, Hq, K], k [B, Tk, Hk, K], v [B, Tk, Hk, V] -> out [B, Tq, Hq, V], lse [B, Hq, Tq] in fp32 (fp64).

    Computes in the input's dtype, so that in float64 it is the reference and in a low precision the yardstick of what
    plain PyTorch loses there.
    """
    tq, tk, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    mask = visible(tq, tk, left, right, q.device)
    scores = scores.to(accumulator).masked_fill(~mask, -torch.inf)
    # Rows that see nothing: a finite score keeps softmax and its gradient from making NaN out of -inf - -inf.
    empty = ~mask.any(dim=1)[:, None]
    lse = torch.logsumexp(scores.masked_fill(empty, 0.0), dim=-1) if tk else scores.sum(-1)
    weights = torch.exp(scores - lse[..., None]).masked_fill(~mask, 0.0).to(q.dtype)
    out = torch.einsum("bhij,bjhd->bihd", weights, v)
    return out, lse.masked_fill(empty[:, 0], -torch.inf)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, scale: float,
                    softcap: float, left: int, right: int) -> tuple[Tensor, Tensor]:
    """`attention`, sequence by sequence when packed."""
    if cu_seqlens_q is None:
        return attention(q, k, v, scale, softcap, left, right)
    # Padding after the last sequence belongs to none: zeros, and lse -inf.
    outs, lses = [], []
    # An empty sequence first, so that the outputs depend on q, k and v even when there is no other.
    ends_q, ends_k = [0, *cu_seqlens_q.tolist()], [0, *cu_seqlens_k.tolist()]
    for q0, q1, k0, k1 in zip(ends_q, ends_q[1:], ends_k, ends_k[1:]):
        out, lse = attention(q[:, q0:q1], k[:, k0:k1], v[:, k0:k1], scale, softcap, left, right)
        outs.append(out)
        lses.append(lse)
    rest = q.shape[1] - ends_q[-1]
    outs.append(q.new_zeros(1, rest, q.shape[2], v.shape[3]))
    lses.append(torch.full((1, q.shape[2], rest), -torch.inf, device=q.device,
                           dtype=torch.float64 if q.dtype == torch.float64 else torch.float32))
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)


def flash_attention_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, new_tokens: int, scale: float,
                           softcap: float, left: int, right: int) -> tuple[Tensor, Tensor]:
    """`attention` of each batch entry against the valid part of its cache."""
    out, lse = attention(q[:0], k_cache[:0], v_cache[:0], scale, softcap, left, right)  # what remains without batch entries
    outs, lses = [out], [lse]
    for b, length in enumerate(cache_seqlens.tolist()):
        length = min(max(length + new_tokens, 0), k_cache.shape[1])
        out, lse = attention(q[b:b + 1], k_cache[b:b + 1, :length], v_cache[b:b + 1, :length], scale, softcap, left, right)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def flash_attention_append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor) -> None:
    """k_cache[b, cache_seqlens[b] + t] = k[b, t], v likewise; what would land outside the cache is dropped."""
    for b, start in enumerate(cache_seqlens.tolist()):
        first, last = max(start, 0), min(start + k.shape[1], k_cache.shape[1])
        if first < last:
            k_cache[b, first:last] = k[b, first - start:last - start]
            v_cache[b, first:last] = v[b, first - start:last - start]
