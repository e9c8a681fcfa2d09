"""The ops, one folder each. `OPS` lists their entries in the table of backends."""

from __future__ import annotations

from . import causal_conv1d, fft_conv, flash_attention, linear_attention, selective_scan

OPS = [flash_attention.OP, flash_attention.DECODE_OP, linear_attention.OP, causal_conv1d.OP, selective_scan.OP,
       fft_conv.OP]
