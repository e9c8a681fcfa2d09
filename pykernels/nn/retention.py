"""Multi-scale retention and linear attention as layers."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.linear_attention import linear_attention, linear_attention_step
from ..ops.retention import retention, retention_step
from .rotary import apply_rotary, positions_of
from .state import check_inference, check_input, check_state


@dataclasses.dataclass
class RecurrentState:
    """What a recurrent layer remembers: one matrix per sequence and head, and how many tokens it has seen."""

    memory: Tensor  # [B, H, K, V], float32 (float64)
    lengths: Tensor  # int32 [B]


def _init_state(weight: Tensor, batch: int, heads: int, key_dim: int, columns: int, device, dtype) -> RecurrentState:
    device = weight.device if device is None else torch.device(device)
    dtype = weight.dtype if dtype is None else dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    memory = torch.zeros(batch, heads, key_dim, columns, device=device, dtype=wide)
    return RecurrentState(memory, torch.zeros(batch, device=device, dtype=torch.int32))


def _theta_shift(x: Tensor, positions: Tensor) -> Tensor:
    """RetNet's rotation: features pair as (2i, 2i + 1), with angles position * 10000 ** -linspace(0, 1, K / 2)."""
    half = x.shape[-1] // 2
    compute = torch.promote_types(x.dtype, torch.float32)
    frequencies = 10000.0 ** -torch.linspace(0, 1, half, device=x.device, dtype=torch.float64)
    angles = positions[..., None, None].to(torch.float64) * frequencies
    cos, sin = angles.cos().to(compute), angles.sin().to(compute)
    even, odd = x[..., 0::2].to(compute), x[..., 1::2].to(compute)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


class MultiScaleRetention(nn.Module):
    """RetNet's mixer: retention with a decay per head, a norm per head and a swish gate; x [B, T, dim] -> [B, T, dim].

    Its parameters have torchscale's names and shapes (q_proj, k_proj, v_proj, g_proj, out_proj), so `load_state_dict`
    takes a torchscale layer's, and with the default options it gives the same outputs as each of torchscale's three
    forms.

    Args:
        dim: size of the tokens.
        heads: number of heads; the key size is dim // heads, the value size value_dim // heads.
        value_dim: size of the values of all heads; None is 2 * dim, as in RetNet.
        positions: "theta_shift" (RetNet's rotation of interleaved pairs), "rotary" (`apply_rotary`) or None.
        learnable_gamma: whether the decay per head is a parameter (`decay_logit`, gamma its sigmoid), starting at
            RetNet's.
        eps: of the norm.
        backend: as in `pykernels.retention`.

    See `pykernels.nn` for how it is called.
    """

    def __init__(self, dim: int, heads: int, *, value_dim: int | None = None, positions: str | None = "theta_shift",
                 learnable_gamma: bool = False, eps: float = 1e-6, backend: str = "auto",
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        value_dim = 2 * dim if value_dim is None else value_dim
        if heads < 1 or dim % heads != 0 or value_dim % heads != 0:
            raise ValueError(f"heads must divide dim and value_dim, got {heads} heads for dim {dim} "
                             f"and value_dim {value_dim}")
        if positions not in ("theta_shift", "rotary", None):
            raise ValueError(f"positions must be 'theta_shift', 'rotary' or None, got {positions!r}")
        if positions is not None and dim // heads % 2 != 0:
            raise ValueError(f"dim // heads must be even for positions, got {dim // heads}")
        self.dim, self.heads, self.value_dim = dim, heads, value_dim
        self.key_dim, self.head_dim = dim // heads, value_dim // heads
        self.positions, self.eps, self.backend = positions, eps, backend
        options = {"bias": False, "device": device, "dtype": dtype}
        self.q_proj, self.k_proj = (nn.Linear(dim, dim, **options) for _ in range(2))
        self.v_proj, self.g_proj = (nn.Linear(dim, value_dim, **options) for _ in range(2))
        self.out_proj = nn.Linear(value_dim, dim, **options)
        self.decay_logit: nn.Parameter | None = None
        if learnable_gamma:
            # sigmoid(x) = 1 - 2 ** -n at x = log(2 ** n - 1).
            exponents = 5 + torch.arange(heads, device=device, dtype=torch.float64)
            self.decay_logit = nn.Parameter(torch.log(torch.exp2(exponents) - 1).to(dtype or torch.get_default_dtype()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torchscale's initialisation."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            nn.init.xavier_uniform_(projection.weight, gain=2 ** -2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=2 ** -1)

    def extra_repr(self) -> str:
        return (f"dim={self.dim}, heads={self.heads}, value_dim={self.value_dim}, positions={self.positions!r}, "
                f"learnable_gamma={self.decay_logit is not None}, backend={self.backend!r}")

    def init_state(self, batch: int, max_tokens: int | None = None, *, device: torch.device | str | None = None,
                   dtype: torch.dtype | None = None) -> RecurrentState:
        """The state before any token, for `batch` sequences of any length."""
        return _init_state(self.q_proj.weight, batch, self.heads, self.key_dim, self.head_dim, device, dtype)

    def state_from_torchscale(self, incremental_state: dict[str, Tensor], tokens: int) -> RecurrentState:
        """The state that torchscale's `incremental_state` stands for after `tokens` tokens.

        torchscale keeps the transposed state divided by the root of a running sum of decays, its "scale".
        """
        kept, scale = incremental_state["prev_key_value"], incremental_state["scale"]
        memory = (kept * scale.view(-1, 1, 1).sqrt()).transpose(2, 3)
        # torchscale scales its keys by the root of the key size, which retention applies to its output.
        memory = memory * self.key_dim ** 0.5
        memory = memory.to(torch.float64 if memory.dtype == torch.float64 else torch.float32).contiguous()
        lengths = torch.full((memory.shape[0],), tokens, device=memory.device, dtype=torch.int32)
        return RecurrentState(memory, lengths)

    def _gamma(self) -> Tensor | None:
        if self.decay_logit is None:
            return None
        logit = self.decay_logit
        return torch.sigmoid(logit.to(torch.promote_types(logit.dtype, torch.float32)))

    def _gate(self, x: Tensor, out: Tensor) -> Tensor:
        """The norm of each head, the gate, the last projection; out [..., H, V]."""
        out = F.rms_norm(out, (self.head_dim,), eps=self.eps).flatten(-2)
        return self.out_proj(F.silu(self.g_proj(x)) * out)

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (p(x).unflatten(-1, (self.heads, self.key_dim)) for p in (self.q_proj, self.k_proj))
        v = self.v_proj(x).unflatten(-1, (self.heads, self.head_dim))
        if self.positions is not None:
            rotate = _theta_shift if self.positions == "theta_shift" else apply_rotary
            q, k = rotate(q, positions), rotate(k, positions)
        return q, k, v

    def forward(self, x: Tensor, state: RecurrentState | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]; with `state`, x continues its sequences. `cu_seqlens` packs them along T."""
        check_state(state, RecurrentState, optional=True)
        check_input(x, self.dim, True, None if state is None else state.lengths.shape[0])
        if state is not None and cu_seqlens is not None:
            raise ValueError("cu_seqlens must be None when state is given: a state holds one sequence per batch entry")
        if state is not None:
            check_inference(self, x)
        q, k, v = self._project(x, positions_of(x, None if state is None else state.lengths, cu_seqlens))
        options = {"gamma": self._gamma(), "backend": self.backend}
        if state is None:
            out = retention(q, k, v, cu_seqlens=cu_seqlens, **options)
        else:
            out, memory = retention(q, k, v, initial_state=state.memory, return_final_state=True, **options)
            state.memory.copy_(memory)
            state.lengths += x.shape[1]
        return self._gate(x, out)

    def step(self, x: Tensor, state: RecurrentState) -> Tensor:
        """One token: x [B, dim] -> [B, dim]; updates the state."""
        check_state(state, RecurrentState)
        check_input(x, self.dim, False, state.lengths.shape[0])
        check_inference(self, x)
        q, k, v = (y[:, 0] for y in self._project(x[:, None], positions_of(x[:, None], state.lengths)))
        out = retention_step(q, k, v, state.memory, gamma=self._gamma(), backend=self.backend)
        state.lengths += 1
        return self._gate(x, out)


def _elu(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def _softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


def _identity(x: Tensor) -> Tensor:
    return x


_FEATURE_MAPS = {"elu": _elu, "relu": F.relu, "softmax": _softmax, "identity": _identity}


class LinearAttention(nn.Module):
    """Attention with feature maps in place of the softmax, causal: x [B, T, dim] -> [B, T, dim].

    Args:
        dim: size of the tokens.
        heads: number of heads.
        key_heads: number of query and key heads, a divisor of `heads`; None is `heads`.
        head_dim: size of a head; None is dim // heads.
        feature_map: of queries and keys: "elu" (elu(x) + 1), "relu", "softmax" (over the head) or "identity".
        normalize: whether weights are divided by their sum; None is True but for "identity", whose weights may be
            negative.
        bias: whether the projections have biases.
        backend: as in `pykernels.linear_attention`.

    See `pykernels.nn` for how it is called.
    """

    def __init__(self, dim: int, heads: int, *, key_heads: int | None = None, head_dim: int | None = None,
                 feature_map: str = "elu", normalize: bool | None = None, bias: bool = False, backend: str = "auto",
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        key_heads = heads if key_heads is None else key_heads
        if heads < 1 or key_heads < 1 or heads % key_heads != 0:
            raise ValueError(f"key_heads must divide heads, got {key_heads} for {heads} heads")
        if head_dim is None:
            if dim % heads != 0:
                raise ValueError(f"heads must divide dim when head_dim is not given, got {heads} heads for dim {dim}")
            head_dim = dim // heads
        if feature_map not in _FEATURE_MAPS:
            raise ValueError(f"feature_map must be one of {tuple(_FEATURE_MAPS)}, got {feature_map!r}")
        self.dim, self.heads, self.key_heads, self.head_dim = dim, heads, key_heads, head_dim
        self.feature_map, self.backend = feature_map, backend
        self.normalize = feature_map != "identity" if normalize is None else normalize
        self.qkv = nn.Linear(dim, (heads + 2 * key_heads) * head_dim, bias=bias, device=device, dtype=dtype)
        self.out = nn.Linear(heads * head_dim, dim, bias=bias, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return (f"dim={self.dim}, heads={self.heads}, key_heads={self.key_heads}, head_dim={self.head_dim}, "
                f"feature_map={self.feature_map!r}, normalize={self.normalize}, backend={self.backend!r}")

    def init_state(self, batch: int, max_tokens: int | None = None, *, device: torch.device | str | None = None,
                   dtype: torch.dtype | None = None) -> RecurrentState:
        """The state before any token, for `batch` sequences of any length."""
        columns = self.head_dim + self.normalize
        return _init_state(self.qkv.weight, batch, self.heads, self.head_dim, columns, device, dtype)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.qkv(x).unflatten(-1, (self.heads + 2 * self.key_heads, self.head_dim))
        q, k, v = heads.split((self.key_heads, self.key_heads, self.heads), dim=-2)
        of = _FEATURE_MAPS[self.feature_map]
        return of(q), of(k), v

    def forward(self, x: Tensor, state: RecurrentState | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]; with `state`, x continues its sequences. `cu_seqlens` packs them along T."""
        check_state(state, RecurrentState, optional=True)
        check_input(x, self.dim, True, None if state is None else state.lengths.shape[0])
        if state is not None and cu_seqlens is not None:
            raise ValueError("cu_seqlens must be None when state is given: a state holds one sequence per batch entry")
        if state is not None:
            check_inference(self, x)
        q, k, v = self._project(x)
        options = {"normalize": self.normalize, "backend": self.backend}
        if state is None:
            out = linear_attention(q, k, v, cu_seqlens=cu_seqlens, **options)
        else:
            out, memory = linear_attention(q, k, v, initial_state=state.memory, return_final_state=True, **options)
            state.memory.copy_(memory)
            state.lengths += x.shape[1]
        return self.out(out.flatten(-2))

    def step(self, x: Tensor, state: RecurrentState) -> Tensor:
        """One token: x [B, dim] -> [B, dim]; updates the state."""
        check_state(state, RecurrentState)
        check_input(x, self.dim, False, state.lengths.shape[0])
        check_inference(self, x)
        q, k, v = self._project(x)
        out = linear_attention_step(q, k, v, state.memory, normalize=self.normalize, backend=self.backend)
        state.lengths += 1
        return self.out(out.flatten(-2))
