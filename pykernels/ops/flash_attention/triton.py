"""Flash attention in Triton: forward, backward, decode and cache append. README.md derives the gradients.

Layout, masks and alignment are those of `reference.py`. Scores live in the exp2 domain: with c = scale * log2(e),
p = exp2(c * q.k - c * max). With ALiBi or a bias (NATURAL) they are themselves and p = exp2((s - max) * log2(e)): where
a bias is large, only equal numbers cancel. One program owns one tile of rows of one head and walks over the other
side's blocks: those that no row sees are skipped, those that every row sees take a loop without masks. Nothing is
accumulated across programs, so results are bitwise repeatable: what several programs add to, they write side by side,
to be summed in a fixed order. Grids follow from shapes alone. Options that are off (a pointer that is None) leave
nothing in the code.

Names: `i_` index, `o_` offset, `m_` mask of rows, `p_` pointer, `b_` block value; BM query rows, BN key rows, BK key
columns, BV value columns. A head wider than one slice (BK, BV) is read in slices, and each slice of the result gets a
program of its own, which recomputes the scores.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import (LN2, LOG2E, clamped, dot_precision, dot_rows, find_sequence, launch, load, load_tile,
                        store_tile, tanh, target, tiles_packed)

# Runtime values on which compiled code must not be specialised: they change from call to call.
_VARYING = ["Tq", "Tk", "tiles", "sequences", "batch", "left", "right", "threshold"]


@triton.jit
def _span(first, last, shift, below, above, size, B: tl.constexpr, BELOW: tl.constexpr, ABOVE: tl.constexpr):
    """Which of the other side's positions the rows first..last see. -> i_0 <= i_1 <= i_2 <= i_3

    Row r sees r + shift - below (if BELOW) to r + shift + above (if ABOVE), within [0, size). Blocks of B in [i_0, i_1)
    and [i_2, i_3) hold positions that only some rows see or that do not exist; in [i_1, i_2) every row sees everything.
    """
    i_0 = 0
    i_1 = 0
    i_2 = size
    i_3 = size
    if BELOW:
        i_0 = tl.maximum(first + shift - below, 0) // B * B
        i_1 = (tl.maximum(last + shift - below, 0) + B - 1) // B * B
    if ABOVE:
        i_2 = tl.minimum(tl.maximum(first + shift + above + 1, 0), size)
        i_3 = tl.minimum(tl.maximum(last + shift + above + 1, 0), size)
    i_1 = tl.minimum(i_1, i_3)
    i_2 = tl.maximum(i_2 // B * B, i_1)
    return i_0, i_1, i_2, i_3


@triton.jit
def _count(i_0, i_1, i_2, i_3, B: tl.constexpr, MASK: tl.constexpr):
    """The number of a span's blocks that need masks, or of those that do not."""
    if MASK:
        blocks = tl.cdiv(i_1 - i_0, B) + tl.cdiv(i_3 - i_2, B)
    else:
        blocks = (i_2 - i_1) // B
    return blocks


@triton.jit
def _block(i, i_0, i_1, i_2, B: tl.constexpr, MASK: tl.constexpr):
    """The start of the i-th of those blocks. One loop for both ends of the span halves the code of two."""
    if MASK:
        i_x = i_0 + i * B
        i_x = tl.where(i_x < i_1, i_x, i_x + i_2 - tl.cdiv(i_1, B) * B)
    else:
        i_x = i_1 + i * B
    return i_x


@triton.jit
def _visible(b_distance, m_key, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Which scores count, given key position - query position and which keys exist."""
    m_s = m_key
    if LEFT:
        m_s = m_s & (b_distance >= -left)
    if RIGHT:
        m_s = m_s & (b_distance <= right)
    return m_s


@triton.jit
def _biased(b_s, p_bias, o_row, o_col, m_row, m_col, MASK_COLS: tl.constexpr):
    """b_s plus the bias at element offsets o_row + o_col; -inf where it is that or false, whatever the score was."""
    p_b = p_bias + (o_row[:, None] + o_col[None, :])
    b_bias = load(p_b, m_row[:, None] & m_col[None, :] if MASK_COLS else m_row[:, None])
    if p_bias.dtype.element_ty == tl.uint8:
        b_s = tl.where(b_bias != 0, b_s, -float("inf"))
    else:
        b_bias = b_bias.to(tl.float32)
        b_s = tl.where(b_bias == -float("inf"), b_bias, b_s + b_bias)
    return b_s


@triton.jit
def _power(b_x, b_shift, NATURAL: tl.constexpr):
    """e to the power of b_x - b_shift, which are multiples of ln 2 unless NATURAL."""
    if NATURAL:
        b_p = tl.exp2((b_x - b_shift) * LOG2E)
    else:
        b_p = tl.exp2(b_x - b_shift)
    return b_p


@triton.jit
def _bias_rows(o_q, m_q, stride_bq, ONE_ROW: tl.constexpr):
    """-> (element offsets, which exist) of the bias's rows for queries o_q; one for all of them if ONE_ROW."""
    if ONE_ROW:
        o_bias = tl.zeros([1], dtype=tl.int64)
        m_bias = tl.full([1], 1, dtype=tl.int1)
    else:
        o_bias = o_q.to(tl.int64) * stride_bq
        m_bias = m_q
    return o_bias, m_bias


@triton.jit
def _kept(seed, threshold, i_bh, o_q, i_k, BN: tl.constexpr, ALIGNED: tl.constexpr):
    """Which weights dropout keeps, of queries o_q and the BN keys from i_k (ALIGNED: a multiple of 4). -> [BM, BN]

    The word of key k is number k % 4 of Philox's four for the counter (k // 4, query, head), as in `reference.dropout`.
    """
    BM: tl.constexpr = o_q.shape[0]
    GROUPS: tl.constexpr = BN // 4 if ALIGNED else BN
    if ALIGNED:
        o_g = i_k // 4 + tl.arange(0, GROUPS)
    else:
        o_g = (i_k + tl.arange(0, GROUPS)) // 4
    c_0 = tl.broadcast_to(o_g[None, :], [BM, GROUPS])
    c_1 = tl.broadcast_to(o_q[:, None], [BM, GROUPS])
    c_2 = tl.full([BM, GROUPS], 0, tl.int32) + i_bh
    c_3 = tl.full([BM, GROUPS], 0, tl.int32)
    b_0, b_1, b_2, b_3 = tl.philox(seed, c_0, c_1, c_2, c_3)
    if ALIGNED:
        b_word = tl.interleave(tl.interleave(b_0, b_2), tl.interleave(b_1, b_3))
    else:
        o_w = ((i_k + tl.arange(0, GROUPS)) % 4)[None, :]
        b_word = tl.where(o_w < 2, tl.where(o_w == 0, b_0, b_1), tl.where(o_w == 2, b_2, b_3))
    return b_word >= threshold


@triton.jit
def _paged(p_table, i_n, o_n, m_n, pages, PAGE: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr):
    """-> (page, place in it) of the keys i_n + o_n, int64. What a table says is not trusted, nor read past its end."""
    if PAGE % BN == 0:
        page = clamped(p_table + i_n // PAGE, pages - 1)
        o_in = i_n % PAGE + o_n
    else:
        page = tl.minimum(tl.maximum(load(p_table + (i_n + o_n) // PAGE, m_n if MASK else None), 0), pages - 1)
        o_in = (i_n + o_n) % PAGE
    return page.to(tl.int64), o_in.to(tl.int64)


@triton.jit
def _not_finite(b_s, b_v):
    """What the values that are not finite add to the rows whose scores of them are above -inf. -> [BM, BV]"""
    b_sees = tl.where(b_s == -float("inf"), 0.0, 1.0).to(b_v.dtype)
    b_up = tl.dot(b_sees, (b_v == float("inf")).to(b_v.dtype), input_precision="ieee")
    b_down = tl.dot(b_sees, (b_v == -float("inf")).to(b_v.dtype), input_precision="ieee")
    b_nan = tl.dot(b_sees, (b_v != b_v).to(b_v.dtype), input_precision="ieee")
    b_x = tl.where(b_up > 0, float("inf"), 0.0) - tl.where(b_down > 0, float("inf"), 0.0)  # both: NaN
    return tl.where(b_nan > 0, float("nan"), b_x)


@triton.jit
def _fwd_keys(b_o, b_max, b_sum, b_q, p_q, o_q, m_q, o_p, p_k, p_v, stride_kb, stride_kt, stride_vb, stride_vt, i_v,
              i_0, i_1, i_2, i_3, tk, left, right, inner_scale, score_scale, b_slope, p_bias, o_bias, m_bias, stride_bk,
              seed, threshold, i_bh, o_drop, k_start, p_table, pages, K: tl.constexpr, V: tl.constexpr,
              BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
              SOFTCAP: tl.constexpr, PAGE: tl.constexpr, ALIGNED: tl.constexpr, MASK: tl.constexpr,
              APART: tl.constexpr, PRECISION: tl.constexpr):
    """The online softmax over the span's blocks of keys. -> updated (o, max, sum): [BM, BV], [BM], [BM]

    APART: values that are not finite reach the rows that see them and no others.
    """
    o_n = tl.arange(0, BN)
    for i in range(0, _count(i_0, i_1, i_2, i_3, BN, MASK)):
        i_n = _block(i, i_0, i_1, i_2, BN, MASK)
        m_n = i_n + o_n < tk
        if p_table is not None:
            page, o_in = _paged(p_table, i_n, o_n, m_n, pages, PAGE, BN, MASK)
            p_kn, p_vn = p_k, p_v
            o_kt = page * stride_kb + o_in * stride_kt
            o_vt = page * stride_vb + o_in * stride_vt
        else:
            p_kn = p_k + tl.cast(i_n, tl.int64) * stride_kt
            p_vn = p_v + tl.cast(i_n, tl.int64) * stride_vt
            o_kt = o_n.to(tl.int64) * stride_kt
            o_vt = o_n.to(tl.int64) * stride_vt
        b_k = load_tile(p_kn, o_kt, 0, m_n, K, BK, MASK)  # [BN, BK]
        b_s = dot_rows(b_q, b_k, p_q, o_q, m_q, p_kn, o_kt, m_n, K, BK, True, MASK, PRECISION)  # [BM, BN]
        if SOFTCAP:
            b_s = tanh(b_s * inner_scale, p_k.dtype.element_ty == tl.float32)
        b_distance = (i_n + o_n)[None, :] - o_p[:, None]
        NATURAL: tl.constexpr = b_slope is not None or p_bias is not None
        factor = score_scale
        if NATURAL:
            b_s = b_s * score_scale
            factor = 1.0
        if b_slope is not None:
            b_s -= b_slope[:, None] * tl.abs(b_distance).to(tl.float32)
        if p_bias is not None:
            b_s = _biased(b_s, p_bias, o_bias, (i_n + o_n).to(tl.int64) * stride_bk, m_bias, m_n, MASK)
        if MASK:
            b_s = tl.where(_visible(b_distance, m_n[None, :], left, right, LEFT, RIGHT), b_s, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * factor)
        # A row that has seen nothing yet keeps the maximum -inf; subtract 0 there rather than make NaN of -inf - -inf.
        b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_p = _power(b_s * factor, b_shift[:, None], NATURAL)
        b_decay = _power(b_max, b_shift, NATURAL)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_max = b_new
        if seed is not None:
            b_p = tl.where(_kept(seed, threshold, i_bh, o_drop, k_start + i_n, BN, ALIGNED), b_p, 0.0)
        b_v = load_tile(p_vn, o_vt, i_v, m_n, V, BV, MASK)  # [BN, BV]
        b_o = b_o * b_decay[:, None]
        if APART:
            b_o += _not_finite(b_s, b_v)
            b_v = tl.where(tl.abs(b_v) < float("inf"), b_v, 0.0)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision=PRECISION)
    return b_o, b_max, b_sum


@triton.jit(do_not_specialize=_VARYING + ["new_tokens", "pages", "splits"])
def flash_attention_fwd_kernel(
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, cache_seqlens, block_table, alibi, bias, sinks, seed, stride_qb,
        stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_ab, stride_bb,
        stride_bh, stride_bq, stride_bk, Tq, Tk, Hq, Hk, batch, tiles, sequences, new_tokens, pages, splits, left,
        right, threshold, inner_scale, score_scale, keep_scale, K: tl.constexpr, V: tl.constexpr, G: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LEFT: tl.constexpr,
        RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ONE_ROW: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr,
        PRECISION: tl.constexpr):
    """Program (tile, slice) owns out[b, rows, h, slice of V] and, if its slice is 0, lse[b, h, rows].

    G query heads that share a key head are packed into the tile, row r being token r // G of head h * G + r % G:
    decoding then reads the cache once per key head. Where few programs would have long rows, SPLIT gives the keys of a
    tile to `splits` programs, whose results, out[split, ...] and lse[split, ...], another kernel combines.
    """
    heads = Hq // G
    i_t = tl.program_id(0) % tiles
    i_h = tl.program_id(0) // tiles % heads
    i_b = (tl.program_id(0) // tiles // heads).to(tl.int64)
    if RIGHT and not LEFT:
        i_t = tiles - 1 - i_t  # the longest rows first, so that no long program starts last
    q_start = 0
    k_start = 0
    tq = Tq
    tk = Tk
    i_s = 0
    i_a = i_b  # the row of the slopes
    if cu_seqlens_q is not None:
        i_s, q_start, tq, i_t = find_sequence(i_t, cu_seqlens_q, sequences, Tq, BM)
        tk = 0
        i_a = tl.minimum(i_s, sequences - 1)
        if i_s < sequences:
            k_start = clamped(cu_seqlens_k + i_s, Tk)
            tk = tl.maximum(clamped(cu_seqlens_k + i_s + 1, Tk) - k_start, 0)
    if cache_seqlens is not None:
        tk = tl.minimum(tl.maximum(tl.load(cache_seqlens + i_b).to(tl.int64) + new_tokens, 0), Tk).to(tl.int32)
    if i_t * BM >= tq * G:
        return

    o_r = i_t * BM + tl.arange(0, BM)
    o_t = o_r // G
    o_h = i_h * G + o_r % G
    m_q = o_t < tq
    o_q = o_t.to(tl.int64) * stride_qt + (o_r % G).to(tl.int64) * stride_qh
    i_v = tl.program_id(1) * BV
    p_q = q + i_b * stride_qb + tl.cast(q_start, tl.int64) * stride_qt + tl.cast(i_h * G, tl.int64) * stride_qh
    i_hk = tl.cast(i_h * G // (Hq // Hk), tl.int64)
    p_k = k + tl.cast(k_start, tl.int64) * stride_kt + i_hk * stride_kh
    p_v = v + tl.cast(k_start, tl.int64) * stride_vt + i_hk * stride_vh
    p_table = None
    if block_table is not None:
        p_table = block_table + i_b * (Tk // PAGE)
    else:
        p_k += i_b * stride_kb
        p_v += i_b * stride_vb
    inner_scale = tl.cast(inner_scale, tl.float32)
    score_scale = tl.cast(score_scale, tl.float32)
    NATURAL: tl.constexpr = alibi is not None or bias is not None
    b_slope = None
    if alibi is not None:
        b_slope = tl.load(alibi + i_a * stride_ab + o_h, mask=m_q, other=0.0)  # [BM]
    p_bias = None
    o_bias = None
    m_bias = None
    if bias is not None:
        p_bias = (bias + i_b * stride_bb + tl.cast(i_h, tl.int64) * stride_bh
                  + tl.cast(q_start, tl.int64) * stride_bq + tl.cast(k_start, tl.int64) * stride_bk)
        o_bias, m_bias = _bias_rows(o_t, m_q, stride_bq, ONE_ROW)
    b_seed = None
    if seed is not None:
        b_seed = tl.load(seed)
        threshold = tl.cast(threshold, tl.uint32, bitcast=True)
    i_bh = (i_b * Hq + i_h).to(tl.int32)

    o_p = o_t + (tk - tq)
    i_0, i_1, i_2, i_3 = _span(i_t * BM // G, tl.minimum((i_t * BM + BM - 1) // G, tq - 1), tk - tq, left, right, tk,
                               BN, LEFT, RIGHT)
    if SPLIT:
        keys = tl.maximum(i_3 - i_0, 0)
        share = tl.cdiv(tl.cdiv(keys, BN), splits) * BN
        i_0 += tl.minimum(tl.program_id(2) * share, keys)
        i_3 = tl.minimum(i_0 + share, i_3)
        i_1 = tl.minimum(tl.maximum(i_1, i_0), i_3)
        i_2 = tl.minimum(tl.maximum(i_2, i_0), i_3)
        out += tl.program_id(2).to(tl.int64) * batch * Tq * Hq * V
        lse += tl.program_id(2).to(tl.int64) * batch * Tq * Hq
    b_o = tl.zeros([BM, BV], dtype=tl.float32)
    b_max = tl.full([BM], -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros([BM], dtype=tl.float32)
    b_q = load_tile(p_q, o_q, 0, m_q, K, BK, True)  # [BM, BK]
    b_o, b_max, b_sum = _fwd_keys(b_o, b_max, b_sum, b_q, p_q, o_q, m_q, o_p, p_k, p_v, stride_kb, stride_kt,
                                  stride_vb, stride_vt, i_v, i_0, i_1, i_2, i_3, tk, left, right, inner_scale,
                                  score_scale, b_slope, p_bias, o_bias, m_bias, stride_bk, b_seed, threshold, i_bh,
                                  q_start + o_t, k_start, p_table, pages, K, V, BN, BK, BV, LEFT, RIGHT, SOFTCAP, PAGE,
                                  cu_seqlens_k is None, True, False, PRECISION)
    b_o, b_max, b_sum = _fwd_keys(b_o, b_max, b_sum, b_q, p_q, o_q, m_q, o_p, p_k, p_v, stride_kb, stride_kt,
                                  stride_vb, stride_vt, i_v, i_0, i_1, i_2, i_3, tk, left, right, inner_scale,
                                  score_scale, b_slope, p_bias, o_bias, m_bias, stride_bk, b_seed, threshold, i_bh,
                                  q_start + o_t, k_start, p_table, pages, K, V, BN, BK, BV, LEFT, RIGHT, SOFTCAP, PAGE,
                                  cu_seqlens_k is None, False, False, PRECISION)
    if bias is not None:
        # Weights of zero made NaN of values that are not finite, and may have done so in rows that do not see them.
        if tl.max((b_o != b_o).to(tl.int32)) > 0:
            b_o, b_max, b_sum = _fwd_keys(
                tl.zeros_like(b_o), tl.full([BM], -float("inf"), dtype=tl.float32), tl.zeros([BM], dtype=tl.float32),
                b_q, p_q, o_q, m_q, o_p, p_k, p_v, stride_kb, stride_kt, stride_vb, stride_vt, i_v, i_0, i_3, i_3, i_3,
                tk, left, right, inner_scale, score_scale, b_slope, p_bias, o_bias, m_bias, stride_bk, b_seed,
                threshold, i_bh, q_start + o_t, k_start, p_table, pages, K, V, BN, BK, BV, LEFT, RIGHT, SOFTCAP, PAGE,
                cu_seqlens_k is None, True, True, PRECISION)

    if sinks is not None:
        b_sink = tl.load(sinks + o_h, mask=m_q, other=0.0)  # one key more, whose value is zero
        if not NATURAL:
            b_sink *= LOG2E
        if cu_seqlens_q is not None:
            b_sink += tl.where(i_s < sequences, 0.0, -float("inf"))
        if SPLIT:
            b_sink += tl.where(tl.program_id(2) == 0, 0.0, -float("inf"))
        b_new = tl.maximum(b_max, b_sink)
        b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_decay = _power(b_max, b_shift, NATURAL)
        b_sum = b_sum * b_decay + _power(b_sink, b_shift, NATURAL)
        b_o = b_o * b_decay[:, None]
        b_max = b_new
    m_some = b_sum != 0  # rows that saw a key
    b_sum = tl.where(m_some, b_sum, 1.0)
    b_o = b_o / b_sum[:, None]
    if seed is not None:
        b_o = b_o * tl.cast(keep_scale, tl.float32)
    if NATURAL:
        b_lse = b_max + tl.log2(b_sum) * LN2
    else:
        b_lse = (b_max + tl.log2(b_sum)) * LN2
    b_lse = tl.where(m_some, b_lse, -float("inf"))
    o_out = ((i_b * Tq + q_start + o_t) * Hq + o_h) * V
    store_tile(out, o_out, i_v, m_q, V, BV, b_o)
    if tl.program_id(1) == 0:
        tl.store(lse + (i_b * Hq + o_h) * Tq + q_start + o_t, b_lse, mask=m_q)


@triton.jit(do_not_specialize=["Tq", "rows", "splits"])
def flash_attention_fwd_combine_kernel(parts, lses, out, lse, Tq, Hq, rows, splits, V: tl.constexpr, BM: tl.constexpr,
                                       BV: tl.constexpr):
    """Program (tile, slice) owns a slice of rows of out and, if its slice is 0, their lse: parts weighted by theirs.

    Row r is out[b, t, h] with r = (b * Tq + t) * Hq + h. Parts are summed in their order.
    """
    o_r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_r = o_r < rows
    i_v = tl.program_id(1) * BV
    o_lse = (o_r // Hq // Tq * Hq + o_r % Hq) * Tq + o_r // Hq % Tq
    b_max = tl.full([BM], -float("inf"), dtype=tl.float32)
    for i in range(0, splits):
        p_lse = lses + tl.cast(i, tl.int64) * rows + o_lse
        b_max = tl.maximum(b_max, tl.load(p_lse, mask=m_r, other=-float("inf")))
    b_max = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_sum = tl.zeros([BM], dtype=tl.float32)
    b_o = tl.zeros([BM, BV], dtype=tl.float32)
    for i in range(0, splits):
        p_lse = lses + tl.cast(i, tl.int64) * rows + o_lse
        b_weight = tl.exp2((tl.load(p_lse, mask=m_r, other=-float("inf")) - b_max) * LOG2E)
        b_sum += b_weight
        p_part = parts + tl.cast(i, tl.int64) * rows * V
        b_o += b_weight[:, None] * load_tile(p_part, o_r * V, i_v, m_r, V, BV, True)  # [BM, BV]
    m_some = b_sum != 0
    b_sum = tl.where(m_some, b_sum, 1.0)
    store_tile(out, o_r * V, i_v, m_r, V, BV, b_o / b_sum[:, None])
    if tl.program_id(1) == 0:
        tl.store(lse + o_lse, tl.where(m_some, b_max + tl.log2(b_sum) * LN2, -float("inf")), mask=m_r)


@triton.jit(do_not_specialize=["Tq", "tiles"])
def flash_attention_bwd_delta_kernel(out, dout, dlse, delta, stride_ob, stride_ot, stride_oh, stride_db, stride_dt,
                                     stride_dh, Tq, Hq, tiles, V: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
                                     PRECISION: tl.constexpr):
    """One program owns delta[b, h, rows] = rowsum(out * dout) - dlse, the term that every score's gradient subtracts.

    The sum is the diagonal of a matrix product, so that it rounds as dout.v does in the other kernels: the two cancel
    exactly where one key holds all the weight. Reading the rows costs more than the rest of the product.
    """
    i_t = tl.program_id(0) % tiles
    i_h = tl.program_id(0) // tiles % Hq
    i_b = (tl.program_id(0) // tiles // Hq).to(tl.int64)
    o_m = tl.arange(0, BM)
    o_t = i_t * BM + o_m
    m_q = o_t < Tq
    p_o = out + i_b * stride_ob + tl.cast(i_h, tl.int64) * stride_oh
    p_do = dout + i_b * stride_db + tl.cast(i_h, tl.int64) * stride_dh
    o_ot = o_t.to(tl.int64) * stride_ot
    o_dt = o_t.to(tl.int64) * stride_dt
    b_o = load_tile(p_o, o_ot, 0, m_q, V, BV, True)  # [BM, BV]
    b_do = load_tile(p_do, o_dt, 0, m_q, V, BV, True)
    b_s = dot_rows(b_do, b_o, p_do, o_dt, m_q, p_o, o_ot, m_q, V, BV, True, True, PRECISION)  # [BM, BM]
    b_delta = tl.sum(tl.where(o_m[:, None] == o_m[None, :], b_s, 0.0), 1)
    o_row = (i_b * Hq + i_h) * Tq + o_t
    if dlse is not None:
        b_delta -= tl.load(dlse + o_row, mask=m_q, other=0.0)
    tl.store(delta + o_row, b_delta, mask=m_q)


@triton.jit
def _of_blind(b_lse):
    """lse, finite for rows that see nothing, all of whose scores are -inf: e^{s - lse} is then 0 rather than NaN."""
    return tl.maximum(b_lse, -1e38, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _bwd_queries(b_dk, b_dv, b_k, b_v, p_k, o_kt, p_v, o_vt, m_k, o_n, p_q, p_do, p_lse, p_delta, stride_qt,
                 stride_qh, stride_dt, stride_dh, i_k, i_v, i_0, i_1, i_2, i_3, group, Tq, tq, shift, left, right,
                 inner_scale, score_scale, p_slope, p_bias, stride_bh, stride_bq, stride_bk, seed, threshold,
                 keep_scale, i_bh, q_start, i_key, K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 BK: tl.constexpr, BV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
                 ONE_ROW: tl.constexpr, ALIGNED: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr):
    """Adds what the span's blocks of queries give, for all heads of the group. -> updated (dk, dv): [BN, BK], [BN, BV]

    Scores are computed transposed, [BN, BM], so that p and ds are left operands of the products that they enter and
    need no trip through shared memory. Rows past the end are zeros, which add nothing.
    """
    o_m = tl.arange(0, BM)
    o_qt = o_m.to(tl.int64) * stride_qt
    o_dt = o_m.to(tl.int64) * stride_dt
    blocks = _count(i_0, i_1, i_2, i_3, BM, MASK)
    for i in range(0, group * blocks):  # one loop, so that the loads of the next head overlap with the end of this one
        i_g = tl.cast(i // blocks, tl.int64)
        i_m = _block(i % blocks, i_0, i_1, i_2, BM, MASK)
        m_q = i_m + o_m < tq
        p_qm = p_q + tl.cast(i_m, tl.int64) * stride_qt + i_g * stride_qh
        p_dm = p_do + tl.cast(i_m, tl.int64) * stride_dt + i_g * stride_dh
        o_row = i_g * Tq + i_m + o_m
        b_q = load_tile(p_qm, o_qt, i_k, m_q, K, BK, MASK)  # [BM, BK]
        b_s = dot_rows(b_k, b_q, p_k, o_kt, m_k, p_qm, o_qt, m_q, K, BK, True, MASK, PRECISION)  # [BN, BM]
        if SOFTCAP:
            b_tanh = tanh(b_s * inner_scale, p_q.dtype.element_ty == tl.float32)
            b_s = b_tanh
        NATURAL: tl.constexpr = p_slope is not None or p_bias is not None
        b_lse = _of_blind(load(p_lse + o_row, m_q if MASK else None))  # [BM]
        if not NATURAL:
            b_lse *= LOG2E
        b_s = b_s * score_scale
        b_distance = o_n[:, None] - (i_m + o_m + shift)[None, :]
        if p_slope is not None:
            b_s -= tl.load(p_slope + i_g) * tl.abs(b_distance).to(tl.float32)
        if p_bias is not None:
            o_bias, m_bias = _bias_rows(i_m + o_m, m_q, stride_bq, ONE_ROW)
            b_s = _biased(b_s, p_bias + i_g * stride_bh, o_n.to(tl.int64) * stride_bk, o_bias, m_k, m_bias, True)
        b_p = _power(b_s, b_lse[None, :], NATURAL)
        if MASK:
            b_p = tl.where(_visible(b_distance, m_q[None, :], left, right, LEFT, RIGHT), b_p, 0.0)
        b_do = load_tile(p_dm, o_dt, i_v, m_q, V, BV, MASK)  # [BM, BV]
        if seed is not None:
            m_kept = tl.trans(_kept(seed, threshold, i_bh + i_g.to(tl.int32), q_start + i_m + o_m, i_key, BN, ALIGNED))
            b_dv = tl.dot(tl.where(m_kept, b_p, 0.0).to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        else:
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        if SOFTCAP:
            b_p = b_p * (1.0 - b_tanh * b_tanh)
        b_dp = dot_rows(b_v, b_do, p_v, o_vt, m_k, p_dm, o_dt, m_q, V, BV, True, MASK, PRECISION)  # [BN, BM]
        if seed is not None:
            b_dp = tl.where(m_kept, b_dp * keep_scale, 0.0)
        b_delta = load(p_delta + o_row, m_q if MASK else None)  # [BM]
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=_VARYING)
def flash_attention_bwd_dkv_kernel(
        q, k, v, dout, lse, delta, dk, dv, cu_seqlens_q, cu_seqlens_k, alibi, bias, seed, stride_qb, stride_qt,
        stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_db, stride_dt, stride_dh,
        stride_ab, stride_bb, stride_bh, stride_bq, stride_bk, Tq, Tk, Hq, Hk, tiles, sequences, left, right, threshold,
        scale, inner_scale, score_scale, keep_scale, K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr,
        BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
        SOFTCAP: tl.constexpr, ONE_ROW: tl.constexpr, PRECISION: tl.constexpr):
    """Program (tile, slice) owns dk[b, keys, h, slice of K] and dv[b, keys, h, slice of V], over h's query heads."""
    i_t = tl.program_id(0) % tiles
    i_h = tl.program_id(0) // tiles % Hk
    i_b = (tl.program_id(0) // tiles // Hk).to(tl.int64)
    group = Hq // Hk
    q_start = 0
    k_start = 0
    tq = Tq
    tk = Tk
    i_a = i_b
    if cu_seqlens_k is not None:
        i_s, k_start, tk, i_t = find_sequence(i_t, cu_seqlens_k, sequences, Tk, BN)
        tq = 0
        i_a = tl.minimum(i_s, sequences - 1)
        if i_s < sequences:
            q_start = clamped(cu_seqlens_q + i_s, Tq)
            tq = tl.maximum(clamped(cu_seqlens_q + i_s + 1, Tq) - q_start, 0)
    if i_t * BN >= tk:
        return

    o_n = i_t * BN + tl.arange(0, BN)
    m_k = o_n < tk
    o_kt = o_n.to(tl.int64) * stride_kt
    o_vt = o_n.to(tl.int64) * stride_vt
    # When K and V differ in their numbers of slices, the shorter one starts over and writes the same values again.
    i_k = tl.program_id(1) % tl.cdiv(K, BK) * BK
    i_v = tl.program_id(1) % tl.cdiv(V, BV) * BV
    p_k = k + i_b * stride_kb + tl.cast(k_start, tl.int64) * stride_kt + tl.cast(i_h, tl.int64) * stride_kh
    p_v = v + i_b * stride_vb + tl.cast(k_start, tl.int64) * stride_vt + tl.cast(i_h, tl.int64) * stride_vh
    inner_scale = tl.cast(inner_scale, tl.float32)
    score_scale = tl.cast(score_scale, tl.float32)

    shift = tk - tq  # query i sits at key position i + shift
    i_0, i_1, i_2, i_3 = _span(i_t * BN, tl.minimum(i_t * BN + BN, tk) - 1, -shift, right, left, tq, BM, RIGHT, LEFT)
    b_k = load_tile(p_k, o_kt, i_k, m_k, K, BK, True)  # [BN, BK]
    b_v = load_tile(p_v, o_vt, i_v, m_k, V, BV, True)  # [BN, BV]
    b_dk = tl.zeros([BN, BK], dtype=tl.float32)
    b_dv = tl.zeros([BN, BV], dtype=tl.float32)
    i_hq = tl.cast(i_h * group, tl.int64)
    p_q = q + i_b * stride_qb + tl.cast(q_start, tl.int64) * stride_qt + i_hq * stride_qh
    p_do = dout + i_b * stride_db + tl.cast(q_start, tl.int64) * stride_dt + i_hq * stride_dh
    p_lse = lse + (i_b * Hq + i_hq) * Tq + q_start
    p_delta = delta + (i_b * Hq + i_hq) * Tq + q_start
    p_slope = None
    if alibi is not None:
        p_slope = alibi + i_a * stride_ab + i_hq
    p_bias = None
    if bias is not None:
        p_bias = (bias + i_b * stride_bb + i_hq * stride_bh + tl.cast(q_start, tl.int64) * stride_bq
                  + tl.cast(k_start, tl.int64) * stride_bk)
    b_seed = None
    if seed is not None:
        b_seed = tl.load(seed)
        threshold = tl.cast(threshold, tl.uint32, bitcast=True)
        keep_scale = tl.cast(keep_scale, tl.float32)
    i_bh = (i_b * Hq + i_hq).to(tl.int32)
    i_key = k_start + i_t * BN
    b_dk, b_dv = _bwd_queries(b_dk, b_dv, b_k, b_v, p_k, o_kt, p_v, o_vt, m_k, o_n, p_q, p_do, p_lse, p_delta,
                              stride_qt, stride_qh, stride_dt, stride_dh, i_k, i_v, i_0, i_1, i_2, i_3, group, Tq, tq,
                              shift, left, right, inner_scale, score_scale, p_slope, p_bias, stride_bh, stride_bq,
                              stride_bk, b_seed, threshold, keep_scale, i_bh, q_start, i_key, K, V, BM, BN, BK, BV,
                              LEFT, RIGHT, SOFTCAP, ONE_ROW, cu_seqlens_k is None, True, PRECISION)
    b_dk, b_dv = _bwd_queries(b_dk, b_dv, b_k, b_v, p_k, o_kt, p_v, o_vt, m_k, o_n, p_q, p_do, p_lse, p_delta,
                              stride_qt, stride_qh, stride_dt, stride_dh, i_k, i_v, i_0, i_1, i_2, i_3, group, Tq, tq,
                              shift, left, right, inner_scale, score_scale, p_slope, p_bias, stride_bh, stride_bq,
                              stride_bk, b_seed, threshold, keep_scale, i_bh, q_start, i_key, K, V, BM, BN, BK, BV,
                              LEFT, RIGHT, SOFTCAP, ONE_ROW, cu_seqlens_k is None, False, PRECISION)

    o_row = (i_b * Tk + k_start + o_n) * Hk + i_h
    store_tile(dk, o_row * K, i_k, m_k, K, BK, b_dk * tl.cast(scale, tl.float32))
    if seed is not None:
        b_dv = b_dv * keep_scale
    store_tile(dv, o_row * V, i_v, m_k, V, BV, b_dv)


@triton.jit
def _bwd_keys(b_dq, b_q, b_do, b_lse, b_delta, p_q, o_qt, p_do, o_dt, m_q, o_p, p_k, p_v, stride_kt, stride_vt, i_k,
              i_0, i_1, i_2, i_3, tk, left, right, inner_scale, score_scale, slope, p_bias, o_bias, m_bias, stride_bk,
              seed, threshold, keep_scale, i_bh, o_drop, k_start, K: tl.constexpr, V: tl.constexpr, BN: tl.constexpr,
              BK: tl.constexpr, BV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
              ALIGNED: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr):
    """Adds what the span's blocks of keys give. -> updated dq [BM, BK]"""
    o_n = tl.arange(0, BN)
    o_kt = o_n.to(tl.int64) * stride_kt
    o_vt = o_n.to(tl.int64) * stride_vt
    for i in range(0, _count(i_0, i_1, i_2, i_3, BN, MASK)):
        i_n = _block(i, i_0, i_1, i_2, BN, MASK)
        m_n = i_n + o_n < tk
        p_kn = p_k + tl.cast(i_n, tl.int64) * stride_kt
        p_vn = p_v + tl.cast(i_n, tl.int64) * stride_vt
        b_k = load_tile(p_kn, o_kt, i_k, m_n, K, BK, MASK)  # [BN, BK]
        b_v = load_tile(p_vn, o_vt, 0, m_n, V, BV, MASK)  # [BN, BV]
        b_s = dot_rows(b_q, b_k, p_q, o_qt, m_q, p_kn, o_kt, m_n, K, BK, True, MASK, PRECISION)  # [BM, BN]
        if SOFTCAP:
            b_tanh = tanh(b_s * inner_scale, p_k.dtype.element_ty == tl.float32)
            b_s = b_tanh
        b_s = b_s * score_scale
        b_distance = (i_n + o_n)[None, :] - o_p[:, None]
        if slope is not None:
            b_s -= slope * tl.abs(b_distance).to(tl.float32)
        if p_bias is not None:
            b_s = _biased(b_s, p_bias, o_bias, (i_n + o_n).to(tl.int64) * stride_bk, m_bias, m_n, MASK)
        b_p = _power(b_s, b_lse[:, None], slope is not None or p_bias is not None)
        if MASK:
            b_p = tl.where(_visible(b_distance, m_n[None, :], left, right, LEFT, RIGHT), b_p, 0.0)
        if SOFTCAP:
            b_p = b_p * (1.0 - b_tanh * b_tanh)
        b_dp = dot_rows(b_do, b_v, p_do, o_dt, m_q, p_vn, o_vt, m_n, V, BV, True, MASK, PRECISION)  # [BM, BN]
        if seed is not None:
            m_kept = _kept(seed, threshold, i_bh, o_drop, k_start + i_n, BN, ALIGNED)
            b_dp = tl.where(m_kept, b_dp * keep_scale, 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq


@triton.jit(do_not_specialize=_VARYING)
def flash_attention_bwd_dq_kernel(
        q, k, v, dout, lse, delta, dq, cu_seqlens_q, cu_seqlens_k, alibi, bias, seed, stride_qb, stride_qt, stride_qh,
        stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_db, stride_dt, stride_dh, stride_ab,
        stride_bb, stride_bh, stride_bq, stride_bk, Tq, Tk, Hq, Hk, tiles, sequences, left, right, threshold, scale,
        inner_scale, score_scale, keep_scale, K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
        BK: tl.constexpr, BV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
        ONE_ROW: tl.constexpr, PRECISION: tl.constexpr):
    """Program (tile, slice) owns dq[b, rows, h, slice of K]."""
    i_t = tl.program_id(0) % tiles
    i_h = tl.program_id(0) // tiles % Hq
    i_b = (tl.program_id(0) // tiles // Hq).to(tl.int64)
    if RIGHT and not LEFT:
        i_t = tiles - 1 - i_t
    q_start = 0
    k_start = 0
    tq = Tq
    tk = Tk
    i_a = i_b
    if cu_seqlens_q is not None:
        i_s, q_start, tq, i_t = find_sequence(i_t, cu_seqlens_q, sequences, Tq, BM)
        tk = 0
        i_a = tl.minimum(i_s, sequences - 1)
        if i_s < sequences:
            k_start = clamped(cu_seqlens_k + i_s, Tk)
            tk = tl.maximum(clamped(cu_seqlens_k + i_s + 1, Tk) - k_start, 0)
    if i_t * BM >= tq:
        return

    o_t = i_t * BM + tl.arange(0, BM)
    m_q = o_t < tq
    o_qt = o_t.to(tl.int64) * stride_qt
    o_dt = o_t.to(tl.int64) * stride_dt
    i_k = tl.program_id(1) * BK
    p_q = q + i_b * stride_qb + tl.cast(q_start, tl.int64) * stride_qt + tl.cast(i_h, tl.int64) * stride_qh
    p_do = dout + i_b * stride_db + tl.cast(q_start, tl.int64) * stride_dt + tl.cast(i_h, tl.int64) * stride_dh
    i_hk = tl.cast(i_h // (Hq // Hk), tl.int64)
    p_k = k + i_b * stride_kb + tl.cast(k_start, tl.int64) * stride_kt + i_hk * stride_kh
    p_v = v + i_b * stride_vb + tl.cast(k_start, tl.int64) * stride_vt + i_hk * stride_vh
    o_row = (i_b * Hq + i_h) * Tq + q_start + o_t
    inner_scale = tl.cast(inner_scale, tl.float32)
    score_scale = tl.cast(score_scale, tl.float32)

    o_p = o_t + (tk - tq)
    i_0, i_1, i_2, i_3 = _span(i_t * BM, tl.minimum(i_t * BM + BM, tq) - 1, tk - tq, left, right, tk, BN, LEFT, RIGHT)
    b_q = load_tile(p_q, o_qt, 0, m_q, K, BK, True)  # [BM, BK]
    b_do = load_tile(p_do, o_dt, 0, m_q, V, BV, True)  # [BM, BV]
    b_lse = _of_blind(tl.load(lse + o_row, mask=m_q, other=0.0))
    if alibi is None and bias is None:
        b_lse *= LOG2E
    b_delta = tl.load(delta + o_row, mask=m_q, other=0.0)
    slope = None
    if alibi is not None:
        slope = tl.load(alibi + i_a * stride_ab + i_h)
    p_bias = None
    o_bias = None
    m_bias = None
    if bias is not None:
        p_bias = (bias + i_b * stride_bb + tl.cast(i_h, tl.int64) * stride_bh
                  + tl.cast(q_start, tl.int64) * stride_bq + tl.cast(k_start, tl.int64) * stride_bk)
        o_bias, m_bias = _bias_rows(o_t, m_q, stride_bq, ONE_ROW)
    b_seed = None
    if seed is not None:
        b_seed = tl.load(seed)
        threshold = tl.cast(threshold, tl.uint32, bitcast=True)
        keep_scale = tl.cast(keep_scale, tl.float32)
    i_bh = (i_b * Hq + i_h).to(tl.int32)
    b_dq = tl.zeros([BM, BK], dtype=tl.float32)
    b_dq = _bwd_keys(b_dq, b_q, b_do, b_lse, b_delta, p_q, o_qt, p_do, o_dt, m_q, o_p, p_k, p_v, stride_kt, stride_vt,
                     i_k, i_0, i_1, i_2, i_3, tk, left, right, inner_scale, score_scale, slope, p_bias, o_bias, m_bias,
                     stride_bk, b_seed, threshold, keep_scale, i_bh, q_start + o_t, k_start, K, V, BN, BK, BV, LEFT,
                     RIGHT, SOFTCAP, cu_seqlens_k is None, True, PRECISION)
    b_dq = _bwd_keys(b_dq, b_q, b_do, b_lse, b_delta, p_q, o_qt, p_do, o_dt, m_q, o_p, p_k, p_v, stride_kt, stride_vt,
                     i_k, i_0, i_1, i_2, i_3, tk, left, right, inner_scale, score_scale, slope, p_bias, o_bias, m_bias,
                     stride_bk, b_seed, threshold, keep_scale, i_bh, q_start + o_t, k_start, K, V, BN, BK, BV, LEFT,
                     RIGHT, SOFTCAP, cu_seqlens_k is None, False, PRECISION)
    o_dq = ((i_b * Tq + q_start + o_t) * Hq + i_h) * K
    store_tile(dq, o_dq, i_k, m_q, K, BK, b_dq * tl.cast(scale, tl.float32))


@triton.jit(do_not_specialize=_VARYING + ["tiles_k", "parts"])
def flash_attention_bwd_dbias_kernel(
        q, k, v, dout, lse, delta, dbias, cu_seqlens_q, cu_seqlens_k, alibi, bias, seed, stride_qb, stride_qt,
        stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_db, stride_dt, stride_dh,
        stride_ab, stride_bb, stride_bh, stride_bq, stride_bk, Tq, Tk, Hq, Hk, batch, out_batch, out_heads, tiles,
        tiles_k, parts, sequences, left, right, threshold, inner_scale, score_scale, keep_scale, K: tl.constexpr,
        V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LEFT: tl.constexpr,
        RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ONE_ROW: tl.constexpr, PRECISION: tl.constexpr):
    """Program (tile, part) owns a tile of dbias[part, b, h, :, :], the gradient of the scores before the mask, summed.

    With ONE_ROW that is a row for each b and h of the batch, a sum over all queries. Otherwise it is a tile of rows and
    keys, of which each part sums its share of the batch entries and heads that the bias is broadcast over.
    """
    i_h = tl.program_id(0) // tiles // tiles_k % out_heads
    i_b = tl.program_id(0) // tiles // tiles_k // out_heads
    q_start = 0
    k_start = 0
    tq = Tq
    tk = Tk
    i_s = 0
    i_tq = tl.program_id(0) // tiles_k % tiles
    i_tk = tl.program_id(0) % tiles_k
    if cu_seqlens_q is not None:
        if ONE_ROW:
            i_s, k_start, tk, i_tk = find_sequence(i_tk, cu_seqlens_k, sequences, Tk, BN)
            tq = 0
            if i_s < sequences:
                q_start = clamped(cu_seqlens_q + i_s, Tq)
                tq = tl.maximum(clamped(cu_seqlens_q + i_s + 1, Tq) - q_start, 0)
        else:
            i_s, q_start, tq, i_tq = find_sequence(i_tq, cu_seqlens_q, sequences, Tq, BM)
            tk = 0
            if i_s < sequences:
                k_start = clamped(cu_seqlens_k + i_s, Tk)
                tk = tl.maximum(clamped(cu_seqlens_k + i_s + 1, Tk) - k_start, 0)
    i_n = i_tk * BN
    if i_n >= tk:
        return
    if not ONE_ROW:
        if i_tq * BM >= tq:
            return

    o_n = i_n + tl.arange(0, BN)
    m_n = o_n < tk
    o_kt = o_n.to(tl.int64) * stride_kt
    o_vt = o_n.to(tl.int64) * stride_vt
    shift = tk - tq
    inner_scale = tl.cast(inner_scale, tl.float32)
    score_scale = tl.cast(score_scale, tl.float32)
    b_seed = None
    if seed is not None:
        b_seed = tl.load(seed)
        threshold = tl.cast(threshold, tl.uint32, bitcast=True)
        keep_scale = tl.cast(keep_scale, tl.float32)
    # The tiles of queries that see a key of this one.
    i_0, _, _, i_3 = _span(i_n, tl.minimum(i_n + BN, tk) - 1, -shift, right, left, tq, BM, RIGHT, LEFT)
    heads = Hq // out_heads
    if ONE_ROW:
        first = i_0 // BM
        last = tl.cdiv(i_3, BM)
    else:
        share = tl.cdiv(batch // out_batch * heads, parts)
        first = tl.program_id(1) * share
        last = tl.minimum(first + share, batch // out_batch * heads)
        if (i_tq * BM < i_0) | (i_tq * BM >= i_3):
            last = first
    b_sum = tl.zeros([BM, BN], dtype=tl.float32)
    for i in range(first, last):
        if ONE_ROW:
            i_m = i * BM
            j_b = i_b.to(tl.int64)
            j_h = i_h.to(tl.int64)
        else:
            i_m = i_tq * BM
            j_b = (i_b + i // heads).to(tl.int64)
            j_h = (i_h + i % heads).to(tl.int64)
        o_t = i_m + tl.arange(0, BM)
        m_q = o_t < tq
        o_qt = o_t.to(tl.int64) * stride_qt
        o_dt = o_t.to(tl.int64) * stride_dt
        p_q = q + j_b * stride_qb + tl.cast(q_start, tl.int64) * stride_qt + j_h * stride_qh
        p_do = dout + j_b * stride_db + tl.cast(q_start, tl.int64) * stride_dt + j_h * stride_dh
        p_k = k + j_b * stride_kb + tl.cast(k_start, tl.int64) * stride_kt + j_h // (Hq // Hk) * stride_kh
        p_v = v + j_b * stride_vb + tl.cast(k_start, tl.int64) * stride_vt + j_h // (Hq // Hk) * stride_vh
        o_row = (j_b * Hq + j_h) * Tq + q_start + o_t
        b_q = load_tile(p_q, o_qt, 0, m_q, K, BK, True)  # [BM, BK]
        b_k = load_tile(p_k, o_kt, 0, m_n, K, BK, True)  # [BN, BK]
        b_s = dot_rows(b_q, b_k, p_q, o_qt, m_q, p_k, o_kt, m_n, K, BK, True, True, PRECISION)  # [BM, BN]
        if SOFTCAP:
            b_s = tanh(b_s * inner_scale, q.dtype.element_ty == tl.float32)
        b_s = b_s * score_scale
        b_distance = o_n[None, :] - (o_t + shift)[:, None]
        if alibi is not None:
            i_a = j_b if cu_seqlens_q is None else i_s
            b_s -= tl.load(alibi + i_a * stride_ab + j_h) * tl.abs(b_distance).to(tl.float32)
        p_bias = (bias + j_b * stride_bb + j_h * stride_bh + tl.cast(q_start, tl.int64) * stride_bq
                  + tl.cast(k_start, tl.int64) * stride_bk)
        o_bias, m_bias = _bias_rows(o_t, m_q, stride_bq, ONE_ROW)
        b_s = _biased(b_s, p_bias, o_bias, o_n.to(tl.int64) * stride_bk, m_bias, m_n, True)
        b_lse = _of_blind(tl.load(lse + o_row, mask=m_q, other=float("inf")))
        m_s = _visible(b_distance, m_q[:, None] & m_n[None, :], left, right, LEFT, RIGHT)
        b_p = tl.where(m_s, _power(b_s, b_lse[:, None], True), 0.0)
        b_do = load_tile(p_do, o_dt, 0, m_q, V, BV, True)  # [BM, BV]
        b_v = load_tile(p_v, o_vt, 0, m_n, V, BV, True)  # [BN, BV]
        b_dp = dot_rows(b_do, b_v, p_do, o_dt, m_q, p_v, o_vt, m_n, V, BV, True, True, PRECISION)  # [BM, BN]
        if seed is not None:
            i_bh = (j_b * Hq + j_h).to(tl.int32)
            m_kept = _kept(b_seed, threshold, i_bh, q_start + o_t, k_start + i_n, BN, cu_seqlens_k is None)
            b_dp = tl.where(m_kept, b_dp * keep_scale, 0.0)
        b_delta = tl.load(delta + o_row, mask=m_q, other=0.0)
        b_sum += b_p * (b_dp - b_delta[:, None])

    o_plane = (tl.program_id(1).to(tl.int64) * out_batch + i_b) * out_heads + i_h
    if ONE_ROW:
        tl.store(dbias + o_plane * Tk + k_start + o_n, tl.sum(b_sum, 0), mask=m_n)
    else:
        o_t = i_tq * BM + tl.arange(0, BM)
        p_dbias = dbias + ((o_plane * Tq + q_start + o_t)[:, None] * Tk + (k_start + o_n)[None, :])
        tl.store(p_dbias, b_sum, mask=(o_t < tq)[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["new_tokens", "capacity", "pages", "tiles"])
def flash_attention_fwd_append_kernel(
        k, v, k_cache, v_cache, cache_seqlens, block_table, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt,
        stride_vh, stride_kcb, stride_kct, stride_kch, stride_vcb, stride_vct, stride_vch, new_tokens, capacity, pages,
        heads, tiles, K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr):
    """One program copies rows of k and v, row r being new token r // heads of head r % heads."""
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_r = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    o_t = (o_r // heads).to(tl.int64)
    o_h = (o_r % heads).to(tl.int64)
    o_c = tl.load(cache_seqlens + i_b).to(tl.int64) + o_t
    m_r = (o_t < new_tokens) & (o_c >= 0) & (o_c < capacity)
    o_b = i_b
    if block_table is not None:
        o_b = tl.load(block_table + i_b * (capacity // PAGE) + o_c // PAGE, mask=m_r, other=-1).to(tl.int64)
        o_c = o_c % PAGE
        m_r = m_r & (o_b >= 0) & (o_b < pages)
    for i_d in range(0, K, BD):
        b_k = load_tile(k + i_b * stride_kb, o_t * stride_kt + o_h * stride_kh, i_d, m_r, K, BD, True)  # [BM, BD]
        store_tile(k_cache, o_b * stride_kcb + o_c * stride_kct + o_h * stride_kch, i_d, m_r, K, BD, b_k)
    for i_d in range(0, V, BD):
        b_v = load_tile(v + i_b * stride_vb, o_t * stride_vt + o_h * stride_vh, i_d, m_r, V, BD, True)  # [BM, BD]
        store_tile(v_cache, o_b * stride_vcb + o_c * stride_vct + o_h * stride_vch, i_d, m_r, V, BD, b_v)


class _Config(NamedTuple):
    """Tile sizes (query rows BM, key rows BN, columns of a slice of a head) and how a kernel is compiled."""

    BM: int
    BN: int
    columns: int
    num_warps: int
    num_stages: int


# class of targets -> head size -> configuration: the first size that holds the head serves; a class without an entry
# takes sm_80's. Derived, not measured: the largest tiles whose accumulators, scores and operands the compiler fits into
# registers without spills in the unmasked loop, and as many stages as fit shared memory (read off code compiled ahead
# of time, as in tests/triton_aot). Where not even a small tile of whole heads fits, heads are cut into slices.
_FWD = {
    "sm_80": {64: _Config(128, 64, 64, 4, 3), 128: _Config(128, 64, 128, 8, 2), 256: _Config(64, 32, 256, 4, 2),
              512: _Config(64, 32, 128, 4, 2)},
    "sm_90": {64: _Config(128, 128, 64, 8, 3), 128: _Config(128, 128, 128, 8, 2), 256: _Config(128, 64, 256, 8, 2),
              512: _Config(128, 64, 128, 8, 2)},
    "sm_100": {64: _Config(128, 128, 64, 8, 3), 128: _Config(128, 64, 128, 8, 3), 256: _Config(128, 32, 256, 8, 2),
               512: _Config(128, 64, 128, 8, 2)},
    "gfx942": {64: _Config(128, 64, 64, 4, 1), 128: _Config(128, 64, 128, 4, 1), 256: _Config(64, 32, 256, 4, 1),
               512: _Config(64, 32, 128, 4, 1)},
}
_FWD["sm_120"] = _FWD["sm_80"] | {64: _Config(128, 64, 64, 8, 3)}
_DECODE = {  # bound by the read of the cache, so whole heads: slices of the values would each read the keys again
    "sm_80": {64: _Config(16, 64, 64, 4, 3), 128: _Config(16, 64, 128, 4, 3), 256: _Config(16, 32, 256, 4, 2),
              512: _Config(16, 16, 512, 4, 2)},
    "gfx942": {128: _Config(16, 64, 128, 4, 1), 256: _Config(16, 32, 256, 4, 1), 512: _Config(16, 16, 512, 4, 1)},
}
_DKV = {
    "sm_80": {64: _Config(64, 128, 64, 8, 2), 128: _Config(32, 64, 128, 4, 2), 256: _Config(16, 64, 256, 8, 2),
              512: _Config(32, 32, 128, 4, 2)},
    "sm_90": {64: _Config(64, 128, 64, 8, 2), 128: _Config(64, 128, 128, 8, 2), 512: _Config(64, 64, 128, 8, 2)},
    # dk, dv and the scores must fit into 512 columns of tensor memory.
    "sm_100": {64: _Config(64, 128, 64, 8, 2), 128: _Config(64, 128, 128, 8, 2), 512: _Config(64, 64, 128, 8, 1)},
    "gfx942": {64: _Config(64, 64, 64, 4, 1), 128: _Config(32, 64, 128, 4, 1), 512: _Config(32, 32, 128, 4, 1)},
}
_DQ = {
    "sm_80": {64: _Config(128, 64, 64, 8, 2), 128: _Config(128, 32, 128, 8, 2), 256: _Config(64, 32, 256, 8, 1),
              512: _Config(32, 32, 128, 4, 2)},
    "sm_90": {64: _Config(128, 64, 64, 8, 2), 128: _Config(128, 64, 128, 8, 2), 256: _Config(128, 32, 256, 8, 2),
              512: _Config(64, 64, 128, 8, 2)},
    "sm_100": {64: _Config(128, 64, 64, 8, 2), 128: _Config(128, 64, 128, 8, 2), 256: _Config(128, 32, 256, 8, 1),
               512: _Config(64, 64, 128, 8, 2)},
    "gfx942": {64: _Config(64, 64, 64, 4, 1), 128: _Config(64, 32, 128, 4, 1), 512: _Config(32, 32, 128, 4, 1)},
}
# float32 runs on the ordinary multipliers, alike on every NVIDIA GPU.
_FWD_32 = {
    "sm_80": {64: _Config(64, 32, 64, 8, 2), 128: _Config(64, 32, 128, 8, 2), 512: _Config(32, 32, 128, 8, 1)},
    "gfx942": {64: _Config(64, 32, 64, 4, 1), 128: _Config(64, 32, 128, 4, 1), 512: _Config(32, 32, 128, 4, 1)},
}
_DECODE_32 = {"sm_80": {128: _Config(16, 32, 128, 4, 2), 512: _Config(16, 16, 256, 4, 2)},
              "gfx942": {128: _Config(16, 32, 128, 4, 1), 512: _Config(16, 16, 256, 4, 1)}}
_DKV_32 = {"sm_80": {64: _Config(32, 32, 64, 4, 2), 128: _Config(16, 32, 128, 8, 2), 512: _Config(16, 32, 64, 8, 1)},
           "gfx942": {64: _Config(32, 32, 64, 4, 1), 128: _Config(16, 32, 128, 4, 1), 512: _Config(32, 32, 64, 4, 1)}}
_DQ_32 = {"sm_80": {64: _Config(64, 32, 64, 8, 2), 128: _Config(32, 32, 128, 8, 2), 512: _Config(32, 32, 64, 8, 1)},
          "gfx942": {128: _Config(32, 32, 128, 4, 1), 512: _Config(32, 32, 64, 4, 1)}}
_DBIAS = {"sm_80": {64: _Config(64, 64, 64, 4, 1), 512: _Config(64, 64, 128, 8, 1)},
          "gfx942": {64: _Config(64, 64, 64, 4, 1), 512: _Config(32, 64, 64, 4, 1)}}
_DBIAS_32 = {"sm_80": {512: _Config(32, 32, 64, 4, 1)}, "gfx942": {512: _Config(32, 32, 64, 4, 1)}}
_CONFIGS = {"fwd": {2: _FWD, 4: _FWD_32}, "decode": {2: _DECODE, 4: _DECODE_32}, "dkv": {2: _DKV, 4: _DKV_32},
            "dq": {2: _DQ, 4: _DQ_32}, "dbias": {2: _DBIAS, 4: _DBIAS_32}}
# Small tiles, so that small tensors have several blocks, and slices.
_INTERPRETED = _Config(32, 32, 64, 4, 1)


def _class(name: str) -> str:
    """The class of targets that one belongs to, by its matrix instructions and shared memory."""
    if name == "sm_90":
        return "sm_90"
    if name in ("sm_100", "sm_103"):
        return "sm_100"
    if name.startswith("sm_12"):
        return "sm_120"
    # What sm_80 runs fits the 99 KB of sm_86 and sm_89. Older NVIDIA GPUs have 64 KB as AMD's do; so may unknown GPUs.
    return "sm_80" if name.startswith(("sm_8", "sm_11")) else "gfx942"


def _config(kernel: str, q: Tensor, v: Tensor, tiled: bool = False) -> _Config:
    """`tiled`: there is a bias or dropout, whose tiles take registers beside those of the scores."""
    name = target(q.device)
    if name == "interpreter":
        return _INTERPRETED._replace(BM=16) if kernel == "decode" else _INTERPRETED
    classes = _CONFIGS[kernel][q.element_size()]
    sizes = classes.get(_class(name), classes["sm_80"])
    config = next(config for size, config in sizes.items() if size >= min(max(q.shape[3], v.shape[3]), 512))
    # Half as much of what the loop walks over, or less. With every option at once some targets still spill: sm_120
    # in dk and dv at head size 64 (99 accesses an iteration), sm_90 (10) in forward, sm_100 (13) in dbias.
    if tiled and kernel != "dbias":
        walked = "BM" if kernel == "dkv" else "BN"
        config = config._replace(**{walked: min(max(getattr(config, walked) // 2, 16), 32)})
    return config


def _slice(size: int, columns: int) -> int:
    """The width of a head's slices: all of it if it fits; at least the 16 that matrix instructions take."""
    return min(max(triton.next_power_of_2(size), 16), columns)


@functools.cache
def _processors(device: torch.device) -> int:
    """How many programs a device runs at a time, about; a few where there is none to ask, so that tests split keys."""
    if device.type in ("cpu", "meta"):
        return 16
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", None) or getattr(properties, "gpu_subslice_count", None) or 64


def _splits(programs: int, keys: int, block: int, device: torch.device) -> int:
    """Over how many programs to spread the keys of each tile: two for each processor, each with four blocks or more."""
    return max(min(2 * _processors(device) // max(programs, 1), keys // (4 * block)), 1)


def _key_slice(size: int, columns: int) -> int:
    """The same for keys: those of latent attention, 576 wide, are no power of two times anything larger than 64."""
    return _slice(size, columns if size <= 512 else 64)


def _rows(x: Tensor) -> Tensor:
    """x with a contiguous last axis; the other strides are free."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {f"stride_{name}{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("bth")}


def _tiles(rows: int, block: int, cu_seqlens: Tensor | None) -> int:
    return triton.cdiv(rows, block) if cu_seqlens is None else tiles_packed(rows, cu_seqlens.shape[0] - 1, block)


def _extras(q: Tensor, alibi_slopes: Tensor | None, bias: Tensor | None, seed: Tensor | None, dropout_p: float) -> dict:
    """What every kernel needs to know of the options that are tensors."""
    if bias is not None and bias.dtype == torch.bool:
        bias = bias.view(torch.uint8)
    strides = [0] * 4
    if bias is not None:
        strides = [0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride())]
    threshold = min(round(dropout_p * 2 ** 32), 2 ** 32 - 1)
    if alibi_slopes is not None and alibi_slopes.numel() == 0:
        alibi_slopes = None  # no sequence
    return dict(alibi=alibi_slopes, bias=bias, seed=seed,
                stride_ab=q.shape[2] if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
                **{f"stride_b{axis}": stride for axis, stride in zip("bhqk", strides)},
                ONE_ROW=bias is not None and bias.shape[2] == 1,
                threshold=threshold - 2 ** 32 * (threshold >= 2 ** 31),  # the same bits in an int32
                keep_scale=1 / (1 - dropout_p))


def _scores(q: Tensor, tk: int, heads_k: int, scale: float, softcap: float, left: int, right: int,
            cu_seqlens_q: Tensor | None, natural: bool) -> dict:
    """What every kernel needs to know of the scores: exponent = score_scale * (q.k, or tanh(inner_scale * q.k)).

    `natural`: in base e, else 2.
    """
    inner_scale, score_scale = (scale / softcap, softcap) if softcap > 0 else (0.0, scale)
    # Bounds that no pair of positions can pass are none, which also keeps sums of positions within 32 bits.
    bounded_left, bounded_right = 0 <= left < tk - 1, 0 <= right < q.shape[1] - 1
    return dict(Tq=q.shape[1], Tk=tk, Hq=q.shape[2], Hk=heads_k,
                sequences=0 if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1, left=left if bounded_left else 0,
                right=right if bounded_right else 0, inner_scale=inner_scale,
                score_scale=score_scale * (1.0 if natural else LOG2E.value), K=q.shape[3], LEFT=bounded_left,
                RIGHT=bounded_right, SOFTCAP=softcap > 0, PRECISION=dot_precision(q.dtype))


def _natural(extras: dict) -> bool:
    """Whether scores are kept as they are, rather than in the exp2 domain."""
    return extras["alibi"] is not None or extras["bias"] is not None


def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
             cache_seqlens: Tensor | None, new_tokens: int, block_table: Tensor | None, sinks: Tensor | None,
             extras: dict, scale: float, softcap: float, left: int, right: int, G: int,
             config: _Config) -> tuple[Tensor, Tensor]:
    q, k, v = _rows(q), _rows(k), _rows(v)
    if softcap == 0:
        # The running maximum is scaled after it is taken, when masked scores are -inf: the scale must be positive.
        q, scale = (-q if scale < 0 else q), max(abs(scale), 2.0 ** -100)
    batch, tq, heads, _ = q.shape
    value_dim, page, tk = v.shape[3], 0, k.shape[1]
    if block_table is not None:
        page, block_table = tk, block_table.contiguous()
        tk = page * block_table.shape[1] if k.shape[0] else 0
    out = q.new_empty(batch, tq, heads, value_dim)
    lse = q.new_empty(batch, heads, tq, dtype=torch.float32)
    BM, BN, columns, num_warps, num_stages = config
    BV = _slice(value_dim, columns)
    tiles = _tiles(tq * G, BM, cu_seqlens_q)
    programs, slices = tiles * (heads // G) * batch if G else 0, triton.cdiv(value_dim, BV)
    scores = _scores(q, tk, k.shape[2], scale, softcap, left, right, cu_seqlens_q, _natural(extras))
    seen = min(tk, scores["left"] + scores["right"] + BM) if scores["LEFT"] and scores["RIGHT"] else tk
    splits = _splits(programs * slices, seen, BN, q.device) if cu_seqlens_q is None else 1
    parts, lses = out, lse
    if splits > 1:
        parts, lses = out.new_empty(splits, *out.shape, dtype=torch.float32), lse.new_empty(splits, *lse.shape)
    launch(flash_attention_fwd_kernel, (programs, slices, splits), q.device, q=q, k=k, v=v, out=parts, lse=lses,
           cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, cache_seqlens=cache_seqlens, block_table=block_table,
           sinks=sinks, new_tokens=new_tokens, pages=k.shape[0], batch=batch, tiles=tiles, splits=splits, V=value_dim,
           G=G, BM=BM, BN=BN, BK=_key_slice(q.shape[3], columns), BV=BV, PAGE=page, SPLIT=splits > 1,
           num_warps=num_warps, num_stages=num_stages, **_strides(q=q, k=k, v=v), **extras, **scores)
    if splits > 1:
        rows, BM, BV = batch * tq * heads, 16, _slice(value_dim, 128)
        launch(flash_attention_fwd_combine_kernel, (triton.cdiv(rows, BM), triton.cdiv(value_dim, BV)), q.device,
               parts=parts, lses=lses, out=out, lse=lse, Tq=tq, Hq=heads, rows=rows, splits=splits, V=value_dim, BM=BM,
               BV=BV, num_warps=4, num_stages=1)
    return out, lse


def _packed_heads(q: Tensor, k: Tensor) -> tuple[int, bool]:
    """-> (how many query heads share a key head, whether all their rows fit the narrow tile of decoding)."""
    G = q.shape[2] // k.shape[2]
    return G, q.shape[1] * G <= 16


def fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, softcap, window_left, window_right, alibi_slopes=None, bias=None,
        sinks=None, seed=None, dropout_p=0.0):
    G, narrow = _packed_heads(q, k)
    tiled = bias is not None or seed is not None
    narrow = narrow and cu_seqlens_q is None and not tiled
    return _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, None, 0, None, sinks,
                    _extras(q, alibi_slopes, bias, seed, dropout_p), scale, softcap, window_left, window_right,
                    G if narrow else 1, _config("decode" if narrow else "fwd", q, v, tiled))


def decode(q, k_cache, v_cache, cache_seqlens, new_tokens, scale, softcap, window_left, window_right, block_table=None,
           alibi_slopes=None, sinks=None):
    G, narrow = _packed_heads(q, k_cache)
    return _forward(q, k_cache, v_cache, None, None, cache_seqlens, new_tokens, block_table, sinks,
                    _extras(q, alibi_slopes, None, None, 0.0), scale, softcap, window_left, window_right, G,
                    _config("decode" if narrow else "fwd", q, v_cache))


def bwd(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, softcap, window_left, window_right,
        deterministic, alibi_slopes=None, bias=None, sinks=None, seed=None, dropout_p=0.0, bias_gradient=False):
    # Bitwise repeatable as it is: `deterministic` changes nothing.
    dout, q, k, v, out = (_rows(x) for x in (dout, q, k, v, out))
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    batch, tq, heads, key_dim = q.shape
    tk, heads_k, value_dim = v.shape[1:]
    tiled = bias is not None or seed is not None
    delta = torch.empty_like(lse)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    tiles = triton.cdiv(tq, 32)
    launch(flash_attention_bwd_delta_kernel, (tiles * heads * batch,), q.device, out=out, dout=dout, dlse=dlse,
           delta=delta, Tq=tq, Hq=heads, tiles=tiles, V=value_dim, BM=32, BV=_slice(value_dim, 128),
           PRECISION=dot_precision(q.dtype), num_warps=4, num_stages=1, **_strides(o=out, d=dout))

    extras = _extras(q, alibi_slopes, bias, seed, dropout_p)
    shared = dict(q=q, k=k, v=v, dout=dout, lse=lse, delta=delta, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
                  V=value_dim, **_strides(q=q, k=k, v=v, d=dout), **extras,
                  **_scores(q, tk, heads_k, scale, softcap, window_left, window_right, cu_seqlens_q, _natural(extras)))

    BM, BN, columns, num_warps, num_stages = _config("dkv", q, v, tiled)
    BK, BV = _slice(key_dim, columns), _slice(value_dim, columns)
    tiles = _tiles(tk, BN, cu_seqlens_k)
    slices = max(triton.cdiv(key_dim, BK), triton.cdiv(value_dim, BV))
    launch(flash_attention_bwd_dkv_kernel, (tiles * heads_k * batch, slices), q.device, dk=dk, dv=dv, tiles=tiles,
           scale=scale, BM=BM, BN=BN, BK=BK, BV=BV, num_warps=num_warps, num_stages=num_stages, **shared)

    BM, BN, columns, num_warps, num_stages = _config("dq", q, v, tiled)
    BK, BV = _slice(key_dim, columns), _slice(value_dim, columns)
    tiles = _tiles(tq, BM, cu_seqlens_q)
    launch(flash_attention_bwd_dq_kernel, (tiles * heads * batch, triton.cdiv(key_dim, BK)), q.device, dq=dq,
           tiles=tiles, scale=scale, BM=BM, BN=BN, BK=BK, BV=BV, num_warps=num_warps, num_stages=num_stages, **shared)

    dbias, dsinks = lse.new_empty(0), lse.new_empty(0)
    if sinks is not None:
        # A sink is a key whose value is zero, so its score's gradient is -p delta; tokens of no sequence have none.
        share = torch.exp(sinks[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)
        dsinks = -(share * delta).sum((0, 2))
    if bias_gradient and bias.shape[3] == 1:
        # One value for all keys of a row moves its lse, and against a sink its output: rows of the softmax sum to 1.
        rows = torch.zeros_like(lse) if dlse is None else dlse
        if sinks is not None:
            rows = rows + share * delta
        rows = rows.masked_fill(lse == -torch.inf, 0.0)
        dbias = rows[..., None].sum_to_size(bias.shape)
    elif bias_gradient:
        dbias = _dbias(q, v, bias, shared)
    return dq, dk, dv, dbias, dsinks


def _dbias(q: Tensor, v: Tensor, bias: Tensor, shared: dict) -> Tensor:
    """The bias's gradient, summed in a fixed order and without a matrix larger than the bias is."""
    batch, tq, heads, key_dim = q.shape
    tk, value_dim, packed = v.shape[1], v.shape[3], shared["cu_seqlens_q"] is not None
    if 0 in (q.numel(), v.numel()):
        return q.new_zeros(bias.shape, dtype=torch.float32)
    BM, BN, columns, num_warps, num_stages = _config("dbias", q, v)
    if bias.shape[2] == 1:  # sums over queries: a row for each head, whatever the bias is broadcast over
        out_batch, out_heads, tiles, parts = batch, heads, 1, 1
        tiles_k = _tiles(tk, BN, shared["cu_seqlens_k"])
    else:
        out_batch, out_heads = bias.shape[:2]
        tiles, tiles_k = _tiles(tq, BM, shared["cu_seqlens_q"]), triton.cdiv(tk, BN)
        # Where the tiles are few, several programs share one, each with part of the batch entries and heads.
        parts = _splits(tiles * tiles_k * out_batch * out_heads, batch * heads // (out_batch * out_heads), 1, q.device)
    # What no program owns lies between the sequences of packed input.
    shape = parts, out_batch, out_heads, min(bias.shape[2], tq), tk
    dbias = (q.new_zeros if packed else q.new_empty)(shape, dtype=torch.float32)
    launch(flash_attention_bwd_dbias_kernel, (tiles * tiles_k * out_batch * out_heads, parts), q.device, dbias=dbias,
           batch=batch, out_batch=out_batch, out_heads=out_heads, tiles=tiles, tiles_k=tiles_k, parts=parts, BM=BM,
           BN=BN, BK=_slice(key_dim, columns), BV=_slice(value_dim, columns), num_warps=num_warps,
           num_stages=num_stages, **shared)
    return dbias.sum(0).sum_to_size(bias.shape) if parts > 1 else dbias[0].sum_to_size(bias.shape)


def append(k_cache, v_cache, k, v, cache_seqlens, block_table=None):
    k, v = _rows(k), _rows(v)
    batch, new_tokens, heads, key_dim = k.shape
    value_dim, page, capacity = v.shape[3], 0, k_cache.shape[1]
    if block_table is not None:
        page, block_table = capacity, block_table.contiguous()
        capacity = page * block_table.shape[1]
    BM, BD = 16, _slice(max(key_dim, value_dim), 128)
    tiles = triton.cdiv(new_tokens * heads, BM)
    launch(flash_attention_fwd_append_kernel, (tiles * batch,), k.device, k=k, v=v, k_cache=k_cache, v_cache=v_cache,
           cache_seqlens=cache_seqlens, block_table=block_table, new_tokens=new_tokens, capacity=capacity,
           pages=k_cache.shape[0], heads=heads, tiles=tiles, K=key_dim, V=value_dim, BM=BM, BD=BD, PAGE=page,
           num_warps=4, num_stages=1, **_strides(k=k, v=v, kc=k_cache, vc=v_cache))
