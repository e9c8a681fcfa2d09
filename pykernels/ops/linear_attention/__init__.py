"""Linear attention: attention without softmax as a recurrence with decay, in time linear in the sequence length.

The definition is `reference.py`; `registration.py` makes ops of the backends; README.md derives the chunked form and
the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks
from ..._autograd import apart, followed
from ...backends import Op, Query, resolve
from . import reference, registration

__all__ = ["OP", "linear_attention", "linear_attention_step"]

_MAX_KEY_DIM, _MAX_VALUE_DIM = 256, 512


def _sizes(query: Query) -> str | None:
    key_dim, value_dim = query.sizes.get("key_dim", 1), query.sizes.get("value_dim", 1)
    if key_dim > _MAX_KEY_DIM:
        return f"key sizes go up to {_MAX_KEY_DIM}, got {key_dim}"
    if value_dim > _MAX_VALUE_DIM:
        return f"value sizes go up to {_MAX_VALUE_DIM}, got {value_dim}"
    return None


def _triton(query: Query) -> str | None:
    if query.dtype == torch.float64:
        return "Triton's matrix instructions have no float64"
    return _sizes(query)


def _cuda(query: Query) -> str | None:
    if query.dtype == torch.float64:
        return "the CUDA kernels take no float64"
    return _sizes(query)


def _reference(query: Query) -> str | None:
    return None


_UNMEASURED = {"cuda": "not yet measured against Triton on a GPU, so only on request"}
OP = Op("linear_attention", {"cuda": _cuda, "triton": _triton, "cpu": _sizes, "reference": _reference},
        explicit_only=_UNMEASURED)


def _check_qkv(q: object, k: object, v: object, axes: str) -> None:
    """`axes` is "B T" or, for a step, "B"."""
    lead = len(axes.split())
    _checks.tensor("q", q, axes + " H K")
    _checks.tensor("k", k, axes + " H K")
    _checks.tensor("v", v, axes + " H V")
    _checks.main_dtype("q", q)
    for name, x in (("k", k), ("v", v)):
        _checks.same_dtype(name, x, "q", q)
        _checks.same_device(name, x, "q", q)
    sizes = dict(zip(axes.split(), q.shape[:lead]))
    _checks.shape("k", k, {**sizes, "H": q.shape[-2], "K": q.shape[-1]})
    _checks.shape("v", v, {**sizes, "H": None, "V": None})
    if q.shape[-2] == 0 or v.shape[-2] % q.shape[-2] != 0:
        raise ValueError(f"v must have a multiple of q's heads: v has {v.shape[-2]} heads, q has {q.shape[-2]}")
    for name, size in (("q", q.shape[-1]), ("v", v.shape[-1])):
        if size < 1:
            raise ValueError(f"{name} must have a head size of at least 1, got {size}")


def _wide(x: Tensor | None, q: Tensor) -> Tensor | None:
    """A decay, bonus or state in the dtype that the ops take it in."""
    return None if x is None else x.to(registration.accumulator(q.dtype))


def _check_decay(decay: object, q: Tensor, v: Tensor, axes: str) -> None:
    if decay is None:
        return
    lead = len(axes.split())
    if not isinstance(decay, Tensor):
        raise TypeError(f"decay must be None or a tensor, got {type(decay).__name__}")
    names = [*axes.split(), "H", "K"]
    if decay.dim() not in (1, lead + 1, lead + 2):
        shapes = ", ".join(f"[{', '.join(x)}]" for x in (names[lead:-1], names[:-1], names))
        raise ValueError(f"decay must have shape {shapes}, got {list(decay.shape)}")
    sizes = dict(zip(names, (*v.shape[:-1], q.shape[-1])))
    expected = names[lead:-1] if decay.dim() == 1 else names[:decay.dim()]
    _checks.shape("decay", decay, {name: sizes[name] for name in expected})
    _checks.parameter("decay", decay, "q", q)


def _check_decay_values(decay: Tensor | None) -> None:
    if decay is not None and _checks.values_checked(decay) and decay.numel():
        if (highest := decay.detach().max().item()) > 0:
            raise ValueError(f"decay must be <= 0, the natural log of a factor of at most 1, got {highest}")


def _check_bonus(bonus: object, q: Tensor, v: Tensor) -> None:
    if bonus is None:
        return
    _checks.tensor("bonus", bonus, "H K")
    _checks.shape("bonus", bonus, {"H": v.shape[-2], "K": q.shape[-1]})
    _checks.parameter("bonus", bonus, "q", q)


def _scale(scale: object, normalize: bool, q: Tensor) -> float:
    if scale is None:
        return 1.0 if normalize else float(q.shape[-1] ** -0.5)
    return float(_checks.number("scale", scale))


def _query(q: Tensor, v: Tensor, grad: bool = False, **options: bool) -> Query:
    return Query(q.device.type, q.dtype, {"key_dim": q.shape[-1], "value_dim": v.shape[-1]},
                 frozenset(name for name, on in options.items() if on), grad)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, decay: Tensor | None = None, bonus: Tensor | None = None,
                     normalize: bool = False, scale: float | None = None, initial_state: Tensor | None = None,
                     return_final_state: bool = False, cu_seqlens: Tensor | None = None, reverse: bool = False,
                     backend: str = "auto") -> Tensor | tuple[Tensor, Tensor]:
    r"""Linear attention with decay: S_t = e^{decay_t} S_{t-1} + k_t v_t^T, out_t = scale q_t^T S_t, chunk by chunk.

    .. math::
        out_i = scale \sum_{j \le i} e^{decay_{j+1} + \dots + decay_i} (q_i \cdot k_j)\, v_j

    and with a bonus u (RWKV-6's), which weighs the current token, so that the state is read before it decays:

    .. math::
        out_i = scale \Big( (q_i \cdot (u \odot k_i))\, v_i
            + \sum_{j < i} e^{decay_{j+1} + \dots + decay_{i-1}} (q_i \cdot k_j)\, v_j \Big)

    Args:
        q: queries [B, T, Hk, K], float32, bfloat16, float16, or float64 on the CPU; any strides. K is 1 to 256.
        k: keys, q's shape and dtype.
        v: values [B, T, H, V], V 1 to 512. H is a multiple of Hk: head h reads q and k of head h // (H // Hk).
            (Mamba-2's SSD is this op with q = C, k = B, v = dt x, decay = dt A.)
        decay: natural log of the factor on the state, <= 0 (-inf clears it); None, [H], [B, T, H], or [B, T, H, K] for
            a factor per key channel (GLA, RWKV-6). q's dtype or float32.
        bonus: [H, K], q's dtype or float32, see above.
        normalize: divide out_t by scale q_t . (the same sum of keys alone) + 1e-6. States then have V + 1 columns, the
            last of which is that sum.
        scale: factor on q; None is K ** -0.5, and 1 with normalize.
        initial_state: the state before the first token [B, H, K, V], packed [sequences, H, K, V]; q's dtype or float32
            (float64 for float64). None is zero.
        return_final_state: also return the state after the last token.
        cu_seqlens: int32 or int64 [sequences + 1], token offsets of sequences packed along T (then B is 1), starting at
            0. Tokens after the last offset belong to no sequence and give zeros.
        reverse: time runs from the last token to the first (the initial state is that after the last token).
        backend: "auto", "cpu", "triton", "cuda" or "reference" (see pykernels.backends).

    Returns:
        out [B, T, H, V] in q's dtype, or (out, final_state) with final_state [B or sequences, H, K, V] in float32
        (float64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value; the message names it.
        BackendUnavailable: the backend asked for can't serve this call.

    Derivatives of first and second order exist with respect to q, k, v, decay, bonus and initial_state (through out and
    final_state); the second in eager mode only, computed by the reference. Results do not depend on the thread count.

    Source: Katharopoulos et al., Transformers are RNNs (arXiv:2006.16236); Sun et al., RetNet (arXiv:2307.08621); Yang
    et al., Gated Linear Attention (arXiv:2312.06635).
    """
    q, k, v = _checks.autocast(q, k, v)
    _check_qkv(q, k, v, "B T")
    _checks.flag("normalize", normalize)
    _checks.flag("return_final_state", return_final_state)
    _checks.flag("reverse", reverse)
    scale = _scale(scale, normalize, q)
    _check_decay(decay, q, v, "B T")
    _check_decay_values(decay)
    _check_bonus(bonus, q, v)
    if cu_seqlens is not None:
        if q.shape[0] != 1:
            raise ValueError(f"q must have batch 1 when cu_seqlens packs sequences, got shape {list(q.shape)}")
        cu_seqlens = _checks.cu_seqlens("cu_seqlens", cu_seqlens, q.shape[1], q.device)
    if initial_state is not None:
        _checks.tensor("initial_state", initial_state, "N H K V")
        count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        columns = {"V + 1": v.shape[3] + 1} if normalize else {"V": v.shape[3]}
        _checks.shape("initial_state", initial_state, {"N": count, "H": v.shape[2], "K": q.shape[3], **columns})
        _checks.parameter("initial_state", initial_state, "q", q)
    tensors = (q, k, v, _wide(decay, q), _wide(bonus, q), _wide(initial_state, q))
    grad = followed(*tensors)
    query = _query(q, v, grad, varlen=cu_seqlens is not None, bonus=bonus is not None, normalize=normalize,
                   reverse=reverse)
    chosen = resolve(OP, query, backend)
    options = scale, normalize, reverse
    if chosen == "reference":
        out, final_state = reference.linear_attention(*tensors, cu_seqlens, *options)
    elif grad:
        out, final_state, _, _ = registration.LinearAttention.apply(*apart(*tensors), cu_seqlens, options, chosen)
    else:
        out, final_state, _, _ = registration.run("fwd", chosen, *tensors, cu_seqlens, *options, False)
    return (out, final_state) if return_final_state else out


def linear_attention_step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, decay: Tensor | None = None,
                          bonus: Tensor | None = None, normalize: bool = False, scale: float | None = None,
                          state_indices: Tensor | None = None, backend: str = "auto") -> Tensor:
    """One token of `linear_attention`: updates the state in place and returns the token's output.

    Args:
        q, k: [B, Hk, K] (see `linear_attention` for dtypes, sizes and grouped heads).
        v: [B, H, V].
        state: [B, H, K, V] (V + 1 columns with normalize), or [slots, ...] with state_indices; float32 (float64 for
            float64), contiguous in its last two axes. Overwritten. A final_state of `linear_attention` continues here.
        decay: natural log, <= 0: None, [H], [B, H] or [B, H, K].
        bonus, normalize, scale, backend: as in `linear_attention`.
        state_indices: int32 or int64 [B], the slot of each entry, all different. None: entry b has slot b.

    Returns:
        out [B, H, V] in q's dtype.

    Raises:
        TypeError, ValueError: as in `linear_attention`; also a slot that does not exist, or named twice (nothing is
            written).
        RuntimeError: grad mode is on and an input requires grad: the state is overwritten, so this is for inference.
        BackendUnavailable: the backend asked for can't serve this call.
    """
    q, k, v = _checks.autocast(q, k, v)
    chosen, factor, ready = _check_step(q, k, v, state, decay, bonus, normalize, scale, state_indices, backend)
    _check_decay_values(decay)
    if state_indices is not None:
        if _checks.values_checked(state_indices):
            slots = state_indices.tolist()
            for b, slot in enumerate(slots):
                if not 0 <= slot < state.shape[0]:
                    raise ValueError(
                        f"state_indices must name one of {state.shape[0]} slots, got {slot} for batch entry {b}")
            if len(set(slots)) != len(slots):
                raise ValueError(f"state_indices must name different slots, got {slots}")
        state_indices = state_indices.to(torch.int32).contiguous()
    if torch.is_grad_enabled():
        _checks.inference("linear_attention_step", "linear_attention",
                          q=q, k=k, v=v, state=state, decay=decay, bonus=bonus)
    if not ready:
        decay, bonus = _wide(decay, q), _wide(bonus, q)
    arguments = state, q, k, v, decay, bonus, state_indices, factor, normalize
    if chosen == "reference":
        return reference.linear_attention_step(*arguments)
    return registration.run("step", chosen, *arguments)


@_checks.by_metadata
def _check_step(q: object, k: object, v: object, state: object, decay: object, bonus: object, normalize: object,
                scale: object, state_indices: object, backend: object) -> tuple[str, float, bool]:
    """-> the backend that serves a step, the factor on q, whether decay and bonus have the dtype that the ops take."""
    _check_qkv(q, k, v, "B")
    _checks.flag("normalize", normalize)
    factor = _scale(scale, normalize, q)
    batch, heads, value_dim = v.shape
    _checks.tensor("state", state, "N H K V")
    columns = {"V + 1": value_dim + 1} if normalize else {"V": value_dim}
    _checks.shape("state", state, {"N": batch if state_indices is None else None, "H": heads, "K": q.shape[2],
                                   **columns})
    wide = registration.accumulator(q.dtype)
    if state.dtype != wide:
        raise TypeError(f"state must have dtype {wide} when q has {q.dtype}, got {state.dtype}")
    _checks.same_device("state", state, "q", q)
    if state.shape[3] > 1 and state.stride(3) != 1 or state.shape[2] > 1 and state.stride(2) != state.shape[3]:
        raise ValueError(f"state must be contiguous in its last two axes, got strides {state.stride()}")
    _checks.writable("state", state)
    _check_decay(decay, q, v, "B")
    _check_bonus(bonus, q, v)
    if state_indices is not None:
        _checks.tensor("state_indices", state_indices, "B")
        _checks.integer("state_indices", state_indices)
        _checks.same_device("state_indices", state_indices, "q", q)
        _checks.shape("state_indices", state_indices, {"B": batch})
    chosen = resolve(OP, _query(q, v, step=True, bonus=bonus is not None, normalize=normalize), backend)
    return chosen, factor, all(x is None or x.dtype == wide for x in (decay, bonus))
