"""safari's and H3's long convolutions on `fft_conv` and `causal_conv1d`.

They are no package that can be installed (their code lies in a folder `src`), so `install` does not know them: import
from here. Beyond the originals: CPUs, any lengths, any dtypes, second derivatives.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.causal_conv1d import causal_conv1d
from ..ops.fft_conv import fft_conv

__all__ = ["HyenaOperator", "fftconv_func"]


def fftconv_func(u, k, D, dropout_mask=None, gelu=True, force_fp16_output=False, output_hbl_layout=False, v=None,
                 head_dim=1, q=None, fftfp16=False, k_rev=None):
    """Long convolution with a skip connection: gelu(conv(u, k) + D u) dropout_mask, or H3's q (conv(u v, k) + D u v).

    Args:
        u: [B, H, L].
        k: [H, K], K up to L; [H / head_dim, K] with v and q.
        D: as many as k has rows.
        dropout_mask: [B, H], a factor on the result; None with v and q.
        gelu: whether GELU is applied; False with v and q.
        force_fp16_output: whether the result is float16 rather than of u's dtype.
        output_hbl_layout: whether the result lies in memory as [H, B, L].
        v, q: [B, H, L], H3's gates, both or neither. With a head_dim d, channel h d + i of u meets channels h d + j of
            v, and the products with q are summed over i.
        fftfp16: how the original computes its FFT; it changes nothing.
        k_rev: the anticausal side [as k], whose first tap is that of lag 0.

    Returns:
        [B, H, L].
    """
    for name, x, axes in (("u", u, "B H L"), ("k", k, "H K"), ("D", D, "H")):
        if not isinstance(x, Tensor) or x.dim() != len(axes.split()):
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor [{', '.join(axes.split())}], got {got}")
    batch, channels, length = u.shape
    for name, x in (("k", k), ("k_rev", k_rev)):
        if x is not None and x.shape[-1] > length:
            raise ValueError(f"{name} must have at most u's {length} taps, got {x.shape[-1]}")
    if (v is None) != (q is None):
        raise ValueError(f"{'v' if v is None else 'q'} must be given with the other, got None")
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim < 1 or channels % head_dim:
        raise ValueError(f"head_dim must divide u's {channels} channels, got {head_dim!r}")
    if v is None and head_dim != 1:
        raise ValueError(f"head_dim must be 1 without v and q, got {head_dim}")
    heads, out_dtype = channels // head_dim, torch.float16 if force_fp16_output else u.dtype
    if k.shape[0] != heads or D.shape[0] != heads:
        raise ValueError(f"k and D must have {heads} rows, got {k.shape[0]} and {D.shape[0]}")
    kernels = {"k_rev": k_rev, "k_rev_lag": 0}
    if v is None:
        out = fft_conv(u, k, D=D, **kernels)
        out = F.gelu(out) if gelu else out
        if dropout_mask is not None:
            if not isinstance(dropout_mask, Tensor) or tuple(dropout_mask.shape) != (batch, channels):
                raise ValueError(f"dropout_mask must be a tensor [{batch}, {channels}], got {dropout_mask!r}")
            out = out * dropout_mask[..., None]
    else:
        if gelu:
            raise ValueError("gelu must be False with v and q, got True")
        if dropout_mask is not None:
            raise ValueError("dropout_mask must be None with v and q, got a tensor")
        for name, x in (("v", v), ("q", q)):
            if not isinstance(x, Tensor) or x.shape != u.shape:
                raise ValueError(f"{name} must be a tensor {list(u.shape)}, got "
                                 f"{list(x.shape) if isinstance(x, Tensor) else type(x).__name__}")
        if head_dim == 1:
            out = fft_conv(u, k, D=D, pre_gate=v, post_gate=q, **kernels)
        else:
            of_u, of_v, of_q = (x.unflatten(1, (heads, head_dim)) for x in (u, v, q))
            products = (of_u[:, :, :, None] * of_v[:, :, None]).flatten(1, 3)  # [B, heads d d, L]
            out = fft_conv(products, k, D=D.repeat_interleave(head_dim ** 2), **kernels)
            out = (out.unflatten(1, (heads, head_dim, head_dim)) * of_q[:, :, :, None]).sum(2).flatten(1, 2)
    out = out.to(out_dtype)
    return out.transpose(0, 1).contiguous().transpose(0, 1) if output_hbl_layout else out


class _Sin(nn.Module):
    def __init__(self, dim: int, w: float) -> None:
        super().__init__()
        self.freq = nn.Parameter(torch.full((1, dim), float(w)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.freq * x)


def _register(module: nn.Module, name: str, x: Tensor, lr: float | None) -> None:
    """A parameter with options for safari's optimiser, or a buffer where the learning rate is 0."""
    if lr == 0.0:
        module.register_buffer(name, x)
        return
    parameter = nn.Parameter(x)
    parameter._optim = {"weight_decay": 0.0} | ({} if lr is None else {"lr": lr})
    module.register_parameter(name, parameter)


class _HyenaFilter(nn.Module):
    """Kernels out of a small network of the position, fading by exp(-t |deltas|) + shift."""

    def __init__(self, d_model: int, order: int, seq_len: int, emb_dim=3, lr=1e-3, lr_pos_emb=1e-5, w=1, wd=0,
                 num_inner_mlps=2, fast_decay_pct=0.3, slow_decay_pct=1.5, target=1e-2, modulation_lr=0.0,
                 modulate=True, shift=0.0) -> None:
        super().__init__()
        if emb_dim % 2 == 0 or emb_dim < 3:
            raise ValueError(f"emb_dim must be odd and at least 3, got {emb_dim}")
        self.modulate, self.shift = modulate, shift
        self.bias = nn.Parameter(torch.randn(d_model))
        bands = (emb_dim - 1) // 2
        t = torch.linspace(0, 1, seq_len, dtype=torch.float64)[:, None]
        angles = (torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64)
                  * (2 * math.pi / seq_len) * torch.arange(seq_len, dtype=torch.float64)[:, None])
        dtype = torch.get_default_dtype()
        self.pos_emb, self.modulation = nn.Module(), nn.Module()
        _register(self.pos_emb, "z", torch.cat((t, angles.cos(), -angles.sin()), 1)[None].to(dtype), lr_pos_emb)
        _register(self.pos_emb, "t", t[None].to(dtype), 0.0)
        deltas = torch.linspace(math.log(target) / slow_decay_pct, math.log(target) / fast_decay_pct, d_model)
        _register(self.modulation, "deltas", deltas[None, None], modulation_lr)
        sine = _Sin(order, w)  # one, as in the original, which all layers share
        inner = [layer for _ in range(num_inner_mlps) for layer in (nn.Linear(order, order), sine)]
        self.implicit_filter = nn.Sequential(nn.Linear(emb_dim, order), sine, *inner,
                                             nn.Linear(order, d_model, bias=False))
        for parameter in self.implicit_filter.parameters():
            parameter._optim = {"weight_decay": wd, "lr": lr}

    def filter(self, tokens: int) -> Tensor:
        """-> the first taps [d_model, tokens], in the parameters' dtype under autocast too."""
        with torch.autocast(self.bias.device.type, enabled=False):
            h = self.implicit_filter(self.pos_emb.z[0, :tokens])
            if self.modulate:
                h = h * (torch.exp(-self.pos_emb.t[0, :tokens] * self.modulation.deltas[0].abs()) + self.shift)
            return h.T


class HyenaOperator(nn.Module):
    """safari's HyenaOperator (its standalone version): its parameters by their names, its forward.

    Args:
        d_model: size of the tokens.
        l_max: the longest sequence; of a longer one, the first l_max tokens are computed, as in the original.
        order: of the recurrence, at least 2.
        filter_order: width of the filter's network.
        dropout: of the gated values, in training.
        filter_dropout: without effect, as in the original.
        filter_args: emb_dim, num_inner_mlps, w, fast_decay_pct, slow_decay_pct, target, modulate, shift; and what goes
            to the optimiser by the parameters' `_optim`: lr, lr_pos_emb, modulation_lr, wd.
    """

    def __init__(self, d_model, l_max, order=2, filter_order=64, dropout=0.0, filter_dropout=0.0, **filter_args):
        super().__init__()
        for name, value, least in (("d_model", d_model, 1), ("l_max", l_max, 1), ("order", order, 2)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.d_model, self.l_max, self.order = d_model, l_max, order
        width = d_model * (order + 1)
        self.dropout = nn.Dropout(dropout)
        self.in_proj, self.out_proj = nn.Linear(d_model, width), nn.Linear(d_model, d_model)
        # Holds the parameters under the original's names; it is not called.
        self.short_filter = nn.Conv1d(width, width, 3, padding=2, groups=width)
        self.filter_fn = _HyenaFilter(d_model * (order - 1), filter_order, l_max, **filter_args)

    def forward(self, u):
        """[B, L, d_model] -> [B, min(L, l_max), d_model]."""
        tokens = min(u.shape[-2], self.l_max)
        streams = self.in_proj(u[:, :tokens]).transpose(1, 2)
        streams = causal_conv1d(streams, self.short_filter.weight[:, 0], bias=self.short_filter.bias)
        first, *gates, v = streams.split(self.d_model, dim=1)
        kernels = self.filter_fn.filter(tokens).split(self.d_model)
        skips = self.filter_fn.bias.split(self.d_model)
        for i, gate in enumerate(reversed(gates)):
            options = {"post_gate": first} if i == self.order - 2 else {}
            if self.training and self.dropout.p > 0:
                v = self.dropout(v * gate)
            else:
                options["pre_gate"] = gate
            v = fft_conv(v, kernels[i], D=skips[i], **options)
        return self.out_proj(v.transpose(1, 2))
