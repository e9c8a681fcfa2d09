"""flash-fft-conv's modules on `fft_conv` and `causal_conv1d`.

Beyond the original: CPUs, FFT sizes that are no powers of two, any lengths, float32 and float64, one gate without the
other, gradients in evaluation mode too, second derivatives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.causal_conv1d import causal_conv1d
from ..ops.fft_conv import fft_conv

__all__ = ["FlashDepthWiseConv1d", "FlashFFTConv"]
VERSION = "0.0.0"  # the original has never had another; these are the signatures of December 2024
MODULES = {"flashfftconv": tuple(__all__), "flashfftconv.conv": ("FlashFFTConv",),
           "flashfftconv.depthwise_1d": ("FlashDepthWiseConv1d",)}


def _size(name: str, x: object, least: int) -> int:
    if isinstance(x, bool) or not isinstance(x, int) or x < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {x!r}")
    return x


class FlashFFTConv(nn.Module):
    """Convolution by an FFT of a fixed size: out = postgate * irfft(rfft(u * pregate, seqlen) * rfft(k, seqlen))[:L].

    It is causal where L plus the taps of k are at most seqlen + 1; positions are modulo seqlen beyond.

    Args:
        seqlen: size of the FFT.
        dtype: of u and the gates.
        use_32_butterfly: how the original cuts long FFTs; the result does not depend on it.

    The module has no parameters or buffers; the original's buffers (roots of unity) in a state dict are passed over.
    """

    def __init__(self, seqlen, dtype=torch.float16, use_32_butterfly=True):
        super().__init__()
        if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype!r}")
        if not isinstance(use_32_butterfly, bool):
            raise TypeError(f"use_32_butterfly must be True or False, got {use_32_butterfly!r}")
        self.seqlen, self.dtype, self.use_32_butterfly = _size("seqlen", seqlen, 1), dtype, use_32_butterfly

    def extra_repr(self) -> str:
        return f"seqlen={self.seqlen}, dtype={self.dtype}, use_32_butterfly={self.use_32_butterfly}"

    def _load_from_state_dict(self, *args) -> None:
        pass

    def forward(self, u: Tensor, k: Tensor, pregate: Tensor | None = None, postgate: Tensor | None = None) -> Tensor:
        """u, pregate, postgate [B, H, L], k [H, K] in their dtype or float32, L and K up to seqlen -> [B, H, L]."""
        for name, x, axes in (("u", u, "B H L"), ("k", k, "H K")):
            if not isinstance(x, Tensor) or x.dim() != len(axes.split()):
                got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"{name} must be a tensor [{', '.join(axes.split())}], got {got}")
            if x.shape[-1] > self.seqlen:
                raise ValueError(f"{name} must be at most seqlen = {self.seqlen} long, got shape {list(x.shape)}")
        for name, x in (("u", u), ("pregate", pregate), ("postgate", postgate)):
            if x is not None and x.dtype != self.dtype:
                raise TypeError(f"{name} must have the module's dtype {self.dtype}, got {x.dtype}")
            if x is not None and x.shape != u.shape:
                raise ValueError(f"{name} must have u's shape {list(u.shape)}, got {list(x.shape)}")
        length = u.shape[2]
        if length + k.shape[1] <= self.seqlen + 1:
            return fft_conv(u, k, pre_gate=pregate, post_gate=postgate)
        padding = (0, self.seqlen - length)
        u, pregate, postgate = (None if x is None else F.pad(x, padding) for x in (u, pregate, postgate))
        return fft_conv(u, k, pre_gate=pregate, post_gate=postgate, mode="circular")[..., :length]


class FlashDepthWiseConv1d(nn.Module):
    """nn.Conv1d(channels, channels, kernel_size, groups=channels, padding=padding) with weights that are given.

    Args:
        channels: D; kernel_size: K; padding: zeros on either side.
        weights: [D, 1, K] or [D, K], an nn.Conv1d's. Kept as `weights`: [D, K], or [K, D] if not is_bhl.
        bias: [D].
        is_bhl: inputs are [B, D, L], else [B, L, D].
        device, dtype: of the parameters; None for those of weights and bias.
    """

    def __init__(self, channels, kernel_size, padding, weights, bias, is_bhl=True, device=None, dtype=None):
        super().__init__()
        self.d, self.k = _size("channels", channels, 1), _size("kernel_size", kernel_size, 1)
        self.padding, self.is_bhl = _size("padding", padding, 0), is_bhl
        if not isinstance(is_bhl, bool):
            raise TypeError(f"is_bhl must be True or False, got {is_bhl!r}")
        for name, x, shapes in (("weights", weights, ((channels, 1, kernel_size), (channels, kernel_size))),
                                ("bias", bias, ((channels,),))):
            if not isinstance(x, Tensor) or tuple(x.shape) not in shapes:
                got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"{name} must be a tensor {' or '.join(str(list(s)) for s in shapes)}, got {got}")
        weights = weights.detach().reshape(channels, kernel_size).to(device=device, dtype=dtype)
        self.weights = nn.Parameter(weights if is_bhl else weights.T.clone(memory_format=torch.contiguous_format))
        self.bias = nn.Parameter(bias.detach().to(device=device, dtype=dtype, copy=True))

    def extra_repr(self) -> str:
        return f"{self.d}, kernel_size={self.k}, padding={self.padding}, is_bhl={self.is_bhl}"

    def forward(self, input: Tensor) -> Tensor:
        """[B, D, L] -> [B, D, L + 2 padding - K + 1], or the same with the last two axes exchanged."""
        if not isinstance(input, Tensor) or input.dim() != 3 or input.shape[1 if self.is_bhl else 2] != self.d:
            got = list(input.shape) if isinstance(input, Tensor) else type(input).__name__
            raise ValueError(f"input must be a tensor {'[B, D, L]' if self.is_bhl else '[B, L, D]'} with D={self.d}, "
                             f"got {got}")
        x, weights = (input, self.weights) if self.is_bhl else (input.transpose(1, 2), self.weights.T)
        if x.shape[2] + 2 * self.padding < self.k:
            raise ValueError(f"input must have at least {self.k - 2 * self.padding} tokens, got {x.shape[2]}")
        out = causal_conv1d(F.pad(x, (self.padding, self.padding)), weights, bias=self.bias)[..., self.k - 1:]
        return out if self.is_bhl else out.transpose(1, 2)
