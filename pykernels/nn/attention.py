"""Softmax attention as a layer."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ..ops.flash_attention import flash_attention, flash_attention_decode
from .rotary import apply_rotary, positions_of
from .state import autocast_dtype, check_inference, check_input, check_state


@dataclasses.dataclass
class AttentionState:
    """The keys and values of the tokens so far; entry b of the batch holds lengths[b] of them.

    With a block table the caches are pages: token t of entry b lies in page block_table[b, t // page size]. Layers of
    one model may share a table, and whoever manages the pages may give them out as sequences grow, or share those of a
    common prompt (never one that is still appended to).
    """

    k: Tensor  # [B, Tmax, Hk, K], or [pages, page size, Hk, K]
    v: Tensor  # likewise
    lengths: Tensor  # int32 [B]
    block_table: Tensor | None = None  # int32 [B, pages of an entry]


class Attention(nn.Module):
    """Multi-head attention with its projections: x [B, T, dim] -> [B, T, dim].

    Args:
        dim: size of the tokens.
        heads: number of query heads.
        key_heads: number of key and value heads, a divisor of `heads` (grouped queries); None is `heads`.
        head_dim: size of a head; None is dim // heads.
        causal, window, scale, softcap, backend: as in `pykernels.flash_attention`.
        sinks: whether each head has a learned sink, at first of score 0 (see `pykernels.flash_attention`).
        rotary_base: if given, queries and keys are rotated by their positions (see `apply_rotary`).
        rotary_interleaved: whether neighbouring features make the pairs that are rotated.
        bias: whether the projections have biases.

    See `pykernels.nn` for how it is called.
    """

    def __init__(self, dim: int, heads: int, *, key_heads: int | None = None, head_dim: int | None = None,
                 causal: bool = True, window: tuple[int | None, int | None] | None = None, scale: float | None = None,
                 softcap: float = 0.0, sinks: bool = False, rotary_base: float | None = None,
                 rotary_interleaved: bool = False, bias: bool = False, backend: str = "auto",
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        key_heads = heads if key_heads is None else key_heads
        if heads < 1 or key_heads < 1 or heads % key_heads != 0:
            raise ValueError(f"key_heads must divide heads, got {key_heads} for {heads} heads")
        if head_dim is None:
            if dim % heads != 0:
                raise ValueError(f"heads must divide dim when head_dim is not given, got {heads} heads for dim {dim}")
            head_dim = dim // heads
        if rotary_base is not None and head_dim % 2 != 0:
            raise ValueError(f"head_dim must be even for rotary_base, got {head_dim}")
        self.dim, self.heads, self.key_heads, self.head_dim = dim, heads, key_heads, head_dim
        self.causal, self.window, self.scale, self.softcap = causal, window, scale, softcap
        self.rotary_base, self.rotary_interleaved, self.backend = rotary_base, rotary_interleaved, backend
        self.qkv = nn.Linear(dim, (heads + 2 * key_heads) * head_dim, bias=bias, device=device, dtype=dtype)
        self.out = nn.Linear(heads * head_dim, dim, bias=bias, device=device, dtype=dtype)
        self.sinks = nn.Parameter(torch.zeros(heads, device=device, dtype=dtype)) if sinks else None

    def extra_repr(self) -> str:
        return (f"dim={self.dim}, heads={self.heads}, key_heads={self.key_heads}, head_dim={self.head_dim}, "
                f"causal={self.causal}, window={self.window}, scale={self.scale}, softcap={self.softcap}, "
                f"sinks={self.sinks is not None}, rotary_base={self.rotary_base}, "
                f"rotary_interleaved={self.rotary_interleaved}, backend={self.backend!r}")

    def init_state(self, batch: int, max_tokens: int, *, page_size: int | None = None,
                   device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> AttentionState:
        """An empty cache for `batch` sequences of at most `max_tokens`, by default where and in what it computes.

        With a `page_size` it is paged, and every sequence has all the pages that it may need.
        """
        if not self.causal:
            raise ValueError("causal must be True for a layer that continues sequences, got a layer with causal=False")
        device = self.qkv.weight.device if device is None else torch.device(device)
        if dtype is None:
            dtype = autocast_dtype(device.type) or self.qkv.weight.dtype
        shape, block_table = (batch, max_tokens), None
        if page_size is not None:
            if page_size < 1:
                raise ValueError(f"page_size must be at least 1, got {page_size}")
            pages = -(-max_tokens // page_size)
            shape = batch * pages, page_size
            block_table = torch.arange(batch * pages, device=device, dtype=torch.int32).view(batch, pages)
        k, v = (torch.zeros(*shape, self.key_heads, self.head_dim, device=device, dtype=dtype) for _ in range(2))
        return AttentionState(k, v, torch.zeros(batch, device=device, dtype=torch.int32), block_table)

    def forward(self, x: Tensor, state: AttentionState | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """x [B, T, dim] -> [B, T, dim].

        With `state`, x continues its sequences: x's keys and values are appended to it. `cu_seqlens` [sequences + 1]
        packs several sequences along T (then B is 1), as in `pykernels.flash_attention`.
        """
        check_state(state, AttentionState, optional=True)
        check_input(x, self.dim, True, None if state is None else state.lengths.shape[0])
        if state is not None and cu_seqlens is not None:
            raise ValueError("cu_seqlens must be None when state is given: a state holds one sequence per batch entry")
        if state is not None:
            check_inference(self, x)
        batch, tokens, _ = x.shape
        heads = self.qkv(x).view(batch, tokens, self.heads + 2 * self.key_heads, self.head_dim)
        q, k, v = heads.split((self.heads, self.key_heads, self.key_heads), dim=2)
        if self.rotary_base is not None:
            positions = positions_of(x, None if state is None else state.lengths, cu_seqlens)
            q, k = (apply_rotary(y, positions, self.rotary_base, interleaved=self.rotary_interleaved) for y in (q, k))
        sinks = self.sinks
        if sinks is not None and sinks.dtype not in (q.dtype, torch.float32):  # under autocast
            sinks = sinks.float()
        options = {"causal": self.causal, "window": self.window, "scale": self.scale, "softcap": self.softcap,
                   "sinks": sinks, "backend": self.backend}
        if state is None:
            out = flash_attention(q, k, v, cu_seqlens_q=cu_seqlens, **options)
        else:
            out = flash_attention_decode(q, state.k, state.v, state.lengths, k=k, v=v, block_table=state.block_table,
                                         **options)
            state.lengths += tokens
        return self.out(out.flatten(2))

    def step(self, x: Tensor, state: AttentionState) -> Tensor:
        """One token: x [B, dim] -> [B, dim]; updates the state."""
        check_state(state, AttentionState)
        check_input(x, self.dim, False, state.lengths.shape[0])
        return self(x[:, None], state)[:, 0]
