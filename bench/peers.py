"""The alternatives we measure ourselves against: one small entry each.

`missing` says why a peer can't run a case here; the report shows that reason. `variants` gives the ways it can be
called, each with inputs in the layout it likes best, made before the clock starts; the fastest is timed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pykernels.testing.fft_conv import torch_fft
from pykernels.testing.linear_attention import chunkwise

from .kit import Call, Case, Peer, step

PEERS: list[Peer] = []


def for_op(op: str) -> list[Peer]:
    return [peer for peer in PEERS if peer.op == op]


def _needs(module: str, *, causal_only: bool = False) -> Callable[[Case], str | None]:
    """The usual conditions of a GPU package for attention."""

    def missing(case: Case) -> str | None:
        package = module.split(".")[0]
        if importlib.util.find_spec(package) is None or importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        if case.device != "cuda":
            return "runs on NVIDIA GPUs only"
        if case.dtype not in ("bf16", "fp16"):
            return f"has no {case.dtype}"
        if causal_only and case.options != "causal":
            return "is causal only"
        return None

    return missing


def _named(tensors: tuple[Tensor, ...], view: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: view(x) for name, x in zip(("out", "dq", "dk", "dv"), tensors)}


def _heads_first(problem, function: Callable[..., Tensor]) -> Call:
    """A call on [B, H, T, D], contiguous, as torch's attention likes it."""
    inputs = [x.transpose(1, 2).contiguous() for x in (problem.q, problem.k, problem.v)]
    dout = None if problem.dout is None else problem.dout.transpose(1, 2).contiguous()
    return Call(step(function, inputs, dout), lambda result: _named(result, lambda x: x.transpose(1, 2)))


def _time_first(problem, function: Callable[..., Tensor]) -> Call:
    """A call on [B, T, H, D], contiguous, as flash-attn and we like it."""
    run = step(function, (problem.q, problem.k, problem.v), problem.dout)
    return Call(run, lambda result: _named(result, lambda x: x))


# ---- flash_attention -----------------------------------------------------------------------------------------------

_SCORES_LIMIT = 1 << 28  # bytes: torch's MATH keeps all scores, and is never the fastest where they are larger


def _sdpa_backends(problem, case: Case) -> dict[str, SDPBackend | None]:
    """torch's own choice, and the backends behind it."""
    batch, time, heads, _ = problem.q.shape
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


def _sdpa(problem, case: Case) -> Mapping[str, Call]:
    calls = {name: _heads_first(problem, _sdpa_call(backend, is_causal=problem.causal))
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

    mask = None
    if problem.causal:
        lengths = problem.q.shape[1], problem.k.shape[1]
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, *lengths, device=case.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return {"compiled": _heads_first(problem, lambda q, k, v: compiled(q, k, v, block_mask=mask))}


def _flash_attn_2(problem, case: Case) -> Mapping[str, Call]:
    from flash_attn import flash_attn_func

    return {"2": _time_first(problem, lambda q, k, v: flash_attn_func(q, k, v, causal=problem.causal))}


def _flash_attn_3(problem, case: Case) -> Mapping[str, Call]:
    from flash_attn_interface import flash_attn_func

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = flash_attn_func(q, k, v, causal=problem.causal)
        return result[0] if isinstance(result, tuple) else result  # older versions also return the LSE

    return {"3": _time_first(problem, call)}


def _flash_attn_4(problem, case: Case) -> Mapping[str, Call]:
    from flash_attn.cute import flash_attn_func

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = flash_attn_func(q, k, v, causal=problem.causal)
        return result[0] if isinstance(result, tuple) else result

    return {"4": _time_first(problem, call)}


def _fla(problem, case: Case) -> Mapping[str, Call]:
    from fla.ops.attn.parallel import parallel_attn

    return {"parallel_attn": _time_first(problem, parallel_attn)}


def _no_flex(case: Case) -> str | None:
    return "has no backward on CPUs" if case.device == "cpu" and case.backward else None


PEERS += [
    Peer("torch SDPA", "flash_attention", lambda case: None, _sdpa),
    Peer("FlexAttention", "flash_attention", _no_flex, _flex, slow=True),
    Peer("flash-attn 2", "flash_attention", _needs("flash_attn.flash_attn_interface"), _flash_attn_2),
    Peer("flash-attn 3", "flash_attention", _needs("flash_attn_interface"), _flash_attn_3),
    Peer("flash-attn 4", "flash_attention", _needs("flash_attn.cute"), _flash_attn_4),
    Peer("fla", "flash_attention", _needs("fla", causal_only=True), _fla),
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
    Peer("flash-attn 2", "flash_attention_decode", _needs("flash_attn.flash_attn_interface"), _flash_attn_2_decode),
]

# ---- linear_attention ----------------------------------------------------------------------------------------------


def _chunkwise(problem, case: Case, compiled: bool = False) -> Mapping[str, Call]:
    """Matrix products on chunks and a loop over their states, with several sizes of chunk."""
    # With a decay per channel a chunk must not decay by more than floats hold.
    sizes = (16, 32, 64) if case.options == "channel decay" else (64, 128, 256)
    function = torch.compile(chunkwise, dynamic=False) if compiled else chunkwise
    return {f"chunks of {size}": _time_first(problem, functools.partial(function, decay=problem.decay, chunk=size))
            for size in sizes}


def _fla_linear(problem, case: Case) -> Mapping[str, Call]:
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    if case.options == "channel decay":
        return {"chunk_gla": _time_first(problem, lambda q, k, v: chunk_gla(q, k, v, problem.decay)[0])}
    name = "g_gamma" if case.options == "head decay" else "g"
    return {"chunk_simple_gla": _time_first(problem, lambda q, k, v: chunk_simple_gla(q, k, v, **{name: problem.decay})[0])}


PEERS += [
    Peer("torch chunkwise", "linear_attention", lambda case: None, _chunkwise),
    Peer("torch chunkwise, compiled", "linear_attention", lambda case: None, functools.partial(_chunkwise, compiled=True), slow=True),
    Peer("fla", "linear_attention", _needs("fla"), _fla_linear),
]

# ---- linear_attention_step -----------------------------------------------------------------------------------------


def _in_place(q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor) -> Tensor:
    state.mul_(decay.exp()[:, None, None]).addcmul_(k.float()[..., None], v.float()[:, :, None])
    return ((q.float()[:, :, None] @ state)[:, :, 0] * q.shape[2] ** -0.5).to(q.dtype)


PEERS += [Peer("torch in place", "linear_attention_step", lambda case: None,
               lambda problem, case: {"eager": problem.call(_in_place)})]

# ---- fft_conv ------------------------------------------------------------------------------------------------------


def _long(tuned: bool) -> Callable[[Case], str | None]:
    """Torch's transforms lose much of their time to the page faults of fresh memory, unless glibc is told to keep it:
    both are measured, each in a process of its own."""

    def missing(case: Case) -> str | None:
        if case.options == "plain":
            return "measured with long kernels"
        keeps = all(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"))
        if case.device == "cpu" and keeps != tuned:
            return f"needs MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ {'set' if tuned else 'unset'}"
        return "is for CPUs" if tuned and case.device != "cpu" else None

    return missing


def _rfft(problem, case: Case) -> Mapping[str, Call]:
    return {"rfft": problem.call(torch_fft)}


def _depthwise(problem, case: Case) -> Mapping[str, Call]:
    length, (channels, taps) = problem.args["u"].shape[2], problem.args["k"].shape

    def call(u: Tensor, k: Tensor) -> Tensor:
        weight = k.flip(-1)[:, None].to(u.dtype)
        return torch.nn.functional.conv1d(u, weight, padding=taps - 1, groups=channels)[..., :length]

    return {"groups": problem.call(call)}


PEERS += [
    Peer("torch rfft", "fft_conv", _long(False), _rfft),
    Peer("torch rfft, allocator tuned", "fft_conv", _long(True), _rfft),
    Peer("torch conv1d", "fft_conv", lambda case: None if case.options == "plain" else "is for short kernels", _depthwise),
]
