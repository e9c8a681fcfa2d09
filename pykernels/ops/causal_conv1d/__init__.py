"""Causal depthwise convolution along time, as state-space models and long convolutions use it.

The definition is `reference.py`; `registration.py` makes ops of the backends; README.md derives the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks
from ..._autograd import apart, followed
from ...backends import Op, Query, resolve
from . import reference, registration

__all__ = ["OP", "causal_conv1d", "causal_conv1d_step"]


def _any(query: Query) -> str | None:
    return None


def _triton(query: Query) -> str | None:
    if query.dtype == torch.float64:
        return "the Triton kernels compute in float32"
    return None


def _cuda(query: Query) -> str | None:
    if query.dtype == torch.float64:
        return "the CUDA kernels compute in float32"
    return None


OP = Op("causal_conv1d", {"cuda": _cuda, "triton": _triton, "cpu": _any, "reference": _any},
        explicit_only={"cuda": "not yet measured against Triton on a GPU, so only on request"})


def _check_parameters(x: Tensor, weight: object, bias: object, activation: object) -> bool:
    """-> whether the activation is SiLU."""
    _checks.main_dtype("x", x)
    channels = x.shape[1]
    _checks.tensor("weight", weight, "D W")
    _checks.shape("weight", weight, {"D": channels, "W": None})
    if weight.shape[1] < 1:
        raise ValueError(f"weight must have a width W of at least 1, got shape {list(weight.shape)}")
    _checks.parameter("weight", weight, "x", x)
    if bias is not None:
        _checks.tensor("bias", bias, "D")
        _checks.shape("bias", bias, {"D": channels})
        _checks.parameter("bias", bias, "x", x)
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")
    return activation == "silu"


def causal_conv1d(x: Tensor, weight: Tensor, *, bias: Tensor | None = None, activation: str | None = None,
                  initial_state: Tensor | None = None, return_final_state: bool = False,
                  cu_seqlens: Tensor | None = None,
                  backend: str = "auto") -> Tensor | tuple[Tensor, Tensor]:
    r"""Convolves each channel with its own filter along time; token t sees tokens t - W + 1 to t.

    .. math::
        out_{d,t} = \mathrm{act}\Big(bias_d + \sum_{w=0}^{W-1} weight_{d,w}\, x_{d,\,t-W+1+w}\Big)

    Args:
        x: [B, D, L], float32, bfloat16, float16, or float64 on the CPU. Any strides: both [B, D, L] and [B, L, D] in
            memory are read without a copy, and the output is laid out as x is.
        weight: [D, W], any W >= 1, x's dtype or float32; the last tap is the current token's.
        bias: [D], x's dtype or float32.
        activation: None or "silu".
        initial_state: the W - 1 inputs before x, oldest first: [B, D, W - 1], [sequences, D, W - 1] when packed; x's
            dtype. None is zeros.
        return_final_state: also return the last W - 1 inputs (of initial_state and x together), to go on from.
        cu_seqlens: int32 or int64 [sequences + 1], token offsets of the sequences packed along L (then B is 1),
            starting at 0. No sequence sees another. Tokens after the last offset belong to none and give zeros.
        backend: "auto", "cpu", "triton", "cuda" or "reference" (see pykernels.backends).

    Returns:
        out [B, D, L] in x's dtype, or (out, final_state), final_state in the shape of initial_state.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value; the message names it.
        BackendUnavailable: the backend asked for can't serve this call.

    Derivatives of first and second order exist with respect to x, weight, bias and initial_state (through out and
    final_state); the second in eager mode only, computed by the reference.
    """
    _checks.tensor("x", x, "B D L")
    device = x.device.type
    # Under autocast, x is narrowed as by torch's own convolutions.
    if x.dtype == torch.float32 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, initial_state = x.to(dtype), initial_state.to(dtype) if isinstance(initial_state, Tensor) else initial_state
    silu = _check_parameters(x, weight, bias, activation)
    _checks.flag("return_final_state", return_final_state)
    batch, channels, length = x.shape
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"x must have batch 1 when cu_seqlens packs sequences, got shape {list(x.shape)}")
        cu_seqlens = _checks.cu_seqlens("cu_seqlens", cu_seqlens, length, x.device)
        batch = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        _checks.tensor("initial_state", initial_state, "B D W-1")
        _checks.shape("initial_state", initial_state,
                      {"B" if cu_seqlens is None else "sequences": batch, "D": channels, "W-1": weight.shape[1] - 1})
        _checks.same_dtype("initial_state", initial_state, "x", x)
        _checks.same_device("initial_state", initial_state, "x", x)
    options = {"varlen": cu_seqlens is not None, "initial_state": initial_state is not None}
    grad = followed(x, weight, bias, initial_state)
    query = Query(device, x.dtype, {"width": weight.shape[1]}, frozenset(name for name, on in options.items() if on),
                  grad)
    chosen = resolve(OP, query, backend)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = weight.to(compute), None if bias is None else bias.to(compute)
    arguments = x, weight, bias, initial_state, cu_seqlens, silu
    if chosen == "reference":
        out, final_state = reference.causal_conv1d(*arguments)
    elif grad:
        out, final_state = registration.CausalConv1d.apply(*apart(*arguments), chosen)
    else:
        out, final_state = registration.run("fwd", chosen, *arguments)
    return (out, final_state) if return_final_state else out


def causal_conv1d_step(x: Tensor, state: Tensor, weight: Tensor, *, bias: Tensor | None = None,
                       activation: str | None = None,
                       state_indices: Tensor | None = None, backend: str = "auto") -> Tensor:
    """One step of generation: convolves new tokens against the state of `causal_conv1d` and updates it in place.

    Args:
        x: [B, D], or [B, D, T] for a few tokens at once.
        state: the last W - 1 inputs of each channel [B, D, W - 1], [slots, D, W - 1] with state_indices; x's dtype, any
            strides. Overwritten.
        weight, bias, activation: as in `causal_conv1d`.
        state_indices: int32 or int64 [B], the slot of each batch entry, no slot twice; -1 marks padding, whose output
            is zero and which touches no state.
        backend: as in `causal_conv1d`.

    Returns:
        out in x's shape and dtype.

    Raises:
        TypeError, ValueError: as in `causal_conv1d`; nothing is written.
        RuntimeError: grad mode is on and an input requires grad: this function is for inference, its state is
            overwritten.
        BackendUnavailable: the backend asked for can't serve this call.
    """
    chosen, ready = _check_step(x, state, weight, bias, activation, state_indices is not None, backend)
    if state_indices is not None:
        state_indices = _checks.state_indices("state_indices", state_indices, x.shape[0], state.shape[0], x.device)
    if torch.is_grad_enabled():
        _checks.inference("causal_conv1d_step", "causal_conv1d", x=x, state=state, weight=weight, bias=bias)
    if not ready:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    silu = activation == "silu"
    if chosen == "reference":
        tokens = x if x.dim() == 3 else x[..., None]
        return reference.causal_conv1d_step(tokens, state, weight, bias, state_indices, silu).view(x.shape)
    return registration.run("step", chosen, x, state, weight, bias, state_indices, silu)


@_checks.by_metadata
def _check_step(x: object, state: object, weight: object, bias: object, activation: object, indexed: bool,
                backend: object) -> tuple[str, bool]:
    """-> the backend that serves a step, and whether it takes weight and bias as they are."""
    if not isinstance(x, Tensor) or x.dim() not in (2, 3):
        _checks.tensor("x", x, "B D" if isinstance(x, Tensor) and x.dim() < 2 else "B D T")
    _check_parameters(x, weight, bias, activation)
    _checks.tensor("state", state, "slots D W-1")
    _checks.same_dtype("state", state, "x", x)
    _checks.same_device("state", state, "x", x)
    _checks.shape("state", state, {"slots": None if indexed else x.shape[0], "D": x.shape[1],
                                   "W-1": weight.shape[1] - 1})
    _checks.writable("state", state)
    chosen = resolve(OP, Query(x.device.type, x.dtype, {"width": weight.shape[1]}), backend)
    return chosen, chosen != "reference" and x.dtype != torch.float64
