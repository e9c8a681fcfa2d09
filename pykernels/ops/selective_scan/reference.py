"""The definition of the selective scan: plain differentiable PyTorch, one token after another, exact in float64.

Per batch entry and channel d, with dt_t = softplus(delta_t + delta_bias) (the identity above 20), or delta_t +
delta_bias:

    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t                      [N], from the initial state (zeros without one)
    y_t = C_t . h_t + D u_t                                       2 Re(C_t . h_t) + D u_t for complex A
    out_t = y_t silu(z_t), or y_t without z

Below float64 it computes in float32 and rounds the result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _per_channel(x: Tensor, channels: int, start: int, end: int) -> Tensor:
    """B or C, [D, N] or [B, G, N, L] -> [1 or B, D, 1 or tokens, N]"""
    if x.dim() == 2:
        return x[None, :, None]
    return x[..., start:end].transpose(2, 3).repeat_interleave(channels // x.shape[1], dim=1)


def _sequence(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
              delta_bias: Tensor | None, state: Tensor | None, softplus: bool) -> tuple[Tensor, Tensor]:
    """u, delta, z [B, D, L]; B, C [1 or B, D, 1 or L, N]; state [B, D, N] -> out [B, D, L], final state [B, D, N]."""
    compute = torch.float64 if u.dtype == torch.float64 else torch.float32
    batch, channels, length = u.shape
    x, dt = u.to(compute), delta.to(compute)
    if delta_bias is not None:
        dt = dt + delta_bias[:, None]
    if softplus:
        dt = F.softplus(dt)
    decay = torch.exp(dt[..., None] * A[:, None])  # [B, D, L, N]
    inputs = (dt * x)[..., None] * B
    h = A.new_zeros(batch, *A.shape) if state is None else state * 1  # the product gives its gradient memory of its own
    states = []
    for a, b in zip(decay.unbind(2), inputs.unbind(2)):
        h = a * h + b
        states.append(h)
    if states:
        y = (torch.stack(states, dim=2) * C).sum(-1)
        y = 2 * y.real if y.is_complex() else y
    else:
        y = (decay * inputs * C).sum(-1)  # nothing, but of the right shape and depending on all
        y = y.real if y.is_complex() else y
    if D is not None:
        y = y + D[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(compute))
    return y.to(u.dtype), h


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
                   delta_bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
                   softplus: bool) -> tuple[Tensor, Tensor]:
    """-> (out, final_state), sequence by sequence when packed; tokens of no sequence give zeros.

    A [D, N] and the states are real or complex, B and C are [D, N] or [B, G, N, L].
    """
    channels, length = u.shape[1:]
    B, C = (x if A.is_complex() else x.to(A.dtype) for x in (B, C))
    if cu_seqlens is None:
        B, C = (_per_channel(x, channels, 0, length) for x in (B, C))
        return _sequence(u, delta, A, B, C, D, z, delta_bias, initial_state, softplus)
    ends = cu_seqlens.tolist()
    # No token and no state first, so that the outputs depend on the inputs even when there is no sequence.
    outs, states = [u[..., :0] * 1], [(A * 1)[None, :][:0] if initial_state is None else initial_state[:0]]
    for s, (start, end) in enumerate(zip(ends, ends[1:])):
        out, state = _sequence(u[..., start:end], delta[..., start:end], A, _per_channel(B, channels, start, end),
                               _per_channel(C, channels, start, end), D, None if z is None else z[..., start:end],
                               delta_bias,
                               None if initial_state is None else initial_state[s:s + 1], softplus)
        outs.append(out)
        states.append(state)
    outs.append(u[..., ends[-1]:] * 0)
    return torch.cat(outs, dim=2), torch.cat(states)


def selective_scan_step(x: Tensor, state: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
                        z: Tensor | None, delta_bias: Tensor | None, state_indices: Tensor | None,
                        softplus: bool) -> Tensor:
    """x, delta, z [B, H, P] against state [slots, H, P, N], in place; A [H, P, N], B and C [B, G, N], D and delta_bias
    [H, P].

    Entries whose index is outside [0, slots) are padding.
    """
    heads, channels, n = A.shape
    A, D, delta_bias = A.flatten(0, 1), *(None if y is None else y.flatten() for y in (D, delta_bias))
    slots = range(x.shape[0]) if state_indices is None else state_indices.tolist()
    outs = [x[:0]]
    for b, slot in enumerate(slots):
        entry = slice(b, b + 1)
        if 0 <= slot < state.shape[0]:
            tokens = [None if y is None else y[entry].flatten(1)[..., None] for y in (x, delta, z)]
            out, new = selective_scan(tokens[0], tokens[1], A, B[entry, ..., None], C[entry, ..., None], D, tokens[2],
                                      delta_bias,
                                      state[slot].reshape(1, heads * channels, n), None, softplus)
            state[slot] = new.view(heads, channels, n)
            outs.append(out.view(1, heads, channels))
        else:
            outs.append(torch.zeros_like(x[entry]))
    return torch.cat(outs)
