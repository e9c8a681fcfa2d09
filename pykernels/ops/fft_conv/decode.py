"""Token by token: the long convolution of a sequence that is not known yet.

The sequence is cut into blocks of `BLOCK` tokens. What a token adds to later outputs of its own block is summed
directly (when they are due; in the CPU's own op at once). What it adds to later blocks is done in squares: at a
boundary m (in tokens), with S the largest power of two times BLOCK that divides m, the S tokens before m are convolved
with the kernel into the S outputs after it, and added to those that are pending. A pair of blocks a < b is in exactly
one of these squares: m is b with all bits below the highest in which a and b differ cleared. A token costs O(log^2 K)
on average, and memory is O(K) however long the sequence gets, because squares larger than the kernel shrink to it and
everything is kept in rings of that size.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

BLOCK = 64  # a power of two; below it, a direct sum is faster than one square


@dataclasses.dataclass
class FFTConvState:
    """What the next outputs of a causal convolution depend on: `fft_conv_init` makes it, `fft_conv_step` changes it."""

    k: Tensor  # [G, C], zeros after the last tap; float32 (float64), as all tensors here
    D: Tensor | None  # [D]
    inputs: Tensor  # [B, D, C]: the last C samples of x, that of token t at t % C
    pending: Tensor  # [B, D, C]: what is known of the outputs from token t on, that of t at t % C
    tokens: int  # t, counted from the end of the prefix
    dtype: torch.dtype  # of u and out
    backend: str
    spectra: list[Tensor] | None = None  # of the native steps: of k's first 4 BLOCK, 8 BLOCK, ..., 2 C taps; or None

    @property
    def capacity(self) -> int:
        """C: the taps, rounded up to BLOCK times a power of two."""
        return self.inputs.shape[2]


def capacity(taps: int) -> int:
    return BLOCK << max(0, (taps - 1).bit_length() - (BLOCK - 1).bit_length())


def _pad(x: Tensor, left: int, right: int) -> Tensor:
    return torch.nn.functional.pad(x, (left, right))


def start(
    convolve, x: Tensor, k: Tensor, D: Tensor | None, dtype: torch.dtype, backend: str, native: bool
) -> FFTConvState:
    """The state after the prefix x [B, D, T]; `convolve(x, k)` is the causal convolution. All in float32 (float64).

    native: the steps are those of the CPU's own op, which keeps the kernel's spectra.
    """
    size = capacity(k.shape[1])
    reach = min(x.shape[2], k.shape[1] - 1)  # samples that later outputs depend on
    inputs, pending = (x.new_zeros(*x.shape[:2], size) for _ in range(2))  # no views of one: both are written
    if reach:
        inputs[..., size - reach :] = x[..., x.shape[2] - reach :]
        pending += convolve(_pad(inputs[..., size - reach :], 0, size), k)[..., reach:]
    k = _pad(k, 0, size - k.shape[1]).contiguous()
    spectra = [_spectrum(k, BLOCK << i) for i in range(1, (size // BLOCK).bit_length())] if native else None
    D = None if D is None else D.clone()  # as k: what the caller's becomes later is not ours
    return FFTConvState(k, D, inputs, pending, 0, dtype, backend, spectra)


def _spectrum(k: Tensor, side: int) -> Tensor:
    """What the square of so many tokens multiplies by."""
    op = torch.ops.pykernels.fft_conv_spectrum_cpu.default
    return op(k, None, 1, False, 2 * side, max(side, 256))


def native_step(u_t: Tensor, state: FFTConvState, pre_gate: Tensor | None, post_gate: Tensor | None) -> Tensor:
    """`step` on the CPU, with the gates; all of one dtype."""
    after = state.tokens + 1
    side = min(after & -after, state.capacity)
    spectrum = state.spectra[(side // BLOCK).bit_length() - 2] if side > BLOCK else None
    op = torch.ops.pykernels.fft_conv_step_cpu.default
    out = op(u_t, state.inputs, state.pending, state.k, spectrum, state.D, pre_gate, post_gate, state.tokens)
    state.tokens = after
    return out


def step(convolve, x: Tensor, state: FFTConvState) -> Tensor:
    """One sample of every channel, x [B, D] -> c + D x; the state moves on."""
    size, t = state.capacity, state.tokens
    at, first = t % size, t % size // BLOCK * BLOCK
    state.inputs[..., at] = x
    block = state.inputs[..., first : at + 1]
    k = state.k if state.k.shape[0] == x.shape[1] else state.k.repeat_interleave(x.shape[1] // state.k.shape[0], 0)
    out = state.pending[..., at] + (block * k[:, : at + 1 - first].flip(1)).sum(-1)
    if state.D is not None:
        out = out + state.D * x
    state.pending[..., at] = 0
    state.tokens = t = t + 1
    if t % BLOCK == 0:
        side = min(t & -t, size)
        begin, end = (t - side) % size, t % size
        square = _pad(state.inputs[..., begin : begin + side], 0, side)
        state.pending[..., end : end + side] += convolve(square, state.k[:, : 2 * side])[..., side:]
    return out
