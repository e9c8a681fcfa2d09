"""flash-linear-attention's functions (fla.ops) on `linear_attention` and `retention`.

Its chunked, fused and recurrent forms are one result, and here one op. All return (out, final_state or None); states
are [sequences, H, K, V] in float32, [..., V, K] with `state_v_first`. Beyond the original: CPUs, float64 there, second
derivatives. Decays are natural logarithms and must be <= 0, as they are in every model.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from ..ops.linear_attention import linear_attention
from ..ops.retention import retention

_BY_MODULE = {
    "fla.ops.gla": {"chunk": ("chunk_gla",), "fused_recurrent": ("fused_recurrent_gla",)},
    "fla.ops.linear_attn": {"chunk": ("chunk_linear_attn",), "fused_chunk": ("fused_chunk_linear_attn",),
                            "fused_recurrent": ("fused_recurrent_linear_attn",)},
    "fla.ops.retention": {"chunk": ("chunk_retention",), "fused_chunk": ("fused_chunk_retention",),
                          "fused_recurrent": ("fused_recurrent_retention",), "parallel": ("parallel_retention",)},
    "fla.ops.rwkv6": {"chunk": ("chunk_rwkv6",), "fused_recurrent": ("fused_recurrent_rwkv6",)},
    "fla.ops.simple_gla": {"chunk": ("chunk_simple_gla",), "fused_chunk": ("fused_chunk_simple_gla",),
                           "fused_recurrent": ("fused_recurrent_simple_gla",), "parallel": ("parallel_simple_gla",)},
}
__all__ = sorted(name for files in _BY_MODULE.values() for names in files.values() for name in names)
VERSION = "0.6.0"  # whose signatures these are
MODULES = {"fla": (), "fla.ops": tuple(__all__)}
for _module, _files in _BY_MODULE.items():
    MODULES[_module] = tuple(name for names in _files.values() for name in names)
    MODULES |= {f"{_module}.{file}": names for file, names in _files.items()}


def _legacy(state_v_first: bool, kwargs: dict[str, object]) -> bool:
    """Honours the keywords that the originals take beyond their signatures; returns the layout of states."""
    if "head_first" in kwargs:
        raise ValueError(f"head_first is not served, got {kwargs['head_first']!r}: inputs are [B, T, H, ...]")
    size = kwargs.pop("chunk_size", None)  # how the original cuts its work; the result does not depend on it
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1 or size & (size - 1)):
        raise ValueError(f"chunk_size must be a power of 2, got {size!r}")
    if "transpose_state_layout" in kwargs:
        if state_v_first:
            raise ValueError("state_v_first must not be given with transpose_state_layout, its former name")
        warnings.warn("transpose_state_layout is now called state_v_first", DeprecationWarning, stacklevel=3)
        state_v_first = kwargs.pop("transpose_state_layout")
    if kwargs:
        raise TypeError(f"unexpected keyword arguments: {', '.join(sorted(kwargs))}")
    return state_v_first


def _check_batch(initial_state: object, cu_seqlens: object) -> None:
    """The one mistake with packed sequences that our op would describe by its own argument names."""
    if isinstance(cu_seqlens, Tensor) and isinstance(initial_state, Tensor):
        if initial_state.shape[0] != (sequences := cu_seqlens.shape[0] - 1):
            raise ValueError(f"initial_state must have one entry for each of {sequences} sequences, "
                             f"got {initial_state.shape[0]}")


def _turned(state: Tensor | None, v_first: bool) -> Tensor | None:
    return state.transpose(-1, -2) if v_first and isinstance(state, Tensor) else state


def _run(q, k, v, *, scale, initial_state, output_final_state, cu_seqlens, state_v_first=False, op=linear_attention,
         **options):
    """Our op with the originals' layouts and pair of return values."""
    _check_batch(initial_state, cu_seqlens)
    out, state = op(q, k, v, scale=scale, initial_state=_turned(initial_state, state_v_first), return_final_state=True,
                    cu_seqlens=cu_seqlens, **options)
    if not output_final_state:
        return out, None
    return out, state.transpose(-1, -2).contiguous() if state_v_first else state


# ---- Retention -------------------------------------------------------------------------------------------------------


def _retention(q, k, v, scale, initial_state, output_final_state, cu_seqlens, reverse=False, state_v_first=False):
    return _run(q, k, v, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
                cu_seqlens=cu_seqlens, state_v_first=state_v_first, op=retention, reverse=reverse)


def chunk_retention(q, k, v, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, **kwargs):
    """Retention with RetNet's decays 1 - 2 ** (-5 - h): q, k [B, T, H, K], v [B, T, H, V]; `scale` None is K ** -0.5.

    Of `kwargs`, chunk_size is accepted without effect, any other raises.
    """
    _legacy(False, kwargs)
    return _retention(q, k, v, scale, initial_state, output_final_state, cu_seqlens)


def fused_chunk_retention(q, k, v, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
    """`chunk_retention`."""
    return _retention(q, k, v, scale, initial_state, output_final_state, cu_seqlens)


def fused_recurrent_retention(q, k, v, scale=None, initial_state=None, output_final_state=False, reverse=False,
                              state_v_first=False, cu_seqlens=None, **kwargs):
    """`chunk_retention`, with time from the last token to the first if `reverse`."""
    state_v_first = _legacy(state_v_first, kwargs)
    return _retention(q, k, v, scale, initial_state, output_final_state, cu_seqlens, reverse, state_v_first)


def parallel_retention(q, k, v, scale=None, output_attentions=False, cu_seqlens=None):
    """`chunk_retention` -> (out, attention [B, H, T, T] or None)."""
    out, _ = _retention(q, k, v, scale, None, False, cu_seqlens)
    if not output_attentions:
        return out, None
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    log_gamma = torch.log1p(-torch.exp2(-5 - torch.arange(q.shape[2], device=q.device, dtype=wide)))
    return out, _attentions(q, k, log_gamma.expand(*q.shape[:3]), scale, cu_seqlens)


def _attentions(q: Tensor, k: Tensor, g: Tensor | None, scale: float | None, cu_seqlens: object) -> Tensor:
    """scale (q_i . k_j) exp(g_{j+1} + ... + g_i) for j <= i, else 0; without gradient, as in the original."""
    if cu_seqlens is not None:
        raise ValueError("output_attentions must be False with cu_seqlens, got True")
    with torch.no_grad():
        scores = torch.einsum("bihk,bjhk->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        order = torch.arange(q.shape[1], device=q.device)
        future = order[:, None] < order
        if g is not None:
            passed = g.to(torch.promote_types(g.dtype, torch.float32)).cumsum(1).transpose(1, 2)
            scores = scores * (passed[..., :, None] - passed[..., None, :]).masked_fill(future, -math.inf).exp()
        return scores.masked_fill(future, 0).to(q.dtype)


# ---- Linear attention ------------------------------------------------------------------------------------------------

_EPSILON = 1e-10


def _linear_attn(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens, reverse=False):
    options = {"cu_seqlens": cu_seqlens, "reverse": reverse}
    before, keys_before = initial_state if normalize and isinstance(initial_state, tuple) else (initial_state, None)
    out, state = _run(q, k, v, scale=scale, initial_state=before, output_final_state=output_final_state, **options)
    if not normalize:
        return out, state
    # The sum of keys so far is the state of values that are 1; in float32, because outputs are divided by its product
    # with q.
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    column = None if keys_before is None else keys_before.movedim(1, 3).to(wide)  # [N, 1, H, K] -> [N, H, K, 1]
    ones = torch.ones(*v.shape[:3], 1, device=v.device, dtype=wide)
    with torch.autocast(q.device.type, enabled=False):
        weight, keys = _run(q.to(wide), k.to(wide), ones, scale=scale, initial_state=column, output_final_state=True,
                            **options)
    out = (out / (weight + _EPSILON)).to(q.dtype)
    kept = k.dtype if keys_before is None else torch.promote_types(k.dtype, keys_before.dtype)
    return out, (state, keys.movedim(3, 1).to(kept))


def chunk_linear_attn(q, k, v, scale=None, initial_state=None, output_final_state=False, normalize=True,
                      cu_seqlens=None):
    """Linear attention without decay: q, k [B, T, H, K], v [B, T, H, V]; `scale` None is K ** -0.5.

    With `normalize`, out_t is divided by scale q_t . (sum of the keys so far) + 1e-10, `initial_state` may be a tuple
    (state, that sum [B or sequences, 1, H, K]), and the second return value is such a tuple, its state None unless
    output_final_state.
    """
    return _linear_attn(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens)


def fused_chunk_linear_attn(q, k, v, scale=None, initial_state=None, output_final_state=False, normalize=True,
                            cu_seqlens=None):
    """`chunk_linear_attn`."""
    return _linear_attn(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens)


def fused_recurrent_linear_attn(q, k, v, scale=None, initial_state=None, output_final_state=False, reverse=False,
                                normalize=False, cu_seqlens=None):
    """`chunk_linear_attn`, but not normalised by default; time from the last token to the first if `reverse`."""
    return _linear_attn(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens, reverse)


# ---- Gated linear attention ------------------------------------------------------------------------------------------


def _head_decay(g: Tensor | None, g_gamma: Tensor | None) -> Tensor | None:
    for name, x, shape in (("g", g, "[B, T, H]"), ("g_gamma", g_gamma, "[H]")):
        if x is not None and (not isinstance(x, Tensor) or x.dim() != shape.count(",") + 1):
            raise ValueError(f"{name} must be a tensor {shape}, got {list(x.shape) if isinstance(x, Tensor) else x!r}")
    if g is None or g_gamma is None:
        return g_gamma if g is None else g
    return g.to(torch.promote_types(g.dtype, torch.float32)) + g_gamma


def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False,
                     state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, **kwargs):
    """Linear attention with a decay per head and token g [B, T, H], per head g_gamma [H], or both.

    cu_seqlens_cpu, a copy of cu_seqlens, is not needed here. Of `kwargs`, chunk_size is accepted without effect,
    transpose_state_layout is state_v_first, any other raises.
    """
    state_v_first = _legacy(state_v_first, kwargs)
    return _run(q, k, v, decay=_head_decay(g, g_gamma), scale=scale, initial_state=initial_state,
                output_final_state=output_final_state, cu_seqlens=cu_seqlens, state_v_first=state_v_first)


def fused_chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False,
                           cu_seqlens=None):
    """`chunk_simple_gla`."""
    return _run(q, k, v, decay=_head_decay(g, g_gamma), scale=scale, initial_state=initial_state,
                output_final_state=output_final_state, cu_seqlens=cu_seqlens)


def fused_recurrent_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False,
                               reverse=False, state_v_first=False, cu_seqlens=None, **kwargs):
    """`chunk_simple_gla`, with time from the last token to the first if `reverse`."""
    state_v_first = _legacy(state_v_first, kwargs)
    return _run(q, k, v, decay=_head_decay(g, g_gamma), scale=scale, initial_state=initial_state, reverse=reverse,
                output_final_state=output_final_state, cu_seqlens=cu_seqlens, state_v_first=state_v_first)


def parallel_simple_gla(q, k, v, g=None, scale=None, output_attentions=False, cu_seqlens=None, cu_seqlens_cpu=None):
    """`chunk_simple_gla` -> (out, attention [B, H, T, T] or None)."""
    out, _ = _run(q, k, v, decay=_head_decay(g, None), scale=scale, initial_state=None, output_final_state=False,
                  cu_seqlens=cu_seqlens)
    return out, _attentions(q, k, g, scale, cu_seqlens) if output_attentions else None


def _channel_decay(name: str, g: object, x: Tensor) -> Tensor:
    if not isinstance(g, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(g).__name__}")
    if g.shape != x.shape:
        raise ValueError(f"{name} must have shape {list(x.shape)}, got {list(g.shape)}")
    return g


def chunk_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False, state_v_first=False,
              cu_seqlens=None, cu_seqlens_cpu=None):
    """Gated linear attention: q, k [B, T, H, K], v [B, T, H, V], a decay per key channel g [B, T, H, K].

    cu_seqlens_cpu, a copy of cu_seqlens, is not needed here.
    """
    return _run(q, k, v, decay=_channel_decay("g", g, k), scale=scale, initial_state=initial_state,
                output_final_state=output_final_state, cu_seqlens=cu_seqlens, state_v_first=state_v_first)


def fused_recurrent_gla(q, k, v, gk=None, gv=None, scale=None, initial_state=None, output_final_state=False,
                        reverse=False, state_v_first=False, cu_seqlens=None, **kwargs):
    """Gated linear attention: S_t = exp(gk_t) S_{t-1} exp(gv_t) + k_t v_t^T, out_t = scale q_t^T S_t.

    gk [B, T, H, K] decays rows of the state and gv [B, T, H, V] its columns; each may be None. With gv, each column is
    computed as a head of its own, which takes V times the decays (V K times with gk).
    """
    state_v_first = _legacy(state_v_first, kwargs)
    options = {"scale": scale, "output_final_state": output_final_state, "reverse": reverse, "cu_seqlens": cu_seqlens}
    if gk is not None:
        gk = _channel_decay("gk", gk, k)
    if gv is None:
        return _run(q, k, v, decay=gk, initial_state=initial_state, state_v_first=state_v_first, **options)
    columns = v.shape[3]
    decay = _channel_decay("gv", gv, v)
    if gk is not None:
        wide = torch.promote_types(decay.dtype, torch.float32)
        decay = decay.to(wide)[..., None] + gk.to(wide)[..., None, :]
    if initial_state is not None:  # [N, H, K, V] -> [N, H V, K, 1]
        initial_state = _turned(initial_state, state_v_first).transpose(2, 3).flatten(1, 2)[..., None]
    out, state = _run(q, k, v.flatten(2)[..., None], decay=decay.flatten(2, 3), initial_state=initial_state, **options)
    if state is not None:
        state = state[..., 0].unflatten(1, (-1, columns))  # [N, H, V, K]
        state = (state if state_v_first else state.transpose(2, 3)).contiguous()
    return out[..., 0].unflatten(2, (-1, columns)), state


# ---- RWKV-6 ----------------------------------------------------------------------------------------------------------


def chunk_rwkv6(r, k, v, w, u, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
                cu_seqlens_cpu=None, **kwargs):
    """RWKV-6: out_t = scale r_t^T (S_{t-1} + (u k_t) v_t^T), then S_t = exp(w_t) S_{t-1} + k_t v_t^T.

    r, k [B, T, H, K], v [B, T, H, V], w [B, T, H, K] the log of the decay, u [H, K] the bonus. cu_seqlens_cpu, a copy
    of cu_seqlens, is not needed here. Of `kwargs`, chunk_size is accepted without effect, any other raises.
    """
    _legacy(False, kwargs)
    return fused_recurrent_rwkv6(r, k, v, w, u, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens)


def fused_recurrent_rwkv6(r, k, v, w, u, scale=None, initial_state=None, output_final_state=False, reverse=False,
                          cu_seqlens=None):
    """`chunk_rwkv6`, with time from the last token to the first if `reverse`."""
    return _run(r, k, v, decay=_channel_decay("w", w, k), bonus=u, scale=scale, initial_state=initial_state,
                reverse=reverse, output_final_state=output_final_state, cu_seqlens=cu_seqlens)
