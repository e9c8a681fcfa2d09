"""causal-conv1d's functions on `causal_conv1d` and `causal_conv1d_step`.

Beyond the original: CPUs, float64 there, filters of any width and channels of any number, states from tensors of any
strides, second derivatives, and a gradient through `causal_conv1d_update`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.causal_conv1d import causal_conv1d, causal_conv1d_step

_INTERFACE = ("causal_conv1d_fn", "causal_conv1d_update")
__all__ = [*_INTERFACE, "causal_conv1d_varlen_states"]
VERSION = "1.6.0"  # whose signatures these are
MODULES = {"causal_conv1d": _INTERFACE, "causal_conv1d.causal_conv1d_interface": _INTERFACE,
           "causal_conv1d.causal_conv1d_varlen": ("causal_conv1d_varlen_states",)}


def _silu(activation: object) -> str | None:
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation must be None, 'silu' or 'swish', got {activation!r}")
    return None if activation is None else "silu"


def _tensor(name: str, x: object, *axes: str) -> Tensor:
    """Checks for one of the shapes that `axes` spell ("B D L")."""
    shapes = " or ".join(f"[{', '.join(a.split())}]" for a in axes)
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {shapes}, got {type(x).__name__}")
    if x.dim() not in [len(a.split()) for a in axes]:
        raise ValueError(f"{name} must have shape {shapes}, got {list(x.shape)}")
    return x


def _values_checked(x: Tensor) -> bool:
    """Whether values inside tensors are looked at here: where that waits for no device and breaks no graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _followed(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _parameter(w: Tensor | None, x: Tensor) -> Tensor | None:
    """A weight that is narrower than x, or in the other half precision, in float32, which is exact."""
    half = (torch.bfloat16, torch.float16)
    return w.float() if isinstance(w, Tensor) and w.dtype in half and w.dtype != x.dtype else w


def _segments(seq_idx: object, x: Tensor, axis: int) -> Tensor:
    """Offsets of the sequences in x's rows [B, ...], laid one after another: int32 [sequences + 1].

    A sequence is a run of equal numbers in seq_idx [B, L]. How many there are must be known to allocate their states,
    so this waits for the device.
    """
    _tensor("seq_idx", seq_idx, "B L")
    if seq_idx.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"seq_idx must be int32 or int64, got {seq_idx.dtype}")
    if tuple(seq_idx.shape) != (x.shape[0], x.shape[axis]):
        raise ValueError(f"seq_idx must have shape [B={x.shape[0]}, L={x.shape[axis]}], got {list(seq_idx.shape)}")
    if seq_idx.device != x.device:
        raise ValueError(f"seq_idx must be on x's device {x.device}, got {seq_idx.device}")
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    if _values_checked(seq_idx):
        for b, row in enumerate(seq_idx):
            if int(starts[b].sum()) != row.unique().numel():
                raise ValueError(f"seq_idx must number each sequence in one run, got a number again in row {b}")
    offsets = starts.flatten().nonzero().flatten()
    return F.pad(offsets, (0, 1), value=seq_idx.numel()).to(torch.int32)


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
                     final_states_out=None, activation=None):
    """Causal depthwise convolution along time, see `pykernels.causal_conv1d`.

    Args:
        x: [B, D, L].
        weight: [D, W]; bias: [D].
        seq_idx: int32 or int64 [B, L], the number of each token's sequence, each in one run of tokens, which see only
            tokens of their own; tokens with a negative number are padding, which gives zeros. Neither with
            initial_states nor return_final_states.
        initial_states: the W - 1 inputs before x, [B, D, W - 1].
        return_final_states: also return the last W - 1 inputs.
        final_states_out: where to write these, [B, D, W - 1]; with return_final_states only.
        activation: None, "silu" or "swish".

    Returns:
        out [B, D, L], or (out, final_states).
    """
    _tensor("x", x, "B D L")
    options = {"bias": _parameter(bias, x), "activation": _silu(activation)}
    weight = _parameter(weight, x)
    if final_states_out is not None and not return_final_states:
        raise ValueError("return_final_states must be True with final_states_out, got False")
    if seq_idx is not None:
        if initial_states is not None:
            raise ValueError("initial_states must be None with seq_idx, got a tensor")
        if return_final_states:
            raise ValueError("return_final_states must be False with seq_idx, got True")
        cu_seqlens = _segments(seq_idx, x, 2)
        row = x.transpose(0, 1).flatten(1)[None]  # [1, D, B L]
        out = causal_conv1d(row, weight, cu_seqlens=cu_seqlens, **options)
        out = out[0].unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)
        return out.masked_fill((seq_idx < 0)[:, None], 0)
    if not return_final_states:
        return causal_conv1d(x, weight, initial_state=initial_states, **options)
    out, final_states = causal_conv1d(x, weight, initial_state=initial_states, return_final_state=True, **options)
    if final_states_out is None:
        return out, final_states
    if _tensor("final_states_out", final_states_out, "B D W-1").shape != final_states.shape:
        raise ValueError(f"final_states_out must have shape {list(final_states.shape)}, "
                         f"got {list(final_states_out.shape)}")
    return out, final_states_out.copy_(final_states)


# ---- One step --------------------------------------------------------------------------------------------------------


def _check_slots(name: str, indices: object, batch: int, slots: int) -> Tensor:
    """int32 or int64 [B], -1 for padding, each other slot at most once."""
    _tensor(name, indices, "B")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {indices.dtype}")
    if indices.shape[0] != batch:
        raise ValueError(f"{name} must have shape [B={batch}], got {list(indices.shape)}")
    if _values_checked(indices):
        used = [slot for slot in indices.tolist() if slot >= 0]
        if len(set(used)) != len(used) or any(slot >= slots for slot in used):
            raise ValueError(f"{name} must name each of {slots} slots at most once, got {indices.tolist()}")
    return indices.long()


def _rows(states: Tensor, indices: Tensor | None) -> Tensor:
    """A copy of the states of the batch's entries; any for padding."""
    return states.clone() if indices is None else states.index_select(0, indices.clamp(min=0))


def _put_rows(states: Tensor, indices: Tensor | None, rows: Tensor) -> None:
    """The opposite, in place, but for padding: its entries write what slot 0 holds afterwards in any case."""
    rows = rows.to(states.dtype)
    if indices is None:
        states.copy_(rows)
        return
    of_first, padding = indices == 0, indices < 0
    first = rows.index_select(0, of_first.int().argmax()[None])
    # Of all that write to slot 0, one passes its gradient on.
    kept, copies = torch.where(of_first.any(), first.detach(), states[:1]), padding.cumsum(0) > 1
    padding, copies = (x.view(-1, *[1] * (states.dim() - 1)) for x in (padding, copies))
    states.index_copy_(0, indices.clamp(min=0),
                       torch.where(padding, torch.where(copies, kept.detach(), kept), rows))


def _without_padding(out: Tensor, indices: Tensor | None) -> Tensor:
    return out if indices is None else out.masked_fill((indices < 0).view(-1, *[1] * (out.dim() - 1)), 0)


def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None,
                         conv_state_indices=None):
    """Convolves new tokens after those in `conv_state`, and updates it in place.

    Args:
        x: [B, D] or [B, D, T].
        conv_state: the last S inputs of each channel [B, D, S], S >= W - 1, x's dtype; [slots, D, S] with
            conv_state_indices.
        weight: [D, W]; bias: [D].
        activation: None, "silu" or "swish".
        cache_seqlens: int32 or int64 [B], tokens seen so far. Then conv_state is a ring, in which token t lies at
            t % S; otherwise its last entry is the latest token.
        conv_state_indices: int32 or int64 [B], the slot of each batch entry, no slot twice; -1 is padding, whose output
            is zero and which touches no state.

    Returns:
        out in x's shape.

    In grad mode with inputs that require grad, conv_state becomes part of the graph, as any tensor that is overwritten.
    """
    _tensor("x", x, "B D", "B D T")
    _tensor("conv_state", conv_state, "B D S")
    _tensor("weight", weight, "D W")
    tokens = x if x.dim() == 3 else x[..., None]
    (batch, channels, count), width, size = tokens.shape, weight.shape[1], conv_state.shape[2]
    if conv_state.dtype != x.dtype:
        raise TypeError(f"conv_state must have x's dtype {x.dtype}, got {conv_state.dtype}")
    if size < width - 1 or conv_state.shape[1] != channels or conv_state_indices is None and len(conv_state) != batch:
        raise ValueError(f"conv_state must have shape [{'B' if conv_state_indices is None else 'slots'}, D={channels}, "
                         f"S] with B={batch} and S at least {width - 1}, got {list(conv_state.shape)}")
    if conv_state_indices is not None:
        conv_state_indices = _check_slots("conv_state_indices", conv_state_indices, batch, len(conv_state))
    weight, bias = _parameter(weight, x), _parameter(bias, x)
    options = {"bias": bias, "activation": _silu(activation)}
    older = size - (width - 1)
    if cache_seqlens is None and not _followed(x, conv_state, weight, bias) and (older == 0 or
                                                                                 conv_state_indices is None):
        shifted = torch.cat((conv_state, tokens), 2)[..., count:count + older] if older else None
        out = causal_conv1d_step(x, conv_state[..., older:], weight, state_indices=conv_state_indices, **options)
        if older:
            conv_state[..., :older] = shifted
        return out

    rows = _rows(conv_state, conv_state_indices)
    if cache_seqlens is None:
        recent, updated = rows[..., older:], torch.cat((rows, tokens), 2)[..., count:]
    else:
        _tensor("cache_seqlens", cache_seqlens, "B")
        if cache_seqlens.dtype not in (torch.int32, torch.int64) or len(cache_seqlens) != batch:
            raise ValueError(f"cache_seqlens must be int32 or int64 [B={batch}], got {cache_seqlens.dtype} "
                             f"{list(cache_seqlens.shape)}")
        # Of more tokens than the ring holds, the last ones stay.
        steps = torch.arange(1 - width, count, device=x.device)
        places = ((cache_seqlens[:, None] + steps) % max(size, 1))[:, None].expand(-1, channels, -1)
        recent, kept = rows.gather(2, places[..., :width - 1]), min(count, size)
        updated = rows.scatter(2, places[..., width - 1 + count - kept:], tokens[..., count - kept:])
    out = causal_conv1d(tokens, weight, initial_state=recent, **options)
    _put_rows(conv_state, conv_state_indices, updated)
    out = _without_padding(out, conv_state_indices)
    return out if x.dim() == 3 else out[..., 0]


def causal_conv1d_varlen_states(x, cu_seqlens, state_len):
    """The last `state_len` tokens of each packed sequence, zeros before shorter ones.

    x [total, D], cu_seqlens int32 or int64 [sequences + 1] -> states [sequences, D, state_len] in x's dtype.
    """
    _tensor("x", x, "total D")
    _tensor("cu_seqlens", cu_seqlens, "sequences+1")
    if isinstance(state_len, bool) or not isinstance(state_len, (int, torch.SymInt)) or state_len < 0:
        raise ValueError(f"state_len must be an integer of at least 0, got {state_len!r}")
    first, last = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    if _values_checked(cu_seqlens) and cu_seqlens.numel() and not (
            cu_seqlens[0] == 0 and cu_seqlens[-1] <= x.shape[0] and bool((cu_seqlens.diff() >= 0).all())):
        raise ValueError(f"cu_seqlens must rise from 0 to at most {x.shape[0]}, got {cu_seqlens.tolist()}")
    tokens = last + torch.arange(-state_len, 0, device=x.device)  # [sequences, state_len]
    inside = tokens >= first
    rows = F.pad(x, (0, 0, 0, 1))[torch.where(inside, tokens, x.shape[0])]  # a row of zeros for what came before
    return rows.transpose(1, 2)
