"""Linear attention in Triton: forward, backward, one step. README.md derives the chunked form and the gradients.

Segments of 512 tokens of a sequence run side by side, each with the state (K x V) in registers from chunk to chunk. One
kernel, the walk, makes every result, because each is a linear attention of its own. With rows x and y of a chunk

    result_x = sum over y of w_xy (a_x . b_y) c_y + f_x a_x state
    state <- total state + sum over y of f_y b_y c_y^T

    result   a   b   c    time         state
    out      q   k   v    ascending    S
    dq       dO  v   k    ascending    S^T
    dk       v   dO  q    descending   gradient of S^T
    dv       k   q   dO   descending   gradient of S

Where a sequence has several segments, a walk without results leaves what each adds to the state, and a scan over
segments turns that into the states between them. Programs share nothing, and a sequence is cut alike whatever the batch
holds: results are bitwise repeatable and the same in every batch.

Weights are exponentials of sums of log decays <= 0, summed from the key on, never of differences of cumulative sums:
nothing overflows, and a weak decay keeps its precision beside a strong one. With a decay per channel the weights are
part of the products. There each chunk is cut into blocks of 16 tokens: for a pair of blocks, queries carry the decay
from their block's start and keys the decay up to it; pairs inside a block are summed one by one (`scores`,
`channel_gradients`).

Names: `i_` index, `o_` offset, `m_` mask of rows, `p_` pointer, `b_` block value. Time t of a sequence lies at row
origin + t, or origin - t when reversed, so that pointers to time 0 and signed strides are all that `reverse` changes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import (LOG2E, clamped, dot_precision, dot_rows, find_sequence, launch, load, load_tile, store,
                        store_tile, target)
from . import registration

NONE, HEAD, TOKEN, CHANNEL = (tl.constexpr(i) for i in range(4))  # kinds of decay
BLOCK = tl.constexpr(16)  # tokens of a chunk's blocks, the least that matrix instructions take
EPSILON = tl.constexpr(1e-6)  # of normalize

# Runtime values on which compiled code must not be specialised: they change from call to call.
_VARYING = ["T", "tiles", "sequences"]


# ---- decay -----------------------------------------------------------------------------------------------------------


@triton.jit
def _exp(b_x):
    """e^x for x <= 0, within 2 ulp: exp2(x log2(e)) alone would be |x| ulp off."""
    b_x = tl.where(b_x < -110.0, -110.0, b_x)  # the result is 0 either way, and infinities would make NaN below
    b_n = tl.floor(b_x * LOG2E + 0.5)
    b_r = (b_x - b_n * 0.693359375) + b_n * 2.12194440e-4  # x - n ln 2, its first product exact
    return tl.exp2(b_r * LOG2E) * tl.exp2(b_n)


@triton.jit
def _logs(p_g, stride_g, o_t, m_t, i_d, D: tl.constexpr, BD: tl.constexpr, KIND: tl.constexpr):
    """Log decays at times o_t, zero where m_t is false: [rows], with KIND == CHANNEL [rows, BD] from channel i_d."""
    if KIND == CHANNEL:
        b_g = load_tile(p_g, o_t.to(tl.int64) * stride_g, i_d, m_t, D, BD, True)
    else:
        b_g = load(p_g + o_t.to(tl.int64) * stride_g, m_t)
    return b_g


@triton.jit
def _query_logs(p_g, stride_g, g, first, n, i_d, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr,
                BONUS: tl.constexpr):
    """Of C tokens from time `first`, n of which exist: the log factor from the first token on to each query."""
    o_c = tl.arange(0, C) - BONUS  # with a bonus the state is read before it decays
    if KIND == HEAD:
        b_l = g * (o_c + 1).to(tl.float32)
    else:
        b_l = tl.cumsum(_logs(p_g, stride_g, first + o_c, (o_c >= 0) & (o_c < n), i_d, D, BD, KIND), 0)
    return b_l


@triton.jit
def _key_logs(p_g, stride_g, g, first, n, i_d, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr):
    """The log factor from after each key to the end of the n tokens."""
    o_c = tl.arange(0, C) + 1
    if KIND == HEAD:
        b_l = g * tl.maximum(n - o_c, 0).to(tl.float32)
    else:
        b_l = tl.cumsum(_logs(p_g, stride_g, first + o_c, o_c < n, i_d, D, BD, KIND), 0, reverse=True)
    return b_l


@triton.jit
def _total_logs(p_g, stride_g, g, first, n, i_d, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr,
                KIND: tl.constexpr):
    """The log factor of all n tokens: a number, with KIND == CHANNEL [BD]."""
    o_c = tl.arange(0, C)
    if KIND == HEAD:
        b_l = g * n.to(tl.float32)
    else:
        b_l = tl.sum(_logs(p_g, stride_g, first + o_c, o_c < n, i_d, D, BD, KIND), 0)
    return b_l


@triton.jit
def _distance(C: tl.constexpr, DESCENDING: tl.constexpr):
    """Query - key for every pair of a chunk: queries are rows and keys columns, with DESCENDING the other way round."""
    o_c = tl.arange(0, C)
    b_d = o_c[:, None] - o_c[None, :]
    return -b_d if DESCENDING else b_d


@triton.jit
def _pair_weights(p_g, stride_g, g, first, n, C: tl.constexpr, KIND: tl.constexpr, BONUS: tl.constexpr,
                  DESCENDING: tl.constexpr):
    """The factor between each query and key of a chunk, scalar decay; pairs that are not visible hold anything."""
    b_d = _distance(C, DESCENDING)
    if KIND == HEAD:
        b_l = g * tl.maximum(b_d - BONUS, 0).to(tl.float32)
    else:
        o_c = tl.arange(0, C) - BONUS
        b_g = _logs(p_g, stride_g, first + o_c, (o_c >= 0) & (o_c < n), 0, 1, 1, KIND)
        if DESCENDING:
            b_l = tl.cumsum(tl.where(b_d > BONUS, b_g[None, :], 0.0), 1)
        else:
            b_l = tl.cumsum(tl.where(b_d > BONUS, b_g[:, None], 0.0), 0)
    return _exp(b_l)


@triton.jit
def _head_log(decay, i_h, KIND: tl.constexpr):
    """The decay of a head, finite so that zero times it is zero."""
    g = 0.0
    if KIND == HEAD:
        g = tl.load(decay + i_h)
        g = tl.where(g < -1e30, -1e30, g)
    return g


# ---- places ----------------------------------------------------------------------------------------------------------


@triton.jit
def _place(i_tile, cu_seqlens, sequences, T, tiles, B: tl.constexpr):
    """-> (sequence, batch entry, its first row, its length, index of the tile in it) of a tile of B tokens.

    Each of `sequences` unpacked sequences has `tiles` tiles. Tiles past their sequence's end, and of rows that belong
    to no sequence, get length 0 and a positive index.
    """
    if cu_seqlens is not None:
        i_s, start, length, i_t = find_sequence(i_tile, cu_seqlens, sequences, T, B)
        exists = (i_s < sequences) & ((i_t == 0) | (i_t * B < length))
        length = tl.where(exists, length, 0)
        i_t = tl.where(exists, i_t, 1)
        i_b = 0
    else:
        i_s = i_tile // tiles
        i_t = i_tile % tiles
        start = 0
        length = T
        i_b = i_s
    return i_s, tl.cast(i_b, tl.int64), start, length, i_t


@triton.jit
def _origin(start, length, REVERSE: tl.constexpr):
    """The row of time 0."""
    row = start + length - 1 if REVERSE else start
    return tl.cast(row, tl.int64)


@triton.jit
def _dot(b_a, b_h, PRECISION: tl.constexpr):
    """a h for a state h. The range of float16 would limit how much a state may add up; TF32 is as precise."""
    if b_a.dtype == tl.float16:
        b_o = tl.dot(b_a.to(tl.float32), b_h, input_precision="tf32")
    else:
        b_o = tl.dot(b_a, b_h.to(b_a.dtype), input_precision=PRECISION)
    return b_o


@triton.jit
def _update(b_h, b_b, b_c, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """b_h + b^T c, one of b and c in fp32: the one that carries factors.

    Its rounding is shared by a whole row or column of the state, so that few errors average out. In bfloat16 other
    roundings hide that; in float16 what it loses is added too.
    """
    if dtype == tl.float16:
        if b_b.dtype == tl.float32:
            b_low = (b_b - b_b.to(dtype).to(tl.float32)).to(dtype)
            b_h = tl.dot(tl.trans(b_low), b_c, b_h, input_precision=PRECISION)
        else:
            b_low = (b_c - b_c.to(dtype).to(tl.float32)).to(dtype)
            b_h = tl.dot(tl.trans(b_b), b_low, b_h, input_precision=PRECISION)
    return tl.dot(tl.trans(b_b.to(dtype)), b_c.to(dtype), b_h, input_precision=PRECISION)


@triton.jit
def _add(p, b_x, m):
    """*p += b_x; no other program touches p."""
    tl.store(p, tl.load(p, mask=m, other=0.0) + b_x, mask=m)


@triton.jit
def _below(o_x, size, exists):
    """o_x < size, but nowhere unless the scalar `exists` holds. The interpreter can't & a mask and a scalar."""
    return o_x < tl.where(exists, size, 0)


# ---- the walk --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_VARYING)
def linear_attention_walk_kernel(
        a, b, c, d, result, within, scores, decay, bonus, extra, denominator, cu_seqlens, states, edge, last, factors,
        ddecay, dbonus, chunk_states, stride_ab, stride_at, stride_ah, stride_bb, stride_bt, stride_bh, stride_cb,
        stride_ct, stride_ch, stride_db, stride_dt, stride_dh, stride_gb, stride_gt, stride_gh, T, H, tiles, sequences,
        scale, A: tl.constexpr, V: tl.constexpr, G: tl.constexpr, BA: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
        SEGMENT: tl.constexpr, KIND: tl.constexpr, BONUS: tl.constexpr, NORMALIZE: tl.constexpr, RESULT: tl.constexpr,
        GRADIENT: tl.constexpr, TRANSPOSED: tl.constexpr, DESCENDING: tl.constexpr, EDGE_KEPT: tl.constexpr,
        REVERSE: tl.constexpr, PRECISION: tl.constexpr):
    """Program (segment of a head, slice) walks over the segment's chunks with the state [A, slice of V columns].

    a, b have A columns and c V; the state lies transposed in memory if TRANSPOSED. The first segment in walking order
    starts from `edge` (None: zero), the others from `states`, as does every one if EDGE_KEPT; the last one leaves its
    state in `last`. Without RESULT it starts from zero, and its state is left in the slot of the segment after it, its
    factor in `factors`.

    GRADIENT: queries are divided by their denominator (normalize). `extra` is one more column of a (ascending) or b
    (descending), whose partner holds ones: the gradient of the denominator. `within` is the part of the result from
    inside the chunk, `scores` the weighted scores, where the decay is per channel. ddecay gets what this walk knows of
    it, from d: q for dq and k for dk; chunk_states carries the states before chunks from the one to the other.
    """
    i_h = (tl.program_id(0) % H).to(tl.int64)
    slot = (tl.program_id(0) // H).to(tl.int64)
    i_s, i_b, start, length, i_t = _place(tl.program_id(0) // H, cu_seqlens, sequences, T, tiles, SEGMENT)
    if i_t * SEGMENT >= length + (i_t == 0):
        return
    begin = i_t * SEGMENT
    count = tl.cdiv(tl.minimum(length - begin, SEGMENT), C)
    # How many segments of the sequence the walk has before and after this one, at most 1 in each case.
    i_before = tl.where(i_t > 0, 1, 0)
    i_after = tl.where(begin + SEGMENT < length, 1, 0)
    if DESCENDING:
        i_before, i_after = i_after, i_before
    if not RESULT:
        count = count * i_after
    i_v = tl.program_id(1) * BV
    GA: tl.constexpr = 1 if TRANSPOSED else G
    GC: tl.constexpr = G if TRANSPOSED else 1
    CHANNEL_IN: tl.constexpr = KIND == CHANNEL and not TRANSPOSED  # the channels are a's and b's columns
    DECAYS: tl.constexpr = V if TRANSPOSED else A
    BD: tl.constexpr = BV if TRANSPOSED else BA
    i_d = i_v if TRANSPOSED else 0
    # Who carries the column that normalize adds, [BV] or [BA].
    COLUMN: tl.constexpr = NORMALIZE and (TRANSPOSED or not GRADIENT or not RESULT)

    origin = _origin(start, length, REVERSE)
    step = -1 if REVERSE else 1
    p_a = a + i_b * stride_ab + i_h // GA * stride_ah + origin * stride_at
    p_b = b + i_b * stride_bb + i_h // GA * stride_bh + origin * stride_bt
    p_c = c + i_b * stride_cb + i_h // GC * stride_ch + origin * stride_ct
    p_d = p_c
    if d is not None:
        p_d = d + i_b * stride_db + i_h // GC * stride_dh + origin * stride_dt
    p_g = decay
    if KIND == TOKEN or KIND == CHANNEL:
        p_g = decay + i_b * stride_gb + i_h * stride_gh + origin * stride_gt
    stride_g = step * stride_gt
    g = _head_log(decay, i_h, KIND)

    o_c = tl.arange(0, C)
    o_a = tl.arange(0, BA)
    o_v = i_v + tl.arange(0, BV)
    KEYS: tl.constexpr = V if TRANSPOSED else A
    VALUES: tl.constexpr = (A if TRANSPOSED else V) + NORMALIZE
    m_h = (o_a < A)[:, None] & (o_v < V)[None, :]
    if TRANSPOSED:
        o_h = o_v[None, :] * VALUES + o_a[:, None]
        o_z = o_v * VALUES + A
        m_z = o_v < V
        m_column = m_z
    else:
        o_h = o_a[:, None] * VALUES + o_v[None, :]
        o_z = o_a * VALUES + V
        m_z = o_a < A
        m_column = _below(o_a, A, tl.program_id(1) == 0)  # every slice has the whole column, the first one writes it
    size = KEYS * VALUES
    rows = tl.cast(T, tl.int64) * H
    if cu_seqlens is None:
        rows *= sequences
    p_state = states
    if states is not None:
        p_state = states + (slot * H + i_h) * size

    b_h = tl.zeros([BA, BV], dtype=tl.float32)
    b_z = tl.zeros([BD if TRANSPOSED else BA], dtype=tl.float32)
    if RESULT:
        if edge is not None:
            p_edge = edge + (tl.cast(i_s, tl.int64) * H + i_h) * size
            b_h += load(p_edge + o_h, m_h & _below(o_h, size, i_before == 0))
            if COLUMN:
                b_z += load(p_edge + o_z, m_z & _below(o_z, size, i_before == 0))
        if states is not None:
            inside = length > 0 if EDGE_KEPT else i_before > 0
            b_h += load(p_state + o_h, m_h & _below(o_h, size, inside))
            if COLUMN:
                b_z += load(p_state + o_z, m_z & _below(o_z, size, inside))
            if not GRADIENT:
                kept = (i_before == 0) & (length > 0)
                tl.store(p_state + o_h, b_h, mask=m_h & _below(o_h, size, kept))
                if COLUMN:
                    tl.store(p_state + o_z, b_z, mask=m_column & _below(o_z, size, kept))

    b_log = tl.zeros([BA], dtype=tl.float32)
    b_du = tl.zeros([BV], dtype=tl.float32)
    for i in range(0, count):
        i_c = count - 1 - i if DESCENDING else i
        first = begin + i_c * C
        n = tl.minimum(length - first, C)
        m_t = o_c < n
        o_t = (first + o_c).to(tl.int64) * step
        o_row = (i_b * T + origin + o_t) * H + i_h  # of [B, T, H]
        b_b = load_tile(p_b, o_t * stride_bt, 0, m_t, A, BA, True)  # [C, BA]
        b_c = load_tile(p_c, o_t * stride_ct, i_v, m_t, V, BV, True)  # [C, BV]

        # Factors of the queries, then of rows x and y, of which one are the queries.
        b_q = tl.full([C], 1.0, dtype=tl.float32)
        if GRADIENT and NORMALIZE:
            b_q = 1.0 / tl.load(denominator + o_row, mask=m_t, other=1.0)
        b_one = tl.full([C], 1.0, dtype=tl.float32)
        b_x = b_one if DESCENDING else b_q * scale
        b_y = b_q * scale if DESCENDING else b_one
        b_e = b_one
        if GRADIENT and NORMALIZE:
            b_e = tl.load(extra + o_row, mask=m_t, other=0.0)
        if KIND == CHANNEL:
            b_x = b_x[:, None]
            b_y = b_y[:, None]
        if KIND != NONE:
            b_query = _exp(_query_logs(p_g, stride_g, g, first, n, i_d, DECAYS, BD, C, KIND, BONUS))
            b_key = _exp(_key_logs(p_g, stride_g, g, first, n, i_d, DECAYS, BD, C, KIND))
            b_x = b_x * (b_key if DESCENDING else b_query)
            b_y = b_y * (b_query if DESCENDING else b_key)

        if RESULT:
            b_a = load_tile(p_a, o_t * stride_at, 0, m_t, A, BA, True)  # [C, BA]
            b_d = _distance(C, DESCENDING)
            if KIND == CHANNEL and TRANSPOSED:
                b_o = load_tile(within, o_row * V, i_v, m_t, V, BV, True)
            else:
                if KIND == CHANNEL:
                    if DESCENDING:
                        b_s = load(scores + (o_row * C)[None, :] + o_c[:, None], m_t[None, :])
                    else:
                        b_s = load(scores + (o_row * C)[:, None] + o_c[None, :], m_t[:, None])
                    b_r = b_q
                else:
                    b_s = tl.dot(b_a, tl.trans(b_b), input_precision=PRECISION)  # [x, y]
                    if TRANSPOSED and NORMALIZE:
                        b_s += b_e[None, :] if DESCENDING else b_e[:, None]
                    if KIND != NONE:
                        b_s *= _pair_weights(p_g, stride_g, g, first, n, C, KIND, BONUS, DESCENDING)
                    if BONUS and not TRANSPOSED:
                        b_u = load(bonus + i_h * A + o_a, o_a < A)
                        b_self = tl.sum(b_a.to(tl.float32) * b_u[None, :] * b_b.to(tl.float32), 1)
                        b_s = tl.where(b_d == 0, b_self[:, None], b_s)
                    b_r = b_q * scale
                m_s = b_d >= (BONUS if TRANSPOSED else 0)  # a bonus on the diagonal is in the scores, or added below
                b_s = tl.where(m_s, b_s * (b_r[None, :] if DESCENDING else b_r[:, None]), 0.0)
                b_o = tl.dot(b_s.to(b_c.dtype), b_c, input_precision=PRECISION)  # [C, BV]
            if CHANNEL_IN:
                b_ax = b_a.to(tl.float32) * b_x
                b_p = _dot(b_ax.to(b_a.dtype), b_h, PRECISION)
            else:
                b_p = _dot(b_a, b_h, PRECISION)
                if TRANSPOSED and NORMALIZE:
                    b_p += b_z[None, :] if DESCENDING else b_e[:, None] * b_z[None, :]
                b_p *= b_x if KIND == CHANNEL else b_x[:, None]
            b_o += b_p
            if NORMALIZE and not GRADIENT:
                if CHANNEL_IN:
                    b_sum = tl.sum(b_ax * b_z[None, :], 1)
                else:
                    b_sum = tl.sum(b_a.to(tl.float32) * b_z[None, :], 1) * b_x
                b_sum += tl.sum(b_s, 1) + EPSILON
                b_o = b_o / b_sum[:, None]
                if tl.program_id(1) == 0:
                    tl.store(denominator + o_row, b_sum, mask=m_t)
            if BONUS and TRANSPOSED:
                b_dp = tl.sum(b_a.to(tl.float32) * b_b.to(tl.float32), 1)
                if NORMALIZE:
                    b_dp += b_e
                b_dp = (b_dp * b_q * scale)[:, None] * b_c.to(tl.float32)
                b_u = load(bonus + i_h * V + o_v, o_v < V)
                b_o += b_dp * b_u[None, :]
            if d is not None:
                b_w = load_tile(p_d, o_t * stride_dt, i_v, m_t, V, BV, True).to(tl.float32)
                if dbonus is not None:
                    b_du += tl.sum(b_dp * b_w, 0)
                if ddecay is not None:
                    i_chunk = slot * tl.cdiv(tl.minimum(T, SEGMENT), C) + i_c
                    p_chunk = chunk_states + (i_chunk * H + i_h) * size
                    b_w *= b_p
                    if KIND == CHANNEL:
                        p_dg = ddecay + (o_row * V)[:, None] + o_v[None, :]
                        stride_dg = step * H * V
                        m_row = m_t[:, None] & (o_v < V)[None, :]
                        o_i = o_c[:, None]
                    else:
                        b_w = tl.sum(b_w, 1)
                        p_dg = ddecay + tl.program_id(1) * rows + o_row
                        stride_dg = step * H
                        m_row = m_t
                        o_i = o_c
                    if DESCENDING:
                        # Keys before each token, and what crosses the chunk.
                        b_cross = tl.sum(load(p_chunk + o_h, m_h) * b_h, 0)
                        if NORMALIZE:
                            b_cross += load(p_chunk + o_z, m_z) * b_z
                        b_cross *= _exp(_total_logs(p_g, stride_g, g, first, n, i_d, DECAYS, BD, C, KIND))
                        b_cross = b_cross[None, :] if KIND == CHANNEL else tl.sum(b_cross, 0)
                        _add(p_dg + stride_dg, tl.cumsum(b_w, 0) + b_cross, m_row & (o_i + 1 < n))
                        _add(p_dg, b_cross, m_row & (o_i == 0))
                    else:
                        # Queries from each token on, with a bonus after it.
                        _add(p_dg - BONUS * stride_dg, tl.cumsum(b_w, 0, reverse=True), m_row & (o_i >= BONUS))
                        tl.store(p_chunk + o_h, b_h, mask=m_h)
                        if NORMALIZE:
                            tl.store(p_chunk + o_z, b_z, mask=m_z)
            store_tile(result, o_row * V, i_v, m_t, V, BV, b_o)

        if KIND != NONE:
            b_total = _total_logs(p_g, stride_g, g, first, n, i_d, DECAYS, BD, C, KIND)
            if not RESULT:
                b_log += b_total
            b_total = _exp(b_total)
            if CHANNEL_IN:
                b_h *= b_total[:, None]
            elif KIND == CHANNEL:
                b_h *= b_total[None, :]
            else:
                b_h *= b_total
            b_z *= b_total
        if CHANNEL_IN:
            b_by = b_b.to(tl.float32) * b_y
            b_h = _update(b_h, b_by, b_c, b_c.dtype, PRECISION)
            if COLUMN:
                b_z += tl.sum(b_by * b_e[:, None] if DESCENDING else b_by, 0)
        else:
            b_cy = b_c.to(tl.float32) * (b_y if KIND == CHANNEL else b_y[:, None])
            b_h = _update(b_h, b_b, b_cy, b_c.dtype, PRECISION)
            if COLUMN:
                b_w = b_cy if TRANSPOSED else b_b.to(tl.float32) * b_y[:, None]
                b_z += tl.sum(b_w * b_e[:, None] if DESCENDING else b_w, 0)

    if RESULT:
        if dbonus is not None:
            tl.store(dbonus + (slot * H + i_h) * V + o_v, b_du, mask=o_v < V)
        p_last = last
        if last is not None:
            p_last = last + (tl.cast(i_s, tl.int64) * H + i_h) * size
    else:
        next_slot = slot + (-1 if DESCENDING else 1)
        p_last = states + (next_slot * H + i_h) * size
        p_factor = factors + (next_slot * H + i_h) * A
        tl.store(p_factor + o_a, _exp(b_log), mask=_below(o_a, A, (i_after > 0) & (tl.program_id(1) == 0)))
    if last is not None or not RESULT:
        kept = i_after == 0 if RESULT else i_after > 0
        tl.store(p_last + o_h, b_h, mask=m_h & _below(o_h, size, kept))
        if COLUMN:
            tl.store(p_last + o_z, b_z, mask=m_column & _below(o_z, size, kept))


@triton.jit(do_not_specialize=_VARYING)
def linear_attention_scan_kernel(states, factors, edge, cu_seqlens, T, H, tiles, sequences, K: tl.constexpr,
                                 V: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_SIZE: tl.constexpr,
                                 DESCENDING: tl.constexpr):
    """Program (sequence and head, elements) turns what segments add into the states between them, in place."""
    i_h = (tl.program_id(0) % H).to(tl.int64)
    i_s = (tl.program_id(0) // H).to(tl.int64)
    start = 0
    length = T
    slot = i_s * tiles
    if cu_seqlens is not None:
        start = clamped(cu_seqlens + i_s, T)
        length = tl.maximum(clamped(cu_seqlens + i_s + 1, T) - start, 0)
        slot = start // SEGMENT + i_s
    count = tl.cdiv(length, SEGMENT)
    o_x = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    m_x = o_x < K * V
    b_s = tl.zeros([BLOCK_SIZE], dtype=tl.float32)
    if edge is not None:
        b_s = tl.load(edge + (i_s * H + i_h) * (K * V) + o_x, mask=m_x, other=0.0)
    for i in range(1, count):
        i_x = (slot + (count - 1 - i if DESCENDING else i)) * H + i_h
        p_s = states + i_x * (K * V) + o_x
        b_s = b_s * tl.load(factors + i_x * K + o_x // V, mask=m_x, other=0.0) + tl.load(p_s, mask=m_x, other=0.0)
        tl.store(p_s, b_s, mask=m_x)


# ---- inside a chunk --------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_VARYING)
def linear_attention_scores_kernel(
        q, k, scores, decay, bonus, cu_seqlens, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
        stride_gb, stride_gt, stride_gh, T, H, tiles, sequences, scale, K: tl.constexpr, G: tl.constexpr,
        BK: tl.constexpr, C: tl.constexpr, BONUS: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr):
    """Program (block of queries of a chunk of a head) owns their scores [b, rows, h, keys of the chunk].

    Of a decay per channel, weights included; those with keys of later blocks are not written.
    """
    BLOCKS: tl.constexpr = C // BLOCK
    i_x = tl.program_id(0) % BLOCKS
    i_h = (tl.program_id(0) // BLOCKS % H).to(tl.int64)
    i_s, i_b, start, length, i_t = _place(tl.program_id(0) // BLOCKS // H, cu_seqlens, sequences, T, tiles, C)
    first = i_t * C + i_x * BLOCK
    if first >= length:
        return
    origin = _origin(start, length, REVERSE)
    step = -1 if REVERSE else 1
    p_q = q + i_b * stride_qb + i_h // G * stride_qh + origin * stride_qt
    p_k = k + i_b * stride_kb + i_h // G * stride_kh + origin * stride_kt
    p_g = decay + i_b * stride_gb + i_h * stride_gh + origin * stride_gt
    stride_g = step * stride_gt
    o_b = tl.arange(0, BLOCK)
    n = tl.minimum(length - first, BLOCK)
    m_q = o_b < n
    o_t = (first + o_b).to(tl.int64) * step
    p_s = scores + ((i_b * T + origin + o_t) * H + i_h)[:, None] * C + o_b[None, :]
    b_q = load_tile(p_q, o_t * stride_qt, 0, m_q, K, BK, True)  # [BLOCK, BK]
    b_qs = b_q.to(tl.float32) * scale
    b_qx = (b_qs * _exp(_query_logs(p_g, stride_g, 0.0, first, n, 0, K, BK, BLOCK, CHANNEL, BONUS))).to(b_q.dtype)
    b_between = tl.zeros([BK], dtype=tl.float32)  # log factor of the blocks between
    for i in range(0, i_x):
        at = first - (i + 1) * BLOCK
        b_k = load_tile(p_k, (at + o_b).to(tl.int64) * (step * stride_kt), 0, o_b >= 0, K, BK, True)
        b_l = _key_logs(p_g, stride_g, 0.0, at, BLOCK, 0, K, BK, BLOCK, CHANNEL) + b_between[None, :]
        b_kx = (b_k.to(tl.float32) * _exp(b_l)).to(b_k.dtype)
        b_s = tl.dot(b_qx, tl.trans(b_kx), input_precision=PRECISION)
        store(p_s + (i_x - 1 - i) * BLOCK, b_s, m_q[:, None])
        b_between += _total_logs(p_g, stride_g, 0.0, at, BLOCK, 0, K, BK, BLOCK, CHANNEL)

    # Inside the block, from the last key to the first: one token's factor more lies between it and every query.
    o_k = tl.arange(0, BK)
    if BONUS:
        b_u = tl.load(bonus + i_h * K + o_k, mask=o_k < K, other=0.0)
    b_s = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    b_w = tl.full([BLOCK, BK], 1.0, dtype=tl.float32)
    for i in range(0, BLOCK):
        j = BLOCK - 1 - i
        at = tl.cast(first + j, tl.int64) * step
        b_g = tl.load(p_g + (at + step) * stride_gt + o_k, mask=o_k < tl.where(j + 1 < n, K, 0), other=0.0)
        b_w *= tl.where(o_b[:, None] > j + BONUS, _exp(b_g)[None, :], 1.0)
        b_k = tl.load(p_k + at * stride_kt + o_k, mask=o_k < tl.where(j < n, K, 0), other=0.0).to(tl.float32)
        b_x = b_qs * b_k[None, :]
        b_x *= tl.where(o_b[:, None] == j, b_u[None, :], b_w) if BONUS else b_w
        b_s = tl.where(o_b[None, :] == j, tl.sum(b_x, 1)[:, None], b_s)
    store(p_s + i_x * BLOCK, b_s, m_q[:, None])


@triton.jit(do_not_specialize=_VARYING)
def linear_attention_pairs_kernel(
        q, k, v, dout, decay, extra, denominator, dscores, ddecay, cu_seqlens, stride_qb, stride_qt, stride_qh,
        stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_ob, stride_ot, stride_oh, stride_gb,
        stride_gt, stride_gh, T, H, tiles, sequences, scale, K: tl.constexpr, V: tl.constexpr, G: tl.constexpr,
        BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr, BONUS: tl.constexpr,
        NORMALIZE: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr):
    """Program (chunk of a head) adds to ddecay what its pairs give; decay per channel: makes dscores = scale dO v^T."""
    i_h = (tl.program_id(0) % H).to(tl.int64)
    i_s, i_b, start, length, i_t = _place(tl.program_id(0) // H, cu_seqlens, sequences, T, tiles, C)
    first = i_t * C
    if first >= length:
        return
    origin = _origin(start, length, REVERSE)
    step = -1 if REVERSE else 1
    o_c = tl.arange(0, C)
    n = tl.minimum(length - first, C)
    m_t = o_c < n
    o_t = (first + o_c).to(tl.int64) * step
    o_row = (i_b * T + origin + o_t) * H + i_h
    p_v = v + i_b * stride_vb + i_h * stride_vh + origin * stride_vt
    p_o = dout + i_b * stride_ob + i_h * stride_oh + origin * stride_ot
    b_v = load_tile(p_v, o_t * stride_vt, 0, m_t, V, BV, True)
    b_do = load_tile(p_o, o_t * stride_ot, 0, m_t, V, BV, True)
    b_s = dot_rows(b_do, b_v, p_o, o_t * stride_ot, m_t, p_v, o_t * stride_vt, m_t, V, BV, True, True, PRECISION)
    b_r = tl.full([C], 1.0, dtype=tl.float32) * scale
    if NORMALIZE:
        b_s += tl.load(extra + o_row, mask=m_t, other=0.0)[:, None]
        b_r /= tl.load(denominator + o_row, mask=m_t, other=1.0)
    b_s *= b_r[:, None]
    if KIND == CHANNEL:
        tl.store(dscores + (o_row * C)[:, None] + o_c[None, :], b_s, mask=m_t[:, None])
    else:
        p_q = q + i_b * stride_qb + i_h // G * stride_qh + origin * stride_qt
        p_k = k + i_b * stride_kb + i_h // G * stride_kh + origin * stride_kt
        p_g = decay
        if KIND == TOKEN:
            p_g = decay + i_b * stride_gb + i_h * stride_gh + origin * stride_gt
        b_q = load_tile(p_q, o_t * stride_qt, 0, m_t, K, BK, True)
        b_k = load_tile(p_k, o_t * stride_kt, 0, m_t, K, BK, True)
        b_s *= dot_rows(b_q, b_k, p_q, o_t * stride_qt, m_t, p_k, o_t * stride_kt, m_t, K, BK, True, True, PRECISION)
        b_s *= _pair_weights(p_g, step * stride_gt, _head_log(decay, i_h, KIND), first, n, C, KIND, BONUS, False)
        b_d = _distance(C, False)
        # For token t, stored in its row (with a bonus, which wants queries after t, a row before): sum over queries
        # from t on, then over keys.
        b_s = tl.cumsum(tl.where(b_d >= BONUS, b_s, 0.0), 0, reverse=True)
        b_x = tl.sum(tl.where(b_d > BONUS, b_s, 0.0), 1)
        _add(ddecay + o_row - BONUS * step * H, b_x, m_t & (o_c >= BONUS))


@triton.jit
def _keys_before(p_k, stride_k, p_g, stride_g, at, b_between, i_k, m_j, K: tl.constexpr, BK: tl.constexpr):
    """Keys of the block at time `at`, decayed to the block whose distance is b_between -> [BLOCK, BK] fp32"""
    o_b = tl.arange(0, BLOCK)
    b_k = load_tile(p_k, (at + o_b).to(tl.int64) * stride_k, i_k, m_j, K, BK, True)
    b_l = _key_logs(p_g, stride_g, 0.0, at, BLOCK, i_k, K, BK, BLOCK, CHANNEL)
    return b_k.to(tl.float32) * _exp(b_l + b_between[None, :])


@triton.jit(do_not_specialize=_VARYING)
def linear_attention_channel_gradients_kernel(
        q, k, decay, dscores, dq, dk, ddecay, cu_seqlens, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt,
        stride_kh, stride_gb, stride_gt, stride_gh, T, H, tiles, sequences, K: tl.constexpr, G: tl.constexpr,
        BK: tl.constexpr, C: tl.constexpr, BONUS: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr):
    """Program (block of a chunk of a head, slice of K) owns dq, dk, ddecay of its rows, from pairs inside the chunk."""
    BLOCKS: tl.constexpr = C // BLOCK
    i_x = tl.program_id(0) % BLOCKS
    i_h = (tl.program_id(0) // BLOCKS % H).to(tl.int64)
    i_s, i_b, start, length, i_t = _place(tl.program_id(0) // BLOCKS // H, cu_seqlens, sequences, T, tiles, C)
    first = i_t * C + i_x * BLOCK
    if first >= length:
        return
    i_k = tl.program_id(1) * BK
    origin = _origin(start, length, REVERSE)
    step = -1 if REVERSE else 1
    p_q = q + i_b * stride_qb + i_h // G * stride_qh + origin * stride_qt
    p_k = k + i_b * stride_kb + i_h // G * stride_kh + origin * stride_kt
    p_g = decay + i_b * stride_gb + i_h * stride_gh + origin * stride_gt
    stride_q = step * stride_qt
    stride_k = step * stride_kt
    stride_g = step * stride_gt
    o_b = tl.arange(0, BLOCK)
    m_all = o_b >= 0
    n = tl.minimum(length - first, BLOCK)
    m_t = o_b < n
    o_t = first + o_b
    o_row = (i_b * T + origin + o_t.to(tl.int64) * step) * H + i_h
    p_ds = dscores + o_row[:, None] * C + o_b[None, :]  # [query, key] with keys of the chunk's first block
    row = H * (BLOCK * step * C)  # from a block of queries to the next

    b_q = load_tile(p_q, o_t.to(tl.int64) * stride_q, i_k, m_t, K, BK, True)
    b_k = load_tile(p_k, o_t.to(tl.int64) * stride_k, i_k, m_t, K, BK, True)
    dtype = b_q.dtype
    b_q = b_q.to(tl.float32)
    b_k = b_k.to(tl.float32)

    # Keys of earlier blocks.
    b_dq = tl.zeros([BLOCK, BK], dtype=tl.float32)
    b_between = tl.zeros([BK], dtype=tl.float32)
    for i in range(0, i_x):
        at = first - (i + 1) * BLOCK
        b_kx = _keys_before(p_k, stride_k, p_g, stride_g, at, b_between, i_k, m_all, K, BK)
        b_ds = load(p_ds + (i_x - 1 - i) * BLOCK, m_t[:, None])
        b_dq = tl.dot(b_ds.to(dtype), b_kx.to(dtype), b_dq, input_precision=PRECISION)
        b_between += _total_logs(p_g, stride_g, 0.0, at, BLOCK, i_k, K, BK, BLOCK, CHANNEL)
    b_dq *= _exp(_query_logs(p_g, stride_g, 0.0, first, n, i_k, K, BK, BLOCK, CHANNEL, BONUS))

    # Queries of later blocks, and what crosses this block: earlier keys with later queries.
    b_dk = tl.zeros([BLOCK, BK], dtype=tl.float32)
    b_cross = tl.zeros([BK], dtype=tl.float32)
    b_between = tl.zeros([BK], dtype=tl.float32)
    for i in range(i_x + 1, BLOCKS):
        at = first + (i - i_x) * BLOCK
        m_l = at + o_b < length
        n_l = tl.minimum(tl.maximum(length - at, 0), BLOCK)
        b_l = _query_logs(p_g, stride_g, 0.0, at, n_l, i_k, K, BK, BLOCK, CHANNEL, BONUS) + b_between[None, :]
        b_qx = load_tile(p_q, (at + o_b).to(tl.int64) * stride_q, i_k, m_l, K, BK, True).to(tl.float32) * _exp(b_l)
        b_ds = load(p_ds + (i - i_x) * row + i_x * BLOCK, m_l[:, None])
        b_dk = tl.dot(tl.trans(b_ds.to(dtype)), b_qx.to(dtype), b_dk, input_precision=PRECISION)
        if ddecay is not None:
            b_before = tl.zeros([BK], dtype=tl.float32)
            for j in range(0, i_x):
                at_j = first - (j + 1) * BLOCK
                b_kx = _keys_before(p_k, stride_k, p_g, stride_g, at_j, b_before, i_k, m_all, K, BK)
                b_ds = load(p_ds + (i - i_x) * row + (i_x - 1 - j) * BLOCK, m_l[:, None])
                b_cross += tl.sum(tl.dot(b_ds.to(dtype), b_kx.to(dtype), input_precision=PRECISION) * b_qx, 0)
                b_before += _total_logs(p_g, stride_g, 0.0, at_j, BLOCK, i_k, K, BK, BLOCK, CHANNEL)
        b_between += _total_logs(p_g, stride_g, 0.0, at, n_l, i_k, K, BK, BLOCK, CHANNEL)
    b_dk *= _exp(_key_logs(p_g, stride_g, 0.0, first, n, i_k, K, BK, BLOCK, CHANNEL))
    if ddecay is not None:
        b_cross *= _exp(_total_logs(p_g, stride_g, 0.0, first, n, i_k, K, BK, BLOCK, CHANNEL))
        b_from = tl.cumsum(b_q * b_dq, 0, reverse=True)  # queries from each row on
        b_until = b_k * b_dk

    # Pairs inside the block, key by key, as in the scores.
    o_k = i_k + tl.arange(0, BK)
    b_w = tl.full([BLOCK, BK], 1.0, dtype=tl.float32)
    for i in range(0, BLOCK):
        j = BLOCK - 1 - i
        at = tl.cast(first + j, tl.int64) * step
        b_g = tl.load(p_g + (at + step) * stride_gt + o_k, mask=o_k < tl.where(j + 1 < n, K, 0), other=0.0)
        b_w *= tl.where(o_b[:, None] > j + BONUS, _exp(b_g)[None, :], 1.0)
        b_key = tl.load(p_k + at * stride_kt + o_k, mask=o_k < tl.where(j < n, K, 0), other=0.0).to(tl.float32)
        b_ds = tl.load(dscores + o_row * C + (i_x * BLOCK + j), mask=m_t & (o_b >= j + BONUS), other=0.0)
        b_x = b_ds[:, None] * b_w
        b_dq += b_x * b_key[None, :]
        b_x *= b_q
        b_dk += tl.where(o_b[:, None] == j, tl.sum(b_x, 0)[None, :], 0.0)
        if ddecay is not None:
            b_x = tl.cumsum(b_x * b_key[None, :], 0, reverse=True)
            b_from += tl.where(o_b[:, None] > j + BONUS, b_x, 0.0)

    store_tile(dq, o_row * K, i_k, m_t, K, BK, b_dq)
    store_tile(dk, o_row * K, i_k, m_t, K, BK, b_dk)
    if ddecay is not None:
        # Rows j < t of one and, with a bonus, row t + 1 of the other: sums with weights 0 and 1.
        b_d = o_b[:, None] - o_b[None, :]
        b_dg = tl.dot((b_d > 0).to(tl.float32), b_until, input_precision="ieee") + b_cross[None, :]
        if BONUS:
            b_dg = tl.dot((b_d == -1).to(tl.float32), b_from, b_dg, input_precision="ieee")
        else:
            b_dg += b_from
        store_tile(ddecay, o_row * K, i_k, m_t, K, BK, b_dg)


@triton.jit(do_not_specialize=["T", "rows"])
def linear_attention_extra_kernel(out, dout, extra, stride_ob, stride_ot, stride_oh, stride_db, stride_dt, stride_dh,
                                  T, H, rows, V: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr):
    """One program owns BM rows of extra[b, t, h] = -out . dout: the gradient of the denominator, times it."""
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_m = o_m < rows
    i_h = o_m % H
    i_t = o_m // H % T
    i_b = o_m // H // T
    b_x = tl.zeros([BM], dtype=tl.float32)
    for i_v in range(0, V, BV):
        b_o = load_tile(out, i_b * stride_ob + i_t * stride_ot + i_h * stride_oh, i_v, m_m, V, BV, True)
        b_d = load_tile(dout, i_b * stride_db + i_t * stride_dt + i_h * stride_dh, i_v, m_m, V, BV, True)
        b_x -= tl.sum(b_o.to(tl.float32) * b_d.to(tl.float32), 1)
    tl.store(extra + o_m, b_x, mask=m_m)


# ---- one step --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["slots"])
def linear_attention_step_kernel(
        state, q, k, v, out, decay, bonus, state_indices, stride_sb, stride_sh, stride_qb, stride_qh, stride_kb,
        stride_kh, stride_vb, stride_vh, stride_gb, stride_gh, H, slots, scale, K: tl.constexpr, V: tl.constexpr,
        G: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, KIND: tl.constexpr, BONUS: tl.constexpr,
        NORMALIZE: tl.constexpr):
    """Program (entry and head, slice of V) updates its columns of the state, with NORMALIZE all of them."""
    i_h = (tl.program_id(0) % H).to(tl.int64)
    i_b = (tl.program_id(0) // H).to(tl.int64)
    slot = i_b
    if state_indices is not None:
        slot = tl.load(state_indices + i_b).to(tl.int64)
    exists = (slot >= 0) & (slot < slots)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    b_v = load(v + i_b * stride_vb + i_h * stride_vh + o_v, o_v < V).to(tl.float32)
    if NORMALIZE:
        b_v = tl.where(o_v == V, 1.0, b_v)
    COLUMNS: tl.constexpr = V + NORMALIZE
    p_g = decay
    if KIND != NONE:
        p_g = decay + i_b * stride_gb + i_h * stride_gh
    b_o = tl.zeros([BV], dtype=tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < K
        b_q = load(q + i_b * stride_qb + i_h // G * stride_qh + o_k, m_k).to(tl.float32) * scale
        b_k = load(k + i_b * stride_kb + i_h // G * stride_kh + o_k, m_k).to(tl.float32)
        p_s = state + slot * stride_sb + i_h * stride_sh + (o_k * COLUMNS)[:, None] + o_v[None, :]
        m_s = _below(o_k, K, exists)[:, None] & (o_v < COLUMNS)[None, :]
        b_s = tl.load(p_s, mask=m_s, other=0.0)  # [BK, BV]
        b_new = b_k[:, None] * b_v[None, :]
        if BONUS:
            b_u = load(bonus + i_h * K + o_k, m_k)
            b_o += tl.sum((b_s + b_u[:, None] * b_new) * b_q[:, None], 0)
        if KIND == CHANNEL:
            b_s *= _exp(load(p_g + o_k, m_k))[:, None]
        elif KIND != NONE:
            b_s *= _exp(tl.load(p_g))
        b_s += b_new
        if not BONUS:
            b_o += tl.sum(b_s * b_q[:, None], 0)
        tl.store(p_s, b_s, mask=m_s)
    if NORMALIZE:
        b_o /= tl.sum(tl.where(o_v == V, b_o, 0.0), 0) + EPSILON
    store(out + (i_b * H + i_h) * V + o_v, tl.where(exists, b_o, 0.0), o_v < V)


# ---- configurations --------------------------------------------------------------------------------------------------


class _Config(NamedTuple):
    """Tokens of a chunk, columns of a slice of the state, and how the walk is compiled."""

    C: int
    columns: int
    num_warps: int
    num_stages: int


# class of targets -> the larger head size -> configuration: the first size that holds it serves; a class without an
# entry takes sm_80's. Derived, not measured: the state, the scores and a slice of the result must fit registers without
# spills, two rows of whole heads and their stages shared memory (read off code compiled ahead of time, as in
# tests/triton_aot).
_WALK = {
    "sm_80": {64: _Config(32, 32, 4, 2), 128: _Config(32, 32, 8, 2), 256: _Config(32, 32, 8, 1),
              512: _Config(16, 32, 8, 1)},
    "sm_90": {64: _Config(64, 64, 8, 2), 128: _Config(64, 32, 8, 2), 256: _Config(32, 32, 8, 1),
              512: _Config(16, 32, 8, 1)},
    # sm_80's matrix instructions, but the same kernels take more registers there: narrower slices.
    "sm_120": {64: _Config(32, 16, 4, 2), 128: _Config(32, 16, 8, 2), 256: _Config(32, 32, 8, 1),
               512: _Config(16, 32, 8, 1)},
    "gfx942": {64: _Config(64, 32, 4, 1), 128: _Config(32, 32, 4, 1), 256: _Config(16, 32, 8, 1),
               512: _Config(16, 32, 8, 1)},
}
# float32 runs on the ordinary multipliers, alike on every NVIDIA GPU.
_WALK_32 = {
    "sm_80": {128: _Config(32, 32, 8, 1), 512: _Config(16, 16, 8, 1)},
    "gfx942": {64: _Config(32, 32, 4, 1), 128: _Config(32, 32, 8, 1), 512: _Config(16, 16, 8, 1)},
}
_INTERPRETED = _Config(64, 32, 4, 1)  # so that small tensors have several slices, and chunks of several blocks


def _class(name: str) -> str:
    """The class of targets that one belongs to, by its matrix instructions and shared memory."""
    if name in ("sm_90", "sm_100", "sm_103"):
        return "sm_90"
    # What sm_80 runs fits the 99 KB of sm_86, sm_89 and sm_120. Older NVIDIA GPUs have 64 KB as AMD's; so may others.
    if name.startswith("sm_12"):
        return "sm_120"
    return "sm_80" if name.startswith(("sm_8", "sm_11")) else "gfx942"


def _config(q: Tensor, v: Tensor, kind: int) -> _Config:
    name = target(q.device)
    if name == "interpreter":
        return _INTERPRETED
    classes = _WALK if q.element_size() == 2 else _WALK_32
    sizes, size = classes.get(_class(name), classes["sm_80"]), max(q.shape[3], v.shape[-1])
    if kind == CHANNEL.value:
        # Its factors are as large as the operands, so that chunks of 64 tokens spill.
        sizes, size = sizes if sizes is not classes.get("sm_90") else classes["sm_80"], max(size, 128)
    return next(config for limit, config in sizes.items() if limit >= size)


def _padded(size: int) -> int:
    """The columns of a tile that holds `size`: matrix instructions take at least 16."""
    return max(triton.next_power_of_2(size), 16)


def _rows(x: Tensor) -> Tensor:
    """x with a contiguous last axis; the other strides are free."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(axes: str = "bth", **tensors: Tensor | None) -> dict[str, int]:
    return {f"stride_{name}{axis}": 0 if x is None or x.dim() < len(axes) else x.stride(i)
            for name, x in tensors.items() for i, axis in enumerate(axes)}


def _kind(decay: Tensor | None, tokens: int = 1) -> int:
    """The kind of a decay whose leading axes before the heads are `tokens` + 1."""
    if decay is None:
        return NONE.value
    return HEAD.value if decay.dim() == 1 else CHANNEL.value if decay.dim() == tokens + 3 else TOKEN.value


class _Call:
    """What the kernels of one call share, and their launches."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, bonus: Tensor | None,
                 cu_seqlens: Tensor | None, scale: float, normalize: bool, reverse: bool) -> None:
        self.q, self.k, self.v = _rows(q), _rows(k), _rows(v)
        self.batch, self.tokens, self.heads, self.value_dim = v.shape
        self.key_dim, self.groups = q.shape[3], v.shape[2] // q.shape[2]
        self.kind = _kind(decay)
        self.decay = decay
        if decay is not None:
            self.decay = _rows(decay) if self.kind == CHANNEL.value else decay.contiguous()
        self.bonus = None if bonus is None else bonus.contiguous()
        self.cu_seqlens, self.normalize = cu_seqlens, normalize
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.segment = registration.SEGMENT
        self.several = self.tokens > self.segment  # a sequence may have several segments
        self.config = _config(q, v, self.kind)
        self.scale = scale
        self.places = dict(decay=self.decay, cu_seqlens=cu_seqlens, T=self.tokens, H=self.heads,
                           sequences=self.sequences, **_strides(g=self.decay))
        self.options = dict(G=self.groups, C=self.config.C, BONUS=int(bonus is not None), REVERSE=reverse,
                            PRECISION=dot_precision(q.dtype))

    def tiles(self, block: int) -> tuple[int, int]:
        """-> (tiles of `block` tokens of all sequences, those of one unpacked sequence)."""
        if self.cu_seqlens is not None:
            return self.tokens // block + self.sequences, 0
        each = max(triton.cdiv(self.tokens, block), 1)
        return self.batch * each, each

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory for a result: rows that belong to no sequence, and tiles without tokens, are zero."""
        return self.q.new_empty(shape, dtype=dtype) if self.cu_seqlens is None else self.q.new_zeros(shape, dtype=dtype)

    def rows(self, *columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.empty(self.batch, self.tokens, self.heads, *columns, dtype=dtype)

    def states(self, count: int) -> Tensor:
        return self.empty(count, self.heads, self.key_dim, self.value_dim + self.normalize)

    def walk(self, a: Tensor, b: Tensor, c: Tensor, result: Tensor | None, *, states: Tensor | None,
             transposed: bool = False, descending: bool = False, gradient: bool = True, edge_kept: bool = False,
             d: Tensor | None = None, **given: Tensor | None) -> None:
        config, tiles = self.config, self.tiles(self.segment)
        BV = min(_padded(c.shape[3]), config.columns)
        optional = dict.fromkeys(("within", "scores", "extra", "denominator", "edge", "last", "factors", "ddecay",
                                  "dbonus", "chunk_states"))
        launch(linear_attention_walk_kernel, (tiles[0] * self.heads, triton.cdiv(c.shape[3], BV)), self.q.device, a=a,
               b=b, c=c, d=d, result=result, states=states, bonus=self.bonus, tiles=tiles[1], scale=self.scale,
               A=a.shape[3], V=c.shape[3], BA=_padded(a.shape[3]), BV=BV, SEGMENT=self.segment, KIND=self.kind,
               NORMALIZE=self.normalize, RESULT=result is not None, GRADIENT=gradient, TRANSPOSED=transposed,
               DESCENDING=descending, EDGE_KEPT=edge_kept, num_warps=config.num_warps, num_stages=config.num_stages,
               **_strides(a=a, b=b, c=c, d=d), **self.places, **self.options, **{**optional, **given})

    def between(self, b: Tensor, c: Tensor, edge: Tensor | None, states: Tensor, *, descending: bool = False,
                gradient: bool = False, **given: Tensor | None) -> None:
        """Fills `states` [tiles, H, K, Ve] with the state before every segment but the first, `edge` being that one's.

        Descending: with the gradient of the state after every segment but the last.
        """
        factors = self.empty(states.shape[0], self.heads, self.key_dim)
        self.walk(b, b, c, None, states=states, factors=factors, descending=descending, gradient=gradient, **given)
        size, block = self.key_dim * states.shape[3], 1024
        places = {name: x for name, x in self.places.items() if not name.startswith(("stride", "decay"))}
        launch(linear_attention_scan_kernel, (self.sequences * self.heads, triton.cdiv(size, block)), self.q.device,
               states=states, factors=factors, edge=edge, tiles=self.tiles(self.segment)[1], K=self.key_dim,
               V=states.shape[3], SEGMENT=self.segment, BLOCK_SIZE=block, DESCENDING=descending, num_warps=4,
               num_stages=1, **places)

    def scores(self) -> Tensor | None:
        """Weighted scores of the pairs inside chunks, where the decay is per channel."""
        if self.kind != CHANNEL.value:
            return None
        scores, tiles = self.rows(self.config.C, dtype=self.q.dtype), self.tiles(self.config.C)
        launch(linear_attention_scores_kernel, (tiles[0] * self.heads * (self.config.C // BLOCK.value),),
               self.q.device, q=self.q, k=self.k, scores=scores, bonus=self.bonus, tiles=tiles[1], scale=self.scale,
               K=self.key_dim, BK=_padded(self.key_dim), num_warps=4, num_stages=1, **_strides(q=self.q, k=self.k),
               **self.places, **self.options)
        return scores

    def pairs(self, dout: Tensor, extra: Tensor | None, denominator: Tensor, ddecay: Tensor | None) -> Tensor | None:
        """-> gradients of the scores if the decay is per channel, else adds what pairs inside chunks give to ddecay."""
        dscores = self.rows(self.config.C) if self.kind == CHANNEL.value else None
        tiles = self.tiles(self.config.C)
        launch(linear_attention_pairs_kernel, (tiles[0] * self.heads,), self.q.device, q=self.q, k=self.k, v=self.v,
               dout=dout, extra=extra, denominator=denominator, dscores=dscores, ddecay=ddecay, tiles=tiles[1],
               scale=self.scale, K=self.key_dim, V=self.value_dim, BK=min(_padded(self.key_dim), 64),
               BV=min(_padded(self.value_dim), 64), KIND=self.kind, NORMALIZE=self.normalize, num_warps=4, num_stages=1,
               **_strides(q=self.q, k=self.k, v=self.v, o=dout), **self.places, **self.options)
        return dscores

    def channel_gradients(self, dscores: Tensor, ddecay: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> dq and dk from pairs inside chunks; fills ddecay with what they give."""
        dq, dk = self.rows(self.key_dim), self.rows(self.key_dim)
        BK, tiles = min(_padded(self.key_dim), 64), self.tiles(self.config.C)
        launch(linear_attention_channel_gradients_kernel,
               (tiles[0] * self.heads * (self.config.C // BLOCK.value), triton.cdiv(self.key_dim, BK)), self.q.device,
               q=self.q, k=self.k, dscores=dscores, dq=dq, dk=dk, ddecay=ddecay, tiles=tiles[1], K=self.key_dim, BK=BK,
               num_warps=4, num_stages=1, **_strides(q=self.q, k=self.k), **self.places, **self.options)
        return dq, dk


def fwd(q, k, v, decay, bonus, initial_state, cu_seqlens, scale, normalize, reverse, checkpoint):
    call = _Call(q, k, v, decay, bonus, cu_seqlens, scale, normalize, reverse)
    initial_state = None if initial_state is None else initial_state.contiguous()
    out = call.rows(call.value_dim, dtype=q.dtype)
    denominator = call.rows() if normalize else q.new_empty(call.batch, 0, call.heads, dtype=torch.float32)
    final_state = call.empty(call.sequences, call.heads, call.key_dim, call.value_dim + normalize)
    states = call.states(registration.tiles(v, cu_seqlens)) if checkpoint or call.several else None
    if call.several:
        call.between(call.k, call.v, initial_state, states)
    call.walk(call.q, call.k, call.v, out, states=states, gradient=False, edge=initial_state, last=final_state,
              denominator=denominator, scores=call.scores())
    return out, final_state, states if checkpoint else final_state.new_empty(0, *final_state.shape[1:]), denominator


def bwd(dout, dfinal_state, q, k, v, decay, bonus, cu_seqlens, out, checkpoints, denominator, scale, normalize, reverse,
        decay_gradient):
    call = _Call(q, k, v, decay, bonus, cu_seqlens, scale, normalize, reverse)
    q, k, v, dout = call.q, call.k, call.v, _rows(dout)
    dfinal_state = None if dfinal_state is None else dfinal_state.contiguous()
    channel = call.kind == CHANNEL.value
    rows = dict(denominator=denominator.contiguous(), extra=None)
    if normalize:
        out, rows["extra"] = _rows(out), call.rows()
        launch(linear_attention_extra_kernel, (triton.cdiv(rows["extra"].numel(), 32),), q.device, out=out, dout=dout,
               extra=rows["extra"], T=call.tokens, H=call.heads, rows=rows["extra"].numel(), V=call.value_dim, BM=32,
               BV=min(_padded(call.value_dim), 64), num_warps=4, num_stages=1, **_strides(o=out, d=dout))
    checkpoints = checkpoints.contiguous()
    after = None  # gradients of the states after segments
    if call.several:
        after = call.states(checkpoints.shape[0])
        call.between(q, dout, dfinal_state, after, descending=True, gradient=True, **rows)

    # A decay that is one number per head gets its gradient from each slice of the keys.
    key_slices = triton.cdiv(call.key_dim, min(_padded(call.key_dim), call.config.columns))
    ddecay = chunk_states = None
    if decay_gradient:
        ddecay = call.rows(call.key_dim) if channel else q.new_zeros(key_slices, *v.shape[:3], dtype=torch.float32)
        chunk_states = call.states(checkpoints.shape[0] * triton.cdiv(min(call.tokens, call.segment), call.config.C))
    within_q = within_k = None
    if channel or decay_gradient:
        dscores = call.pairs(dout, **rows, ddecay=ddecay)
        if channel:
            within_q, within_k = call.channel_gradients(dscores, ddecay)

    of_k = q.dtype if call.groups == 1 else torch.float32
    dq, dk = call.rows(call.key_dim, dtype=of_k), call.rows(call.key_dim, dtype=of_k)
    dv = call.rows(call.value_dim, dtype=q.dtype)
    dbonus = call.empty(checkpoints.shape[0] if bonus is not None else 0, call.heads, call.key_dim)
    dinitial_state = call.empty(call.sequences, call.heads, call.key_dim, call.value_dim + normalize)
    decays = dict(ddecay=ddecay, chunk_states=chunk_states)
    call.walk(dout, v, k, dq, states=checkpoints, transposed=True, edge_kept=True, within=within_q,
              d=q if decay_gradient or bonus is not None else None, dbonus=None if bonus is None else dbonus, **decays,
              **rows)
    call.walk(v, dout, q, dk, states=after, transposed=True, descending=True, edge=dfinal_state, last=dinitial_state,
              within=within_k, d=k if decay_gradient else None, **decays, **rows)
    call.walk(k, q, dout, dv, states=after, descending=True, edge=dfinal_state, scores=call.scores(), **rows)
    if not decay_gradient:
        ddecay = q.new_empty(call.batch, 0, call.heads, *((call.key_dim,) if channel else ()), dtype=torch.float32)
    elif not channel:
        ddecay = ddecay.sum(0)
    return dq, dk, dv, ddecay, dbonus, dinitial_state


def step(state, q, k, v, decay, bonus, state_indices, scale, normalize):
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, heads, value_dim = v.shape
    key_dim, kind = q.shape[2], _kind(decay, tokens=0)
    if decay is not None:
        decay = _rows(decay) if kind == CHANNEL.value else decay.contiguous()
    out = v.new_empty(v.shape)
    columns = value_dim + normalize
    # Bound by memory: whole columns of the state in pieces of a few registers. The normaliser's one is needed by all.
    BV = _padded(columns) if normalize else min(_padded(columns), 64)
    BK = min(_padded(key_dim), max(4096 // BV, 8))
    strides = _strides("bh", s=state, q=q, k=k, v=v)
    if kind in (NONE.value, HEAD.value):
        strides |= dict(stride_gb=0, stride_gh=1)
    else:
        strides |= _strides("bh", g=decay)
    launch(linear_attention_step_kernel, (batch * heads, triton.cdiv(value_dim, BV)), q.device, state=state, q=q, k=k,
           v=v, out=out, decay=decay, bonus=None if bonus is None else bonus.contiguous(), state_indices=state_indices,
           H=heads, slots=state.shape[0], scale=scale, K=key_dim, V=value_dim, G=heads // q.shape[1], BK=BK, BV=BV,
           KIND=kind, BONUS=int(bonus is not None), NORMALIZE=normalize, num_warps=4, num_stages=1, **strides)
    return out
