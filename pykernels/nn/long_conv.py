"""Long convolutions as layers: one whose kernel is a parameter, and Hyena's, whose kernel a small network writes."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops.fft_conv import (
    FFTConvSpectrum,
    FFTConvState,
    fft_conv,
    fft_conv_init,
    fft_conv_spectrum,
    fft_conv_step,
    transforms_beforehand,
)
from .state import autocast_dtype, check_inference, check_input, check_state

# convolve(u [B, D, T], kernel, D=None, pre_gate=None, post_gate=None); kernel(tokens) gives that many taps [D, tokens],
# or where `convolve` is `_whole` their spectrum.
_Convolve = Callable[..., Tensor]


@dataclasses.dataclass
class LongConvState:
    """What a layer of long convolutions remembers of its sequences."""

    convolutions: list[FFTConvState]  # in the order of the layer's convolutions; empty before the first token
    tokens: int  # seen
    max_tokens: int

    @property
    def batch(self) -> int | None:
        """None before the first token."""
        return self.convolutions[0].inputs.shape[0] if self.convolutions else None


class _LongMixer(nn.Module, abc.ABC):
    """The interface of `pykernels.nn` around `_mix`, which convolves by the function it is given."""

    dim: int
    max_tokens: int
    backend: str

    @abc.abstractmethod
    def _mix(self, x: Tensor, convolve: _Convolve) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]."""

    def init_state(
        self,
        batch: int,
        max_tokens: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LongConvState:
        """The state before any token, for sequences of up to `max_tokens` (None: the layer's, which is also the most).

        Batch, device and dtype are those of the first tokens that come.
        """
        max_tokens = self.max_tokens if max_tokens is None else max_tokens
        if not 1 <= max_tokens <= self.max_tokens:
            raise ValueError(f"max_tokens must be 1 to the layer's {self.max_tokens}, got {max_tokens}")
        return LongConvState([], 0, max_tokens)

    def forward(self, x: Tensor, state: LongConvState | None = None) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]; with `state`, x continues its sequences."""
        check_state(state, LongConvState, optional=True)
        check_input(x, self.dim, True, None if state is None else state.batch)
        if state is None or x.shape[1] == 0:
            if x.shape[1] > self.max_tokens:
                raise ValueError(f"x must have at most max_tokens = {self.max_tokens} tokens, got {x.shape[1]}")
            return self._mix(x, self._whole)
        if state.tokens:
            return torch.stack([self.step(token, state) for token in x.unbind(1)], 1)
        self._advance(x, state, x.shape[1])
        return self._mix(x, functools.partial(self._prefix, state))

    def step(self, x: Tensor, state: LongConvState) -> Tensor:
        """One token: x [B, dim] -> [B, dim]; updates the state."""
        check_state(state, LongConvState)
        check_input(x, self.dim, False, state.batch)
        self._advance(x, state, 1)
        if not state.convolutions:
            return self._mix(x[:, None], functools.partial(self._prefix, state))[:, 0]
        return self._mix(x[:, None], functools.partial(self._next, iter(state.convolutions)))[:, 0]

    def _advance(self, x: Tensor, state: LongConvState, tokens: int) -> None:
        check_inference(self, x)
        if state.tokens + tokens > state.max_tokens:
            raise ValueError(
                f"x must keep the sequence within the state's max_tokens of {state.max_tokens}, got {tokens} more "
                f"after {state.tokens}"
            )
        state.tokens += tokens

    def _whole(
        self, u: Tensor, kernel: Callable[[int], Tensor | FFTConvSpectrum], **options: Tensor | None
    ) -> Tensor:
        return fft_conv(u, kernel(max(u.shape[2], 1)), backend=self.backend, **options)

    def _prefix(
        self,
        state: LongConvState,
        u: Tensor,
        kernel: Callable[[int], Tensor],
        *,
        D: Tensor | None = None,
        pre_gate: Tensor | None = None,
        post_gate: Tensor | None = None,
    ) -> Tensor:
        k = kernel(state.max_tokens)
        state.convolutions.append(fft_conv_init(k, u, D=D, pre_gate=pre_gate, backend=self.backend))
        return fft_conv(u, k, D=D, pre_gate=pre_gate, post_gate=post_gate, backend=self.backend)

    @staticmethod
    def _next(
        states,
        u: Tensor,
        kernel: Callable[[int], Tensor],
        *,
        D: Tensor | None = None,
        pre_gate: Tensor | None = None,
        post_gate: Tensor | None = None,
    ) -> Tensor:
        pre, post = (None if gate is None else gate[..., 0] for gate in (pre_gate, post_gate))
        return fft_conv_step(u[..., 0], next(states), pre_gate=pre, post_gate=post)[..., None]


def _decay_rates(dim: int, device: torch.device | str | None) -> Tensor:
    """Hyena's: e^{-rate} falls to 0.01 within 0.3 to 1.5 of the longest sequence."""
    return torch.linspace(-math.log(0.01) / 1.5, -math.log(0.01) / 0.3, dim, device=device, dtype=torch.float64)


class LongConv(_LongMixer):
    """A convolution with a kernel per channel as long as the sequence, which is a parameter; [B, T, dim] -> the same.

    Args:
        dim: number of channels.
        max_tokens: taps of the kernel, and the longest sequence.
        threshold: kernels are squashed, sign(k) max(|k| - threshold, 0), which regularises them (Fu et al.,
            arXiv:2302.06646).
        backend: as in `pykernels.fft_conv`.

    See `pykernels.nn` for how it is called.
    """

    def __init__(
        self,
        dim: int,
        max_tokens: int,
        *,
        threshold: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or max_tokens < 1:
            raise ValueError(f"dim and max_tokens must be at least 1, got {dim} and {max_tokens}")
        self.dim, self.max_tokens, self.threshold, self.backend = dim, max_tokens, threshold, backend
        self.kernel = nn.Parameter(torch.empty(dim, max_tokens, device=device, dtype=dtype))
        self.skip = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Kernels of unit norm that fade at Hyena's rates."""
        t = torch.arange(self.max_tokens, device=self.kernel.device, dtype=torch.float64) / self.max_tokens
        kernel = torch.randn_like(self.kernel, dtype=torch.float64) * torch.exp(
            -_decay_rates(self.dim, t.device)[:, None] * t
        )
        self.kernel.copy_(kernel / kernel.norm(dim=1, keepdim=True))
        self.skip.fill_(1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, max_tokens={self.max_tokens}, threshold={self.threshold}, backend={self.backend!r}"

    def _taps(self, tokens: int) -> Tensor:
        k = self.kernel[:, :tokens]
        return torch.nn.functional.softshrink(k, self.threshold) if self.threshold else k

    def _mix(self, x: Tensor, convolve: _Convolve) -> Tensor:
        dtype = autocast_dtype(x.device.type)
        if dtype is not None:  # here, because not every step of a convolution is a call that is
            x = x.to(dtype)
        return convolve(x.transpose(1, 2), self._taps, D=self.skip).transpose(1, 2)


class HyenaFilter(nn.Module):
    """Hyena's implicit filter: k_n = MLP(z_n) e^{-t_n rate}, z_n = (t_n, cos f_b w_n, -sin f_b w_n), t_n in [0, 1].

    Args:
        dim: number of kernels.
        max_tokens: the longest, which positions are relative to.
        embedding: size of z, odd; its (embedding - 1) / 2 frequencies f_b run from 1e-4 on.
        width, layers: of the network's hidden layers, between which sin(frequency x) stands.
        frequency: the initial value of that parameter.
    """

    def __init__(
        self,
        dim: int,
        max_tokens: int,
        *,
        embedding: int = 3,
        width: int = 64,
        layers: int = 3,
        frequency: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embedding < 3 or embedding % 2 == 0:
            raise ValueError(f"embedding must be odd and at least 3, got {embedding}")
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        options = {"device": device, "dtype": dtype}
        self.max_tokens, self.bands = max_tokens, (embedding - 1) // 2
        self.hidden = nn.ModuleList(nn.Linear(width if i else embedding, width, **options) for i in range(layers))
        self.out = nn.Linear(width, dim, bias=False, **options)
        self.frequency = nn.Parameter(torch.full((width,), frequency, **options))
        self.register_buffer("rates", _decay_rates(dim, device).to(self.frequency.dtype))

    def forward(self, tokens: int) -> Tensor:
        """-> the first `tokens` taps [dim, tokens], in the parameters' dtype under autocast too."""
        device = self.frequency.device.type
        if autocast_dtype(device) is None:
            return self._taps(tokens)
        with torch.autocast(device, enabled=False):
            return self._taps(tokens)

    def _taps(self, tokens: int) -> Tensor:
        n = torch.arange(tokens, device=self.frequency.device, dtype=torch.float64)[:, None]
        t = n / max(self.max_tokens - 1, 1)
        frequencies = torch.linspace(1e-4, self.bands - 1, self.bands, device=n.device, dtype=torch.float64)
        angles = frequencies * (2 * math.pi / self.max_tokens) * n
        h = torch.cat((t, angles.cos(), -angles.sin()), dim=1).to(self.frequency.dtype)
        for layer in self.hidden:
            h = torch.sin(self.frequency * layer(h))
        return (self.out(h) * torch.exp(-t.to(h.dtype) * self.rates)).T


class _Spectra:
    """A filter's kernels as spectra, kept for as long as they are those of its parameters.

    Whether they are is decided by the parameters' values. Writes through `.data` and in inference mode leave no other
    trace, and a filter's parameters are few beside its kernels.
    """

    def __init__(self) -> None:
        self._made: tuple | None = None  # what of, the values of the parameters then, spectra

    def __reduce__(self) -> tuple:
        return _Spectra, ()  # copies of a layer, and those that are saved, make their own

    def clear(self) -> None:
        self._made = None

    def of(self, module: HyenaFilter, tokens: int, parts: int, dtype: torch.dtype) -> list[FFTConvSpectrum]:
        """The spectra of so many equal parts of the kernels, for rows in `dtype`."""
        facts = tokens, parts, dtype, module.max_tokens, module.bands
        values = [*module.parameters(), *module.buffers()]
        made = self._made
        if made is None or made[0] != facts or not _equal(made[1], values):
            kernels = module(tokens)
            kernels = kernels.double() if dtype == torch.float64 else kernels
            spectra = [fft_conv_spectrum(k, tokens, backend="cpu") for k in kernels.chunk(parts)]
            made = self._made = facts, [x.clone() for x in values], spectra
        return made[2]


def _equal(x: list[Tensor], y: list[Tensor]) -> bool:
    return len(x) == len(y) and all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in zip(x, y)
    )


class HyenaOperator(_LongMixer):
    """Hyena's mixer, a stand-in for attention: gates and long convolutions in turn; x [B, T, dim] -> [B, T, dim].

    A projection to order + 1 streams, a short causal convolution of each, then v = x_order, and for i from order - 1
    down to 1 v = conv_i(x_i v) with a skip, and at last out_proj(x_0 v). Of order 2 that is one call of `fft_conv` with
    both gates.

    Args:
        dim: size of the tokens.
        max_tokens: the longest sequence.
        order: number of gates, at least 2.
        short_taps: of the short convolution.
        backend: as in `pykernels.fft_conv`.
        filter_options: further arguments of `HyenaFilter`.

    In evaluation mode, without grad and on a CPU, the spectra of the filter's kernels are kept from one whole sequence
    to the next of the same length, until a parameter changes or `train()` is called; they take 8 bytes per tap.

    See `pykernels.nn` for how it is called. Source: Poli et al., Hyena Hierarchy (arXiv:2302.10866).
    """

    def __init__(
        self,
        dim: int,
        max_tokens: int,
        *,
        order: int = 2,
        short_taps: int = 3,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **filter_options: float,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("dim", dim, 1),
            ("max_tokens", max_tokens, 1),
            ("order", order, 2),
            ("short_taps", short_taps, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.dim, self.max_tokens, self.order, self.backend = dim, max_tokens, order, backend
        options = {"device": device, "dtype": dtype}
        streams = (order + 1) * dim
        self.in_proj, self.out_proj = nn.Linear(dim, streams, **options), nn.Linear(dim, dim, **options)
        self.short_kernel = nn.Parameter(torch.empty(streams, short_taps, **options))
        self.short_bias = nn.Parameter(torch.empty(streams, 1, **options))
        self.filter = HyenaFilter((order - 1) * dim, max_tokens, **filter_options, **options)
        self.skip = nn.Parameter(torch.randn(order - 1, dim, **options))
        self._spectra = _Spectra()
        for parameter in (self.short_kernel, self.short_bias):  # as of torch.nn.Conv1d
            nn.init.uniform_(parameter, -(short_taps**-0.5), short_taps**-0.5)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, max_tokens={self.max_tokens}, order={self.order}, backend={self.backend!r}"

    def train(self, mode: bool = True) -> HyenaOperator:
        self._spectra.clear()
        return super().train(mode)

    def _kernels(self, u: Tensor, convolve: _Convolve) -> list[Callable[[int], Tensor | FFTConvSpectrum]]:
        """What `convolve` of u takes as its kernels, of all gates in turn."""
        if not torch.compiler.is_compiling() and not self.training and not torch.is_grad_enabled():
            plain = type(u) is Tensor and type(self.filter) is HyenaFilter
            if plain and transforms_beforehand(u.device, self.backend) and convolve == self._whole:
                spectra = self._spectra.of(self.filter, max(u.shape[2], 1), self.order - 1, u.dtype)
                return [lambda _, spectrum=spectrum: spectrum for spectrum in spectra]
        parts = (slice(i * self.dim, (i + 1) * self.dim) for i in range(self.order - 1))
        return [lambda tokens, rows=rows: self.filter(tokens)[rows] for rows in parts]

    def _mix(self, x: Tensor, convolve: _Convolve) -> Tensor:
        streams = self.in_proj(x).transpose(1, 2)
        streams = convolve(streams, lambda tokens: self.short_kernel[:, :tokens])
        streams = streams + self.short_bias.to(streams.dtype)
        *gates, v = streams.unflatten(1, (self.order + 1, self.dim)).unbind(1)
        kernels = self._kernels(v, convolve)
        for i in range(self.order - 1, 0, -1):
            last = gates[0] if i == 1 else None
            v = convolve(v, kernels[i - 1], D=self.skip[i - 1], pre_gate=gates[i], post_gate=last)
        return self.out_proj(v.transpose(1, 2))
