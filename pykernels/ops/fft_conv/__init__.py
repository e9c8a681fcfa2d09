"""Long convolution: a kernel as long as the sequence, causal, two-sided or circular, with gates, in time L log L.

The definition is `reference.py`; `registration.py` makes ops of the backends; README.md derives the transforms and gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks
from ...backends import Op, Query, resolve
from . import reference, registration

__all__ = ["OP", "fft_conv"]


def _serves(query: Query) -> str | None:
    return None


OP = Op("fft_conv", {"cpu": _serves, "reference": _serves})

_MODES = ("causal", "circular")


def _wide(name: str, x: Tensor, u: Tensor) -> Tensor:
    """A kernel or D in the dtype that the ops take it in."""
    wide = registration.accumulator(u.dtype)
    if x.dtype not in (u.dtype, torch.float32, wide):
        raise TypeError(f"{name} must have u's dtype {u.dtype} or {wide}, got {x.dtype}")
    _checks.same_device(name, x, "u", u)
    return x.to(wide)


def _check_kernel(name: str, k: object, u: Tensor) -> Tensor:
    axis = "K" if name == "k" else "R"
    _checks.tensor(name, k, f"G {axis}")
    if k.shape[1] < 1:
        raise ValueError(f"{name} must have at least one tap, got shape {list(k.shape)}")
    return _wide(name, k, u)


def _check_kernels(k: object, k_rev: object, k_rev_lag: object, D: object, u: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    k = _check_kernel("k", k, u)
    channels, groups = u.shape[1], k.shape[0]
    if channels % groups if groups else channels:
        raise ValueError(f"k must have one row per channel or per group of channels: u has {channels} channels, k {groups} rows")
    if type(k_rev_lag) is not int or k_rev_lag not in (0, 1):
        raise ValueError(f"k_rev_lag must be 0 or 1, got {k_rev_lag!r}")
    if k_rev is not None:
        k_rev = _check_kernel("k_rev", k_rev, u)
        _checks.shape("k_rev", k_rev, {"G": groups, "R": None})
    if D is not None:
        _checks.tensor("D", D, "D")
        _checks.shape("D", D, {"D": channels})
        D = _wide("D", D, u)
    return k, k_rev, D


def _check_gate(name: str, gate: object, u: Tensor) -> Tensor:
    _checks.tensor(name, gate, "B D L")
    _checks.shape(name, gate, dict(zip("BDL", u.shape)))
    if gate.dtype not in (u.dtype, torch.float32) or u.dtype == torch.float64 != gate.dtype:
        raise TypeError(f"{name} must have u's dtype {u.dtype} or, for 16-bit u, float32, got {gate.dtype}")
    _checks.same_device(name, gate, "u", u)
    return gate


def fft_conv(u: Tensor, k: Tensor, *, k_rev: Tensor | None = None, k_rev_lag: int = 1, D: Tensor | None = None,
             pre_gate: Tensor | None = None, post_gate: Tensor | None = None, mode: str = "causal",
             backend: str = "auto") -> Tensor:
    r"""Long depthwise convolution, with gates before and after it and a skip connection:

    .. math::
        x = pre \odot u, \qquad c_n = \sum_{i \ge 0} k_i\, x_{n-i} + \sum_{i \ge 0} k^{rev}_i\, x_{n+i+lag}, \qquad
        out = post \odot (c + D \odot x)

    Args:
        u: [B, D, L], float32, bfloat16, float16, or float64 on the CPU; any strides; L of any size. Arithmetic is in float32
            (float64 for float64).
        k: kernel [D, K], or [G, K] with D a multiple of G: channel d reads row d // (D // G). K >= 1, shorter or longer than L.
            u's dtype or float32.
        k_rev: the anticausal side of the kernel, [G, R] with k's rows, or None. u's dtype or float32.
        k_rev_lag: where k_rev starts. 1: k_rev[0] weighs the sample after (lag -1), as in S4, whose kernel is pad(k) +
            pad(flip(k_rev)). 0: k_rev[0] weighs the sample itself and adds to k[0], as in safari and H3, whose spectrum is
            K + conj(K_rev).
        D: skip connection [D], or None. u's dtype or float32.
        pre_gate: factor on u [B, D, L], or None; u's dtype, or float32 for 16-bit u (u is then widened).
        post_gate: factor on the result [B, D, L], or None; as pre_gate.
        mode: "causal": samples outside [0, L) are zero, and taps that reach beyond the sequence have no effect. "circular":
            positions are modulo L, and longer kernels wrap.
        backend: "auto", "cpu" or "reference" (see pykernels.backends).

    Returns:
        out [B, D, L] in u's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value; the message names it.
        BackendUnavailable: the backend asked for can't serve this call.

    Derivatives of first and second order exist with respect to u, k, k_rev, D, pre_gate and post_gate; the second in eager mode
    only, computed by the reference. Results do not depend on the thread count, and a batch entry's not on the others. A value that
    is not finite may make every output of its own batch entry and channel NaN (the transform mixes them all), and no other.

    Source: Poli et al., Hyena Hierarchy (arXiv:2302.10866); Fu et al., FlashFFTConv (arXiv:2311.05908).
    """
    u, pre_gate, post_gate = _checks.autocast(u, pre_gate, post_gate)  # kernels and D stay as wide as they come
    _checks.tensor("u", u, "B D L")
    _checks.main_dtype("u", u)
    k, k_rev, D = _check_kernels(k, k_rev, k_rev_lag, D, u)
    gates = [None if gate is None else _check_gate(name, gate, u) for name, gate in (("pre_gate", pre_gate), ("post_gate", post_gate))]
    if mode not in _MODES:
        raise ValueError(f"mode must be 'causal' or 'circular', got {mode!r}")
    dtype = u.dtype
    if any(gate is not None and gate.dtype != dtype for gate in gates):
        u, *gates = (None if x is None else x.to(torch.float32) for x in (u, *gates))
    tensors = (u, k, k_rev, D, *gates)
    grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    on = {"k_rev": k_rev, "D": D, "pre_gate": gates[0], "post_gate": gates[1]}
    options = frozenset(name for name, x in on.items() if x is not None) | {mode}
    chosen = resolve(OP, Query(u.device.type, u.dtype, {"length": u.shape[2], "taps": k.shape[1]}, options, grad), backend)
    settings = k_rev_lag, mode == "circular"
    if chosen == "reference":
        out = reference.fft_conv(*tensors, *settings)
    elif grad:
        out = registration.FFTConv.apply(*tensors, settings, chosen)
    else:
        out = registration.run("fwd", chosen, *tensors, *settings)
    return out.to(dtype)
