"""The definition of linear attention with decay: the recurrence, plain differentiable PyTorch, exact in float64.

Per sequence and head, with a state S [K, V] that starts at the initial state or zero, for each token t in time order:

    without bonus:  S = exp(decay_t) * S + k_t v_t^T       out_t = scale * q_t^T S
    with bonus u:   out_t = scale * q_t^T (S + (u * k_t) v_t^T)       S = exp(decay_t) * S + k_t v_t^T

exp(decay_t) multiplies rows of S (it is one number unless the decay is per key channel). With `normalize`, v has one
more column of ones, and out_t is divided by its own last column plus 1e-6. `reverse` runs time from the last token to
the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _with_ones(v: Tensor) -> Tensor:
    return torch.cat([v, v.new_ones(*v.shape[:-1], 1)], dim=-1)


def token(q: Tensor, k: Tensor, v: Tensor, factor: Tensor | None, bonus: Tensor | None, state: Tensor,
          scale: float, normalize: bool) -> tuple[Tensor, Tensor]:
    """One token: q, k [B, H, K], v [B, H, Ve], factor [B, H, K or 1], state [B, H, K, Ve] -> out [B, H, V], the new
    state.

    Products are taken in the input's dtype and the state is kept in fp32 (fp64), so that in float64 this is the
    reference and in a low precision the yardstick of what plain PyTorch loses there.
    """
    update = (k[..., :, None] * v[..., None, :]).to(state.dtype)
    decayed = state if factor is None else factor[..., None] * state
    new = decayed + update
    read = new if bonus is None else state + bonus[..., None] * update
    out = (q[..., None, :] @ read.to(q.dtype))[..., 0, :] * scale
    return (out[..., :-1] / (out[..., -1:] + EPSILON) if normalize else out), new


def sequences(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, bonus: Tensor | None, state: Tensor, scale: float,
              normalize: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    """`token` over the time axis of [B, T, H, .]; decay [H], [B, T, H] or [B, T, H, K] -> out, final state."""
    groups = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(groups, dim=2) for x in (q, k))
    factor = None
    if decay is not None:
        factor = decay.exp()[..., None] if decay.dim() < 4 else decay.exp()
        if decay.dim() == 1:
            factor = factor.expand(*q.shape[:3], 1)
    outs = []
    times = range(v.shape[1])
    for t in reversed(times) if reverse else times:
        out, state = token(q[:, t], k[:, t], v[:, t], None if factor is None else factor[:, t], bonus, state, scale,
                           normalize)
        outs.append(out)
    if not outs:  # still a function of the inputs
        return v[..., :v.shape[3] - normalize] + 0 * (q.sum() + k.sum()), state
    return torch.stack(outs[::-1] if reverse else outs, dim=1), state


def linear_attention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, bonus: Tensor | None,
                     initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, normalize: bool,
                     reverse: bool) -> tuple[Tensor, Tensor]:
    """-> out [B, T, H, V], final states [N, H, K, Ve]; sequence by sequence when packed."""
    if normalize:
        v = _with_ones(v)
    count = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = initial_state
    if state is None:
        state = q.new_zeros(count, v.shape[2], q.shape[3], v.shape[3], dtype=_accumulator(q))
    if cu_seqlens is None:
        return sequences(q, k, v, decay, bonus, state, scale, normalize, reverse)
    outs, states = [], [state[:0]]
    ends = [0, *cu_seqlens.tolist()]  # an empty sequence first, so that the result depends on the inputs in any case
    for s, (first, last) in enumerate(zip(ends, ends[1:])):
        here = decay if decay is None or decay.dim() == 1 else decay[:, first:last]
        before = state[max(s - 1, 0):s] if s else state.new_zeros(1, *state.shape[1:])
        out, after = sequences(q[:, first:last], k[:, first:last], v[:, first:last], here, bonus, before, scale,
                               normalize, reverse)
        outs.append(out)
        if s:
            states.append(after)
    # Tokens after the last sequence belong to none.
    outs.append(v.new_zeros(1, v.shape[1] - ends[-1], v.shape[2], v.shape[3] - normalize))
    return torch.cat(outs, dim=1), torch.cat(states)


def linear_attention_step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, bonus: Tensor | None,
                          state_indices: Tensor | None, scale: float, normalize: bool) -> Tensor:
    """`token` on the slots of `state` that `state_indices` names, in place; a slot that does not exist gives zeros."""
    groups = v.shape[1] // q.shape[1]
    q, k = (x.repeat_interleave(groups, dim=1) for x in (q, k))
    slots = torch.arange(v.shape[0], device=v.device) if state_indices is None else state_indices.long()
    exists = (slots >= 0) & (slots < state.shape[0])
    factor = None
    if decay is not None:
        factor = (decay[..., None] if decay.dim() < 3 else decay).exp()
        factor = factor.expand(*v.shape[:2], factor.shape[-1])[exists]
    out = torch.zeros_like(v)
    picked = slots[exists]
    values = _with_ones(v) if normalize else v
    out[exists], state[picked] = token(q[exists], k[exists], values[exists], factor, bonus, state[picked], scale,
                                       normalize)
    return out
