"""Retention: linear attention whose decay is one number per head. A thin layer over `linear_attention`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import _checks
from ..linear_attention import linear_attention, linear_attention_step

__all__ = ["retention", "retention_step"]


def _decay(gamma: object, v: Tensor) -> Tensor:
    """The natural log of gamma, or of RetNet's 1 - 2 ** (-5 - h)."""
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    if gamma is None:
        exponents = torch.arange(v.shape[-2], device=v.device, dtype=wide)
        return torch.log1p(-torch.exp2(-5 - exponents))
    _checks.tensor("gamma", gamma, "H")
    _checks.shape("gamma", gamma, {"H": v.shape[-2]})
    _checks.parameter("gamma", gamma, "v", v)
    if _checks.values_checked(gamma):
        for head, value in enumerate(gamma.tolist()):
            if not (0 < value <= 1 or math.isnan(value)):
                raise ValueError(f"gamma must be above 0 and at most 1, got {value} for head {head}")
    return gamma.to(wide).log()


def retention(q: Tensor, k: Tensor, v: Tensor, *, gamma: Tensor | None = None, scale: float | None = None,
              initial_state: Tensor | None = None, return_final_state: bool = False, cu_seqlens: Tensor | None = None,
              reverse: bool = False, backend: str = "auto") -> Tensor | tuple[Tensor, Tensor]:
    r"""Retention: out_i = scale * sum over j <= i of gamma^(i - j) (q_i . k_j) v_j, in time linear in the length.

    The parallel form above, the recurrence S <- gamma S + k v^T, out = scale q^T S, and the chunked form that the
    kernels compute are one result; `retention_step` continues it token by token.

    Args:
        q, k: [B, T, Hk, K]; Hk divides H. See `linear_attention` for dtypes, sizes and strides.
        v: [B, T, H, V].
        gamma: [H], above 0 and at most 1, differentiable, v's dtype or float32; None is RetNet's 1 - 2 ** (-5 - h).
        scale, initial_state, return_final_state, cu_seqlens, reverse, backend: as in `linear_attention`.

    Returns:
        out [B, T, H, V], or (out, final_state) with final_state [B or sequences, H, K, V] in float32 (float64 for
        float64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value; the message names it.
        BackendUnavailable: the backend asked for can't serve this call.

    Source: Sun et al., Retentive Network (arXiv:2307.08621). Its layer's group norm makes the result independent of the
    paper's normalisations of q k^T and of the state; this function has none of them.
    """
    _checks.tensor("v", v, "B T H V")
    return linear_attention(q, k, v, decay=_decay(gamma, v), scale=scale, initial_state=initial_state,
                            return_final_state=return_final_state, cu_seqlens=cu_seqlens, reverse=reverse,
                            backend=backend)


def retention_step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, gamma: Tensor | None = None,
                   scale: float | None = None, state_indices: Tensor | None = None, backend: str = "auto") -> Tensor:
    """One token of `retention`: updates the state in place and returns the token's output.

    Args:
        q, k: [B, Hk, K].
        v: [B, H, V].
        state: [B, H, K, V], or [slots, ...] with state_indices; overwritten. A final_state of `retention` continues
            here.
        gamma: as in `retention`.
        scale, state_indices, backend: as in `linear_attention_step`.

    Returns:
        out [B, H, V].

    Raises:
        TypeError, ValueError: as in `retention` and `linear_attention_step`.
        RuntimeError: grad mode is on and an input requires grad: the state is overwritten, so this is for inference.
        BackendUnavailable: the backend asked for can't serve this call.
    """
    _checks.tensor("v", v, "B H V")
    if torch.is_grad_enabled() and isinstance(gamma, Tensor) and gamma.requires_grad:
        raise RuntimeError("gamma requires grad, but retention_step is for inference (it writes the state in place): "
                           "call it under torch.no_grad(), or use retention")
    return linear_attention_step(q, k, v, state, decay=_decay(gamma, v), scale=scale, state_indices=state_indices,
                                 backend=backend)
