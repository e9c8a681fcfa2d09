"""The selective scan in Triton: forward, backward and step, for real A. README.md derives the gradients.

Chunks of tokens are independent but for the state that enters them, so every pass has three kernels. The first runs
each chunk from zero and keeps what it does to a state: where it ends, and the product of its decays. The second walks
over the chunks of a sequence with just these. The third runs each chunk again from the right state. The machine is full
however few channels there are, and no decay is ever divided by another. The backward pass does the same with the
adjoint, from the last chunk to the first.

One program owns BD channels, which read the same B and C, and one chunk; it takes the states n one after another, each
as a scan along tokens. Nothing is accumulated across programs: sums over channels or tokens are kept per program and
added up afterwards, in a fixed order, so results are bitwise repeatable. Grids follow from shapes alone.

Names: `i_` index, `o_` offset, `m_` mask, `p_` pointer, `b_` block value.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..._dispatch import empty_like_layout
from ..._triton import INTERPRET, clamped, find_sequence, launch, load, store, target, tiles_packed
from .registration import CHUNK, in_heads

# Runtime values on which compiled code must not be specialised: they change from call to call.
_VARYING = ["L", "chunks", "sequences"]


@triton.jit
def _combine(b_a, b_x, b_c, b_y):
    """h -> c (a h + x) + y: one token after another."""
    return b_a * b_c, b_x * b_c + b_y


@triton.jit
def _exp(b_x):
    """e^x. The interpreter has NumPy's, which in float32 errs by more than what it stands for: 2.5 ulp."""
    if INTERPRET:
        b_e = tl.exp(b_x.to(tl.float64)).to(tl.float32)
    else:
        b_e = tl.exp(b_x)
    return b_e


@triton.jit
def _sigmoid(b_x):
    return 1.0 / (1.0 + _exp(-b_x))


@triton.jit
def _softplus(b_x):
    """log(1 + e^x), the identity above 20. log1p(e) is 2 atanh(e / (2 + e)), whose series keeps the bits of a small
    e."""
    b_e = _exp(-tl.abs(b_x))
    b_s = b_e / (b_e + 2.0)
    b_z = b_s * b_s
    b_p = b_z * (2.0 / 15) + (2.0 / 13)
    b_p = b_p * b_z + (2.0 / 11)
    b_p = b_p * b_z + (2.0 / 9)
    b_p = b_p * b_z + (2.0 / 7)
    b_p = b_p * b_z + (2.0 / 5)
    b_p = b_p * b_z + (2.0 / 3)
    b_p = b_p * b_z + 2.0
    return tl.where(b_x > 20.0, b_x, tl.maximum(b_x, 0.0) + b_s * b_p)


@triton.jit
def _chunk(cu_seqlens, i_c, i_b, sequences, L, BT: tl.constexpr):
    """-> (sequence, its first token, its length, the chunk's index in it); number `sequences` is the tokens of none."""
    i_s = i_b
    start = 0
    length = L
    if cu_seqlens is not None:
        i_s, start, length, i_c = find_sequence(i_c, cu_seqlens, sequences, L, BT)
    return i_s, start, length, i_c


@triton.jit
def _channels(i_d, per_group, D, inside, BD: tl.constexpr):
    """-> (group, channels, which exist, which of them belong to a sequence) of block i_d; blocks do not cross
    groups."""
    blocks = tl.cdiv(per_group, BD)
    i_g = i_d // blocks
    o_g = i_d % blocks * BD + tl.arange(0, BD)
    m_d = o_g < per_group
    o_d = (i_g * per_group + o_g).to(tl.int64)
    return i_g.to(tl.int64), o_d, m_d, m_d & (o_d < D * inside)


@triton.jit
def _tokens(p, o_d, m_d, o_t, m_t, stride_c, stride_t):
    """[BD, BT] of a tensor [B, D, L], in fp32."""
    p = p + (o_d[:, None] * stride_c + o_t.to(tl.int64)[None, :] * stride_t)
    return load(p, m_d[:, None] & m_t[None, :]).to(tl.float32)


@triton.jit
def _steps(p_delta, delta_bias, o_d, m_d, o_t, m_t, stride_c, stride_t, SOFTPLUS: tl.constexpr):
    """dt, zero where there is no token. -> [BD, BT]"""
    b_dt = _tokens(p_delta, o_d, m_d, o_t, m_t, stride_c, stride_t)
    if delta_bias is not None:
        b_dt += load(delta_bias + o_d, m_d)[:, None]
    if SOFTPLUS:
        b_dt = _softplus(b_dt)
    return tl.where(m_d[:, None] & m_t[None, :], b_dt, 0.0)


@triton.jit
def _projection(p, n, o_d, m_d, o_t, m_t, stride_n, stride_t, N: tl.constexpr, CONSTANT: tl.constexpr):
    """State n of B or C: [BD, 1] when constant, else [1, BT]."""
    if CONSTANT:
        b_x = load(p + o_d * N + n, m_d)[:, None]
    else:
        b_x = load(p + n * stride_n + o_t.to(tl.int64) * stride_t, m_t).to(tl.float32)[None, :]
    return b_x


@triton.jit
def _output_gradient(p_dout, p_z, o_d, m_d, o_t, m_t, stride_dc, stride_dt, stride_zc, stride_zt):
    """dy, the gradient before the gate."""
    b_dy = _tokens(p_dout, o_d, m_d, o_t, m_t, stride_dc, stride_dt)
    if p_z is not None:
        b_z = _tokens(p_z, o_d, m_d, o_t, m_t, stride_zc, stride_zt)
        b_dy = b_dy * (b_z * _sigmoid(b_z))
    return b_dy


@triton.jit
def _at(p, offset):
    """p + offset, None of None."""
    if p is not None:
        p = p + offset
    return p


@triton.jit(do_not_specialize=_VARYING)
def selective_scan_fwd_chunk_kernel(u, delta, A, B, delta_bias, cu_seqlens, ends, products, stride_ub, stride_uc,
                                    stride_ut, stride_sb,
                                    stride_sc, stride_st, stride_Bb, stride_Bg, stride_Bn, stride_Bt, D, L, per_group,
                                    chunks,
                                    sequences, N: tl.constexpr, B_CONSTANT: tl.constexpr, SOFTPLUS: tl.constexpr,
                                    BD: tl.constexpr,
                                    BT: tl.constexpr):
    """A chunk from zero: ends and products [chunks, N, D]."""
    blocks = D // per_group * tl.cdiv(per_group, BD)
    i_b = (tl.program_id(0) // chunks // blocks).to(tl.int64)
    o_p = (i_b * chunks + tl.program_id(0) % chunks) * N * D
    i_s, start, length, i_c = _chunk(cu_seqlens, tl.program_id(0) % chunks, i_b, sequences, L, BT)
    if i_c * BT >= length:
        return
    i_g, o_d, m_d, m_in = _channels(tl.program_id(0) // chunks % blocks, per_group, D, i_s < sequences, BD)
    o_k = tl.arange(0, BT)
    o_t = i_c * BT + o_k
    m_t = o_t < length
    o_start = tl.cast(start, tl.int64)
    b_dt = _steps(delta + i_b * stride_sb + o_start * stride_st, delta_bias, o_d, m_in, o_t, m_t, stride_sc, stride_st,
                  SOFTPLUS)
    b_dtu = b_dt * _tokens(u + i_b * stride_ub + o_start * stride_ut, o_d, m_in, o_t, m_t, stride_uc, stride_ut)
    p_B = B if B_CONSTANT else B + i_b * stride_Bb + i_g * stride_Bg + o_start * stride_Bt
    for n in range(0, N):
        b_a = _exp(b_dt * load(A + o_d * N + n, m_d)[:, None])
        b_x = b_dtu * _projection(p_B, n, o_d, m_d, o_t, m_t, stride_Bn, stride_Bt, N, B_CONSTANT)
        b_a, b_h = tl.associative_scan((b_a, b_x), 1, _combine)
        m_last = (o_k == BT - 1)[None, :]
        tl.store(ends + o_p + n * D + o_d, tl.sum(tl.where(m_last, b_h, 0.0), 1), mask=m_d)
        tl.store(products + o_p + n * D + o_d, tl.sum(tl.where(m_last, b_a, 0.0), 1), mask=m_d)


@triton.jit(do_not_specialize=_VARYING)
def selective_scan_fwd_carry_kernel(ends, products, first_state, last_state, cu_seqlens, D, L, chunks, sequences,
                                    N: tl.constexpr,
                                    REVERSE: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr):
    """Replaces each chunk's end from zero by the state that enters it, in the order of the scan; states are [sequences,
    D, N]."""
    blocks = tl.cdiv(D * N, BM)
    i_s = tl.program_id(0) // blocks
    first = i_s * chunks
    length = L
    if cu_seqlens is not None:
        start = clamped(cu_seqlens + i_s, L)
        length = tl.maximum(clamped(cu_seqlens + i_s + 1, L) - start, 0)
        first = start // BT + i_s
    o_m = tl.program_id(0) % blocks * BM + tl.arange(0, BM)  # n D + d
    m_m = o_m < D * N
    o_state = tl.cast(i_s, tl.int64) * D * N + o_m % D * N + o_m // D
    b_h = tl.zeros([BM], dtype=tl.float32)
    if first_state is not None:
        b_h = tl.load(first_state + o_state, mask=m_m, other=0.0)
    count = tl.cdiv(length, BT)
    for i in range(0, count):
        i_c = first + i
        if REVERSE:
            i_c = first + count - 1 - i
        o_p = tl.cast(i_c, tl.int64) * D * N + o_m
        b_end = tl.load(ends + o_p, mask=m_m, other=0.0)
        b_product = tl.load(products + o_p, mask=m_m, other=0.0)
        tl.store(ends + o_p, b_h, mask=m_m)
        b_h = b_product * b_h + b_end
    if last_state is not None:
        tl.store(last_state + o_state, b_h, mask=m_m)


@triton.jit(do_not_specialize=_VARYING)
def selective_scan_fwd_kernel(u, delta, A, B, C, skip, z, delta_bias, cu_seqlens, states, out, stride_ub, stride_uc,
                              stride_ut, stride_sb,
                              stride_sc, stride_st, stride_zb, stride_zc, stride_zt, stride_ob, stride_oc, stride_ot,
                              stride_Bb,
                              stride_Bg, stride_Bn, stride_Bt, stride_Cb, stride_Cg, stride_Cn, stride_Ct, D, L,
                              per_group, chunks,
                              sequences, N: tl.constexpr, B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr,
                              SOFTPLUS: tl.constexpr,
                              BD: tl.constexpr, BT: tl.constexpr):
    """A chunk from the state that enters it."""
    blocks = D // per_group * tl.cdiv(per_group, BD)
    i_b = (tl.program_id(0) // chunks // blocks).to(tl.int64)
    o_p = (i_b * chunks + tl.program_id(0) % chunks) * N * D
    i_s, start, length, i_c = _chunk(cu_seqlens, tl.program_id(0) % chunks, i_b, sequences, L, BT)
    if i_c * BT >= length:
        return
    i_g, o_d, m_d, m_in = _channels(tl.program_id(0) // chunks % blocks, per_group, D, i_s < sequences, BD)
    o_t = i_c * BT + tl.arange(0, BT)
    m_t = o_t < length
    o_start = tl.cast(start, tl.int64)
    b_dt = _steps(delta + i_b * stride_sb + o_start * stride_st, delta_bias, o_d, m_in, o_t, m_t, stride_sc, stride_st,
                  SOFTPLUS)
    b_u = _tokens(u + i_b * stride_ub + o_start * stride_ut, o_d, m_in, o_t, m_t, stride_uc, stride_ut)
    p_B = B if B_CONSTANT else B + i_b * stride_Bb + i_g * stride_Bg + o_start * stride_Bt
    p_C = C if C_CONSTANT else C + i_b * stride_Cb + i_g * stride_Cg + o_start * stride_Ct
    b_y = tl.zeros([BD, BT], dtype=tl.float32)
    for n in range(0, N):
        b_a = _exp(b_dt * load(A + o_d * N + n, m_d)[:, None])
        b_x = b_dt * b_u * _projection(p_B, n, o_d, m_d, o_t, m_t, stride_Bn, stride_Bt, N, B_CONSTANT)
        b_a, b_h = tl.associative_scan((b_a, b_x), 1, _combine)
        b_h += b_a * load(states + o_p + n * D + o_d, m_in)[:, None]
        b_y += b_h * _projection(p_C, n, o_d, m_in, o_t, m_t, stride_Cn, stride_Ct, N, C_CONSTANT)
    if skip is not None:
        b_y += load(skip + o_d, m_d)[:, None] * b_u
    if z is not None:
        b_z = _tokens(z + i_b * stride_zb + o_start * stride_zt, o_d, m_in, o_t, m_t, stride_zc, stride_zt)
        b_y = b_y * (b_z * _sigmoid(b_z))
    p_o = out + i_b * stride_ob + o_start * stride_ot
    store(p_o + (o_d[:, None] * stride_oc + o_t.to(tl.int64)[None, :] * stride_ot), b_y, m_d[:, None] & m_t[None, :])


@triton.jit(do_not_specialize=_VARYING)
def selective_scan_bwd_chunk_kernel(delta, A, C, z, delta_bias, dout, cu_seqlens, ends, products, stride_sb, stride_sc,
                                    stride_st,
                                    stride_zb, stride_zc, stride_zt, stride_db, stride_dc, stride_dt, stride_Cb,
                                    stride_Cg, stride_Cn,
                                    stride_Ct, D, L, per_group, chunks, sequences, N: tl.constexpr,
                                    C_CONSTANT: tl.constexpr,
                                    SOFTPLUS: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr):
    """a g of a chunk's first token, given that of the token after the chunk is zero: ends and products [chunks, N,
    D]."""
    blocks = D // per_group * tl.cdiv(per_group, BD)
    i_b = (tl.program_id(0) // chunks // blocks).to(tl.int64)
    o_p = (i_b * chunks + tl.program_id(0) % chunks) * N * D
    i_s, start, length, i_c = _chunk(cu_seqlens, tl.program_id(0) % chunks, i_b, sequences, L, BT)
    if i_c * BT >= length:
        return
    i_g, o_d, m_d, m_in = _channels(tl.program_id(0) // chunks % blocks, per_group, D, i_s < sequences, BD)
    o_k = tl.arange(0, BT)
    o_t = i_c * BT + o_k
    m_t = o_t < length
    o_start = tl.cast(start, tl.int64)
    b_dt = _steps(delta + i_b * stride_sb + o_start * stride_st, delta_bias, o_d, m_in, o_t, m_t, stride_sc, stride_st,
                  SOFTPLUS)
    b_dy = _output_gradient(dout + i_b * stride_db + o_start * stride_dt, _at(z,
                                                                              i_b * stride_zb + o_start * stride_zt),
                                                                              o_d, m_in, o_t,
                            m_t, stride_dc, stride_dt, stride_zc, stride_zt)
    p_C = C if C_CONSTANT else C + i_b * stride_Cb + i_g * stride_Cg + o_start * stride_Ct
    for n in range(0, N):
        b_a = _exp(b_dt * load(A + o_d * N + n, m_d)[:, None])
        b_x = b_a * (b_dy * _projection(p_C, n, o_d, m_in, o_t, m_t, stride_Cn, stride_Ct, N, C_CONSTANT))
        b_a, b_q = tl.associative_scan((b_a, b_x), 1, _combine, reverse=True)
        m_first = (o_k == 0)[None, :]
        tl.store(ends + o_p + n * D + o_d, tl.sum(tl.where(m_first, b_q, 0.0), 1), mask=m_d)
        tl.store(products + o_p + n * D + o_d, tl.sum(tl.where(m_first, b_a, 0.0), 1), mask=m_d)


@triton.jit(do_not_specialize=_VARYING)
def selective_scan_bwd_kernel(u, delta, A, B, C, skip, z, delta_bias, dout, cu_seqlens, states, carries, du, ddelta,
                              dz, dA, dB, dC,
                              dskip, ddelta_bias, stride_ub, stride_uc, stride_ut, stride_sb, stride_sc, stride_st,
                              stride_zb, stride_zc,
                              stride_zt, stride_db, stride_dc, stride_dt, stride_Bb, stride_Bg, stride_Bn, stride_Bt,
                              stride_Cb,
                              stride_Cg, stride_Cn, stride_Ct, stride_dub, stride_duc, stride_dut, stride_dsb,
                              stride_dsc, stride_dst,
                              stride_dzb, stride_dzc, stride_dzt, batch, D, L, per_group, chunks, sequences,
                              N: tl.constexpr,
                              B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr, SOFTPLUS: tl.constexpr,
                              BD: tl.constexpr,
                              BT: tl.constexpr):
    """A chunk from the state that enters it and, backwards, from a g of the token after it.

    Neighbours' values are loaded and computed again rather than moved between threads. dA, constant dB and dC [chunks,
    N, D], dskip and ddelta_bias [chunks, D] are this chunk's parts; dB and dC per token are this block of channels'
    parts [blocks of a group, B, G, N, L].
    """
    of_group = tl.cdiv(per_group, BD)
    groups = D // per_group
    blocks = groups * of_group
    i_b = (tl.program_id(0) // chunks // blocks).to(tl.int64)
    i_d = tl.program_id(0) // chunks % blocks
    i_p = i_b * chunks + tl.program_id(0) % chunks
    o_p = i_p * N * D
    i_s, start, length, i_c = _chunk(cu_seqlens, tl.program_id(0) % chunks, i_b, sequences, L, BT)
    if i_c * BT >= length:
        return
    i_g, o_d, m_d, m_in = _channels(i_d, per_group, D, i_s < sequences, BD)
    o_k = tl.arange(0, BT)
    o_t = i_c * BT + o_k
    m_t = o_t < length
    m_before = m_t & (o_k > 0)
    m_after = (o_t + 1 < length) & (o_k < BT - 1)
    o_start = tl.cast(start, tl.int64)
    p_u = u + i_b * stride_ub + o_start * stride_ut
    p_delta = delta + i_b * stride_sb + o_start * stride_st
    p_z = _at(z, i_b * stride_zb + o_start * stride_zt)
    p_dout = dout + i_b * stride_db + o_start * stride_dt
    p_B = B if B_CONSTANT else B + i_b * stride_Bb + i_g * stride_Bg + o_start * stride_Bt
    p_C = C if C_CONSTANT else C + i_b * stride_Cb + i_g * stride_Cg + o_start * stride_Ct
    b_u = _tokens(p_u, o_d, m_in, o_t, m_t, stride_uc, stride_ut)
    b_dt = _steps(p_delta, delta_bias, o_d, m_in, o_t, m_t, stride_sc, stride_st, SOFTPLUS)
    b_dt_before = _steps(p_delta, delta_bias, o_d, m_in, o_t - 1, m_before, stride_sc, stride_st, SOFTPLUS)
    b_dt_after = _steps(p_delta, delta_bias, o_d, m_in, o_t + 1, m_after, stride_sc, stride_st, SOFTPLUS)
    b_dtu = b_dt * b_u
    b_dtu_before = b_dt_before * _tokens(p_u, o_d, m_in, o_t - 1, m_before, stride_uc, stride_ut)
    b_dy = _output_gradient(p_dout, p_z, o_d, m_in, o_t, m_t, stride_dc, stride_dt, stride_zc, stride_zt)
    b_dy_after = _output_gradient(p_dout, p_z, o_d, m_in, o_t + 1, m_after, stride_dc, stride_dt, stride_zc, stride_zt)
    b_y = tl.zeros([BD, BT], dtype=tl.float32)
    b_ddtu = tl.zeros([BD, BT], dtype=tl.float32)
    b_ddt = tl.zeros([BD, BT], dtype=tl.float32)
    for n in range(0, N):
        b_A = load(A + o_d * N + n, m_d)[:, None]
        b_a = _exp(b_dt * b_A)
        b_B = _projection(p_B, n, o_d, m_in, o_t, m_t, stride_Bn, stride_Bt, N, B_CONSTANT)
        b_C = _projection(p_C, n, o_d, m_in, o_t, m_t, stride_Cn, stride_Ct, N, C_CONSTANT)
        b_x = b_dtu_before * _projection(p_B, n, o_d, m_in, o_t - 1, m_before, stride_Bn, stride_Bt, N, B_CONSTANT)
        b_p, b_before = tl.associative_scan((_exp(b_dt_before * b_A), b_x), 1, _combine)
        b_before += b_p * load(states + o_p + n * D + o_d, m_in)[:, None]  # h of the token before
        b_h = b_a * b_before + b_dtu * b_B
        b_a_after = _exp(b_dt_after * b_A)
        b_x = b_a_after * (b_dy_after * _projection(p_C, n, o_d, m_in, o_t + 1, m_after, stride_Cn, stride_Ct, N,
                                                    C_CONSTANT))
        b_p, b_g = tl.associative_scan((b_a_after, b_x), 1, _combine, reverse=True)
        b_g += b_p * load(carries + o_p + n * D + o_d, m_in)[:, None]  # a g of the token after
        b_g += b_dy * b_C
        b_w = b_a * b_g * b_before  # the gradient of dt A
        b_y += b_h * b_C
        b_ddtu += b_g * b_B
        b_ddt += b_w * b_A
        tl.store(dA + o_p + n * D + o_d, tl.sum(b_w * b_dt, 1), mask=m_d)
        o_part = (((i_d % of_group).to(tl.int64) * batch + i_b) * groups + i_g) * N * L + n * L + start + o_t
        if B_CONSTANT:
            tl.store(dB + o_p + n * D + o_d, tl.sum(b_g * b_dtu, 1), mask=m_d)
        else:
            tl.store(dB + o_part, tl.sum(b_g * b_dtu, 0), mask=m_t)
        if C_CONSTANT:
            tl.store(dC + o_p + n * D + o_d, tl.sum(b_h * b_dy, 1), mask=m_d)
        else:
            tl.store(dC + o_part, tl.sum(b_h * b_dy, 0), mask=m_t)
    b_du = b_dt * b_ddtu
    if skip is not None:
        b_skip = load(skip + o_d, m_d)[:, None]
        b_du += b_skip * b_dy
        b_y += b_skip * b_u
        tl.store(dskip + i_p * D + o_d, tl.sum(b_dy * b_u, 1), mask=m_d)
    m_out = m_d[:, None] & m_t[None, :]
    o_t64 = o_t.to(tl.int64)
    if z is not None:
        b_z = _tokens(p_z, o_d, m_in, o_t, m_t, stride_zc, stride_zt)
        b_s = _sigmoid(b_z)
        b_dz = _tokens(p_dout, o_d, m_in, o_t, m_t, stride_dc, stride_dt) * b_y * (b_s * (1.0 + b_z * (1.0 - b_s)))
        store(dz + i_b * stride_dzb + o_start * stride_dzt + (o_d[:, None] * stride_dzc + o_t64[None, :] * stride_dzt),
              b_dz, m_out)
    b_ddt += b_u * b_ddtu
    if SOFTPLUS:
        b_x = _tokens(p_delta, o_d, m_in, o_t, m_t, stride_sc, stride_st)
        if delta_bias is not None:
            b_x += load(delta_bias + o_d, m_d)[:, None]
        b_ddt = b_ddt * tl.where(b_x > 20.0, 1.0, _sigmoid(b_x))
    b_ddt = tl.where(m_in[:, None] & m_t[None, :], b_ddt, 0.0)
    if delta_bias is not None:
        tl.store(ddelta_bias + i_p * D + o_d, tl.sum(b_ddt, 1), mask=m_d)
    store(du + i_b * stride_dub + o_start * stride_dut + (o_d[:, None] * stride_duc + o_t64[None, :] * stride_dut),
          b_du, m_out)
    store(ddelta + i_b * stride_dsb + o_start * stride_dst + (o_d[:, None] * stride_dsc + o_t64[None, :] * stride_dst),
          b_ddt, m_out)


@triton.jit(do_not_specialize=["slots"])
def selective_scan_step_kernel(x, state, delta, A, B, C, skip, z, delta_bias, state_indices, out, stride_xb, stride_xh,
                               stride_xp,
                               stride_hb, stride_hh, stride_hp, stride_hn, stride_sb, stride_sh, stride_sp, stride_Ah,
                               stride_Ap,
                               stride_An, stride_Bb, stride_Bg, stride_Bn, stride_Cb, stride_Cg, stride_Cn, stride_Dh,
                               stride_Dp,
                               stride_zb, stride_zh, stride_zp, stride_bh, stride_bp, H, P, groups, slots,
                               N: tl.constexpr,
                               SOFTPLUS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
    """BP channels of one head of one batch entry, all their states at once."""
    blocks = tl.cdiv(P, BP)
    i_h = (tl.program_id(0) // blocks % H).to(tl.int64)
    i_b = (tl.program_id(0) // blocks // H).to(tl.int64)
    i_g = i_h // (H // groups)
    slot = i_b
    if state_indices is not None:
        slot = tl.load(state_indices + i_b).to(tl.int64)
    o_p = (tl.program_id(0) % blocks * BP + tl.arange(0, BP)).to(tl.int64)
    m_p = o_p < P
    m_in = o_p < P * ((slot >= 0) & (slot < slots))
    o_n = tl.arange(0, BN).to(tl.int64)
    m_n = o_n < N
    m_s = m_in[:, None] & m_n[None, :]
    b_x = load(x + i_b * stride_xb + i_h * stride_xh + o_p * stride_xp, m_in).to(tl.float32)
    b_dt = load(delta + i_b * stride_sb + i_h * stride_sh + o_p * stride_sp, m_in).to(tl.float32)
    if delta_bias is not None:
        b_dt += load(delta_bias + i_h * stride_bh + o_p * stride_bp, m_in).to(tl.float32)
    if SOFTPLUS:
        b_dt = _softplus(b_dt)
    b_A = load(A + i_h * stride_Ah + (o_p[:, None] * stride_Ap + o_n[None, :] * stride_An), m_s)
    b_B = load(B + i_b * stride_Bb + i_g * stride_Bg + o_n * stride_Bn, m_n).to(tl.float32)
    b_C = load(C + i_b * stride_Cb + i_g * stride_Cg + o_n * stride_Cn, m_n).to(tl.float32)
    p_h = state + slot * stride_hb + i_h * stride_hh + (o_p[:, None] * stride_hp + o_n[None, :] * stride_hn)
    b_h = load(p_h, m_s) * _exp(b_dt[:, None] * b_A) + (b_dt * b_x)[:, None] * b_B[None, :]
    tl.store(p_h, b_h, mask=m_s)
    b_y = tl.sum(tl.where(m_s, b_h * b_C[None, :], 0.0), 1)
    if skip is not None:
        b_y += load(skip + i_h * stride_Dh + o_p * stride_Dp, m_in).to(tl.float32) * b_x
    if z is not None:
        b_z = load(z + i_b * stride_zb + i_h * stride_zh + o_p * stride_zp, m_in).to(tl.float32)
        b_y = b_y * (b_z * _sigmoid(b_z))
    store(out + (i_b * H + i_h) * P + o_p, b_y, m_p)


def _strides(axes: str, **tensors: Tensor | None) -> dict[str, int]:
    """0 for a tensor that is not there or lacks the axes."""
    return {f"stride_{name}{axis}": 0 if x is None or x.dim() != len(axes) else x.stride(i)
            for name, x in tensors.items() for i, axis in enumerate(axes)}


_COMPILED = {"num_warps": 4, "num_stages": 1}
# Channels of a program: as many as registers hold without spilling on every target (read off code compiled ahead of
# time; for the forward pass by the bytes of an element: sm_86 spills with 32 in bf16 and, oddly, with 16 in fp32). Not
# measured.
_FWD_CHANNELS, _BWD_CHANNELS = {2: 16, 4: 32}, 16
_ROWS = 256  # states of a program that walks over chunks


class _Call:
    """What the kernels of one call share; BD is their block of channels on a GPU."""

    def __init__(self, BD, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus):
        self.u, self.A, self.cu_seqlens = u, A.contiguous(), cu_seqlens
        self.batch, channels, length = u.shape
        groups = next((x.shape[1] for x in (B, C) if x.dim() == 4), 1)
        B, C = (x.contiguous() if x.dim() == 2 else x for x in (B, C))
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        chunks = length // CHUNK + 1 if cu_seqlens is None else tiles_packed(length, self.sequences, CHUNK)
        self.BD = 4 if target(u.device) == "interpreter" else BD
        self.per_group, self.groups = channels // groups, groups
        self.of_group = triton.cdiv(self.per_group, self.BD)
        self.grid = (chunks * groups * self.of_group * self.batch,)
        self.states_shape = self.batch * chunks, A.shape[1], channels
        self.shape = dict(D=channels, L=length, per_group=self.per_group, chunks=chunks, sequences=self.sequences,
                          N=A.shape[1],
                          BT=CHUNK, **_COMPILED)
        self.steps = dict(delta=delta, A=self.A, delta_bias=delta_bias, cu_seqlens=cu_seqlens, SOFTPLUS=delta_softplus,
                          BD=self.BD,
                          **_strides("bct", s=delta), **self.shape)
        self.B = dict(B=B, B_CONSTANT=B.dim() == 2, **_strides("bgnt", B=B))
        self.C = dict(C=C, C_CONSTANT=C.dim() == 2, **_strides("bgnt", C=C))
        self.gate = dict(z=z, **_strides("bct", z=z))
        self.inputs = dict(u=u, **_strides("bct", u=u))

    def launch(self, kernel, **arguments) -> None:
        launch(kernel, self.grid, self.u.device, **arguments)

    def local(self) -> tuple[Tensor, Tensor]:
        """ends and products; chunks that a packed sequence does not need stay zero."""
        return tuple(self.A.new_zeros(self.states_shape) for _ in range(2))

    def carry(self, ends: Tensor, products: Tensor, first: Tensor | None, last: Tensor | None, reverse: bool) -> None:
        shape = {name: x for name, x in self.shape.items() if name != "per_group"}
        rows = shape["D"] * shape["N"]
        launch(selective_scan_fwd_carry_kernel, (self.sequences * triton.cdiv(rows, _ROWS),), self.u.device, ends=ends,
               products=products, first_state=None if first is None else first.contiguous(), last_state=last,
               cu_seqlens=self.cu_seqlens, REVERSE=reverse, BM=_ROWS, **shape)


def fwd(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, keep_states):
    call = _Call(_FWD_CHANNELS[u.element_size()], u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens,
                 delta_softplus)
    out, final_state = empty_like_layout(u), A.new_empty(call.sequences, *A.shape)
    states, products = call.local()
    call.launch(selective_scan_fwd_chunk_kernel, ends=states, products=products, **call.inputs, **call.B, **call.steps)
    call.carry(states, products, initial_state, final_state, False)
    call.launch(selective_scan_fwd_kernel, skip=D, states=states, out=out, **call.inputs, **call.B, **call.C,
                **call.gate, **call.steps,
                **_strides("bct", o=out))
    return out, final_state, states if keep_states else A.new_empty(0, *states.shape[1:])


def bwd(dout, dfinal_state, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus,
        chunk_states):
    call = _Call(_BWD_CHANNELS, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus)
    gradient = dict(dout=dout, **_strides("bct", d=dout))
    carries, products = call.local()
    call.launch(selective_scan_bwd_chunk_kernel, ends=carries, products=products, **call.C, **call.gate, **gradient,
                **call.steps)
    dinitial_state = A.new_empty(0 if initial_state is None else call.sequences, *A.shape)
    call.carry(carries, products, dfinal_state, None if initial_state is None else dinitial_state, True)

    du, ddelta = empty_like_layout(u), empty_like_layout(delta)
    dz = u.new_empty(0) if z is None else empty_like_layout(z)
    chunks, states, channels = call.states_shape

    def part(x: Tensor) -> Tensor:
        """Of dB or dC."""
        shape = call.states_shape if x.dim() == 2 else (call.of_group, call.batch, call.groups, states, u.shape[2])
        return A.new_zeros(shape)

    dA, dB, dC = A.new_zeros(call.states_shape), part(B), part(C)
    dskip, ddelta_bias = (None if x is None else A.new_zeros(chunks, channels) for x in (D, delta_bias))
    call.launch(selective_scan_bwd_kernel, skip=D, states=chunk_states.contiguous(), carries=carries, du=du,
                ddelta=ddelta,
                dz=None if z is None else dz, dA=dA, dB=dB, dC=dC, dskip=dskip, ddelta_bias=ddelta_bias,
                batch=call.batch, **call.inputs,
                **call.B, **call.C, **call.gate, **gradient, **call.steps,
                **_strides("bct", du=du, ds=ddelta, dz=None if z is None else dz))
    dB, dC = (y.sum(0).t().contiguous() if x.dim() == 2 else y.sum(0) for x, y in ((B, dB), (C, dC)))
    dskip, ddelta_bias = (A.new_empty(0) if x is None else x.sum(0) for x in (dskip, ddelta_bias))
    return du, ddelta, dA.sum(0).t().contiguous(), dB, dC, dskip, dz, ddelta_bias, dinitial_state


def step(*arguments):
    shape = arguments[0].shape
    x, state, delta, A, B, C, D, z, delta_bias, state_indices, delta_softplus = in_heads(*arguments)
    batch, heads, channels = x.shape
    n = A.shape[2]
    out = x.new_empty(x.shape)
    BN = triton.next_power_of_2(n)
    BP = max(1, 1024 // BN)
    launch(selective_scan_step_kernel, (batch * heads * triton.cdiv(channels, BP),), x.device, x=x, state=state,
           delta=delta, A=A, B=B,
           C=C, skip=D, z=z, delta_bias=delta_bias, state_indices=state_indices, out=out, H=heads, P=channels,
           groups=B.shape[1],
           slots=state.shape[0], N=n, SOFTPLUS=delta_softplus, BP=BP, BN=BN, **_strides("bhp", x=x, s=delta, z=z),
           **_strides("bhpn", h=state), **_strides("hpn", A=A), **_strides("bgn", B=B, C=C), **_strides("hp", D=D,
                                                                                                        b=delta_bias),
           **_COMPILED)
    return out.view(shape)
