"""What every op's Triton code shares: loads, stores and dots that the interpreter also runs, the target, the launch.

The interpreter (TRITON_INTERPRET=1) keeps bfloat16 as integer bits and would compute on those, so under it `load`
widens bfloat16 to float32 and `store` rounds back; in compiled code both are plain.
"""

from __future__ import annotations

import contextlib
import functools
import os

import torch
import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load(p, mask):
    """*p, zero where masked off; no mask when it is None."""
    if mask is None:
        b_x = tl.load(p)
    else:
        b_x = tl.load(p, mask=mask, other=0.0)
    if INTERPRET:
        if b_x.dtype == tl.bfloat16:
            b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def store(p, b_x, mask):
    """*p = b_x where mask holds, rounded to nearest."""
    if INTERPRET:
        if p.dtype.element_ty == tl.bfloat16:
            # Its own cast truncates. Half-way cases away from even carry; NaN stays NaN.
            b_bits = b_x.to(tl.float32).to(tl.uint32, bitcast=True)
            b_rounded = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16
            b_bits = tl.where(b_x == b_x, b_rounded, 0x7FC0)
            b_x = b_bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    tl.store(p, b_x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def load_tile(p, o_row, i_col, m_row, COLS: tl.constexpr, BC: tl.constexpr, MASK_ROWS: tl.constexpr):
    """The tile of rows at element offsets `o_row` (int64) and BC columns from i_col.

    It is zero where m_row is false and in columns past COLS. MASK_ROWS false promises that every row exists;
    there is no column mask when COLS is a multiple of BC.
    """
    o_col = i_col + tl.arange(0, BC)
    p_x = p + (o_row[:, None] + o_col[None, :])
    if MASK_ROWS and COLS % BC != 0:
        b_x = load(p_x, m_row[:, None] & (o_col < COLS)[None, :])
    elif MASK_ROWS:
        b_x = load(p_x, m_row[:, None])
    elif COLS % BC != 0:
        b_x = load(p_x, (o_col < COLS)[None, :])
    else:
        b_x = load(p_x, None)
    return b_x


@triton.jit
def store_tile(p, o_row, i_col, m_row, COLS: tl.constexpr, BC: tl.constexpr, b_x):
    """The inverse of `load_tile`; rows are always masked."""
    o_col = i_col + tl.arange(0, BC)
    p_x = p + (o_row[:, None] + o_col[None, :])
    if COLS % BC != 0:
        store(p_x, b_x, m_row[:, None] & (o_col < COLS)[None, :])
    else:
        store(p_x, b_x, m_row[:, None])


@triton.jit
def dot_rows(b_a, b_b, p_a, o_a, m_a, p_b, o_b, m_b, D: tl.constexpr, BD: tl.constexpr,
             MASK_A: tl.constexpr, MASK_B: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over D columns, in fp32, for rows a at p_a + o_a and b at p_b + o_b. -> [rows of a, rows of b]

    When one slice of BD columns holds D, b_a and b_b are those rows, loaded. Otherwise they are not used: both operands
    are read slice by slice, so that shared memory and registers do not grow with D.
    """
    if D <= BD:
        b_s = tl.dot(b_a, tl.trans(b_b), input_precision=PRECISION)
    else:
        b_s = tl.zeros([o_a.shape[0], o_b.shape[0]], dtype=tl.float32)
        for i_d in range(0, D, BD):
            b_x = load_tile(p_a, o_a, i_d, m_a, D, BD, MASK_A)
            b_y = load_tile(p_b, o_b, i_d, m_b, D, BD, MASK_B)
            b_s = tl.dot(b_x, tl.trans(b_y), b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def tanh(b_x, EXACT: tl.constexpr):
    """tanh with an absolute error of 1e-7; EXACT makes the relative error that small too, as fp32 results need."""
    b_a = tl.abs(b_x)
    b_y = 1.0 - 2.0 / (tl.exp2(b_a * (2 * LOG2E)) + 1.0)
    b_y = tl.where(b_x < 0, -b_y, b_y)
    if EXACT:
        # Below 0.625 the formula above cancels; there Cephes' minimax fit of (tanh x - x) / x^3 in x^2.
        b_x2 = b_x * b_x
        b_p = -5.70498872745e-3 * b_x2 + 2.06390887954e-2
        b_p = b_p * b_x2 - 5.37397155531e-2
        b_p = b_p * b_x2 + 1.33314422036e-1
        b_p = b_p * b_x2 - 3.33332819422e-1
        b_y = tl.where(b_a < 0.625, b_x + b_x * b_x2 * b_p, b_y)
    return b_y


@triton.jit
def find_sequence(i_tile, cu_seqlens, sequences, total, B: tl.constexpr):
    """-> (sequence, its first token, its length, the tile's index in it), of tile i_tile over packed sequences.

    Sequence s owns the tiles from cu_seqlens[s] // B + s on, which is at least as many as it needs; so the number of
    tiles, total // B + sequences + 1, follows from shapes, and the owner from a binary search. Tokens after the last
    offset count as a sequence of their own, number `sequences`. A tile may lie past its sequence's end.
    """
    i_low = 0
    i_high = sequences
    while i_low < i_high:
        i_mid = (i_low + i_high + 1) // 2
        if clamped(cu_seqlens + i_mid, total) // B + i_mid <= i_tile:
            i_low = i_mid
        else:
            i_high = i_mid - 1
    start = clamped(cu_seqlens + i_low, total)
    end = total
    if i_low < sequences:
        end = clamped(cu_seqlens + i_low + 1, total)
    return i_low, start, tl.maximum(end - start, 0), tl.maximum(i_tile - (start // B + i_low), 0)


@triton.jit
def clamped(p, high):
    """The integer at p, clamped to [0, high]: values in index tensors are not trusted."""
    return tl.minimum(tl.maximum(tl.load(p), 0), high)


def tiles_packed(total: int, sequences: int, block: int) -> int:
    """The number of tiles that `find_sequence` spreads over packed sequences."""
    return total // block + sequences + 1


@functools.cache
def _target(index: int | None) -> str:
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def target(device: torch.device) -> str:
    """What kernels are compiled for on a device: "sm_90", "gfx942", or "interpreter"."""
    if INTERPRET.value:
        return "interpreter"
    with _on(device):
        return _target(device.index)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes `device` the current one: Triton launches there, and on its current stream."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


def launch(kernel, grid: tuple[int, ...], device: torch.device, **arguments) -> None:
    """Runs `kernel` on the device's current stream; does nothing for an empty grid."""
    if 0 not in grid:
        with _on(device):
            kernel[grid](**arguments, enable_fp_fusion=True)  # the default differs between versions of Triton


def dot_precision(dtype: torch.dtype) -> str:
    """The precision of fp32 dots: IEEE unless torch's own setting for matrix products allows TF32."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"
