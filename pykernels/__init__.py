"""pykernels: fast sequence-mixing kernels for PyTorch that run everywhere."""

from __future__ import annotations

from ._library import release_scratch
from ._version import __version__
from .backends import BackendUnavailable, use_backend
from .ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from .ops.fft_conv import fft_conv, fft_conv_init, fft_conv_spectrum, fft_conv_step
from .ops.flash_attention import flash_attention, flash_attention_decode
from .ops.linear_attention import linear_attention, linear_attention_step
from .ops.retention import retention, retention_step
from .ops.selective_scan import selective_scan, selective_scan_step

__all__ = [
    "BackendUnavailable",
    "__version__",
    "causal_conv1d",
    "causal_conv1d_step",
    "fft_conv",
    "fft_conv_init",
    "fft_conv_spectrum",
    "fft_conv_step",
    "flash_attention",
    "flash_attention_decode",
    "linear_attention",
    "linear_attention_step",
    "release_scratch",
    "retention",
    "retention_step",
    "selective_scan",
    "selective_scan_step",
    "use_backend",
]
