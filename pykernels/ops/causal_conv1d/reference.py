"""The definition of the causal depthwise convolution: plain differentiable PyTorch, exact in float64.

With e the sequence that starts with the initial state (zeros without one) and goes on with x, so that e has W - 1 + L
entries:

    out[d, t] = act(bias[d] + sum_{w < W} weight[d, w] e[d, t + w])         final_state[d, j] = e[d, L + j],  j < W - 1

Below float64 it computes in float32 and rounds the result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _sequence(x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None,
              silu: bool) -> tuple[Tensor, Tensor]:
    """x [B, D, L], weight [D, W], initial_state [B, D, W - 1] -> out [B, D, L], final_state [B, D, W - 1]."""
    batch, channels, length = x.shape
    width = weight.shape[1]
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    if initial_state is None:
        initial_state = x.new_zeros(batch, channels, width - 1)
    e = torch.cat([initial_state * 1, x], dim=2)  # the product gives its gradient memory of its own
    wide, weight = e.to(compute), weight.to(compute)
    out = sum(weight[:, w, None] * wide[:, :, w:w + length] for w in range(width))
    if bias is not None:
        out = out + bias.to(compute)[:, None]
    if silu:
        out = F.silu(out)
    return out.to(x.dtype), e[:, :, length:].clone()


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None,
                  cu_seqlens: Tensor | None,
                  silu: bool) -> tuple[Tensor, Tensor]:
    """-> (out, final_state), sequence by sequence when packed; tokens of no sequence give zeros."""
    if cu_seqlens is None:
        return _sequence(x, weight, bias, initial_state, silu)
    ends = cu_seqlens.tolist()
    # An empty sequence first, so that the outputs depend on the inputs even when there is no other.
    out, state = _sequence(x[:, :, :0], weight, bias, None, silu)
    outs, states = [out], [state[:0] if initial_state is None else initial_state[:0]]
    for s, (start, end) in enumerate(zip(ends, ends[1:])):
        out, state = _sequence(x[:, :, start:end], weight, bias,
                               None if initial_state is None else initial_state[s:s + 1], silu)
        outs.append(out)
        states.append(state)
    outs.append(x[:, :, ends[-1]:] * 0)
    return torch.cat(outs, dim=2), torch.cat(states)


def causal_conv1d_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, state_indices: Tensor | None,
                       silu: bool) -> Tensor:
    """x [B, D, T] against state [slots, D, W - 1], in place; entries whose index is outside [0, slots) are padding."""
    slots = range(x.shape[0]) if state_indices is None else state_indices.tolist()
    outs = [x[:0]]
    for b, slot in enumerate(slots):
        if 0 <= slot < state.shape[0]:
            out, new = _sequence(x[b:b + 1], weight, bias, state[slot:slot + 1], silu)
            state[slot] = new[0]
        else:
            out = torch.zeros_like(x[b:b + 1])
        outs.append(out)
    return torch.cat(outs)
