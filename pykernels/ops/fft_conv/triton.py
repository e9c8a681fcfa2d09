"""The long convolution in Triton: transforms as products with matrices, on the matrix units. README.md derives them.

Three ways, chosen by counted work (`plan`): kernels of few taps by a Toeplitz product; else windows of 2N samples whose
transform of N complex points one program does by itself; and where the kernel is too long for that, one transform of
the whole row, of which outer stages go through memory and the rest is such a program's. Rows are transforms of their
own, so neither rounding errors nor values that are not finite leave a row.

A stage of a transform is the product of a tile, whose rows are all other indices, with a small matrix from the right:
warps share the many rows, and each holds the matrix. Sums over rows go by parts that depend on shapes alone and are
added up in a fixed order, so results are bitwise repeatable.

Names: `i_` index, `o_` offset, `m_` mask, `p_` pointer, `b_` block value; `_r` and `_i` real and imaginary part.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import launch, load, store, target

# Runtime values on which compiled code must not be specialised: they change from call to call.
_VARYING = ["batch", "per_group", "rows", "L", "windows", "step", "offset", "lift", "first", "last", "T", "behind",
             "blocks", "share", "parts", "zero"]


# ---- rows in memory --------------------------------------------------------------------------------------------------


@triton.jit
def _entry(o_row, batch, windows):
    """Row (d batch + b) windows + w -> b, d, w."""
    o_bd = o_row // windows
    return (o_bd % batch).to(tl.int64), (o_bd // batch).to(tl.int64), o_row % windows


@triton.jit
def _at(p_x, o_b, o_d, stride_b, stride_c):
    """Where the rows of a tensor start; None of None."""
    if p_x is not None:
        p_x = p_x + (o_b * stride_b + o_d * stride_c)
    return p_x


@triton.jit
def _both(m_row, m):
    """Where both masks hold; m_row None holds everywhere."""
    if m_row is not None:
        m = m_row & m
    return m


@triton.jit
def _samples(p_x, p_g, o_n, m, stride_xt, stride_gt):
    """x at positions o_n (int64) of its rows, times a gate, in fp32; zero where masked off."""
    b_x = load(p_x + o_n * stride_xt, m).to(tl.float32)
    if p_g is not None:
        b_x = b_x * load(p_g + o_n * stride_gt, m).to(tl.float32)
    return b_x


@triton.jit
def _window(p_x, p_g, o_w, m_row, o_p, L, step, offset, lift, first, last, stride_xt, stride_gt,
            CIRCULAR: tl.constexpr):
    """The samples at positions o_p of windows o_w; zero outside [first, last) of the window and outside the row.

    Window w starts at sample w step - offset. CIRCULAR: samples are modulo L, `lift` a multiple of it that is at least
    `offset`.
    """
    o_n = o_w * step - offset + o_p
    m = _both(m_row, (o_p >= first) & (o_p < last))
    if CIRCULAR:
        o_n = (o_n + lift) % L
    else:
        m = m & (o_n >= 0) & (o_n < L)
    return _samples(p_x, p_g, o_n.to(tl.int64), m, stride_xt, stride_gt)


@triton.jit
def _finish(b_c, p_x, p_g, skip, p_f, p_h, p_o, p_q, o_d, o_n, m, stride_xt, stride_gt, stride_ft, stride_ht):
    """Writes out = f (c + D x), and h (c + D x) where a second result is asked for."""
    o_n = o_n.to(tl.int64)
    if skip is not None:
        b_c += load(skip + (o_d + o_n * 0), m) * _samples(p_x, p_g, o_n, m, stride_xt, stride_gt)
    if p_q is not None:
        store(p_q + o_n, b_c * load(p_h + o_n * stride_ht, m).to(tl.float32), m)
    if p_f is not None:
        b_c = b_c * load(p_f + o_n * stride_ft, m).to(tl.float32)
    store(p_o + o_n, b_c, m)


@triton.jit
def _finish_window(b_c, p_x, p_g, skip, p_f, p_h, p_o, p_q, o_d, o_w, m_row, o_p, L, step, offset,
                   stride_xt, stride_gt, stride_ft, stride_ht):
    """`_finish` for what windows own: their positions [offset, offset + step), where nothing wraps."""
    o_n = o_w * step - offset + o_p
    m = _both(m_row, (o_p >= offset) & (o_p < offset + step) & (o_n < L))
    _finish(b_c, p_x, p_g, skip, p_f, p_h, p_o, p_q, o_d, o_n, m, stride_xt, stride_gt, stride_ft, stride_ht)


@triton.jit
def _tap(o_p, T, behind, SIZE: tl.constexpr):
    """-> (index of the tap whose lag is o_p modulo SIZE, the sign with which it wraps, whether there is one).

    Tap j has lag j - behind. Of the lags modulo SIZE, those from SIZE - behind on stand for negative ones.
    """
    wraps = o_p >= SIZE - behind
    o_j = tl.where(wraps, o_p - SIZE, o_p) + behind
    return o_j.to(tl.int64), tl.where(wraps, -1.0, 1.0), o_j < T


@triton.jit
def _load_taps(p_t, m_row, o_p, T, behind, SIZE: tl.constexpr):
    o_j, b_sign, m = _tap(o_p, T, behind, SIZE)
    return b_sign * load(p_t + o_j, _both(m_row, m))


@triton.jit
def _store_taps(p_t, m_row, o_p, T, behind, b_w, SIZE: tl.constexpr):
    o_j, b_sign, m = _tap(o_p, T, behind, SIZE)
    tl.store(p_t + o_j, b_sign * b_w * (1.0 / (SIZE // 2)), mask=_both(m_row, m))


# ---- transforms ------------------------------------------------------------------------------------------------------


@triton.jit
def _turn(o_t, N: tl.constexpr):
    """cos and sin of 2 pi t / 4N to an ulp of 1: t is reduced to an eighth of a turn as an integer, exactly."""
    o_t = o_t & (4 * N - 1)
    o_q = (o_t + N // 2) // N
    b_x = (o_t - o_q * N).to(tl.float32) * (1.5707963267948966 / N)
    b_z = b_x * b_x
    # Cephes' minimax fits on [-pi/4, pi/4].
    b_s = ((-1.9515295891e-4 * b_z + 8.3321608736e-3) * b_z - 1.6666654611e-1) * b_z * b_x + b_x
    b_c = ((2.443315711809948e-5 * b_z - 1.388731625493765e-3) * b_z + 4.166664568298827e-2) * b_z * b_z
    b_c = b_c - 0.5 * b_z + 1.0
    m_odd = (o_q & 1) == 1
    b_cos, b_sin = tl.where(m_odd, b_s, b_c), tl.where(m_odd, b_c, b_s)
    return tl.where(((o_q + 1) & 2) == 2, -b_cos, b_cos), tl.where((o_q & 2) == 2, -b_sin, b_sin)


@triton.jit
def fft_conv_tables_kernel(tables, N1: tl.constexpr, N2: tl.constexpr, SHIFT: tl.constexpr, TOTAL: tl.constexpr,
                           BLOCK: tl.constexpr):
    """The first TOTAL of the constants of a transform of N = N1 N2 points: e^{-2 pi i n1 (k1 - SHIFT/4) / N1} as
    [n1, k1], the twiddles e^{-2 pi i n2 (k1 - SHIFT/4) / N} as [n2, k1], and e^{-2 pi i n2 k2 / N2} as [n2, k2]; all
    real parts, then the others."""
    o_e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_2, o_3 = o_e - N1 * N1, o_e - N1 * N1 - N1 * N2
    o_t = o_e // N1 * N2 * (4 * (o_e % N1) - SHIFT)
    o_t = tl.where(o_2 >= 0, o_2 // N1 * (4 * (o_2 % N1) - SHIFT), o_t)
    o_t = tl.where(o_3 >= 0, 4 * N1 * (o_3 // N2) * (o_3 % N2), o_t)
    b_cos, b_sin = _turn(o_t, N1 * N2)
    tl.store(tables + o_e, b_cos, mask=o_e < TOTAL)
    tl.store(tables + TOTAL + o_e, -b_sin, mask=o_e < TOTAL)


@triton.jit
def _dots(b_ar, b_ai, b_fr, b_fi, PRECISION: tl.constexpr):
    """a F, of complex matrices, of which a may be real (b_ai None)."""
    b_r = tl.dot(b_ar, b_fr, input_precision=PRECISION)
    b_i = tl.dot(b_ar, b_fi, input_precision=PRECISION)
    if b_ai is not None:
        b_r = tl.dot(b_ai, -b_fi, b_r, input_precision=PRECISION)
        b_i = tl.dot(b_ai, b_fr, b_i, input_precision=PRECISION)
    return b_r, b_i


@triton.jit
def _dots_inverse(b_ar, b_ai, b_fr, b_fi, REAL: tl.constexpr, PRECISION: tl.constexpr):
    """a conj(F); of a result that is REAL just that part, twice."""
    b_r = tl.dot(b_ar, b_fr, input_precision=PRECISION)
    b_r = tl.dot(b_ai, b_fi, b_r, input_precision=PRECISION)
    b_i = b_r
    if not REAL:
        b_i = tl.dot(b_ai, b_fr, input_precision=PRECISION)
        b_i = tl.dot(b_ar, -b_fi, b_i, input_precision=PRECISION)
    return b_r, b_i


@triton.jit
def _rotate(b_r, b_i, b_cr, b_ci):
    return b_r * b_cr - b_i * b_ci, b_r * b_ci + b_i * b_cr


@triton.jit
def _matrix(p_f, N: tl.constexpr, PLANE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The real and imaginary part of a matrix [N, N], or of its transpose."""
    o = tl.arange(0, N)
    if TRANSPOSED:
        p_f += o[None, :] * N + o[:, None]
    else:
        p_f += o[:, None] * N + o[None, :]
    return tl.load(p_f), tl.load(p_f + PLANE)


@triton.jit
def _first_matrix(p_f, N0: tl.constexpr, B: tl.constexpr, PLANE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The matrix [N0, N0] of B / N0 transforms side by side: it stands B / N0 times on the diagonal of [B, B]."""
    o = tl.arange(0, B)
    o_n, o_k = o[:, None], o[None, :]
    m = (o_n // N0) == (o_k // N0)
    if TRANSPOSED:
        p_f += o_k % N0 * N0 + o_n % N0
    else:
        p_f += o_n % N0 * N0 + o_k % N0
    return load(p_f, m), load(p_f + PLANE, m)


@triton.jit
def _first_twiddles(p_t, M: tl.constexpr, N0: tl.constexpr, B: tl.constexpr, PLANE: tl.constexpr):
    """Those of B / N0 transforms, [m, (r, k0)]."""
    p_t += (tl.arange(0, M) * N0)[:, None] + (tl.arange(0, B) % N0)[None, :]
    return tl.load(p_t), tl.load(p_t + PLANE)


@triton.jit
def _twiddles(p_t, N1: tl.constexpr, N2: tl.constexpr, B: tl.constexpr, PLANE: tl.constexpr):
    """Those of B transforms, [(b, n2), k1]."""
    p_t += (tl.arange(0, B * N2) % N2 * N1)[:, None] + tl.arange(0, N1)[None, :]
    return tl.load(p_t), tl.load(p_t + PLANE)


@triton.jit
def _swap(b_x, B: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """[(b, n1), n2] -> [(b, n2), n1]"""
    return tl.reshape(tl.permute(tl.reshape(b_x, [B, N1, N2]), [0, 2, 1]), [B * N2, N1])


@triton.jit
def _forward(b_r, b_i, tables, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, BR: tl.constexpr,
             PRECISION: tl.constexpr):
    """BR transforms side by side: x[(r, n2), n1] -> X[(r, k1), k2], with a factor N0 x[(n1, n2), (r, n0)] ->
    X[(r, k0, k1), k2]. b_i may be None: x is real."""
    ALONE: tl.constexpr = N0 * N0 + N0 * N1 * N2
    PLANE: tl.constexpr = N1 * N1 + N1 * N2 + N2 * N2
    B: tl.constexpr = N0 * BR
    if N0 > 1:
        b_fr, b_fi = _first_matrix(tables, N0, B, ALONE, False)
        b_r, b_i = _dots(b_r, b_i, b_fr, b_fi, PRECISION)
        b_tr, b_ti = _first_twiddles(tables + N0 * N0, N1 * N2, N0, B, ALONE)
        b_r, b_i = _rotate(b_r, b_i, b_tr, b_ti)
        # [(n1, n2), (r, k0)] -> [(r, k0, n2), n1]
        b_r = tl.reshape(tl.permute(tl.reshape(b_r, [N1, N2, B]), [2, 1, 0]), [B * N2, N1])
        b_i = tl.reshape(tl.permute(tl.reshape(b_i, [N1, N2, B]), [2, 1, 0]), [B * N2, N1])
        tables += 2 * ALONE
    b_fr, b_fi = _matrix(tables, N1, PLANE, False)
    b_r, b_i = _dots(b_r, b_i, b_fr, b_fi, PRECISION)
    b_tr, b_ti = _twiddles(tables + N1 * N1, N1, N2, B, PLANE)
    b_r, b_i = _rotate(b_r, b_i, b_tr, b_ti)
    b_r, b_i = _swap(b_r, B, N2, N1), _swap(b_i, B, N2, N1)
    b_fr, b_fi = _matrix(tables + N1 * N1 + N1 * N2, N2, PLANE, False)
    return _dots(b_r, b_i, b_fr, b_fi, PRECISION)


@triton.jit
def _inverse(b_r, b_i, tables, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, BR: tl.constexpr,
             REAL: tl.constexpr, PRECISION: tl.constexpr):
    """From what `_forward` returns to what it takes, times N; the imaginary part is not computed when REAL."""
    ALONE: tl.constexpr = N0 * N0 + N0 * N1 * N2
    PLANE: tl.constexpr = N1 * N1 + N1 * N2 + N2 * N2
    B: tl.constexpr = N0 * BR
    first = tables
    if N0 > 1:
        tables += 2 * ALONE
    b_fr, b_fi = _matrix(tables + N1 * N1 + N1 * N2, N2, PLANE, False)  # symmetric
    b_r, b_i = _dots_inverse(b_r, b_i, b_fr, b_fi, False, PRECISION)
    b_r, b_i = _swap(b_r, B, N1, N2), _swap(b_i, B, N1, N2)
    b_tr, b_ti = _twiddles(tables + N1 * N1, N1, N2, B, PLANE)
    b_r, b_i = _rotate(b_r, b_i, b_tr, -b_ti)
    b_fr, b_fi = _matrix(tables, N1, PLANE, True)
    b_r, b_i = _dots_inverse(b_r, b_i, b_fr, b_fi, REAL and N0 == 1, PRECISION)
    if N0 > 1:
        # [(r, k0, n2), n1] -> [(n1, n2), (r, k0)]
        b_r = tl.reshape(tl.permute(tl.reshape(b_r, [B, N2, N1]), [2, 1, 0]), [N1 * N2, B])
        b_i = tl.reshape(tl.permute(tl.reshape(b_i, [B, N2, N1]), [2, 1, 0]), [N1 * N2, B])
        b_tr, b_ti = _first_twiddles(first + N0 * N0, N1 * N2, N0, B, ALONE)
        b_r, b_i = _rotate(b_r, b_i, b_tr, -b_ti)
        b_fr, b_fi = _first_matrix(first, N0, B, ALONE, True)
        b_r, b_i = _dots_inverse(b_r, b_i, b_fr, b_fi, REAL, PRECISION)
    return b_r, b_i


@triton.jit
def _times_spectrum(b_r, b_i, p_w, m, N: tl.constexpr, CONJ: tl.constexpr):
    b_wr, b_wi = load(p_w, m), load(p_w + N, m)
    if CONJ:
        b_wi = -b_wi
    return _rotate(b_r, b_i, b_wr, b_wi)


@triton.jit
def _times(i_tile, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, BR: tl.constexpr):
    """-> (rows [., 1] or [1, .], positions in them) of what `_forward` takes."""
    if N0 > 1:
        o_m, o_c = tl.arange(0, N1 * N2)[:, None], tl.arange(0, BR * N0)[None, :]
        o_row, o_p = i_tile * BR + o_c // N0, o_m + o_c % N0 * (N1 * N2)
    else:
        o_m = tl.arange(0, BR * N2)[:, None]
        o_row, o_p = i_tile * BR + o_m // N2, o_m % N2 + tl.arange(0, N1)[None, :] * N2
    return o_row, o_p


@triton.jit
def _frequencies(i_tile, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, BR: tl.constexpr):
    """-> (rows [., 1], offsets in their spectra) of what `_forward` returns."""
    o_m = tl.arange(0, BR * N0 * N1)
    return (i_tile * BR + o_m // (N0 * N1))[:, None], (o_m % (N0 * N1) * N2)[:, None] + tl.arange(0, N2)[None, :]


# ---- one program per transform ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_VARYING)
def fft_conv_spectrum_kernel(taps, spectrum, tables, rows, T, behind, N0: tl.constexpr, N1: tl.constexpr,
                             N2: tl.constexpr, BR: tl.constexpr, REAL: tl.constexpr, PRECISION: tl.constexpr):
    """Kernels [rows, T] -> their spectra [rows, 2, N], over N."""
    N: tl.constexpr = N0 * N1 * N2
    o_row, o_p = _times(tl.program_id(0), N0, N1, N2, BR)
    m_row, p_t = o_row < rows, taps + o_row.to(tl.int64) * T
    b_r = _load_taps(p_t, m_row, o_p, T, behind, 2 * N)
    b_i = None
    if not REAL:
        b_i = _load_taps(p_t, m_row, o_p + N, T, behind, 2 * N)
    b_r, b_i = _forward(b_r, b_i, tables, N0, N1, N2, BR, PRECISION)
    o_row, o_k = _frequencies(tl.program_id(0), N0, N1, N2, BR)
    p_w = spectrum + (o_row.to(tl.int64) * (2 * N) + o_k)
    tl.store(p_w, b_r * (1.0 / N), mask=o_row < rows)
    tl.store(p_w + N, b_i * (1.0 / N), mask=o_row < rows)


@triton.jit(do_not_specialize=_VARYING)
def fft_conv_window_kernel(x, gate, spectrum, skip, factor, factor2, out, out2, tables, stride_xb, stride_xc, stride_xt,
                           stride_gb, stride_gc, stride_gt, stride_fb, stride_fc, stride_ft, stride_hb, stride_hc,
                           stride_ht, stride_ob, stride_oc, stride_qb, stride_qc, batch, per_group, rows, L, windows,
                           step, offset, lift, last, zero, N0: tl.constexpr, N1: tl.constexpr,
                           N2: tl.constexpr, BR: tl.constexpr, REAL: tl.constexpr, CIRCULAR: tl.constexpr,
                           CONJ: tl.constexpr, PRECISION: tl.constexpr):
    """BR windows: transform, product with the spectrum of the kernel, inverse.

    `zero` is 0, here and below, but the compiler does not know: it computes addresses and loads constants anew where it
    stands instead of keeping all of them in registers.
    """
    N: tl.constexpr = N0 * N1 * N2
    o_row, o_p = _times(tl.program_id(0), N0, N1, N2, BR)
    o_b, o_d, o_w = _entry(o_row, batch, windows)
    m_row = o_row < rows
    p_x, p_g = _at(x, o_b, o_d, stride_xb, stride_xc), _at(gate, o_b, o_d, stride_gb, stride_gc)
    # A circular window's samples beyond those that its outputs depend on need not be read.
    b_r = _window(p_x, p_g, o_w, m_row, o_p, L, step, offset, lift, 0, last, stride_xt, stride_gt, CIRCULAR)
    b_i = None
    if not REAL:
        b_i = _window(p_x, p_g, o_w, m_row, o_p + N, L, step, offset, lift, 0, last, stride_xt, stride_gt, CIRCULAR)
    b_r, b_i = _forward(b_r, b_i, tables, N0, N1, N2, BR, PRECISION)
    o_r, o_k = _frequencies(tl.program_id(0), N0, N1, N2, BR)
    o_g = (o_r // (windows * batch) // per_group).to(tl.int64)
    b_r, b_i = _times_spectrum(b_r, b_i, spectrum + (o_g * (2 * N) + o_k), o_r < rows, N, CONJ)
    b_r, b_i = _inverse(b_r, b_i, tables + 16 * zero, N0, N1, N2, BR, REAL, PRECISION)
    o_row, o_p = _times(tl.program_id(0) + zero, N0, N1, N2, BR)
    o_b, o_d, o_w = _entry(o_row, batch, windows)
    m_row, o_p = o_row < rows, o_p + 16 * zero
    p_x, p_g = _at(x, o_b, o_d, stride_xb, stride_xc), _at(gate, o_b, o_d, stride_gb, stride_gc)
    p_f, p_h = _at(factor, o_b, o_d, stride_fb, stride_fc), _at(factor2, o_b, o_d, stride_hb, stride_hc)
    p_o, p_q = _at(out, o_b, o_d, stride_ob, stride_oc), _at(out2, o_b, o_d, stride_qb, stride_qc)
    _finish_window(b_r, p_x, p_g, skip, p_f, p_h, p_o, p_q, o_d, o_w, m_row, o_p, L, step, offset, stride_xt,
                   stride_gt, stride_ft, stride_ht)
    if not REAL:
        _finish_window(b_i, p_x, p_g, skip, p_f, p_h, p_o, p_q, o_d, o_w, m_row, o_p + N, L, step, offset,
                       stride_xt, stride_gt, stride_ft, stride_ht)


@triton.jit(do_not_specialize=_VARYING)
def fft_conv_correlate_kernel(x, gate, dy, dgate, sums, tables, stride_xb, stride_xc, stride_xt, stride_gb, stride_gc,
                              stride_gt, stride_yb, stride_yc, stride_yt, stride_hb, stride_hc, stride_ht, batch,
                              per_group, L, windows, step, offset, lift, last, share, parts, zero, N0: tl.constexpr,
                              N1: tl.constexpr, N2: tl.constexpr, BR: tl.constexpr, REAL: tl.constexpr,
                              CIRCULAR: tl.constexpr, PRECISION: tl.constexpr):
    """sums [G, parts, 2, N]: the spectra of dc times the conjugates of those of x, added up over a part of the rows of
    a group: `share` tiles of BR rows."""
    N: tl.constexpr = N0 * N1 * N2
    i_g, i_part = tl.program_id(0) // parts, tl.program_id(0) % parts
    rows = per_group * batch * windows
    b_sr, b_si = tl.zeros([BR * N0 * N1, N2], dtype=tl.float32), tl.zeros([BR * N0 * N1, N2], dtype=tl.float32)
    for i_tile in range(i_part * share, tl.minimum((i_part + 1) * share, tl.cdiv(rows, BR))):
        o_row, o_p = _times(i_tile, N0, N1, N2, BR)
        m_row = o_row < rows
        o_b, o_d, o_w = _entry(i_g * rows + o_row, batch, windows)
        p_x, p_g = _at(x, o_b, o_d, stride_xb, stride_xc), _at(gate, o_b, o_d, stride_gb, stride_gc)
        b_xr = _window(p_x, p_g, o_w, m_row, o_p, L, step, offset, lift, 0, last, stride_xt, stride_gt, CIRCULAR)
        b_xi = None
        if not REAL:
            b_xi = _window(p_x, p_g, o_w, m_row, o_p + N, L, step, offset, lift, 0, last, stride_xt, stride_gt,
                           CIRCULAR)
        b_xr, b_xi = _forward(b_xr, b_xi, tables + i_tile * (16 * zero), N0, N1, N2, BR, PRECISION)
        p_y, p_h = _at(dy, o_b, o_d, stride_yb, stride_yc), _at(dgate, o_b, o_d, stride_hb, stride_hc)
        b_yr = _window(p_y, p_h, o_w, m_row, o_p, L, step, offset, lift, offset, offset + step, stride_yt, stride_ht,
                       False)
        b_yi = None
        if not REAL:
            b_yi = _window(p_y, p_h, o_w, m_row, o_p + N, L, step, offset, lift, offset, offset + step, stride_yt,
                           stride_ht, False)
        b_yr, b_yi = _forward(b_yr, b_yi, tables + (i_tile + 1) * (16 * zero), N0, N1, N2, BR, PRECISION)
        b_yr, b_yi = _rotate(b_yr, b_yi, b_xr, -b_xi)
        b_sr += b_yr
        b_si += b_yi
    if BR > 1:
        b_sr, b_si = tl.sum(tl.reshape(b_sr, [BR, N0 * N1, N2]), 0), tl.sum(tl.reshape(b_si, [BR, N0 * N1, N2]), 0)
    o_k = _frequencies(0, N0, N1, N2, 1)[1]
    p_s = sums + (tl.program_id(0).to(tl.int64) * (2 * N) + o_k)
    tl.store(p_s, b_sr)
    tl.store(p_s + N, b_si)


@triton.jit(do_not_specialize=_VARYING)
def fft_conv_taps_kernel(sums, dtaps, tables, rows, T, behind, parts, N0: tl.constexpr, N1: tl.constexpr,
                         N2: tl.constexpr, BR: tl.constexpr, REAL: tl.constexpr, PRECISION: tl.constexpr):
    """sums [rows, parts, 2, N], added up over parts -> the gradient of kernels [rows, T]."""
    N: tl.constexpr = N0 * N1 * N2
    o_row, o_k = _frequencies(tl.program_id(0), N0, N1, N2, BR)
    b_r, b_i = tl.zeros([BR * N0 * N1, N2], dtype=tl.float32), tl.zeros([BR * N0 * N1, N2], dtype=tl.float32)
    for i_part in range(0, parts):
        p_s = sums + ((o_row.to(tl.int64) * parts + i_part) * (2 * N) + o_k)
        b_r += load(p_s, o_row < rows)
        b_i += load(p_s + N, o_row < rows)
    b_r, b_i = _inverse(b_r, b_i, tables, N0, N1, N2, BR, REAL, PRECISION)
    o_row, o_p = _times(tl.program_id(0), N0, N1, N2, BR)
    m_row, p_t = o_row < rows, dtaps + o_row.to(tl.int64) * T
    _store_taps(p_t, m_row, o_p, T, behind, b_r, 2 * N)
    if not REAL:
        _store_taps(p_t, m_row, o_p + N, T, behind, b_i, 2 * N)


# ---- transforms that pass through memory -----------------------------------------------------------------------------
#
# z [rows, 2, TOTAL] holds real and imaginary parts. A stage of radix R treats each of TOTAL / (R M) sequences in it as
# [R, M]: it transforms along R and multiplies twiddles on, which leaves R sequences of M points that are transformed
# alike; those of one program's size at last by that. Everything is in place.


@triton.jit
def _stage(o_m, R: tl.constexpr, M: tl.constexpr, SHIFT: tl.constexpr):
    """The twiddles e^{-2 pi i m (k1 - SHIFT/4) / RM} as [m, k1]."""
    b_cos, b_sin = _turn(o_m[:, None] * (4 * tl.arange(0, R)[None, :] - SHIFT), R * M)
    return b_cos, -b_sin


@triton.jit
def _stage_matrix(o_n, o_k, R: tl.constexpr, SHIFT: tl.constexpr):
    """e^{-2 pi i n1 (k1 - SHIFT/4) / R}"""
    b_cos, b_sin = _turn(o_n * (4 * o_k - SHIFT), R)
    return b_cos, -b_sin


@triton.jit(do_not_specialize=_VARYING)
def fft_conv_split_kernel(x, gate, taps, z, stride_xb, stride_xc, stride_xt, stride_gb, stride_gc, stride_gt, batch, L,
                          T, behind, step, offset, lift, first, last, R: tl.constexpr, M: tl.constexpr,
                          BM: tl.constexpr, TOTAL: tl.constexpr, REAL: tl.constexpr, CIRCULAR: tl.constexpr,
                          SHIFT: tl.constexpr, PRECISION: tl.constexpr):
    """A stage forward, of BM columns of [R, M]: from rows x, from kernels, or from what is in z."""
    i_s = tl.program_id(0) // (M // BM)
    o_m = tl.program_id(0) % (M // BM) * BM + tl.arange(0, BM)
    o_1 = tl.arange(0, R)
    o_p = o_m[:, None] + o_1[None, :] * M
    SEQUENCES: tl.constexpr = TOTAL // (R * M)
    p_z = z + (i_s // SEQUENCES).to(tl.int64) * (2 * TOTAL) + i_s % SEQUENCES * (R * M)
    b_i = None
    if x is not None:
        o_b, o_d = (i_s % batch).to(tl.int64), (i_s // batch).to(tl.int64)
        p_x, p_g = _at(x, o_b, o_d, stride_xb, stride_xc), _at(gate, o_b, o_d, stride_gb, stride_gc)
        b_r = _window(p_x, p_g, 0, None, o_p, L, step, offset, lift, first, last, stride_xt, stride_gt, CIRCULAR)
        if not REAL:
            b_i = _window(p_x, p_g, 0, None, o_p + TOTAL, L, step, offset, lift, first, last, stride_xt, stride_gt,
                          CIRCULAR)
    elif taps is not None:
        p_t = taps + i_s.to(tl.int64) * T
        b_r = _load_taps(p_t, None, o_p, T, behind, 2 * TOTAL)
        if not REAL:
            b_i = _load_taps(p_t, None, o_p + TOTAL, T, behind, 2 * TOTAL)
    else:
        b_r, b_i = tl.load(p_z + o_p), tl.load(p_z + TOTAL + o_p)
    b_fr, b_fi = _stage_matrix(o_1[:, None], o_1[None, :], R, SHIFT)
    b_r, b_i = _dots(b_r, b_i, b_fr, b_fi, PRECISION)
    b_tr, b_ti = _stage(o_m, R, M, SHIFT)
    b_r, b_i = _rotate(b_r, b_i, b_tr, b_ti)
    tl.store(p_z + o_p, b_r)
    tl.store(p_z + TOTAL + o_p, b_i)


@triton.jit(do_not_specialize=_VARYING)
def fft_conv_merge_kernel(z, x, gate, skip, factor, factor2, out, out2, dtaps, stride_xb, stride_xc, stride_xt,
                          stride_gb, stride_gc, stride_gt, stride_fb, stride_fc, stride_ft, stride_hb, stride_hc,
                          stride_ht, stride_ob, stride_oc, stride_qb, stride_qc, batch, L, T, behind, step, offset,
                          R: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, TOTAL: tl.constexpr, REAL: tl.constexpr,
                          SHIFT: tl.constexpr, PRECISION: tl.constexpr):
    """The inverse of a stage: to rows, to gradients of kernels, or to z."""
    i_s = tl.program_id(0) // (M // BM)
    o_m = tl.program_id(0) % (M // BM) * BM + tl.arange(0, BM)
    o_1 = tl.arange(0, R)
    o_p = o_m[:, None] + o_1[None, :] * M
    SEQUENCES: tl.constexpr = TOTAL // (R * M)
    p_z = z + (i_s // SEQUENCES).to(tl.int64) * (2 * TOTAL) + i_s % SEQUENCES * (R * M)
    b_tr, b_ti = _stage(o_m, R, M, SHIFT)
    b_r, b_i = _rotate(tl.load(p_z + o_p), tl.load(p_z + TOTAL + o_p), b_tr, -b_ti)
    b_fr, b_fi = _stage_matrix(o_1[None, :], o_1[:, None], R, SHIFT)
    b_r, b_i = _dots_inverse(b_r, b_i, b_fr, b_fi, REAL, PRECISION)
    if out is not None:
        o_b, o_d = (i_s % batch).to(tl.int64), (i_s // batch).to(tl.int64)
        p_x, p_g = _at(x, o_b, o_d, stride_xb, stride_xc), _at(gate, o_b, o_d, stride_gb, stride_gc)
        p_f, p_h = _at(factor, o_b, o_d, stride_fb, stride_fc), _at(factor2, o_b, o_d, stride_hb, stride_hc)
        p_o, p_q = _at(out, o_b, o_d, stride_ob, stride_oc), _at(out2, o_b, o_d, stride_qb, stride_qc)
        _finish_window(b_r, p_x, p_g, skip, p_f, p_h, p_o, p_q, o_d, 0, None, o_p, L, step, offset,
                       stride_xt, stride_gt, stride_ft, stride_ht)
        if not REAL:
            _finish_window(b_i, p_x, p_g, skip, p_f, p_h, p_o, p_q, o_d, 0, None, o_p + TOTAL, L, step,
                           offset, stride_xt, stride_gt, stride_ft, stride_ht)
    elif dtaps is not None:
        p_t = dtaps + i_s.to(tl.int64) * T
        _store_taps(p_t, None, o_p, T, behind, b_r, 2 * TOTAL)
        if not REAL:
            _store_taps(p_t, None, o_p + TOTAL, T, behind, b_i, 2 * TOTAL)
    else:
        tl.store(p_z + o_p, b_r)
        tl.store(p_z + TOTAL + o_p, b_i)


@triton.jit
def _in_z(o_s, o_p, N: tl.constexpr, TOTAL: tl.constexpr):
    """The offset of position o_p of sequence o_s of N points."""
    return (o_s // (TOTAL // N)).to(tl.int64) * (2 * TOTAL) + (o_s % (TOTAL // N) * N + o_p)


@triton.jit(do_not_specialize=_VARYING)
def fft_conv_inner_kernel(z, spectrum, tables, batch, per_group, zero, N0: tl.constexpr, N1: tl.constexpr,
                          N2: tl.constexpr, BR: tl.constexpr, TOTAL: tl.constexpr, FORWARD: tl.constexpr,
                          INVERSE: tl.constexpr, CONJ: tl.constexpr, PRECISION: tl.constexpr):
    """The last stage of BR sequences. FORWARD alone makes spectra of kernels, over TOTAL; both with a product between
    them convolve."""
    N: tl.constexpr = N0 * N1 * N2
    o_s, o_p = _times(tl.program_id(0), N0, N1, N2, BR)
    p_z = z + _in_z(o_s, o_p, N, TOTAL)
    o_s, o_k = _frequencies(tl.program_id(0), N0, N1, N2, BR)
    p_k = z + _in_z(o_s, o_k, N, TOTAL)
    if FORWARD:
        b_r, b_i = _forward(tl.load(p_z), tl.load(p_z + TOTAL), tables, N0, N1, N2, BR, PRECISION)
    else:
        b_r, b_i = tl.load(p_k), tl.load(p_k + TOTAL)
    if spectrum is not None:
        o_g = o_s // (TOTAL // N) // batch // per_group  # whose sequences are those of the group's row
        p_w = spectrum + _in_z(o_g * (TOTAL // N) + o_s % (TOTAL // N), o_k, N, TOTAL)
        b_r, b_i = _times_spectrum(b_r, b_i, p_w, None, TOTAL, CONJ)
    if INVERSE:
        b_r, b_i = _inverse(b_r, b_i, tables + 16 * zero, N0, N1, N2, BR, False, PRECISION)
        o_s, o_p = _times(tl.program_id(0) + zero, N0, N1, N2, BR)
        p_z = z + _in_z(o_s, o_p, N, TOTAL)
        tl.store(p_z, b_r)
        tl.store(p_z + TOTAL, b_i)
    else:
        tl.store(p_k, b_r * (1.0 / TOTAL))
        tl.store(p_k + TOTAL, b_i * (1.0 / TOTAL))


@triton.jit(do_not_specialize=_VARYING)
def fft_conv_correlate_inner_kernel(zx, zy, sums, tables, rows, zero, N0: tl.constexpr, N1: tl.constexpr,
                                    N2: tl.constexpr, BR: tl.constexpr, TOTAL: tl.constexpr, PRECISION: tl.constexpr):
    """sums [G, 2, TOTAL] plus the spectra of dc times the conjugates of those of x, over the `rows` rows of a group:
    BR sequences of theirs."""
    N: tl.constexpr = N0 * N1 * N2
    TILES: tl.constexpr = TOTAL // (N * BR)
    i_g = tl.program_id(0) // TILES
    o_s, o_p = _times(tl.program_id(0) % TILES, N0, N1, N2, BR)
    o_p = _in_z(o_s, o_p, N, TOTAL)
    o_s, o_k = _frequencies(tl.program_id(0) % TILES, N0, N1, N2, BR)
    p_s = sums + i_g.to(tl.int64) * (2 * TOTAL) + _in_z(o_s, o_k, N, TOTAL)
    b_sr, b_si = tl.load(p_s), tl.load(p_s + TOTAL)
    for i_row in range(0, rows):
        o_z = (i_g * rows + i_row).to(tl.int64) * (2 * TOTAL) + o_p
        p_t = tables + i_row * (16 * zero)
        b_xr, b_xi = _forward(tl.load(zx + o_z), tl.load(zx + TOTAL + o_z), p_t, N0, N1, N2, BR, PRECISION)
        p_t += 16 * zero
        b_yr, b_yi = _forward(tl.load(zy + o_z), tl.load(zy + TOTAL + o_z), p_t, N0, N1, N2, BR, PRECISION)
        b_yr, b_yi = _rotate(b_yr, b_yi, b_xr, -b_xi)
        b_sr += b_yr
        b_si += b_yi
    tl.store(p_s, b_sr)
    tl.store(p_s + TOTAL, b_si)


# ---- kernels of few taps ---------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_VARYING)
def fft_conv_direct_kernel(x, gate, taps, skip, factor, factor2, out, out2, stride_xb, stride_xc, stride_xt, stride_gb,
                           stride_gc, stride_gt, stride_fb, stride_fc, stride_ft, stride_hb, stride_hc, stride_ht,
                           stride_ob, stride_oc, stride_qb, stride_qc, batch, per_group, L, T, offset, lift, blocks,
                           BM: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, CIRCULAR: tl.constexpr,
                           REVERSE: tl.constexpr, PRECISION: tl.constexpr):
    """BM blocks of BT outputs of a channel, each from the T + BT - 1 samples it sees, which start `offset` before it:
    samples [BM, .] times the Toeplitz matrix [., BT] of the taps."""
    tiles = tl.cdiv(batch * blocks, BM)
    i_d = tl.program_id(0) // tiles
    o_block = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    m_row = (o_block < batch * blocks)[:, None]
    o_b = (o_block // blocks).to(tl.int64)[:, None]
    o_start = (o_block % blocks * BT)[:, None]
    o_d = i_d.to(tl.int64) + o_b * 0
    p_x, p_g = _at(x, o_b, o_d, stride_xb, stride_xc), _at(gate, o_b, o_d, stride_gb, stride_gc)
    p_t = taps + (i_d // per_group).to(tl.int64) * T
    o_t = tl.arange(0, BT)
    b_c = tl.zeros([BM, BT], dtype=tl.float32)
    for i_s in range(0, BT + T - 1, BS):
        o_s = i_s + tl.arange(0, BS)
        b_x = _window(p_x, p_g, 0, m_row, o_start + o_s[None, :], L, 0, offset, lift, 0, L + offset + T, stride_xt,
                      stride_gt, CIRCULAR)
        o_j = o_s[:, None] - o_t[None, :]
        if not REVERSE:
            o_j = T - 1 - o_j
        b_w = load(p_t + o_j, (o_j >= 0) & (o_j < T))
        b_c = tl.dot(b_x, b_w, b_c, input_precision=PRECISION)
    p_f, p_h = _at(factor, o_b, o_d, stride_fb, stride_fc), _at(factor2, o_b, o_d, stride_hb, stride_hc)
    p_o, p_q = _at(out, o_b, o_d, stride_ob, stride_oc), _at(out2, o_b, o_d, stride_qb, stride_qc)
    o_n = o_start + o_t[None, :]
    _finish(b_c, p_x, p_g, skip, p_f, p_h, p_o, p_q, o_d, o_n, m_row & (o_n < L), stride_xt, stride_gt, stride_ft,
            stride_ht)


@triton.jit(do_not_specialize=_VARYING)
def fft_conv_direct_taps_kernel(x, gate, dy, dgate, sums, stride_xb, stride_xc, stride_xt, stride_gb, stride_gc,
                                stride_gt, stride_yb, stride_yc, stride_yt, stride_hb, stride_hc, stride_ht, batch,
                                per_group, L, behind, lift, blocks, share, parts, BM: tl.constexpr, BJ: tl.constexpr,
                                CIRCULAR: tl.constexpr, PRECISION: tl.constexpr):
    """sums [G, parts, BJ BJ]: the gradients of a group's taps from `share` of its blocks of BM samples.

    Tap j = BJ j1 + j2 of lag j - behind has the gradient sum over n of dc_n x_{n - j + behind}; with n = m + j2 that is
    the product of x_{m + behind - BJ j1} as [j1, m] and dc_{m + j2} as [m, j2].
    """
    i_g, i_part = tl.program_id(0) // parts, tl.program_id(0) % parts
    o_j = tl.arange(0, BJ)
    b_s = tl.zeros([BJ, BJ], dtype=tl.float32)
    for i_block in range(i_part * share, tl.minimum((i_part + 1) * share, per_group * batch * blocks)):
        i_row = i_block // blocks
        o_b, o_d = (i_row % batch).to(tl.int64), (i_g * per_group + i_row // batch).to(tl.int64)
        p_x, p_g = _at(x, o_b, o_d, stride_xb, stride_xc), _at(gate, o_b, o_d, stride_gb, stride_gc)
        p_y, p_h = _at(dy, o_b, o_d, stride_yb, stride_yc), _at(dgate, o_b, o_d, stride_hb, stride_hc)
        o_m = i_block % blocks * BM - (BJ - 1) + tl.arange(0, BM)
        o_x = o_m[None, :] + behind - BJ * o_j[:, None]
        b_x = _window(p_x, p_g, 0, None, o_x, L, 0, 0, lift, -lift, L + lift, stride_xt, stride_gt, CIRCULAR)
        b_y = _window(p_y, p_h, 0, None, o_m[:, None] + o_j[None, :], L, 0, 0, 0, 0, L, stride_yt, stride_ht, False)
        b_s = tl.dot(b_x, b_y, b_s, input_precision=PRECISION)
    p_s = sums + tl.program_id(0).to(tl.int64) * (BJ * BJ)
    tl.store(p_s + (BJ * o_j[:, None] + o_j[None, :]), b_s)


@triton.jit(do_not_specialize=_VARYING)
def fft_conv_skip_kernel(x, gate, dy, dgate, sums, stride_xb, stride_xc, stride_xt, stride_gb, stride_gc, stride_gt,
                         stride_yb, stride_yc, stride_yt, stride_hb, stride_hc, stride_ht, batch, L, blocks,
                         BM: tl.constexpr):
    """sums [D, batch, blocks]: the sums of dc x over BM samples."""
    i_row = tl.program_id(0) // blocks
    o_b, o_d = (i_row % batch).to(tl.int64), (i_row // batch).to(tl.int64)
    o_n = (tl.program_id(0) % blocks * BM + tl.arange(0, BM)).to(tl.int64)
    b_x = _samples(_at(x, o_b, o_d, stride_xb, stride_xc), _at(gate, o_b, o_d, stride_gb, stride_gc), o_n, o_n < L,
                   stride_xt, stride_gt)
    b_y = _samples(_at(dy, o_b, o_d, stride_yb, stride_yc), _at(dgate, o_b, o_d, stride_hb, stride_hc), o_n, o_n < L,
                   stride_yt, stride_ht)
    tl.store(sums + tl.program_id(0), tl.sum(b_x * b_y, 0))


# ---- on the host -----------------------------------------------------------------------------------------------------

_DIRECT = 128  # taps that are summed directly. Not measured, as nothing here: work is counted.
# Transforms that one program does, N0 N1 N2 points: with factors of 16 at most, since all warps hold the matrices in
# registers, as three parts of TF32 products; as many side by side as make a tile of 4096 points.
_FACTORS = {256: (1, 16, 16), 512: (2, 16, 16), 1024: (4, 16, 16), 2048: (8, 16, 16), 4096: (16, 16, 16)}
_RADICES = (16,)  # of stages that pass through memory
_STAGE = 40  # work that such a stage costs besides, per point: 32 bytes, in multiplications by a complex constant
_SCRATCH = 1 << 27  # bytes that one set of rows may take there
_TILE = 4096  # points of a program
_SAMPLES = 4096  # the most whose products one program adds up directly


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How rows are convolved: `points` are zero for a direct sum, `stages` are the radices before them."""

    points: int
    stages: tuple[int, ...] = ()
    windows: int = 1
    step: int = 0  # outputs of a window
    real: bool = False  # the window's second half is zero and not wanted

    @property
    def total(self) -> int:
        return functools.reduce(int.__mul__, self.stages, self.points)


def _work(points: int) -> int:
    """Of a point, in multiplications by a complex constant."""
    return 32 if _FACTORS[points][0] == 1 else 48


@functools.cache
def _stages(total: int) -> tuple[int, tuple[int, ...]] | None:
    """The (work per point, radices) of least work for a transform of `total` points; None: there is none."""
    ways = [(_work(total), ())] if total in _FACTORS else []
    for radix in _RADICES:
        if total % radix == 0 and (rest := _stages(total // radix)) is not None:
            ways.append((radix + _STAGE + rest[0], (radix, *rest[1])))
    return min(ways, default=None)


def _single(length: int, taps: int, circular: bool) -> list[tuple[int, _Plan]]:
    """The ways to transform a row whole, with zeros after it: its transform's second half is neither given nor wanted,
    which saves a quarter of the products."""
    least = max((length + taps) // 2 if circular else length, min(_FACTORS))
    ways = []
    for total in (1 << (least - 1).bit_length(), 2 << (least - 1).bit_length()):
        if (stages := _stages(total)) is not None:
            work, radices = stages
            points = functools.reduce(int.__floordiv__, radices, total)
            ways.append((work * total * (4 if circular else 3) // 4, _Plan(points, radices, 1, length, not circular)))
    return ways


@functools.cache
def plan(length: int, taps: int, circular: bool) -> _Plan:
    """The way of least counted work: multiplications by complex constants, per row."""
    if taps <= _DIRECT:
        return _Plan(0)
    ways = _single(length, taps, circular)
    for points in _FACTORS:
        step = min(2 * points - taps + 1, length)
        if step > 0:
            windows = -(-length // step)
            ways.append((windows * points * _work(points), _Plan(points, (), windows, step)))
    return min(ways, key=lambda way: way[0])[1]


def _taps(k: Tensor, k_rev: Tensor | None, lag: int, length: int, circular: bool) -> tuple[Tensor, int]:
    """-> (the taps of all lags [G, T], the number of those that are negative); `_taps_gradient` is the adjoint."""
    if circular:
        if k.shape[1] + (0 if k_rev is None else k_rev.shape[1]) > length:
            taps = _fold(k, length)
            if k_rev is not None:
                taps = taps + _fold(k_rev, length).flip(1).roll(1 - lag, 1)
            return taps.contiguous(), 0
    else:
        k = k[:, :length]
        k_rev = None if k_rev is None or length <= lag else k_rev[:, : length - lag]
    if k_rev is None:
        return k.contiguous(), 0
    behind = k_rev.shape[1] - 1 + lag
    taps = torch.nn.functional.pad(k, (behind, 0))
    taps[:, : k_rev.shape[1]] += k_rev.flip(1)
    return taps, behind


def _fold(k: Tensor, length: int) -> Tensor:
    """The sums over taps that are equal modulo `length`."""
    return torch.nn.functional.pad(k, (0, -k.shape[1] % length)).unflatten(1, (-1, length)).sum(1)


def _taps_gradient(dtaps: Tensor, behind: int, k: Tensor, k_rev: Tensor | None, lag: int, length: int,
                   circular: bool) -> tuple[Tensor, Tensor]:
    dk = k.new_zeros(k.shape)
    dk_rev = k.new_zeros(k.shape[0], 0) if k_rev is None else k.new_zeros(k_rev.shape)
    if circular and k.shape[1] + dk_rev.shape[1] > length:
        lags = torch.arange(max(k.shape[1], dk_rev.shape[1]), device=k.device)
        return dtaps[:, lags[: k.shape[1]] % length], dtaps[:, (-lags[: dk_rev.shape[1]] - lag) % length]
    ahead = dtaps[:, behind:]
    dk[:, : ahead.shape[1]] = ahead
    reverse = dtaps[:, : max(behind + 1 - lag, 0) if k_rev is not None else 0]
    dk_rev[:, : reverse.shape[1]] = reverse.flip(1)
    return dk, dk_rev


def _strides(**tensors: Tensor | None) -> dict[str, int]:
    """Of x, gates g and h, and so on: by their letters."""
    return {f"stride_{name}{axis}": 0 if x is None else x.stride(i)
            for name, x in tensors.items() for i, axis in enumerate("bc" if name in "oq" else "bct")}


def _precision(device: torch.device) -> str:
    """NVIDIA's matrix units take fp32 as sums of TF32 numbers, three products each; AMD's take it as it is."""
    return "tf32x3" if target(device).startswith("sm_") else "ieee"


def _compiled(points: int) -> dict[str, int]:
    return {"num_warps": 8 if points > 1024 else 4, "num_stages": 1}


def _tables(points: int, shift: int, like: Tensor) -> Tensor:
    N0, N1, N2 = _FACTORS[points]
    alone, rest = 2 * (N0 * N0 + points if N0 > 1 else 0), 2 * (N1 * N1 + N1 * N2 + N2 * N2)
    tables = like.new_empty(alone + rest, dtype=torch.float32)
    for part, n1, n2, of_shift in ((tables[:alone], N0, N1 * N2, shift), (tables[alone:], N1, N2, shift * (N0 == 1))):
        launch(fft_conv_tables_kernel, (triton.cdiv(part.shape[0] // 2, 1024),), like.device, tables=part, N1=n1, N2=n2,
               SHIFT=of_shift, TOTAL=part.shape[0] // 2, BLOCK=1024, num_warps=4, num_stages=1)
    return tables


class _Convolution:
    """The kernels `taps` [G, T], of lags from -behind, and sequences of `length`; `tables` and spectra come with it."""

    def __init__(self, taps: Tensor, behind: int, length: int, circular: bool) -> None:
        self.taps, self.behind, self.length, self.circular = taps, behind, length, circular
        self.plan = plan(length, taps.shape[1], circular)
        points, total = self.plan.points, self.plan.total
        ahead = taps.shape[1] - 1 - behind
        self.taps_real = behind == 0 and ahead < total
        if points:
            self.factors = dict(zip(("N0", "N1", "N2"), _FACTORS[points]))
            self.tables = _tables(points, int(not self.plan.stages), taps)
        self.common = {"PRECISION": _precision(taps.device)}

    def _window(self, reverse: bool) -> dict[str, int]:
        """Where windows start, of the convolution with these kernels or the one `reverse`d in time."""
        plan, T, behind = self.plan, self.taps.shape[1], self.behind
        offset = 0 if plan.real else behind if reverse else T - 1 - behind
        last = 2 * plan.total if not self.circular else plan.step + T - 1
        return {"step": plan.step, "offset": offset, "lift": -(-offset // self.length) * self.length, "last": last}

    @functools.cached_property
    def _spectrum(self) -> Tensor:
        groups, taps = self.taps.shape
        points = self.plan.points
        spectrum = self.taps.new_empty(groups, 2, points)
        BR = _TILE // self.plan.points
        launch(fft_conv_spectrum_kernel, (triton.cdiv(groups, BR),), spectrum.device, taps=self.taps, spectrum=spectrum,
               tables=self.tables, rows=groups, T=taps, behind=self.behind, BR=BR, REAL=self.taps_real, **self.factors,
               **self.common, **_compiled(_TILE))
        return spectrum

    def convolve(self, x: Tensor, gate: Tensor | None, skip: Tensor | None, factor: Tensor | None, *,
                 also: Tensor | None = None, reverse: bool = False) -> tuple[Tensor, Tensor | None]:
        """With c the convolution of gate x (its transpose if `reverse`): factor (c + D gate x), also (c + D gate x)."""
        out = x.new_empty(x.shape)
        second = None if also is None else x.new_empty(x.shape)
        way = self._direct if not self.plan.points else self._staged if self.plan.stages else self._windowed
        way(x, gate, skip, factor, also, out, second, reverse)
        return out, second

    def _rows(self, x, gate, skip, factor, also, out, second) -> dict:
        return {"x": x, "gate": gate, "skip": skip, "factor": factor, "factor2": also, "out": out, "out2": second,
                "batch": x.shape[0], "L": self.length, **_strides(x=x, g=gate, f=factor, h=also, o=out, q=second)}

    def _direct(self, *rows, reverse=None) -> None:
        *rows, reverse = rows
        x = rows[0]
        (batch, channels, length), T = x.shape, self.taps.shape[1]
        offset = self.behind if reverse else T - 1 - self.behind
        BT, BM = 32 if T <= 32 else 64, 64
        blocks = triton.cdiv(length, BT)
        launch(fft_conv_direct_kernel, (channels * triton.cdiv(batch * blocks, BM),), x.device, taps=self.taps,
               per_group=channels // self.taps.shape[0], T=T, offset=offset, lift=-(-offset // length) * length,
               blocks=blocks, BM=BM, BT=BT, BS=16, CIRCULAR=self.circular, REVERSE=reverse, **self._rows(*rows),
               **self.common, **_compiled(BM * BT))

    def _windowed(self, *rows) -> None:
        *rows, reverse = rows
        x = rows[0]
        plan, programs = self.plan, x.shape[0] * x.shape[1] * self.plan.windows
        BR = _TILE // self.plan.points
        launch(fft_conv_window_kernel, (triton.cdiv(programs, BR),), x.device, spectrum=self._spectrum,
               tables=self.tables, per_group=x.shape[1] // self.taps.shape[0], rows=programs, windows=plan.windows,
               zero=0, BR=BR, REAL=plan.real, CIRCULAR=self.circular, CONJ=reverse, **self.factors,
               **self._window(reverse),
               **self._rows(*rows), **self.common, **_compiled(_TILE))

    # Rows that pass through memory do so a part at a time: some groups of channels, or some rows of one group.

    def _parts(self, batch: int, channels: int, copies: int):
        """-> slices of groups, and for each of these slices of channels and of batch entries."""
        groups = self.taps.shape[0]
        per_group = channels // groups
        rows = max(1, _SCRATCH // (8 * self.plan.total * copies))
        some = max(1, rows // (batch * per_group))
        width = some * per_group if batch * per_group <= rows else max(1, min(per_group, rows // batch))
        for g in range(0, groups, some):
            end = min(g + some, groups) * per_group
            yield slice(g, g + some), [
                (slice(b, b + rows), slice(d, min(d + width, end)))
                for d in range(g * per_group, end, width) for b in range(0, batch, rows)]

    def _scratch(self, rows: int) -> Tensor:
        return self.taps.new_empty(rows, 2, self.plan.total)

    def _stages(self):
        """-> (what a stage's kernels are told of it, its programs per row)"""
        left = self.plan.total
        for i, R in enumerate(self.plan.stages):
            M = left // R
            BM = _TILE // R
            yield ({"R": R, "M": M, "BM": BM, "TOTAL": self.plan.total, "SHIFT": int(i == 0), **self.common,
                    **_compiled(_TILE)}, self.plan.total // (R * BM))
            left = M

    def _split(self, z: Tensor, x: Tensor | None = None, gate: Tensor | None = None, taps: Tensor | None = None,
               real: bool = False, circular: bool = False, **window: int) -> None:
        """Every stage but the last, from x or taps to z."""
        for stage, programs in self._stages():
            first = stage["SHIFT"] == 1
            none = {"step": 0, "offset": 0, "lift": 0, "first": 0, "last": 0}
            launch(fft_conv_split_kernel, (z.shape[0] * programs,), z.device, x=x if first else None,
                   gate=gate if first else None, taps=taps if first else None, z=z,
                   batch=1 if x is None else x.shape[0], L=self.length, T=self.taps.shape[1], behind=self.behind,
                   REAL=real and first, CIRCULAR=circular and first, **{**none, **window}, **stage,
                   **(_strides(x=x, g=gate) if first else _strides(x=None, g=None)))

    def _inner(self, z: Tensor, spectrum: Tensor | None = None, batch: int = 1, per_group: int = 1,
               forward: bool = True, inverse: bool = True, conj: bool = False) -> None:
        points, total = self.plan.points, self.plan.total
        BR = _TILE // points
        launch(fft_conv_inner_kernel, (z.shape[0] * (total // points) // BR,), z.device, z=z, spectrum=spectrum,
               tables=self.tables, batch=batch, per_group=per_group, zero=0, BR=BR, TOTAL=total, FORWARD=forward,
               INVERSE=inverse, CONJ=conj, **self.factors, **self.common, **_compiled(_TILE))

    def _merge(self, z: Tensor, real: bool, dtaps: Tensor | None = None, rows: dict | None = None,
               **window: int) -> None:
        """The inverse of all stages but the last, from z to rows or dtaps."""
        nothing = {**self._rows(z, *[None] * 6), "x": None, **_strides(x=None), "batch": 1}
        for stage, programs in reversed(list(self._stages())):
            last = stage["SHIFT"] == 1
            launch(fft_conv_merge_kernel, (z.shape[0] * programs,), z.device, z=z, dtaps=dtaps if last else None,
                   T=self.taps.shape[1], behind=self.behind, step=self.plan.step, offset=window.get("offset", 0),
                   REAL=real and last, **(rows if rows is not None and last else nothing), **stage)

    def _staged(self, *rows) -> None:
        *rows, reverse = rows
        x, gate, skip = rows[:3]
        (batch, channels, _), window = x.shape, self._window(reverse)
        for groups, pieces in self._parts(batch, channels, 1):
            taps = self.taps[groups]
            spectrum = self._scratch(taps.shape[0])
            self._split(spectrum, taps=taps, real=self.taps_real)
            self._inner(spectrum, inverse=False)
            for b, d in pieces:
                piece = [None if y is None else y[d] if y is skip else y[b, d] for y in rows]
                z = self._scratch(piece[0].shape[0] * piece[0].shape[1])
                self._split(z, piece[0], piece[1], real=self.plan.real, circular=self.circular, first=0, **window)
                self._inner(z, spectrum, piece[0].shape[0], channels // self.taps.shape[0], conj=reverse)
                self._merge(z, self.plan.real, rows=self._rows(*piece), **window)

    def taps_gradient(self, x: Tensor, gate: Tensor | None, dy: Tensor, dgate: Tensor | None) -> Tensor:
        """-> [G, T]: tap j's, the sum over rows of a group and n of dc_n (gate x)_{n - j + behind}, dc = dgate dy."""
        way = (self._direct_taps if not self.plan.points
               else self._staged_taps if self.plan.stages else self._windowed_taps)
        return way(x, gate, dy, dgate)

    def _pair(self, x, gate, dy, dgate) -> dict:
        return {"x": x, "gate": gate, "dy": dy, "dgate": dgate, "batch": x.shape[0], "L": self.length,
                **_strides(x=x, g=gate, y=dy, h=dgate)}

    def _direct_taps(self, *pair: Tensor | None) -> Tensor:
        x = pair[0]
        (batch, channels, length), (groups, T) = x.shape, self.taps.shape
        BM, BJ = 64, 16
        while BJ * BJ < T:
            BJ *= 2
        blocks = triton.cdiv(length + BJ - 1, BM)
        items = channels // groups * batch * blocks
        share = _SAMPLES // BM
        parts = triton.cdiv(items, share)
        sums = x.new_empty(groups, parts, BJ * BJ, dtype=torch.float32)
        lift = -(-BJ * (BJ + 1) // length) * length if self.circular else 0
        launch(fft_conv_direct_taps_kernel, (groups * parts,), x.device, sums=sums, per_group=channels // groups,
               behind=self.behind, lift=lift, blocks=blocks, share=share, parts=parts, BM=BM, BJ=BJ,
               CIRCULAR=self.circular, **self._pair(*pair), **self.common, num_warps=2, num_stages=1)
        return sums.sum(1)[:, :T]

    def _windowed_taps(self, *pair: Tensor | None) -> Tensor:
        x, plan, groups = pair[0], self.plan, self.taps.shape[0]
        per_group = x.shape[1] // groups
        BR = _TILE // self.plan.points
        tiles = triton.cdiv(x.shape[0] * per_group * plan.windows, BR)
        share = triton.cdiv(tiles, min(triton.cdiv(tiles, 4), triton.cdiv(1024, groups)))
        parts = triton.cdiv(tiles, share)
        sums = self.taps.new_empty(groups, parts, 2, plan.points)
        launch(fft_conv_correlate_kernel, (groups * parts,), x.device, sums=sums, tables=self.tables,
               per_group=per_group, windows=plan.windows, share=share, parts=parts, zero=0, BR=BR, REAL=plan.real,
               CIRCULAR=self.circular, **self.factors, **self._window(False), **self._pair(*pair), **self.common,
               **_compiled(_TILE))
        dtaps = torch.empty_like(self.taps)
        BR = _TILE // self.plan.points
        launch(fft_conv_taps_kernel, (triton.cdiv(groups, BR),), x.device, sums=sums, dtaps=dtaps, tables=self.tables,
               rows=groups, T=dtaps.shape[1], behind=self.behind, parts=parts, BR=BR, REAL=self.taps_real,
               **self.factors, **self.common, **_compiled(_TILE))
        return dtaps

    def _staged_taps(self, *pair: Tensor | None) -> Tensor:
        x, plan, window = pair[0], self.plan, self._window(False)
        own = {"step": plan.step, "offset": window["offset"], "lift": 0, "first": window["offset"],
               "last": window["offset"] + plan.step}
        dtaps = torch.empty_like(self.taps)
        for groups, pieces in self._parts(x.shape[0], x.shape[1], 2):
            some = dtaps[groups]
            sums = self._scratch(some.shape[0]).zero_()
            for b, d in pieces:
                px, pg, py, ph = (None if y is None else y[b, d] for y in pair)
                rows = px.shape[0] * px.shape[1]
                zx, zy = self._scratch(rows), self._scratch(rows)
                self._split(zx, px, pg, real=plan.real, circular=self.circular, first=0, **window)
                self._split(zy, py, ph, real=plan.real, **own)
                launch(fft_conv_correlate_inner_kernel, (some.shape[0] * (plan.total // _TILE),), x.device, zx=zx,
                       zy=zy, sums=sums, tables=self.tables, rows=rows // some.shape[0], zero=0,
                       BR=_TILE // plan.points, TOTAL=plan.total, **self.factors, **self.common, **_compiled(_TILE))
            self._inner(sums, forward=False)
            self._merge(sums, self.taps_real, dtaps=some)
        return dtaps


def _skip_gradient(x: Tensor, gate: Tensor | None, dy: Tensor, dgate: Tensor | None) -> Tensor:
    batch, channels, length = x.shape
    BM = min(_SAMPLES, triton.next_power_of_2(length))
    blocks = triton.cdiv(length, BM)
    sums = x.new_empty(channels, batch, blocks, dtype=torch.float32)
    launch(fft_conv_skip_kernel, (sums.numel(),), x.device, x=x, gate=gate, dy=dy, dgate=dgate, sums=sums, batch=batch,
           L=length, blocks=blocks, BM=BM, num_warps=4, num_stages=1, **_strides(x=x, g=gate, y=dy, h=dgate))
    return sums.sum((1, 2))


def fwd(u, k, k_rev, D, pre_gate, post_gate, k_rev_lag, circular):
    if not u.numel():
        return u.new_empty(u.shape)
    taps, behind = _taps(k, k_rev, k_rev_lag, u.shape[2], circular)
    D = None if D is None else D.contiguous()
    return _Convolution(taps, behind, u.shape[2], circular).convolve(u, pre_gate, D, post_gate)[0]


def bwd(dout, u, k, k_rev, D, pre_gate, post_gate, k_rev_lag, circular, input_gradient, kernel_gradient):
    length = u.shape[2]

    def rows(wanted: bool) -> Tensor:
        return u.new_empty(u.shape[0] if wanted else 0, *u.shape[1:])

    groups = k.shape[0] if kernel_gradient else 0
    du, dpre, dpost = (rows(wanted and not u.numel()) for wanted in (
        input_gradient, input_gradient and pre_gate is not None, post_gate is not None))
    dk = k.new_zeros(groups, k.shape[1])
    dk_rev = k.new_zeros(0, 0) if k_rev is None else k.new_zeros(groups, k_rev.shape[1])
    dD = k.new_zeros(0 if D is None else u.shape[1])
    if not u.numel():
        return du, dk, dk_rev, dD, dpre, dpost
    taps, behind = _taps(k, k_rev, k_rev_lag, length, circular)
    convolution = _Convolution(taps, behind, length, circular)
    if D is not None:
        D = D.contiguous()
        dD = _skip_gradient(u, pre_gate, dout, post_gate)
    if input_gradient:
        also = None if pre_gate is None else u
        du, second = convolution.convolve(dout, post_gate, D, pre_gate, also=also, reverse=True)
        dpre = dpre if second is None else second
    if post_gate is not None:
        dpost, _ = convolution.convolve(u, pre_gate, D, dout)
    if kernel_gradient:
        dtaps = convolution.taps_gradient(u, pre_gate, dout, post_gate)
        dk, of_rev = _taps_gradient(dtaps, behind, k, k_rev, k_rev_lag, length, circular)
        dk_rev = dk_rev if k_rev is None else of_rev
    return du, dk, dk_rev, dD, dpre, dpost
