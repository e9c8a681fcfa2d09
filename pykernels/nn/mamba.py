"""Mamba's block as a layer: projections, causal convolution, selective scan, gate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from ..ops.selective_scan import selective_scan, selective_scan_step
from .state import check_inference, check_input, check_state


@dataclasses.dataclass
class MambaState:
    """What a Mamba layer remembers of each sequence: the convolution's last inputs, the scan's state, the number of
    tokens."""

    conv: Tensor  # [B, E, W - 1], the layer's dtype
    memory: Tensor  # [B, E, N], float32 (float64)
    lengths: Tensor  # int32 [B]


class _Recomputed(torch.autograd.graph.saved_tensors_hooks):
    """Within it, autograd does not keep the tensors given to `forget`, but computes all of them again once it needs
    one.

    `compute` returns them in the order they are given in; it runs under the autocast that is on now.
    """

    def __init__(self, device: str, compute: Callable[[], tuple[Tensor, ...]]) -> None:
        places: dict[int, tuple[int, int]] = {}
        values: list[Tensor] = []
        precision = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

        def pack(x: Tensor) -> object:
            i, size = places.get(x.data_ptr(), (0, 0))
            return (i, x.shape, x.stride()) if 0 < size == x.numel() else x

        def unpack(packed: object) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            if not values:
                with torch.no_grad(), precision:
                    values.extend(compute())
            i, shape, stride = packed
            return values[i].as_strided(shape, stride)

        super().__init__(pack, unpack)
        self._places = places

    def forget(self, x: Tensor) -> None:
        self._places[x.data_ptr()] = len(self._places), x.numel()


class Mamba(nn.Module):
    """Mamba's sequence mixer: x [B, T, dim] -> [B, T, dim].

    With E = expand * dim channels: in_proj makes the channels and their gate, a causal convolution with SiLU mixes
    neighbouring tokens, x_proj and dt_proj make the scan's time steps, B and C from its result, and out_proj closes the
    block. Its parameters have mamba_ssm's names and shapes (in_proj, conv1d, x_proj, dt_proj, A_log, D, out_proj), so
    `load_state_dict` takes those of a `mamba_ssm.Mamba`.

    Args:
        dim: size of the tokens.
        state_dim: states N per channel.
        conv_width: taps of the convolution.
        expand: channels per feature of a token.
        dt_rank: size of what the time steps are projected from; None is dim / 16, rounded up.
        dt_min, dt_max: range of the time steps that the initial biases give.
        bias, conv_bias: whether in_proj and out_proj, and the convolution, have biases.
        recompute: whether the backward pass computes the convolution and the time steps again instead of keeping them.
        backend: as in `pykernels.selective_scan`.

    See `pykernels.nn` for how it is called.

    Source: Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces (arXiv:2312.00752).
    """

    def __init__(self, dim: int, *, state_dim: int = 16, conv_width: int = 4, expand: int = 2,
                 dt_rank: int | None = None,
                 dt_min: float = 1e-3, dt_max: float = 0.1, bias: bool = False, conv_bias: bool = True,
                 recompute: bool = True,
                 backend: str = "auto", device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        dt_rank = -(-dim // 16) if dt_rank is None else dt_rank
        for name, value in (("dim", dim), ("state_dim", state_dim), ("conv_width", conv_width), ("expand", expand),
                            ("dt_rank", dt_rank)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min and dt_max must be positive and in order, got {dt_min} and {dt_max}")
        self.dim, self.channels, self.state_dim, self.dt_rank = dim, expand * dim, state_dim, dt_rank
        self.dt_min, self.dt_max, self.recompute, self.backend = dt_min, dt_max, recompute, backend
        options = {"device": device, "dtype": dtype}
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.in_proj = nn.Linear(dim, 2 * self.channels, bias=bias, **options)
        # Holds the parameters under mamba_ssm's names; it is not called.
        self.conv1d = nn.Conv1d(self.channels, self.channels, conv_width, groups=self.channels, bias=conv_bias,
                                **options)
        self.x_proj = nn.Linear(self.channels, dt_rank + 2 * state_dim, bias=False, **options)
        self.dt_proj = nn.Linear(dt_rank, self.channels, bias=True, **options)
        self.A_log = nn.Parameter(torch.empty(self.channels, state_dim, device=device, dtype=wide))
        self.D = nn.Parameter(torch.empty(self.channels, device=device, dtype=wide))
        self.out_proj = nn.Linear(self.channels, dim, bias=bias, **options)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """mamba_ssm's initialisation of what the scan is made of: A = -1 ... -N, D = 1, time steps spread over their
        range."""
        self.A_log.copy_(torch.arange(1, self.state_dim + 1, device=self.A_log.device).log().expand(self.A_log.shape))
        self.D.fill_(1)
        nn.init.uniform_(self.dt_proj.weight, -self.dt_rank ** -0.5, self.dt_rank ** -0.5)
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        dt = torch.empty(self.channels, device=self.D.device, dtype=self.D.dtype).uniform_(low, high).exp()
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt

    def extra_repr(self) -> str:
        return (f"dim={self.dim}, channels={self.channels}, state_dim={self.state_dim}, dt_rank={self.dt_rank}, "
                f"recompute={self.recompute}, backend={self.backend!r}")

    def init_state(self, batch: int, max_tokens: int | None = None, *, device: torch.device | str | None = None,
                   dtype: torch.dtype | None = None) -> MambaState:
        """The state before any token, for `batch` sequences of any length."""
        weight = self.in_proj.weight
        device = weight.device if device is None else torch.device(device)
        dtype = weight.dtype if dtype is None else dtype
        width = self.conv1d.weight.shape[2]
        wide = torch.promote_types(dtype, torch.float32)
        return MambaState(torch.zeros(batch, self.channels, width - 1, device=device, dtype=dtype),
                          torch.zeros(batch, self.channels, self.state_dim, device=device, dtype=wide),
                          torch.zeros(batch, device=device, dtype=torch.int32))

    def _filter(self, x: Tensor) -> dict[str, object]:
        """The convolution's arguments, in dtypes that go with x."""
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        if x.dtype != torch.float64 and weight.dtype != x.dtype:
            weight, bias = weight.float(), None if bias is None else bias.float()
        return {"weight": weight, "bias": bias, "activation": "silu", "backend": self.backend}

    def _select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u [..., E] -> delta [..., E] before its bias, B and C [..., N]."""
        dt, B, C = self.x_proj(u).split((self.dt_rank, self.state_dim, self.state_dim), dim=-1)
        return F.linear(dt, self.dt_proj.weight), B, C

    def _dynamics(self, u: Tensor) -> dict[str, object]:
        """The scan's other arguments, which do not depend on tokens."""
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        bias = self.dt_proj.bias
        bias = bias if bias.dtype == u.dtype else bias.to(A.dtype)
        return {"A": A, "D": self.D.to(A.dtype), "delta_bias": bias, "delta_softplus": True, "backend": self.backend}

    def forward(self, x: Tensor, state: MambaState | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]; with `state`, x continues its sequences. `cu_seqlens` packs sequences along
        T."""
        check_state(state, MambaState, optional=True)
        check_input(x, self.dim, True, None if state is None else state.lengths.shape[0])
        if state is not None and cu_seqlens is not None:
            raise ValueError("cu_seqlens must be None when state is given: a state holds one sequence per batch entry")
        if state is not None:
            check_inference(self, x)
        channels, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)  # [B, E, T], token by token in memory
        if state is not None:
            return self._continue(channels, z, state)

        def convolve() -> Tensor:
            return causal_conv1d(channels, cu_seqlens=cu_seqlens, **self._filter(channels))

        def again() -> tuple[Tensor, Tensor]:
            u = convolve()
            return u, self._select(u.transpose(1, 2))[0]

        def scan(forget: Callable[[Tensor], None]) -> Tensor:
            u = convolve()
            forget(u)
            delta, B, C = self._select(u.transpose(1, 2))
            forget(delta)
            delta, B, C = (y.transpose(1, 2) for y in (delta, B, C))
            return selective_scan(u, delta, B=B, C=C, z=z, cu_seqlens=cu_seqlens, **self._dynamics(u))

        # Compilers choose for themselves what to compute again, torch.func's transforms take no hooks, and tensors on
        # meta, which have no memory, would all be taken for one.
        if (not self.recompute or x.is_meta or torch.compiler.is_compiling()
                or torch._C._are_functorch_transforms_active()):
            y = scan(lambda x: None)
        else:
            recomputed = _Recomputed(x.device.type, again)
            with recomputed:
                y = scan(recomputed.forget)
        return self.out_proj(y.transpose(1, 2))

    def _continue(self, x: Tensor, z: Tensor, state: MambaState) -> Tensor:
        """The channels x and their gate z [B, E, T] after the tokens in the state."""
        u, conv = causal_conv1d(x, initial_state=state.conv.to(x.dtype), return_final_state=True, **self._filter(x))
        delta, B, C = (y.transpose(1, 2) for y in self._select(u.transpose(1, 2)))
        y, memory = selective_scan(u, delta, B=B, C=C, z=z, initial_state=state.memory, return_final_state=True,
                                   **self._dynamics(u))
        state.conv.copy_(conv)
        state.memory.copy_(memory)
        state.lengths += x.shape[2]
        return self.out_proj(y.transpose(1, 2))

    def step(self, x: Tensor, state: MambaState) -> Tensor:
        """One token: x [B, dim] -> [B, dim]; updates the state."""
        check_state(state, MambaState)
        check_input(x, self.dim, False, state.lengths.shape[0])
        check_inference(self, x)
        channels, z = self.in_proj(x).chunk(2, dim=1)
        conv = state.conv.to(channels.dtype)  # a copy under autocast, else itself
        u = causal_conv1d_step(channels, conv, **self._filter(channels))
        delta, B, C = self._select(u)
        y = selective_scan_step(u, state.memory, delta, B=B, C=C, z=z, **self._dynamics(u))
        if conv is not state.conv:
            state.conv.copy_(conv)
        state.lengths += 1
        return self.out_proj(y)
