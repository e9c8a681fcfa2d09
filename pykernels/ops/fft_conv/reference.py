"""The definition of long convolution, in plain PyTorch: the transform of everything, as models write it.

Float64 inputs are computed in float64, all others in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _by_lag(k: Tensor, k_rev: Tensor | None, k_rev_lag: int, length: int, circular: bool, period: int) -> Tensor:
    """The taps [G, K] and [G, R] -> [G, period], that of lag l at l modulo the period.

    Causal: taps at lags beyond +-(length - 1) are left out. Circular: lags are taken modulo the length.
    """
    result = k.new_zeros(k.shape[0], period)
    lags = torch.arange(k.shape[1], device=k.device)
    sides = [(k, lags)]
    if k_rev is not None:
        sides.append((k_rev, -k_rev_lag - torch.arange(k_rev.shape[1], device=k.device)))
    for taps, lags in sides:
        if circular:
            lags = lags % length
        else:
            effective = lags.abs() < length
            taps, lags = taps[:, effective], lags[effective] % period
        result = result.index_add(1, lags, taps)
    return result


def fft_conv(
    u: Tensor,
    k: Tensor,
    k_rev: Tensor | None,
    D: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    k_rev_lag: int,
    circular: bool,
) -> Tensor:
    """u, gates [B, D, L]; k [G, K]; k_rev [G, R]; D [D] -> [B, D, L]:

        x = pre_gate u        c_n = sum over lags of w_lag x_{n - lag}        out = post_gate (c + D x)

    with w_lag = k[lag] for lag >= 0, and k_rev[i] added at lag -(i + k_rev_lag). Channel d reads group d // (D // G).
    """
    length, wide = u.shape[2], torch.float64 if u.dtype == torch.float64 else torch.float32
    x = u.to(wide)
    if pre_gate is not None:
        x = x * pre_gate.to(wide)
    k, k_rev, D = (None if w is None else w.to(wide) for w in (k, k_rev, D))
    if x.numel():
        period = (
            1 << (2 * length - 1).bit_length()
        )  # so that nothing wraps; of a power of two, whose transform is the most exact
        spectrum = torch.fft.rfft(_by_lag(k, k_rev, k_rev_lag, length, circular, period))
        spectrum = spectrum.repeat_interleave(u.shape[1] // k.shape[0], dim=0)
        out = torch.fft.irfft(torch.fft.rfft(x, n=period) * spectrum, n=period)
        out = out[..., :length] + out[..., length : 2 * length] if circular else out[..., :length]
    else:  # no transform of nothing; the result still depends on all inputs
        out = x * (k.sum() + (0 if k_rev is None else k_rev.sum()))
    if D is not None:
        out = out + D[:, None] * x
    if post_gate is not None:
        out = out * post_gate.to(wide)
    return out.to(u.dtype)
