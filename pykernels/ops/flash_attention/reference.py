"""The definition of flash attention: plain differentiable PyTorch, quadratic in memory, exact in float64.

For query head h of sequence b (its key head is h // (Hq // Hk)), query i and key j, with p = i + Tk - Tq:

    s_ij = scale * q_i . k_j                          then, if softcap > 0,  s_ij = softcap * tanh(s_ij / softcap)
    s_ij += -slope_h |p - j|                          with ALiBi slopes
    s_ij += bias_ij                                   with a bias; a boolean one hides what is False, as -inf does
    visible(i, j) = p - left <= j <= p + right        (an unbounded side always holds; causal is right = 0)
                    and s_ij > -inf                   (by a bias, or a product of q and k)
    lse_i = log (exp(sink_h) + sum_{j visible} exp(s_ij))         (without sinks: -inf when nothing is visible)
    out_i = sum_{j visible} keep_ij exp(s_ij - lse_i) v_j         (zero when nothing is visible)

keep_ij is 1 without dropout, else 0 or 1 / (1 - p) as `dropout` says.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(tq: int, tk: int, left: int, right: int, device: torch.device) -> Tensor:
    """The mask [tq, tk], True where query i sees key j; a negative bound is unbounded."""
    distance = _distance(tq, tk, device)
    mask = torch.ones(tq, tk, dtype=torch.bool, device=device)
    if left >= 0:
        mask &= distance >= -left
    if right >= 0:
        mask &= distance <= right
    return mask


def _distance(tq: int, tk: int, device: torch.device) -> Tensor:
    """j - p [tq, tk]."""
    return torch.arange(tk, device=device) - torch.arange(tq, device=device)[:, None] - (tk - tq)


def philox(key: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) of the counters (c0, c1, c2, 0) under a 64-bit key, words in int64."""
    low32 = 0xFFFFFFFF
    k0, k1 = key & low32, (key >> 32) & low32
    c3 = torch.zeros_like(c0)
    for _ in range(10):
        # The products wrap around at 64 bits; all of their bits are still there.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & low32) ^ c1 ^ k0, b & low32, ((a >> 32) & low32) ^ c3 ^ k1, a & low32
        k0, k1 = (k0 + 0x9E3779B9) & low32, (k1 + 0xBB67AE85) & low32
    return c0, c1, c2, c3


def dropout(seed: Tensor, p: float, heads: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """What weights are multiplied by, [heads, queries, keys]: 0 with probability p, else 1 / (1 - p).

    heads are numbers b * Hq + h; queries and keys are tokens (of packed input: along the whole packed axis). Key k is
    dropped where word k % 4 of Philox of the counter (k // 4, query, head, 0) under the seed is below p 2^32.
    """
    groups = torch.arange(int(keys[0]) // 4, int(keys[-1]) // 4 + 1, device=keys.device) if len(keys) else keys
    counters = torch.broadcast_tensors(groups, queries[:, None], heads[:, None, None])
    words = torch.stack(philox(seed, *counters), dim=-1).flatten(-2)
    words = words[..., int(keys[0]) % 4:][..., :len(keys)] if len(keys) else words[..., :0]
    return (words >= threshold(p)).to(torch.float64) / (1 - p)


def threshold(p: float) -> int:
    """Random words below this drop."""
    return min(round(p * 2 ** 32), 2 ** 32 - 1)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, left: int, right: int,
              alibi_slopes: Tensor | None = None, bias: Tensor | None = None, sinks: Tensor | None = None,
              keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q [B, Tq, Hq, K], k [B, Tk, Hk, K], v [B, Tk, Hk, V] -> out [B, Tq, Hq, V], lse [B, Hq, Tq] in fp32 (fp64).

    alibi_slopes [Hq] or [B, Hq]; bias, keep: broadcastable to [B, Hq, Tq, Tk]; sinks [Hq].
    Computes in the input's dtype, so that in float64 it is the reference and in a low precision the yardstick of what
    plain PyTorch loses there.
    """
    tq, tk, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.to(accumulator)
    mask = visible(tq, tk, left, right, q.device)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(accumulator)[..., None, None] * _distance(tq, tk, q.device).abs()
    if bias is not None and bias.dtype == torch.bool:
        mask = mask & bias
    elif bias is not None:
        scores = scores + bias.to(accumulator)
        mask = mask & (bias != -torch.inf)
    mask = mask & (scores != -torch.inf)
    scores = scores.masked_fill(~mask, -torch.inf)
    # Rows that see nothing: a finite score keeps softmax and its gradient from making NaN out of -inf - -inf.
    empty = ~mask.any(dim=-1)
    lse = torch.logsumexp(scores.masked_fill(empty[..., None], 0.0), dim=-1) if tk else scores.sum(-1)
    nothing = torch.full_like(lse, -torch.inf)
    if sinks is not None:
        nothing = sinks.to(accumulator)[:, None].expand_as(lse)
        lse = torch.logaddexp(lse, nothing)
    weights = torch.exp(scores - lse[..., None]).masked_fill(~mask, 0.0)
    if keep is not None:
        weights = weights * keep.to(accumulator)
    out = torch.einsum("bhij,bjhd->bihd", weights.to(q.dtype), v)
    return out, torch.where(empty, nothing, lse)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
                    scale: float, softcap: float, left: int, right: int, alibi_slopes: Tensor | None = None,
                    bias: Tensor | None = None, sinks: Tensor | None = None, seed: Tensor | None = None,
                    dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
    """`attention`, sequence by sequence when packed: alibi_slopes may be [sequences, Hq], bias is by packed tokens."""
    batch, heads = q.shape[0], q.shape[2]

    def keep(q0: int, q1: int, k0: int, k1: int) -> Tensor | None:
        if seed is None:
            return None
        of = [torch.arange(*ends, device=q.device) for ends in ((0, batch * heads), (q0, q1), (k0, k1))]
        return dropout(seed, dropout_p, *of).unflatten(0, (batch, heads))

    if cu_seqlens_q is None:
        return attention(q, k, v, scale, softcap, left, right, alibi_slopes, bias, sinks,
                         keep(0, q.shape[1], 0, k.shape[1]))
    # Padding after the last sequence belongs to none: zeros, and lse -inf.
    outs, lses = [], []
    # An empty sequence first, so that the outputs depend on all inputs even when there is no other.
    ends_q, ends_k = [0, *cu_seqlens_q.tolist()], [0, *cu_seqlens_k.tolist()]
    for s, (q0, q1, k0, k1) in enumerate(zip(ends_q, ends_q[1:], ends_k, ends_k[1:])):
        slopes, part = alibi_slopes, bias
        if alibi_slopes is not None and alibi_slopes.dim() == 2:
            slopes = alibi_slopes[s - 1] if s else None
        if bias is not None:
            part = bias if bias.shape[2] == 1 else bias[:, :, q0:q1]
            part = part if bias.shape[3] == 1 else part[..., k0:k1]
        out, lse = attention(q[:, q0:q1], k[:, k0:k1], v[:, k0:k1], scale, softcap, left, right, slopes, part, sinks,
                             keep(q0, q1, k0, k1))
        outs.append(out)
        lses.append(lse)
    rest = q.shape[1] - ends_q[-1]
    outs.append(q.new_zeros(1, rest, q.shape[2], v.shape[3]))
    lses.append(torch.full((1, q.shape[2], rest), -torch.inf, device=q.device,
                           dtype=torch.float64 if q.dtype == torch.float64 else torch.float32))
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)


def _entry(cache: Tensor, block_table: Tensor | None, b: int) -> Tensor:
    """The keys or values [1, Tmax, Hk, K] of batch entry b of a cache."""
    if block_table is None:
        return cache[b:b + 1]
    return cache[block_table[b].long().clamp(0, cache.shape[0] - 1)].flatten(0, 1)[None]


def flash_attention_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, new_tokens: int,
                           scale: float, softcap: float, left: int, right: int, block_table: Tensor | None = None,
                           alibi_slopes: Tensor | None = None, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`attention` of each batch entry against the valid part of its cache."""
    slopes = None if alibi_slopes is None else alibi_slopes.expand(q.shape[0], -1)
    # What remains without batch entries.
    none = (x[:0].reshape(0, *x.shape[-3:]) for x in (k_cache, v_cache))
    out, lse = attention(q[:0], *none, scale, softcap, left, right)
    outs, lses = [out], [lse]
    for b, length in enumerate(cache_seqlens.tolist()):
        k, v = (_entry(cache, block_table, b) for cache in (k_cache, v_cache))
        length = min(max(length + new_tokens, 0), k.shape[1])
        out, lse = attention(q[b:b + 1], k[:, :length], v[:, :length], scale, softcap, left, right,
                             None if slopes is None else slopes[b], None, sinks)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def flash_attention_append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor,
                           block_table: Tensor | None = None) -> None:
    """k_cache[b, cache_seqlens[b] + t] = k[b, t], v likewise; what would land outside the cache is dropped.

    With a block table token t of entry b lies at [block_table[b, t // page], t % page].
    """
    size = k_cache.shape[1]
    for b, start in enumerate(cache_seqlens.tolist()):
        capacity = size if block_table is None else size * block_table.shape[1]
        first, last = max(start, 0), min(start + k.shape[1], capacity)
        if first >= last:
            continue
        tokens = torch.arange(first, last, device=k.device)
        where = (b, tokens) if block_table is None else (block_table[b].long()[tokens // size], tokens % size)
        for cache, new in ((k_cache, k), (v_cache, v)):
            cache[where] = new[b, first - start:last - start]
