"""Layers that models are built from, on the package's public functions.

Every sequence mixer here has one interface, so that a model can swap one for another:

    y = mixer(x)                                 x, y [B, T, dim]; differentiable
    state = mixer.init_state(batch, max_tokens)  what it must remember of the sequences
    y = mixer(x, state)                          continues the sequences in `state` by T tokens, updates it in place
    y = mixer.step(x, state)                     the same for one token, x, y [B, dim]

The last two are for inference (under torch.no_grad() or torch.inference_mode()).
"""

from __future__ import annotations

from .attention import Attention, AttentionState
from .long_conv import HyenaFilter, HyenaOperator, LongConv, LongConvState
from .mamba import Mamba, MambaState
from .retention import LinearAttention, MultiScaleRetention, RecurrentState
from .rotary import apply_rotary

__all__ = ["Attention", "AttentionState", "HyenaFilter", "HyenaOperator", "LinearAttention", "LongConv", "LongConvState",
           "Mamba", "MambaState", "MultiScaleRetention", "RecurrentState", "apply_rotary"]
