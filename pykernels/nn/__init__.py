"""Layers that models are built from, on the package's public functions.

Every sequence mixer here has one interface, so that a model can swap one for another:

    y = mixer(x)                                 x, y [B, T, dim]; differentiable
    state = mixer.init_state(batch, max_tokens)  what it must remember of the sequences
    y = mixer(x, state)                          continues the sequences in `state` by T tokens, updates it in place
    y = mixer.step(x, state)                     the same for one token, x, y [B, dim]

The last two are for inference (under torch.no_grad() or torch.inference_mode()). `make_mixer` makes one by its name.
"""

from __future__ import annotations

from torch import nn as _nn

from .attention import Attention, AttentionState
from .long_conv import HyenaFilter, HyenaOperator, LongConv, LongConvState
from .mamba import Mamba, MambaState
from .retention import LinearAttention, MultiScaleRetention, RecurrentState
from .rotary import apply_rotary

__all__ = ["MIXERS", "Attention", "AttentionState", "HyenaFilter", "HyenaOperator", "LinearAttention", "LongConv",
           "LongConvState", "Mamba", "MambaState", "MultiScaleRetention", "RecurrentState", "apply_rotary",
           "make_mixer"]

MIXERS: dict[str, type[_nn.Module]] = {
    "attention": Attention,
    "hyena": HyenaOperator,
    "linear_attention": LinearAttention,
    "long_conv": LongConv,
    "mamba": Mamba,
    "retention": MultiScaleRetention,
}
_WITH_HEADS, _WITH_LENGTH = (Attention, LinearAttention, MultiScaleRetention), (HyenaOperator, LongConv)


def make_mixer(name: str, dim: int, max_tokens: int, **options) -> _nn.Module:
    """A sequence mixer by its name, x [B, T, dim] -> [B, T, dim].

    Args:
        name: one of `MIXERS`.
        dim: size of the tokens.
        max_tokens: the longest sequence, which layers of long convolutions are made for; others take any.
        options: further arguments of the layer, by name. Where it has heads and `heads` is not among them, these have
            64 features, or dim if that is less.

    Raises:
        ValueError: no such name, or sizes that the layer does not take.
        TypeError: an option that the layer does not have.
    """
    if name not in MIXERS:
        raise ValueError(f"name must be one of {', '.join(MIXERS)}, got {name!r}")
    layer = MIXERS[name]
    if layer in _WITH_HEADS:
        options.setdefault("heads", max(1, dim // 64))
    if layer in _WITH_LENGTH:
        options["max_tokens"] = max_tokens
    return layer(dim, **options)
