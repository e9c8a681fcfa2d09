"""The ops, one folder each. `OPS` lists their entries in the table of backends."""

from __future__ import annotations

from . import fft_conv, flash_attention, linear_attention

OPS = [flash_attention.OP, flash_attention.DECODE_OP, linear_attention.OP, fft_conv.OP]
