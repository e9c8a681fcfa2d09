"""mamba_ssm's functions on `selective_scan`, `causal_conv1d` and, for Mamba-2, `linear_attention`.

Mamba-2's recurrence S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t is linear attention with q = C, k = B,
v = dt x and decay dt A. Beyond the original: CPUs, float64 there, any sizes, gradients through every state and through
`selective_state_update`, second derivatives. dt A must be <= 0, as it is in every model.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.linear_attention import linear_attention
from ..ops.selective_scan import selective_scan, selective_scan_step
from .causal_conv1d import _check_slots, _followed, _put_rows, _rows, _segments, _tensor, _values_checked, \
    _without_padding, causal_conv1d_fn

_SCAN, _UPDATE = ("mamba_inner_fn", "selective_scan_fn"), ("selective_state_update",)
_SSD = ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined")
__all__ = [*_SCAN, *_SSD, *_UPDATE]
VERSION = "2.3.2"  # whose signatures these are
MODULES = {"mamba_ssm": _SCAN, "mamba_ssm.ops": (), "mamba_ssm.ops.selective_scan_interface": _SCAN,
           "mamba_ssm.ops.triton": (), "mamba_ssm.ops.triton.selective_state_update": _UPDATE,
           "mamba_ssm.ops.triton.ssd_combined": _SSD}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _same_shape(name: str, x: object, expected: tuple[int, ...], axes: str) -> None:
    if tuple(_tensor(name, x, axes).shape) != expected:
        labels = ", ".join(f"{axis}={size}" for axis, size in zip(axes.split(), expected))
        raise ValueError(f"{name} must have shape [{labels}], got {list(x.shape)}")


# ---- Mamba -----------------------------------------------------------------------------------------------------------


def _projection(x: object, A: object) -> object:
    """B or C per token: beside a complex A, pairs (real, imaginary) along the last axis."""
    if isinstance(x, Tensor) and isinstance(A, Tensor) and A.is_complex() and not x.is_complex() and x.dim() > 2:
        return torch.view_as_complex(x.to(A.real.dtype).unflatten(-1, (-1, 2)))
    return x


def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                      return_last_state=False):
    """The recurrence of Mamba, see `pykernels.selective_scan`.

    u, delta, z [B, D, L]; A [D, N], real or complex; B and C [D, N], [B, N, L] or [B, G, N, L], with 2 L numbers
    (real, imaginary, real, ...) beside a complex A; D, delta_bias [D].

    Returns out [B, D, L], or (out, last_state [B, D, N] in float32), of which both take gradients.
    """
    return selective_scan(u, delta, A, _projection(B, A), _projection(C, A), D=D, z=z, delta_bias=delta_bias,
                          delta_softplus=bool(delta_softplus), return_final_state=bool(return_last_state))


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, groups: int = 1) -> Tensor:
    """x / rms(x) * weight over the last axis, in `groups` equal parts of it; in x's dtype."""
    wide = x.to(_wide(x.dtype)).unflatten(-1, (groups, -1))
    wide = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    return (wide if weight is None else wide * weight.to(wide.dtype)).to(x.dtype)


def mamba_inner_fn(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A,
                   B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True,
                   checkpoint_lvl=1, b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, b_c_dt_rms_eps=1e-6):
    """Mamba's layer between its first projection and its output: convolution, projections, scan, gate, projection.

    Args:
        xz: [B, 2 D, L], the inputs of the convolution and the gates.
        conv1d_weight: [D, 1, W]; conv1d_bias: [D] or None.
        x_proj_weight: [R + states, D]: of each token, R numbers for delta and, where B and C are None, theirs.
        delta_proj_weight: [D, R].
        out_proj_weight: [dim, D]; out_proj_bias: [dim] or None.
        A, D, delta_bias, delta_softplus: as in `selective_scan_fn`.
        B, C: as in `selective_scan_fn`; None for those of x_proj_weight, plus B_proj_bias and C_proj_bias [N].
        checkpoint_lvl: 0 or 1: what the original computes again in backward; it does not change the result.
        b_rms_weight, c_rms_weight, dt_rms_weight: if given, B and C of each token [N] and delta [D], before its bias,
            are divided by their root mean square (b_c_dt_rms_eps is added to the square) and multiplied by these.

    Returns:
        [B, L, dim].
    """
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"checkpoint_lvl must be 0 or 1, got {checkpoint_lvl!r}")
    _tensor("xz", xz, "B 2D L")
    _tensor("conv1d_weight", conv1d_weight, "D 1 W")
    for name, given, forbidden in (("B", B, (B_proj_bias, b_rms_weight)), ("C", C, (C_proj_bias, c_rms_weight))):
        if given is not None and any(x is not None for x in forbidden):
            raise ValueError(f"{name} must be None with {name}_proj_bias or {name.lower()}_rms_weight, got a tensor")
    x, z = xz.chunk(2, dim=1)
    u = causal_conv1d_fn(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    rank, states = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    projected = F.linear(u.transpose(1, 2), x_proj_weight)  # [B, L, R + states]

    def per_token(y: Tensor, bias: Tensor | None, weight: Tensor | None) -> Tensor:
        y = y if bias is None else y + bias.to(y.dtype)
        y = y if weight is None else _rms_norm(y, weight, b_c_dt_rms_eps)
        if A.is_complex():  # numbers of a token are (n, real or imaginary), the scan takes (token, real or imaginary)
            return y.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(2)
        return y.transpose(1, 2)

    if B is None:
        B = per_token(projected[..., rank:rank + states], B_proj_bias, b_rms_weight)
    if C is None:
        C = per_token(projected[..., projected.shape[2] - states:], C_proj_bias, c_rms_weight)
    delta = F.linear(projected[..., :rank], delta_proj_weight)
    if dt_rms_weight is not None:
        delta = _rms_norm(delta, dt_rms_weight, b_c_dt_rms_eps)
    out = selective_scan_fn(u, delta.transpose(1, 2), A, B, C, D, z, delta_bias, delta_softplus).transpose(1, 2)
    return F.linear(out, out_proj_weight, None if out_proj_bias is None else out_proj_bias.to(out.dtype))


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False,
                           state_batch_indices=None):
    """One token of the recurrence of Mamba or Mamba-2; updates `state` in place.

    Args:
        state: [B, D, N] or in heads [B, H, D, N], [slots, ...] with state_batch_indices; any floating dtype and
            strides (computed in float32, rounded where it is kept in less).
        x, dt, z: [B, D] or [B, H, D].
        A: [D, N] or [H, D, N].
        B, C: [B, N] or [B, G, N]; head h reads group h // (H // G).
        D, dt_bias: [D] or [H, D].
        dt_softplus: apply softplus to dt + dt_bias.
        state_batch_indices: int32 or int64 [B], the slot of each batch entry, no slot twice; -1 is padding, whose
            output is zero and which touches no state.

    Returns:
        out in x's shape, an axis of one head more or less if state has that.

    In grad mode with inputs that require grad, state becomes part of the graph, as any tensor that is overwritten.
    """
    has_heads = _tensor("state", state, "B D N", "B H D N").dim() == 4
    heads = state if has_heads else state[:, None]
    for name, y, axes in (("x", x, "B H D"), ("dt", dt, "B H D"), ("A", A, "H D N"), ("B", B, "B G N"),
                          ("C", C, "B G N"), ("D", D, "H D"), ("z", z, "B H D"), ("dt_bias", dt_bias, "H D")):
        if y is not None or name in ("x", "dt", "A", "B", "C"):
            _tensor(name, y, axes, axes.replace("H ", "").replace("G ", ""))
    x, dt, B, C, z = (y if y is None or y.dim() == 3 else y[:, None] for y in (x, dt, B, C, z))
    A = A if A.dim() == 3 else A[None]
    D, dt_bias = (y if y is None or y.dim() == 2 else y[None] for y in (D, dt_bias))
    batch, n = x.shape[0], heads.shape[3]
    if x.shape[1:] != heads.shape[1:3] or state_batch_indices is None and len(state) != batch:
        raise ValueError(f"state must have x's heads and channels {list(x.shape[1:])} and, without "
                         f"state_batch_indices, its batch {batch}, got {list(state.shape)}")
    if state_batch_indices is not None:
        state_batch_indices = _check_slots("state_batch_indices", state_batch_indices, batch, len(state))
    inside = A.dtype if A.is_complex() else _wide(x.dtype)
    options = {"delta_softplus": bool(dt_softplus)}
    followed = _followed(state, x, dt, A, B, C, D, z, dt_bias)
    if state.dtype == inside and not followed:
        out = selective_scan_step(x, heads, dt, A, B, C, D=D, z=z, delta_bias=dt_bias,
                                  state_indices=state_batch_indices, **options)
        return out if has_heads else out[:, 0]
    rows = _rows(heads, state_batch_indices).to(inside)
    if followed:
        u, delta, gate = (None if y is None else y.flatten(1)[..., None] for y in (x, dt, z))
        skip, bias = (None if y is None else y.flatten() for y in (D, dt_bias))
        out, updated = selective_scan(u, delta, A.flatten(0, 1), B[..., None], C[..., None], D=skip, z=gate,
                                      delta_bias=bias, initial_state=rows.flatten(1, 2), return_final_state=True,
                                      **options)
        out, updated = out.view(x.shape), updated.view(*x.shape, n)
    else:
        out = selective_scan_step(x, rows, dt, A, B, C, D=D, z=z, delta_bias=dt_bias, **options)
        updated = rows
    _put_rows(heads, state_batch_indices, updated)
    out = _without_padding(out, state_batch_indices)
    return out if has_heads else out[:, 0]


# ---- Mamba-2 ---------------------------------------------------------------------------------------------------------


def _limits(dt_limit: object) -> tuple[float, float]:
    if not isinstance(dt_limit, (tuple, list)) or len(dt_limit) != 2:
        raise TypeError(f"dt_limit must be (least, most), got {dt_limit!r}")
    return tuple(dt_limit)


def _check_chunk_size(chunk_size: object) -> None:
    """How the original cuts its work; the result does not depend on it."""
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive integer, got {chunk_size!r}")


def _check_offsets(cu_seqlens: object, segments: Tensor | None, batch: int) -> Tensor:
    _tensor("cu_seqlens", cu_seqlens, "sequences+1")
    if segments is None:
        raise ValueError("seq_idx must be given with cu_seqlens: without it, states pass from sequence to sequence")
    if batch != 1:
        raise ValueError(f"x must have batch 1 with cu_seqlens, got {batch}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if _values_checked(cu_seqlens) and cu_seqlens.unique().tolist() != segments.tolist():
        raise ValueError(f"cu_seqlens must have the offsets of seq_idx's sequences {segments.tolist()}, "
                         f"got {cu_seqlens.tolist()}")
    return cu_seqlens


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
                              seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, math.inf),
                              return_final_states=False, return_varlen_states=False, state_dtype=None):
    r"""Mamba-2's recurrence S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = (S_t C_t + D x_t) silu(z_t).

    Args:
        x: [B, L, H, P]; z: the same, or None.
        dt: [B, L, H]; dt_bias [H] is added, softplus taken if dt_softplus, and the result clamped to dt_limit.
        A: [H], such that dt A <= 0.
        B, C: [B, L, G, N] in x's dtype; head h reads group h // (H // G).
        chunk_size: how the original cuts its work; the result does not depend on it.
        D: [H] or [H, P].
        initial_states: [B, H, P, N], before the first token; with seq_idx, of rows whose first number is 0.
        seq_idx: int32 or int64 [B, L], the number of each token's sequence, each in one run of tokens. No state passes
            from one to the next.
        cu_seqlens: offsets of the same sequences [sequences + 1] in a batch of 1 (some may be empty); needs seq_idx.
        return_final_states: also return the states after each row's last token, [B, H, P, N] in float32.
        return_varlen_states: also return those after each sequence's last token, [sequences, H, P, N]; needs
            cu_seqlens.
        state_dtype: of these; None is C's. States are float32 inside, whatever it is.

    Returns:
        out [B, L, H, P] in x's dtype, or (out, final_states), (out, varlen_states), (out, final_states, varlen_states).
    """
    _check_chunk_size(chunk_size)
    least, most = _limits(dt_limit)
    _tensor("x", x, "B L H P")
    batch, length, heads, width = x.shape
    wide = _wide(x.dtype)
    _same_shape("dt", dt, (batch, length, heads), "B L H")
    _same_shape("A", A, (heads,), "H")
    for name, y in (("B", B), ("C", C)):
        groups, n = _tensor(name, y, "B L G N").shape[2:]
        _same_shape(name, y, (batch, length, groups, n), "B L G N")
        if groups < 1 or heads % groups:
            raise ValueError(f"{name} must have groups that divide x's {heads} heads, got {groups}")
    _same_shape("C", C, tuple(B.shape), "B L G N")
    n = B.shape[3]
    if D is not None:
        _same_shape("D", D, (heads, width)[:_tensor("D", D, "H", "H P").dim()], "H P" if D.dim() == 2 else "H")
    if z is not None:
        _same_shape("z", z, tuple(x.shape), "B L H P")
    if dt_bias is not None:
        _same_shape("dt_bias", dt_bias, (heads,), "H")
    if initial_states is not None:
        _same_shape("initial_states", initial_states, (batch, heads, width, n), "B H P N")
    if return_varlen_states and cu_seqlens is None:
        raise ValueError("cu_seqlens must be given with return_varlen_states, got None")
    if state_dtype is not None and not (isinstance(state_dtype, torch.dtype) and state_dtype.is_floating_point):
        raise TypeError(f"state_dtype must be None or a floating dtype, got {state_dtype!r}")

    dt = dt.to(wide)
    if dt_bias is not None:
        dt = dt + dt_bias.to(wide)
    if dt_softplus:
        dt = F.softplus(dt)
    if (least, most) != (0.0, math.inf) or not dt_softplus:
        dt = dt.clamp(least, most)
    decay = dt * A.to(wide)
    v = (x * dt[..., None]).to(x.dtype)
    before = None if initial_states is None else initial_states.to(wide).transpose(2, 3)  # [B, H, N, P]

    segments = None if seq_idx is None else _segments(seq_idx, x, 1)
    offsets = None if cu_seqlens is None else _check_offsets(cu_seqlens, segments, batch)
    tensors = (C, B, v, decay)
    if segments is not None:  # the rows' sequences one after another
        tensors = tuple(y.flatten(0, 1)[None] for y in tensors)
        rows = torch.arange(batch + 1, device=x.device, dtype=torch.int32) * length
        first = torch.searchsorted(segments, rows[:-1])  # each row's first sequence
        last = torch.searchsorted(segments, rows[1:]) - 1
        if before is not None:
            continues = (seq_idx[:, 0] == 0).view(-1, 1, 1, 1)
            zeros = before.new_zeros(segments.numel() - 1, *before.shape[1:])
            before = zeros.index_copy(0, first, torch.where(continues, before, 0))
    q, k, v, decay = tensors
    out, states = linear_attention(q, k, v, decay=decay, scale=1.0, initial_state=before, return_final_state=True,
                                   cu_seqlens=segments)
    out = out.view(x.shape)
    if D is not None or z is not None:
        out = out.to(wide)
        if D is not None:
            out = out + (D[:, None] if D.dim() == 1 else D).to(wide) * x.to(wide)
        if z is not None:
            out = out * F.silu(z.to(wide))
        out = out.to(x.dtype)
    if not return_final_states and not return_varlen_states:
        return out
    states = states.transpose(2, 3).contiguous()  # [B or sequences, H, P, N]
    returned = (out,)
    if return_final_states:
        returned += (states if segments is None else states[last],)
    if return_varlen_states:
        # A sequence without tokens is none of seq_idx's, and its state is zero.
        places = torch.searchsorted(segments, offsets[1:].to(segments.dtype)) - 1
        empty = (offsets.diff() == 0).view(-1, 1, 1, 1)
        varlen = torch.where(empty, 0, states[places.clamp(min=0)])
        returned += (varlen.to(C.dtype if state_dtype is None else state_dtype),)
    return returned


def mamba_split_conv1d_scan_combined(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states=None,
                                     seq_idx=None, dt_limit=(0.0, math.inf), return_final_states=False,
                                     activation="silu", rmsnorm_weight=None, rmsnorm_eps=1e-6, outproj_weight=None,
                                     outproj_bias=None, headdim=None, ngroups=1, norm_before_gate=True):
    """Mamba-2's layer after its first projection: convolution, scan, gate, norm, projection.

    Args:
        zxbcdt: [B, L, 2 M + 2 H P + 2 G N + H]: of each token 2 M numbers of a gated MLP beside the scan (M is what is
            left, mostly 0), the gates, x, B, C, and dt.
        conv1d_weight: [H P + 2 G N, W]; conv1d_bias: [H P + 2 G N] or None; activation: None, "silu" or "swish".
        dt_bias, A: [H]; softplus is taken of dt + dt_bias, and the result clamped to dt_limit.
        D: [H, P], or [H] with headdim.
        chunk_size, initial_states, seq_idx, return_final_states: as in `mamba_chunk_scan_combined`.
        rmsnorm_weight: [H P]: RMS norm over each group's channels, of y with norm_before_gate and then y silu(z), else
            of y silu(z). None for y silu(z) alone.
        rmsnorm_eps: added to the mean square.
        outproj_weight: [dim, M + H P]; outproj_bias: [dim]. None for no projection.
        headdim: P; needed where D is [H].
        ngroups: G.

    Returns:
        out [B, L, dim or M + H P], or (out, final_states).
    """
    _tensor("zxbcdt", zxbcdt, "B L channels")
    _tensor("conv1d_weight", conv1d_weight, "channels W")
    if _tensor("D", D, "H", "H P").dim() == 1 and headdim is None:
        raise ValueError("headdim must be given where D is [H], got None")
    heads, width = D.shape if D.dim() == 2 else (D.shape[0], headdim)
    if headdim not in (None, width):
        raise ValueError(f"headdim must be D's {width}, got {headdim}")
    if outproj_weight is None and outproj_bias is not None:
        raise ValueError("outproj_weight must be given with outproj_bias, got None")
    inner, of_both = heads * width, conv1d_weight.shape[0] - heads * width
    if ngroups < 1 or heads % ngroups or of_both < 2 * ngroups or of_both % (2 * ngroups):
        raise ValueError(f"conv1d_weight must have {inner} + 2 ngroups N channels, and ngroups divide the {heads} "
                         f"heads, got {conv1d_weight.shape[0]} channels and {ngroups} groups")
    n = of_both // (2 * ngroups)
    beside = zxbcdt.shape[2] - inner - conv1d_weight.shape[0] - heads
    if beside < 0 or beside % 2:
        raise ValueError(f"zxbcdt must have {2 * inner + of_both + heads} channels or an even number more, "
                         f"got {zxbcdt.shape[2]}")
    mlp, z, xBC, dt = zxbcdt.split((beside, inner, inner + of_both, heads), dim=2)
    xBC = causal_conv1d_fn(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation)
    x, B, C = xBC.transpose(1, 2).split((inner, of_both // 2, of_both // 2), dim=2)
    gates = z.unflatten(2, (heads, width))
    out = mamba_chunk_scan_combined(
        x.unflatten(2, (heads, width)), dt, A, B.unflatten(2, (ngroups, n)), C.unflatten(2, (ngroups, n)), chunk_size,
        D=D, z=gates if rmsnorm_weight is None else None, dt_bias=dt_bias, initial_states=initial_states,
        seq_idx=seq_idx, dt_softplus=True, dt_limit=dt_limit, return_final_states=return_final_states)
    out, *states = out if return_final_states else (out,)
    out = out.flatten(2)
    if rmsnorm_weight is not None:
        _same_shape("rmsnorm_weight", rmsnorm_weight, (inner,), "HP")
        dtype, wide = out.dtype, _wide(out.dtype)
        gate, out = F.silu(z.to(wide)), out.to(wide)
        if norm_before_gate:
            out = _rms_norm(out, rmsnorm_weight, rmsnorm_eps, ngroups) * gate
        else:
            out = _rms_norm(out * gate, rmsnorm_weight, rmsnorm_eps, ngroups)
        out = out.to(dtype)
    if beside:
        gate, up = mlp.chunk(2, dim=2)
        out = torch.cat((F.silu(gate) * up, out), dim=2)
    if outproj_weight is not None:
        out = F.linear(out, outproj_weight, outproj_bias)
    return (out, *states) if return_final_states else out
