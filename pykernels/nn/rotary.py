"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary(x: Tensor, positions: Tensor, base: float = 10000.0, *, interleaved: bool = False) -> Tensor:
    r"""Turns each pair of features by an angle that grows with the position, so that q k^T depends on distance alone.

    .. math::
        x_i \to x_i \cos\theta - x_{i + K/2} \sin\theta, \qquad
        x_{i + K/2} \to x_{i + K/2} \cos\theta + x_i \sin\theta, \qquad
        \theta = position \cdot base^{-2i / K}

    Features pair as (i, i + K/2), the layout of Llama and GPT-NeoX weights in Transformers, or as (2i, 2i + 1) when
    `interleaved`, that of GPT-J and of Llama's original weights.

    Args:
        x: [B, T, H, K], K even.
        positions: integers [T] or [B, T].
        base: the longest wavelength is about 2 pi base.

    Returns:
        A tensor like x; computed in float32 at least.

    Source: Su et al., RoFormer (arXiv:2104.09864).
    """
    half = x.shape[-1] // 2
    if 2 * half != x.shape[-1]:
        raise ValueError(f"x must have an even head size, got shape {list(x.shape)}")
    compute = torch.promote_types(x.dtype, torch.float32)
    # Angles in float64: in float32 the phase of the fastest pair is off by 1e-3 at position 10^4.
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angles = positions[..., None, None].to(torch.float64) * frequencies  # [(B,) T, 1, K/2]
    cos, sin = angles.cos().to(compute), angles.sin().to(compute)
    pairs = x.unflatten(-1, (half, 2) if interleaved else (2, half)).to(compute)
    first, second = pairs.unbind(-1 if interleaved else -2)
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.stack(turned, dim=-1 if interleaved else -2).flatten(-2).to(x.dtype)


def positions_of(x: Tensor, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """The place in its sequence of each token of x [B, T, dim], int64 [T] or [B, T].

    `lengths` [B] are the tokens that came before x; `cu_seqlens` [sequences + 1] packs sequences along T.
    """
    positions = torch.arange(x.shape[1], device=x.device)
    if lengths is not None:
        return lengths[:, None] + positions
    if cu_seqlens is not None:
        # Tokens after the last sequence belong to none; they count on from its start.
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), positions.to(cu_seqlens.dtype), right=True)
        return positions - cu_seqlens[sequence.clamp(max=cu_seqlens.shape[0] - 1)]
    return positions
