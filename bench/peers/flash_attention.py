"""Alternatives to flash_attention and flash_attention_decode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..kit import Call, Case, Peer
from .common import heads_first, needs, time_first

_SCORES_LIMIT = 1 << 28  # bytes: torch's MATH keeps all scores, and is never the fastest where they are larger


def _sdpa_backends(problem, case: Case) -> dict[str, SDPBackend | None]:
    """torch's own choice, and the backends behind it."""
    batch, time, heads, _ = problem.q.shape
    if len(problem.options) > 1:
        return {"default": None}  # with a mask, which of the backends take differs
    found: dict[str, SDPBackend | None] = {"default": None}
    if batch * heads * time * problem.k.shape[1] * 4 <= _SCORES_LIMIT:
        found["math"] = SDPBackend.MATH
    if case.device == "cuda":
        found |= {"efficient": SDPBackend.EFFICIENT_ATTENTION}
        if case.dtype != "fp32":
            found |= {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    return found


def _sdpa_call(backend: SDPBackend | None, **options) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
            return scaled_dot_product_attention(q, k, v, **options)

    return call


def _distances(problem) -> Tensor:
    """How far each query is behind each key [T, T]; negative for keys that come after."""
    time = torch.arange(problem.q.shape[1], device=problem.q.device)
    return time[:, None] - time


def _dense_mask(problem) -> Tensor:
    """What a causal row's options do to scores, as the mask that torch's attention takes."""
    behind, options = _distances(problem), problem.options
    hidden = behind < 0
    if "window" in options:
        hidden = hidden | (behind > options["window"][0])
    mask = torch.zeros(behind.shape, device=behind.device)
    if "alibi_slopes" in options:
        mask = mask - options["alibi_slopes"][:, None, None] * behind
    if "bias" in options:
        mask = mask + options["bias"]
    return mask.masked_fill(hidden, -torch.inf).to(problem.q.dtype).expand(1, problem.q.shape[2], *behind.shape)


def _sdpa_packed(problem) -> Call:
    """A call for each sequence."""
    parts = [tuple(x.transpose(1, 2).contiguous() for x in part) for part in problem.parts]

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [scaled_dot_product_attention(*part, is_causal=True) for part in parts]

    return Call(run, lambda outs: {"out": torch.cat(outs, dim=2).transpose(1, 2)})


def _sdpa(problem, case: Case) -> Mapping[str, Call]:
    if "packed" in case.options:
        return {"by sequence": _sdpa_packed(problem)}
    options = {"is_causal": problem.causal} if len(problem.options) == 1 else {"attn_mask": _dense_mask(problem)}
    calls = {name: heads_first(problem, _sdpa_call(backend, **options))
             for name, backend in _sdpa_backends(problem, case).items()}
    if case.device == "cuda":  # which of them serve depends on the GPU
        calls = {name: call for name, call in calls.items() if _runs(call)}
    return calls


def _runs(call: Call) -> bool:
    try:
        call.run()
    except RuntimeError:
        return False
    return True


def _flex(problem, case: Case) -> Mapping[str, Call]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask, options = None, problem.options
    if problem.causal:
        lengths = problem.q.shape[1], problem.k.shape[1]
        window = options.get("window", (lengths[1], 0))[0]
        mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j <= window), None, None, *lengths,
                                 device=case.device)
    slopes, bias, softcap = options.get("alibi_slopes"), options.get("bias"), options.get("softcap")

    def change(score, b, h, i, j):
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if slopes is not None:
            score = score - slopes[h] * (i - j)
        return score if bias is None else score + bias[h, i, j]

    changes = change if options.keys() & {"alibi_slopes", "bias", "softcap"} else None
    compiled = torch.compile(flex_attention, dynamic=False)
    return {"compiled": heads_first(problem, lambda q, k, v: compiled(q, k, v, score_mod=changes, block_mask=mask))}


def _flash_attn_2(problem, case: Case) -> Mapping[str, Call]:
    from flash_attn import flash_attn_func

    return {"2": time_first(problem, lambda q, k, v: flash_attn_func(q, k, v, causal=problem.causal))}


def _flash_attn_3(problem, case: Case) -> Mapping[str, Call]:
    from flash_attn_interface import flash_attn_func

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = flash_attn_func(q, k, v, causal=problem.causal)
        return result[0] if isinstance(result, tuple) else result  # older versions also return the LSE

    return {"3": time_first(problem, call)}


def _flash_attn_4(problem, case: Case) -> Mapping[str, Call]:
    from flash_attn.cute import flash_attn_func

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = flash_attn_func(q, k, v, causal=problem.causal)
        return result[0] if isinstance(result, tuple) else result

    return {"4": time_first(problem, call)}


def _fla(problem, case: Case) -> Mapping[str, Call]:
    from fla.ops.attn.parallel import parallel_attn

    return {"parallel_attn": time_first(problem, parallel_attn)}


def _no_flex(case: Case) -> str | None:
    if "packed" in case.options:
        return "is not set up for options here"
    return "has no backward on CPUs" if case.device == "cpu" and case.backward else None


def _plain(missing: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
    """The conditions of a package that is only set up for rows without options."""
    return lambda case: missing(case) or (
        None if case.options in ("causal", "full") else "is not set up for options here")


PEERS = [
    Peer("torch SDPA", "flash_attention", lambda case: "has no softcap" if "softcap" in case.options else None, _sdpa),
    Peer("FlexAttention", "flash_attention", _no_flex, _flex, slow=True),
    Peer("flash-attn 2", "flash_attention", _plain(needs("flash_attn.flash_attn_interface")), _flash_attn_2),
    Peer("flash-attn 3", "flash_attention", _plain(needs("flash_attn_interface")), _flash_attn_3),
    Peer("flash-attn 4", "flash_attention", _plain(needs("flash_attn.cute")), _flash_attn_4),
    Peer("fla", "flash_attention", _plain(needs("fla", causal_only=True)), _fla),
]

# ---- flash_attention_decode ----------------------------------------------------------------------------------------


def _decode(problem, function: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, caches: list,
            view: Callable[[Tensor], Tensor]) -> Call:
    turns = problem.in_turn(caches)

    def run() -> Tensor:
        with torch.no_grad():
            return function(q, *next(turns))

    return Call(run, lambda result: {"out": view(result)})


def _sdpa_decode(problem, case: Case) -> Mapping[str, Call]:
    q = problem.q.transpose(1, 2).contiguous()  # [B, H, 1, K]
    batch, heads, _, size = q.shape
    caches = [tuple(x.transpose(1, 2).contiguous() for x in cache) for cache in problem.caches]  # [B, Hk, T, K]
    # The other way to say it: the query heads of a key head as its queries, so that nothing is repeated.
    grouped = q.view(batch, caches[0][0].shape[1], -1, size)

    def ungroup(x: Tensor) -> Tensor:
        return x.reshape(batch, 1, heads, size)

    return {
        "enable_gqa": _decode(problem, _sdpa_call(None, enable_gqa=True), q, caches, lambda x: x.transpose(1, 2)),
        "grouped": _decode(problem, _sdpa_call(None), grouped, caches, ungroup),
        "grouped math": _decode(problem, _sdpa_call(SDPBackend.MATH), grouped, caches, ungroup),
    }


def _flash_attn_2_decode(problem, case: Case) -> Mapping[str, Call]:
    from flash_attn import flash_attn_with_kvcache

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_with_kvcache(q, k, v, cache_seqlens=problem.lengths)

    return {"2": _decode(problem, call, problem.q, problem.caches, lambda x: x)}


PEERS += [
    Peer("torch SDPA", "flash_attention_decode", lambda case: None, _sdpa_decode),
    Peer("flash-attn 2", "flash_attention_decode", needs("flash_attn.flash_attn_interface"), _flash_attn_2_decode),
]
