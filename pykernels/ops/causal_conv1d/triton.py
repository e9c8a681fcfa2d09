"""The causal convolution in Triton: forward, backward and step. README.md derives the gradients.

One program owns a tile of BD channels and BT tokens. It reads e, the state followed by x, once per tap: the taps of a
tile share cache lines. Nothing is accumulated across programs: sums over tokens are kept per tile and added up
afterwards, in a fixed order, so results are bitwise repeatable. Grids follow from shapes alone.

Names: `i_` index, `o_` offset, `m_` mask, `p_` pointer, `b_` block value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._dispatch import empty_like_layout
from ..._triton import clamped, find_sequence, launch, load, store, target, tiles_packed

# Runtime values on which compiled code must not be specialised: they change from call to call.
_VARYING = ["L", "tiles", "sequences"]


@triton.jit
def _entries(p_x, p_s, o_d, m_d, o_e, m_e, length, stride_xc, stride_xt, W: tl.constexpr):
    """e at its entries o_e, of which the first W - 1 are the state's, in fp32, zero outside. -> [BD, BT]"""
    o_t = o_e - (W - 1)
    m_x = m_e & (o_t >= 0) & (o_t < length)
    p_e = p_x + (o_d[:, None] * stride_xc + o_t.to(tl.int64)[None, :] * stride_xt)
    b_e = load(p_e, m_d[:, None] & m_x[None, :]).to(tl.float32)
    if p_s is not None:
        m_s = m_e & (o_e >= 0) & (o_t < 0)
        b_e += load(p_s + (o_d[:, None] * (W - 1) + o_e[None, :]), m_d[:, None] & m_s[None, :]).to(tl.float32)
    return b_e


@triton.jit
def _convolve(p_x, p_s, weight, bias, o_d, m_d, o_t, m_t, length, stride_xc, stride_xt, W: tl.constexpr):
    """The convolution at tokens o_t, before its activation. -> [BD, BT]"""
    b_y = tl.zeros([o_d.shape[0], o_t.shape[0]], dtype=tl.float32)
    for w in range(0, W):
        b_w = load(weight + o_d * W + w, m_d)
        b_y += b_w[:, None] * _entries(p_x, p_s, o_d, m_d, o_t + w, m_t, length, stride_xc, stride_xt, W)
    if bias is not None:
        b_y += load(bias + o_d, m_d)[:, None]
    return b_y


@triton.jit
def _tile(cu_seqlens, i_t, i_b, sequences, L, BT: tl.constexpr):
    """-> (sequence, its first token, its length, the tile's index in it); number `sequences` is the tokens of none."""
    i_s = i_b
    start = 0
    length = L
    if cu_seqlens is not None:
        i_s, start, length, i_t = find_sequence(i_t, cu_seqlens, sequences, L, BT)
    return i_s, start, length, i_t


@triton.jit
def _at(state, i_s, D, W: tl.constexpr):
    """The states of sequence i_s, None of None."""
    if state is not None:
        state = state + tl.cast(i_s, tl.int64) * D * (W - 1)
    return state


@triton.jit(do_not_specialize=_VARYING)
def causal_conv1d_fwd_kernel(x, weight, bias, state, out, cu_seqlens, stride_xb, stride_xc, stride_xt, stride_ob,
                             stride_oc,
                             stride_ot, D, L, tiles, sequences, W: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr,
                             BT: tl.constexpr):
    blocks = tl.cdiv(D, BD)
    i_b = (tl.program_id(0) // tiles // blocks).to(tl.int64)
    i_s, start, length, i_t = _tile(cu_seqlens, tl.program_id(0) % tiles, i_b, sequences, L, BT)
    if i_t * BT >= length:
        return
    o_d = (tl.program_id(0) // tiles % blocks * BD + tl.arange(0, BD)).to(tl.int64)
    m_d = o_d < D
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = o_t < length
    p_x = x + i_b * stride_xb + tl.cast(start, tl.int64) * stride_xt
    m_in = o_d < D * (i_s < sequences)  # tokens of no sequence see nothing, and come out as zeros
    b_y = _convolve(p_x, _at(state, i_s, D, W), weight, bias, o_d, m_in, o_t, m_t, length, stride_xc, stride_xt, W)
    if SILU:
        b_y = b_y * tl.sigmoid(b_y)
    p_o = out + i_b * stride_ob + tl.cast(start, tl.int64) * stride_ot
    store(p_o + (o_d[:, None] * stride_oc + o_t.to(tl.int64)[None, :] * stride_ot), b_y, m_d[:, None] & m_t[None, :])


@triton.jit
def _sequence(cu_seqlens, i_s, L):
    """-> (its batch entry, its first token, its length)"""
    i_b = tl.cast(i_s, tl.int64)
    start = 0
    length = L
    if cu_seqlens is not None:
        i_b = i_b * 0
        start = clamped(cu_seqlens + i_s, L)
        length = tl.maximum(clamped(cu_seqlens + i_s + 1, L) - start, 0)
    return i_b, start, length


@triton.jit(do_not_specialize=["L"])
def causal_conv1d_fwd_state_kernel(x, state, final_state, cu_seqlens, stride_xb, stride_xc, stride_xt, D, L,
                                   W: tl.constexpr,
                                   BD: tl.constexpr, BW: tl.constexpr):
    """The last W - 1 entries of e, of BD channels of one sequence."""
    blocks = tl.cdiv(D, BD)
    i_s = tl.program_id(0) // blocks
    i_b, start, length = _sequence(cu_seqlens, i_s, L)
    o_d = (tl.program_id(0) % blocks * BD + tl.arange(0, BD)).to(tl.int64)
    m_d = o_d < D
    o_j = tl.arange(0, BW)
    m_j = o_j < W - 1
    p_x = x + i_b * stride_xb + tl.cast(start, tl.int64) * stride_xt
    b_e = _entries(p_x, _at(state, i_s, D, W), o_d, m_d, length + o_j, m_j, length, stride_xc, stride_xt, W)
    store(_at(final_state, i_s, D, W) + (o_d[:, None] * (W - 1) + o_j[None, :]), b_e, m_d[:, None] & m_j[None, :])


@triton.jit(do_not_specialize=_VARYING)
def causal_conv1d_bwd_sums_kernel(x, weight, bias, state, dout, dy, dweight, dbias, cu_seqlens, stride_xb, stride_xc,
                                  stride_xt,
                                  stride_db, stride_dc, stride_dt, D, L, tiles, sequences, W: tl.constexpr,
                                  SILU: tl.constexpr,
                                  BD: tl.constexpr, BT: tl.constexpr):
    """dy [B, D, L], the gradient before the activation, and the tile's part of dweight [tiles, D, W] and dbias [tiles,
    D]."""
    blocks = tl.cdiv(D, BD)
    i_b = (tl.program_id(0) // tiles // blocks).to(tl.int64)
    i_p = i_b * tiles + tl.program_id(0) % tiles
    i_s, start, length, i_t = _tile(cu_seqlens, tl.program_id(0) % tiles, i_b, sequences, L, BT)
    if i_t * BT >= length:
        return
    o_d = (tl.program_id(0) // tiles % blocks * BD + tl.arange(0, BD)).to(tl.int64)
    m_d = o_d < D
    m_in = o_d < D * (i_s < sequences)
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = o_t < length
    p_x = x + i_b * stride_xb + tl.cast(start, tl.int64) * stride_xt
    p_s = _at(state, i_s, D, W)
    p_d = dout + i_b * stride_db + tl.cast(start, tl.int64) * stride_dt
    p_g = p_d + (o_d[:, None] * stride_dc + o_t.to(tl.int64)[None, :] * stride_dt)
    b_g = load(p_g, m_in[:, None] & m_t[None, :]).to(tl.float32)
    if SILU:
        b_y = _convolve(p_x, p_s, weight, bias, o_d, m_in, o_t, m_t, length, stride_xc, stride_xt, W)
        b_s = tl.sigmoid(b_y)
        b_g = b_g * (b_s * (1.0 + b_y * (1.0 - b_s)))
    store(dy + ((i_b * D + o_d)[:, None] * L + (start + o_t)[None, :]), b_g, m_d[:, None] & m_t[None, :])
    tl.store(dbias + i_p * D + o_d, tl.sum(b_g, 1), mask=m_d)
    for w in range(0, W):
        b_e = _entries(p_x, p_s, o_d, m_in, o_t + w, m_t, length, stride_xc, stride_xt, W)
        tl.store(dweight + (i_p * D + o_d) * W + w, tl.sum(b_g * b_e, 1), mask=m_d)


@triton.jit
def _transposed(p_g, weight, p_f, o_d, m_d, o_e, m_e, length, L, W: tl.constexpr):
    """The gradient of e's entries o_e: from dy at the tokens that see them, and from the final state. -> [BD, BT]"""
    b_x = tl.zeros([o_d.shape[0], o_e.shape[0]], dtype=tl.float32)
    for w in range(0, W):
        o_t = o_e - w
        m_t = m_e & (o_t >= 0) & (o_t < length)
        b_w = load(weight + o_d * W + w, m_d)
        b_x += b_w[:, None] * load(p_g + (o_d[:, None] * L + o_t[None, :]), m_d[:, None] & m_t[None, :])
    if p_f is not None:
        o_j = o_e - length
        m_j = m_e & (o_j >= 0) & (o_j < W - 1)
        b_x += load(p_f + (o_d[:, None] * (W - 1) + o_j[None, :]), m_d[:, None] & m_j[None, :]).to(tl.float32)
    return b_x


@triton.jit(do_not_specialize=_VARYING)
def causal_conv1d_bwd_input_kernel(dy, weight, dfinal_state, dx, cu_seqlens, stride_xb, stride_xc, stride_xt, D, L,
                                   tiles, sequences,
                                   W: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr):
    blocks = tl.cdiv(D, BD)
    i_b = (tl.program_id(0) // tiles // blocks).to(tl.int64)
    i_s, start, length, i_t = _tile(cu_seqlens, tl.program_id(0) % tiles, i_b, sequences, L, BT)
    if i_t * BT >= length:
        return
    o_d = (tl.program_id(0) // tiles % blocks * BD + tl.arange(0, BD)).to(tl.int64)
    m_d = o_d < D
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = o_t < length
    p_g = dy + i_b * D * L + start
    m_in = o_d < D * (i_s < sequences)
    b_x = _transposed(p_g, weight, _at(dfinal_state, i_s, D, W), o_d, m_in, o_t + (W - 1), m_t, length, L, W)
    p_x = dx + i_b * stride_xb + tl.cast(start, tl.int64) * stride_xt
    store(p_x + (o_d[:, None] * stride_xc + o_t.to(tl.int64)[None, :] * stride_xt), b_x, m_d[:, None] & m_t[None, :])


@triton.jit(do_not_specialize=["L"])
def causal_conv1d_bwd_state_kernel(dy, weight, dfinal_state, dinitial_state, cu_seqlens, D, L, W: tl.constexpr,
                                   BD: tl.constexpr,
                                   BW: tl.constexpr):
    """The gradient of e's first W - 1 entries, of BD channels of one sequence."""
    blocks = tl.cdiv(D, BD)
    i_s = tl.program_id(0) // blocks
    i_b, start, length = _sequence(cu_seqlens, i_s, L)
    o_d = (tl.program_id(0) % blocks * BD + tl.arange(0, BD)).to(tl.int64)
    m_d = o_d < D
    o_j = tl.arange(0, BW)
    m_j = o_j < W - 1
    b_x = _transposed(dy + i_b * D * L + start, weight, _at(dfinal_state, i_s, D, W), o_d, m_d, o_j, m_j, length, L, W)
    store(_at(dinitial_state, i_s, D, W) + (o_d[:, None] * (W - 1) + o_j[None, :]), b_x, m_d[:, None] & m_j[None, :])


@triton.jit
def _entry(p_x, p_s, m_d, i_e, stride_xt, stride_st, W: tl.constexpr):
    """Entry i_e of the state followed by x, in fp32."""
    if i_e < W - 1:
        b_e = load(p_s + i_e * stride_st, m_d).to(tl.float32)
    else:
        b_e = load(p_x + (i_e - (W - 1)) * stride_xt, m_d).to(tl.float32)
    return b_e


@triton.jit(do_not_specialize=["slots"])
def causal_conv1d_step_kernel(x, state, weight, bias, state_indices, out, stride_xb, stride_xc, stride_xt, stride_sb,
                              stride_sc,
                              stride_st, stride_ob, stride_oc, stride_ot, D, slots, T: tl.constexpr, W: tl.constexpr,
                              SILU: tl.constexpr, BD: tl.constexpr):
    blocks = tl.cdiv(D, BD)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    slot = i_b
    if state_indices is not None:
        slot = tl.load(state_indices + i_b).to(tl.int64)
    o_d = (tl.program_id(0) % blocks * BD + tl.arange(0, BD)).to(tl.int64)
    m_d = o_d < D
    m_in = o_d < D * ((slot >= 0) & (slot < slots))
    p_x = x + i_b * stride_xb + o_d * stride_xc
    p_s = state + slot * stride_sb + o_d * stride_sc
    for t in range(0, T):
        b_y = tl.zeros([BD], dtype=tl.float32)
        for w in range(0, W):
            b_w = load(weight + o_d * W + w, m_in).to(tl.float32)
            b_y += b_w * _entry(p_x, p_s, m_in, t + w, stride_xt, stride_st, W)
        if bias is not None:
            b_y += load(bias + o_d, m_in).to(tl.float32)
        if SILU:
            b_y = b_y * tl.sigmoid(b_y)
        store(out + i_b * stride_ob + o_d * stride_oc + t * stride_ot, b_y, m_d)
    # Each entry moves T places down, the first one first: what it overwrites has been read, by every thread.
    for j in range(0, W - 1):
        b_e = _entry(p_x, p_s, m_in, T + j, stride_xt, stride_st, W)
        tl.debug_barrier()
        store(p_s + j * stride_st, b_e, m_in)


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {f"stride_{name}{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("bct")}


def _blocks(x: Tensor) -> tuple[int, int]:
    """(BD, BT): long along the axis that is contiguous. Not measured."""
    if target(x.device) == "interpreter":
        return 16, 32
    return (8, 128) if x.stride(2) == 1 else (64, 16)


def _tiles(x: Tensor, BT: int, cu_seqlens: Tensor | None) -> dict[str, int]:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tiles = triton.cdiv(x.shape[2], BT) if cu_seqlens is None else tiles_packed(x.shape[2], sequences, BT)
    return {"tiles": tiles, "sequences": sequences}


def _states(x: Tensor, width: int, cu_seqlens: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, x.shape[1], width - 1)


_COMPILED = {"num_warps": 4, "num_stages": 1}
_STATE_BLOCK = 16  # channels of a program that copies states


def _launch_states(kernel, states: Tensor, **arguments) -> None:
    sequences, channels, entries = states.shape
    if entries > 0:
        launch(kernel, (sequences * triton.cdiv(channels, _STATE_BLOCK),), states.device, D=channels, W=entries + 1,
               BD=_STATE_BLOCK,
               BW=triton.next_power_of_2(entries), **arguments, **_COMPILED)


def fwd(x, weight, bias, initial_state, cu_seqlens, silu):
    batch, channels, length = x.shape
    width = weight.shape[1]
    weight, initial_state = weight.contiguous(), None if initial_state is None else initial_state.contiguous()
    out, final_state = empty_like_layout(x), _states(x, width, cu_seqlens)
    BD, BT = _blocks(x)
    grid = _tiles(x, BT, cu_seqlens)
    launch(causal_conv1d_fwd_kernel, (grid["tiles"] * triton.cdiv(channels, BD) * batch,), x.device, x=x,
           weight=weight, bias=None if bias is None else bias.contiguous(),
           state=initial_state, out=out, cu_seqlens=cu_seqlens, D=channels, L=length, W=width, SILU=silu, BD=BD, BT=BT,
           **grid,
           **_strides(x=x, o=out), **_COMPILED)
    _launch_states(causal_conv1d_fwd_state_kernel, final_state, x=x, state=initial_state, final_state=final_state,
                   cu_seqlens=cu_seqlens, L=length, **_strides(x=x))
    return out, final_state


def bwd(dout, dfinal_state, x, weight, bias, initial_state, cu_seqlens, silu):
    batch, channels, length = x.shape
    width = weight.shape[1]
    weight = weight.contiguous()
    bias, initial_state, dfinal_state = (None if s is None else s.contiguous()
                                         for s in (bias, initial_state, dfinal_state))
    dx = empty_like_layout(x)
    BD, BT = _blocks(x)
    grid = _tiles(x, BT, cu_seqlens)
    dy = x.new_empty(batch, channels, length, dtype=torch.float32)
    # Tiles past the end of a packed sequence add nothing.
    dweight = x.new_zeros(batch * grid["tiles"], channels, width, dtype=torch.float32)
    dbias = x.new_zeros(batch * grid["tiles"], channels, dtype=torch.float32)
    programs = (grid["tiles"] * triton.cdiv(channels, BD) * batch,)
    shared = dict(weight=weight, cu_seqlens=cu_seqlens, D=channels, L=length, W=width, BD=BD, BT=BT, **grid,
                  **_COMPILED)
    launch(causal_conv1d_bwd_sums_kernel, programs, x.device, x=x, bias=bias, state=initial_state, dout=dout, dy=dy,
           dweight=dweight,
           dbias=dbias, SILU=silu, **shared, **_strides(x=x, d=dout))
    launch(causal_conv1d_bwd_input_kernel, programs, x.device, dy=dy, dfinal_state=dfinal_state, dx=dx, **shared,
           **_strides(x=dx))
    dinitial_state = _states(x, width, cu_seqlens)
    if initial_state is None:
        dinitial_state = dinitial_state[:0]
    _launch_states(causal_conv1d_bwd_state_kernel, dinitial_state, dy=dy, weight=weight, dfinal_state=dfinal_state,
                   dinitial_state=dinitial_state, cu_seqlens=cu_seqlens, L=length)
    return dx, dweight.sum(0), dbias.sum(0), dinitial_state


def step(x, state, weight, bias, state_indices, silu):
    if x.dim() == 2:
        return step(x[..., None], state, weight, bias, state_indices, silu)[..., 0]
    batch, channels, tokens = x.shape
    out = empty_like_layout(x)
    BD = 128
    launch(causal_conv1d_step_kernel, (batch * triton.cdiv(channels, BD),), x.device, x=x, state=state,
           weight=weight.contiguous(),
           bias=None if bias is None else bias.contiguous(), state_indices=state_indices, out=out, D=channels,
           slots=state.shape[0], T=tokens, W=weight.shape[1], SILU=silu,
           BD=BD, **_strides(x=x, s=state, o=out), **_COMPILED)
    return out
