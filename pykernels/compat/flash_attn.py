"""flash-attn's functions (version 2's Python interface) on `flash_attention` and `flash_attention_decode`.

Beyond the original: CPUs, float32 (and float64 on CPUs), head sizes to 512 that may differ between keys and values, an
LSE that takes a gradient, pages of any size. Where a query sees no key, the LSE is -inf (the original's is +inf or
-inf, depending on its kernel). Dropout drops with the same probability, but other weights than the original's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.flash_attention import flash_attention, flash_attention_decode

_FUNCTIONS = ("flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func",
              "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func", "flash_attn_with_kvcache")
_PADDING = ("index_first_axis", "index_put_first_axis", "pad_input", "unpad_input",
            "unpad_input_for_concatenated_sequences")
VERSION = "2.8.3"  # whose signatures these are
MODULES = {"flash_attn": _FUNCTIONS, "flash_attn.flash_attn_interface": _FUNCTIONS, "flash_attn.bert_padding": _PADDING}
__all__ = [*_FUNCTIONS, *_PADDING]


def _window(window_size: object) -> tuple[int | None, int | None]:
    """(left, right) where -1 is unbounded -> ours, where None is."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size must be (left, right), got {window_size!r}")
    return tuple(None if side is None or side < 0 else side for side in window_size)


def _softcap(softcap: float) -> float:
    return max(softcap, 0.0)  # the original: anything positive activates it


def _deterministic(deterministic: object) -> bool | None:
    """False asks for nothing, so that torch's own switch still decides."""
    if not isinstance(deterministic, bool):
        raise TypeError(f"deterministic must be True or False, got {deterministic!r}")
    return deterministic or None


def _values_checked(x: object) -> bool:
    """Whether values inside tensors are looked at here: where that waits for no device and breaks no graph."""
    return isinstance(x, Tensor) and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _unpack(name: str, x: object, axis: int, count: int) -> tuple[Tensor, ...]:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() != axis + 3 or x.shape[axis] != count:
        raise ValueError(f"{name} must have {axis + 3} axes with size {count} in axis {axis}, "
                         f"got shape {list(x.shape)}")
    return x.unbind(axis)


def _drops(dropout_p: object) -> bool:
    return isinstance(dropout_p, float) and 0 < dropout_p < 1  # anything else raises in attention, but for 0


_COLUMNS = 512  # the largest head size


def _weights(attend: Callable[..., Tensor], q: Tensor, k: Tensor, positions: Tensor, longest: int,
             scores: dict[str, object], dropout_p: float) -> Tensor:
    """The softmax [B, Tq, Hq, longest] by keys' `positions` [B, Tk], negative where the next call drops it.

    Attention itself tells them: over values that are 1 at one position and 0 elsewhere. `scores`: options that the
    pattern does not depend on.
    """
    q, k, parts = q.detach(), k.detach(), []
    devices = [] if q.device.type == "cpu" else [q.device]
    for first in range(0, longest, _COLUMNS):
        columns = torch.arange(first, min(first + _COLUMNS, longest), device=q.device)
        v = (positions[..., None] == columns).to(q.dtype)[:, :, None].expand(-1, -1, k.shape[2], -1)
        weights = attend(q, k, v, **scores)
        with torch.random.fork_rng(devices, device_type=q.device.type):  # so that the next call draws the same seed
            kept = attend(torch.zeros_like(q), k, v, dropout_p=dropout_p) > 0
        parts.append(torch.where(kept, weights, -weights))
    return torch.cat(parts, -1) if parts else q.new_zeros(*q.shape[:3], 0)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                    alibi_slopes=None, deterministic=False, return_attn_probs=False):
    """Attention of q [B, Tq, Hq, K] over k [B, Tk, Hk, K] and v [B, Tk, Hk, V], see `pykernels.flash_attention`.

    `window_size` is (left, right), -1 unbounded; causal and window align at the last query and the last key.

    Returns out [B, Tq, Hq, V]; with `return_attn_probs` (out, lse [B, Hq, Tq], weights). The weights are for tests:
    with dropout they are the softmax [B, Hq, Tq, Tk], negative where dropped, else an empty tensor.
    """
    scores = {"scale": softmax_scale, "softcap": _softcap(softcap), "alibi_slopes": alibi_slopes}
    attend = functools.partial(flash_attention, causal=causal, window=_window(window_size),
                               deterministic=_deterministic(deterministic))
    if not return_attn_probs:
        return attend(q, k, v, dropout_p=dropout_p, **scores)
    weights = None
    if _drops(dropout_p):
        positions = torch.arange(k.shape[1], device=k.device)[None].expand(k.shape[0], -1)
        weights = _weights(attend, q, k, positions, k.shape[1], scores, dropout_p).transpose(1, 2)
    out, lse = attend(q, k, v, dropout_p=dropout_p, return_lse=True, **scores)
    return out, lse, out.new_empty(0) if weights is None else weights


def flash_attn_kvpacked_func(q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                             alibi_slopes=None, deterministic=False, return_attn_probs=False):
    """`flash_attn_func` with keys and values in one tensor kv [B, Tk, 2, Hk, K]."""
    k, v = _unpack("kv", kv, 2, 2)
    return flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                           return_attn_probs)


def flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                              alibi_slopes=None, deterministic=False, return_attn_probs=False):
    """`flash_attn_func` with queries, keys and values in one tensor qkv [B, T, 3, H, K]."""
    q, k, v = _unpack("qkv", qkv, 2, 3)
    return flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                           return_attn_probs)


def _longest(name: str, longest: object, cu_seqlens: object) -> int:
    """The original sizes its grid by the longest sequence; ours needs none, but a wrong one is a mistake."""
    if isinstance(longest, Tensor) and longest.numel() == 1:
        longest = int(longest)
    if isinstance(longest, bool) or not isinstance(longest, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {longest!r}")
    if _values_checked(cu_seqlens) and cu_seqlens.numel() > 1 and (found := int(cu_seqlens.diff().max())) > longest:
        raise ValueError(f"{name} must be at least the longest sequence's {found} tokens, got {longest}")
    return longest


def _places(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(sequence, position in it) of each token, int64 [total]; behind the last sequence the number of all."""
    tokens = torch.arange(total, device=cu_seqlens.device)
    sequences = torch.searchsorted(cu_seqlens[1:].long().contiguous(), tokens, right=True)
    return sequences, tokens - cu_seqlens.long()[sequences]


def _of_pages(k: object, v: object, block_table: Tensor, cu_seqlens_k: object, longest: int) -> tuple[Tensor, Tensor]:
    """Keys and values [pages, page size, Hk, .] -> those of the sequences, [tokens, Hk, .]."""
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor [pages, page size, H, K], got {type(x).__name__}")
        if x.dim() != 4 or x.shape[:2] != k.shape[:2] or 0 in x.shape[:2]:
            raise ValueError(f"{name} must have 4 axes [pages, page size, H, K] with block_table, the first two those "
                             f"of k, got shape {list(x.shape)}")
    if not isinstance(cu_seqlens_k, Tensor):
        raise TypeError(f"cu_seqlens_k must be a tensor [sequences + 1], got {type(cu_seqlens_k).__name__}")
    if not isinstance(block_table, Tensor):
        raise TypeError(f"block_table must be a tensor [sequences, pages], got {type(block_table).__name__}")
    pages, size = k.shape[:2]
    count = cu_seqlens_k.shape[0] - 1
    if block_table.dim() != 2 or block_table.shape[0] != count or block_table.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"block_table must be int32 or int64 [{count}, pages of a sequence], "
                         f"got {block_table.dtype} {list(block_table.shape)}")
    # Without a look at the offsets as many tokens as the sequences may have; those behind the last belong to none.
    total = int(cu_seqlens_k[-1]) if _values_checked(cu_seqlens_k) else count * longest
    sequence, position = _places(cu_seqlens_k, total)
    entry = position // size
    if _values_checked(k) and total:
        if (needed := int(entry.max()) + 1) > block_table.shape[1]:
            raise ValueError(f"block_table must have {needed} pages for the longest sequence, "
                             f"got {block_table.shape[1]}")
        used = block_table[sequence, entry]
        if not 0 <= int(used.min()) <= int(used.max()) < pages:
            raise ValueError(f"block_table must hold pages below {pages} where tokens are, "
                             f"got {used.unique().tolist()}")
    entry = block_table[sequence.clamp(max=count - 1), entry.clamp(max=block_table.shape[1] - 1)].long()
    rows = entry.clamp(0, pages - 1) * size + position % size
    return k.flatten(0, 1)[rows], v.flatten(0, 1)[rows]


def _packed(name: str, x: object) -> Tensor:
    """[total, H, K] -> [1, total, H, K], the layout of our packed sequences."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor [total, H, K], got {type(x).__name__}")
    if x.dim() != 3:
        raise ValueError(f"{name} must have 3 axes [total, H, K], got shape {list(x.shape)}")
    return x[None]


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                           deterministic=False, return_attn_probs=False, block_table=None):
    """`flash_attn_func` for packed sequences: q [total_q, Hq, K], k [total_k, Hk, K], v [total_k, Hk, V].

    cu_seqlens_q and cu_seqlens_k: int32 [sequences + 1], offsets of the sequences; max_seqlen_q and max_seqlen_k: the
    longest ones (checked on CPUs, otherwise not needed). block_table: int32 [sequences, pages of a sequence]: k and v
    are paged, [pages, page size, Hk, K] and [pages, page size, Hk, V], and token t of sequence s lies in page
    block_table[s, t // page size]; the tokens in use are copied to attend to them.

    Returns out [total_q, Hq, V]; with `return_attn_probs` (out, lse [Hq, total_q], weights). The weights are for tests:
    with dropout they are the softmax [sequences, Hq, max_seqlen_q, max_seqlen_k], negative where dropped, else an empty
    tensor.
    """
    max_seqlen_q = _longest("max_seqlen_q", max_seqlen_q, cu_seqlens_q)
    max_seqlen_k = _longest("max_seqlen_k", max_seqlen_k, cu_seqlens_k)
    if block_table is not None:
        k, v = _of_pages(k, v, block_table, cu_seqlens_k, max_seqlen_k)
    q, k, v = _packed("q", q), _packed("k", k), _packed("v", v)
    scores = {"scale": softmax_scale, "softcap": _softcap(softcap), "alibi_slopes": alibi_slopes}
    attend = functools.partial(flash_attention, causal=causal, window=_window(window_size), cu_seqlens_q=cu_seqlens_q,
                               cu_seqlens_k=cu_seqlens_k, deterministic=_deterministic(deterministic))
    if not return_attn_probs:
        return attend(q, k, v, dropout_p=dropout_p, **scores)[0]
    weights = None
    if _drops(dropout_p):
        positions = _places(cu_seqlens_k, k.shape[1])[1][None]
        found = _weights(attend, q, k, positions, max_seqlen_k, scores, dropout_p)[0]
        sequence, position = _places(cu_seqlens_q, q.shape[1])
        count = cu_seqlens_q.shape[0] - 1
        weights = found.new_zeros(count + 1, max_seqlen_q, *found.shape[1:])
        weights[sequence, position.clamp(max=max_seqlen_q - 1)] = found
        weights = weights[:count].transpose(1, 2)
    out, lse = attend(q, k, v, dropout_p=dropout_p, return_lse=True, **scores)
    return out[0], lse[0], out.new_empty(0) if weights is None else weights


def flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                                    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                                    alibi_slopes=None, deterministic=False, return_attn_probs=False):
    """`flash_attn_varlen_func` with keys and values in one tensor kv [total_k, 2, Hk, K]."""
    k, v = _unpack("kv", kv, 1, 2)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                                  softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                                  return_attn_probs)


def flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False,
                                     window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                                     return_attn_probs=False):
    """`flash_attn_varlen_func` with queries, keys and values in one tensor qkv [total, 3, H, K]."""
    q, k, v = _unpack("qkv", qkv, 1, 3)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale,
                                  causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)


# ---- Key/value cache -------------------------------------------------------------------------------------------------


def _rotate(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turns the first 2 * cos.shape[1] features of x [B, T, H, K] by the angles at `positions` [B, T]."""
    pairs = cos.shape[1]
    compute = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos[positions][:, :, None].to(compute), sin[positions][:, :, None].to(compute)
    turned, rest = x[..., :2 * pairs].to(compute), x[..., 2 * pairs:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def _rotated(q: Tensor, k: Tensor | None, lengths: Tensor, cos: object, sin: object, interleaved: bool,
             ordered: bool) -> tuple[Tensor, Tensor]:
    """q and k turned by their positions; queries not ordered in time (neither causal nor local) share the first."""
    if cos is None or sin is None:
        raise ValueError(f"rotary_{'cos' if cos is None else 'sin'} must be given with the other, got None")
    if k is None:
        raise ValueError("k must be given with rotary_cos and rotary_sin, got None")
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor [positions, rotary size / 2], got {type(x).__name__}")
        if x.dim() != 2 or 2 * x.shape[1] > q.shape[3] or x.shape != cos.shape:
            raise ValueError(f"{name} must have shape [positions, rotary size / 2] with a rotary size of at most "
                             f"{q.shape[3]}, and rotary_sin that of rotary_cos, got {list(x.shape)}")
    steps = torch.arange(max(q.shape[1], k.shape[1]), device=q.device)
    positions = lengths[:, None].long() + steps
    of_q = positions[:, :q.shape[1]] if ordered else positions[:, :1].expand(-1, q.shape[1])
    of_k = positions[:, :k.shape[1]]
    if _values_checked(q) and of_k.numel() and (last := int(torch.cat((of_q, of_k), 1).max())) >= cos.shape[0]:
        raise ValueError(f"rotary_cos must reach position {last}, got {cos.shape[0]} positions")
    return _rotate(q, of_q, cos, sin, interleaved), _rotate(k, of_k, cos, sin, interleaved)


def _row_vector(name: str, x: object, batch: int) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be an integer tensor [{batch}], got {type(x).__name__}")
    if x.dtype not in (torch.int32, torch.int64) or x.shape != (batch,):
        raise ValueError(f"{name} must be int32 or int64 [{batch}], got {x.dtype} {list(x.shape)}")
    return x.long()


def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
                            cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None,
                            causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None,
                            num_splits=0, return_softmax_lse=False):
    """Attention of q [B, Tq, Hq, K] over a cache, after k and v are appended to it in place. For inference.

    Args:
        q: [B, Tq, Hq, K].
        k_cache, v_cache: [rows, Tmax, Hk, K] and [rows, Tmax, Hk, V], or with block_table [pages, page size, ...].
        k, v: new tokens [B, Tnew, Hk, K] and [B, Tnew, Hk, V], written at cache_seqlens; both or neither.
        rotary_cos, rotary_sin: [positions, R / 2]: the first R features of k, and of q, are turned by the angles of
            their positions, cache_seqlens + t (all queries by those of cache_seqlens if neither causal nor local).
            Needs k.
        cache_seqlens: tokens in the cache before the append, left padding included: an int, or int32 [B]. None: all.
        cache_batch_idx: int32 [B], the cache's row of each batch entry; None: entry b has row b. Rows should differ.
        cache_leftpad: int32 [B], where the valid tokens of each row begin; None: at 0.
        block_table, alibi_slopes: as in `flash_attention_decode`; pages of any size.
        softmax_scale, causal, window_size, softcap: as in `flash_attn_func`.
        rotary_interleaved: whether features pair as (2i, 2i + 1), rather than (i, i + R / 2).
        num_splits: the original's hint on how to spread the work; ours finds that itself, the result is the same.
        return_softmax_lse: also return the LSE.

    Returns:
        out [B, Tq, Hq, V], or (out, lse [B, Hq, Tq]).

    With cache_batch_idx or cache_leftpad, the rows in use are copied to attend to them; the append is in place all the
    same.
    """
    if not isinstance(q, Tensor) or not isinstance(k_cache, Tensor) or not isinstance(v_cache, Tensor):
        names = ", ".join(type(x).__name__ for x in (q, k_cache, v_cache))
        raise TypeError(f"q, k_cache and v_cache must be tensors, got {names}")
    if q.dim() != 4 or k_cache.dim() != 4 or v_cache.dim() != 4:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k_cache, v_cache))
        raise ValueError(f"q, k_cache and v_cache must have 4 axes, got shapes {shapes}")
    if isinstance(num_splits, bool) or not isinstance(num_splits, int):
        raise TypeError(f"num_splits must be an integer, got {num_splits!r}")
    batch, capacity = q.shape[0], k_cache.shape[1]
    if isinstance(block_table, Tensor) and block_table.dim() == 2:
        capacity *= block_table.shape[1]
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("cache_seqlens must be given with k, got None")
        cache_seqlens = capacity
    if isinstance(cache_seqlens, int) and not isinstance(cache_seqlens, bool):
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    lengths = _row_vector("cache_seqlens", cache_seqlens, batch)
    window = _window(window_size)
    if rotary_cos is not None or rotary_sin is not None:
        ordered = causal or window != (None, None)
        q, k = _rotated(q, k, lengths, rotary_cos, rotary_sin, rotary_interleaved, ordered)
    options = {"block_table": block_table, "causal": causal, "window": window, "scale": softmax_scale,
               "softcap": _softcap(softcap), "alibi_slopes": alibi_slopes, "return_lse": return_softmax_lse}
    if cache_batch_idx is None and cache_leftpad is None:
        if block_table is None:
            k_cache, v_cache = k_cache[:batch], v_cache[:batch]
        return flash_attention_decode(q, k_cache, v_cache, lengths, k=k, v=v, **options)
    if block_table is not None:
        raise ValueError("block_table must be None with cache_batch_idx or cache_leftpad, got a tensor")

    # Our op reads row b from its first token on, so it gets a copy of the rows in use that is laid out so.
    rows, first = torch.arange(batch, device=q.device), torch.zeros_like(lengths)
    if cache_batch_idx is not None:
        rows = _row_vector("cache_batch_idx", cache_batch_idx, batch)
    if cache_leftpad is not None:
        first = _row_vector("cache_leftpad", cache_leftpad, batch)
    steps = torch.arange(capacity, device=q.device)
    if _values_checked(q) and batch:
        if not 0 <= int(rows.min()) <= int(rows.max()) < k_cache.shape[0]:
            raise ValueError(f"cache_batch_idx must name rows of the cache's {k_cache.shape[0]}, got {rows.tolist()}")
        if int(first.min()) < 0 or bool((first > lengths).any()):
            raise ValueError(f"cache_leftpad must be from 0 to cache_seqlens, got {first.tolist()} "
                             f"for {lengths.tolist()}")
        if k is not None and int(lengths.max()) + k.shape[1] > capacity:
            raise ValueError(f"cache_seqlens must leave room for {k.shape[1]} new tokens in a cache of {capacity}, "
                             f"got {lengths.tolist()}")
    read = (rows[:, None], (first[:, None] + steps).clamp(max=capacity - 1))
    k_rows, v_rows = k_cache[read], v_cache[read]
    out = flash_attention_decode(q, k_rows, v_rows, lengths - first, k=k, v=v, **options)
    if k is not None:  # all that was wrong with the arguments has been raised by now
        written = (rows[:, None], lengths[:, None] + steps[:k.shape[1]])
        k_cache[written], v_cache[written] = k, v
    return out


# ---- Padding ---------------------------------------------------------------------------------------------------------


def index_first_axis(input, indices):
    """input[indices] along the first axis: [N, ...] and int64 [M] -> [M, ...]."""
    return input.index_select(0, indices)


def index_put_first_axis(values, indices, first_axis_dim):
    """The opposite of `index_first_axis`: values [M, ...] at rows `indices` [M] of zeros [first_axis_dim, ...]."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def _offsets(lengths: Tensor) -> tuple[Tensor, int]:
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), int(lengths.max())


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    """Takes padding out of a batch, for the functions of packed sequences.

    Args:
        hidden_states: [B, T, ...].
        attention_mask: [B, T], bool or integer, nonzero for the tokens to keep.
        unused_mask: [B, T], nonzero for tokens that are kept too, but not counted in the last return value.

    Returns:
        (tokens [total, ...], their indices in the flattened batch int64 [total], cu_seqlens int32 [B + 1], the longest
        length, tokens of attention_mask in each entry int32 [B]).
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    cu_seqlens, longest = _offsets(kept.sum(-1, dtype=torch.int32))
    indices = kept.flatten().nonzero().flatten()
    used = attention_mask.sum(-1, dtype=torch.int32)
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest, used


def unpad_input_for_concatenated_sequences(hidden_states, attention_mask_in_length):
    """`unpad_input` for rows that hold several sequences each.

    attention_mask_in_length: integer [B, T], whose nonzero entries in row b are the lengths of b's sequences, which lie
    one after another from the row's start.

    Returns (tokens [total, ...], indices int64 [total], cu_seqlens int32 [sequences + 1], the longest length).
    """
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    cu_seqlens, longest = _offsets(lengths)
    steps = torch.arange(attention_mask_in_length.shape[1], device=lengths.device)
    indices = (steps < attention_mask_in_length.sum(-1, keepdim=True)).flatten().nonzero().flatten()
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest


def pad_input(hidden_states, indices, batch, seqlen):
    """The opposite of `unpad_input`: tokens [total, ...] and their indices -> [batch, seqlen, ...], zeros elsewhere."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
