"""The descriptions of linear_attention and linear_attention_step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.linear_attention import OP, linear_attention, linear_attention_step
from .kit import BadInput, Case, Description, Sample
from .layouts import compute_dtype, contiguous, expanded, generator, heads_first, normal, padded, strided

# ---- Tensors --------------------------------------------------------------------------------------------------------


def _decay(name: str, shape: Sequence[int], strength: float | Callable[[Tensor], Tensor]) -> Tensor:
    """Log factors in (-strength, 0), or what `strength` makes of values in (0, 1)."""
    uniform = torch.rand(shape, generator=generator(name), dtype=torch.float64)
    return strength(uniform) if callable(strength) else -strength * uniform


# ---- linear_attention -----------------------------------------------------------------------------------------------

_DECAYS = {None: "", "head": "H", "token": "BTH", "channel": "BTHK"}


def linear_case(name: str, *, batch: int = 1, tokens: int, heads: int = 2, heads_k: int | None = None,
                key_dim: int = 32, value_dim: int | None = None, decay: str | None = None,
                strength: float | Callable[[Tensor], Tensor] = 0.2, bonus: bool = False, state: bool = False,
                lengths: Sequence[int] | None = None, narrow: bool = False,
                layout: Callable[[Tensor], Tensor] = contiguous,
                values: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None,
                dtypes: tuple[torch.dtype, ...] | None = None, **options: Any) -> Case:
    """A call of linear_attention with normal inputs; `decay` is a key of _DECAYS, `strength` its size; `state` gives an
    initial state; `narrow` keeps decay, bonus and state in the dtype of q."""
    heads_k = heads if heads_k is None else heads_k
    value_dim = key_dim if value_dim is None else value_dim
    sizes = {"B": batch, "T": tokens, "H": heads, "K": key_dim}

    def make(dtype: torch.dtype, device: str) -> Sample:
        q, k, v = (normal(name + axis, shape) for axis, shape in (("q", (batch, tokens, heads_k, key_dim)),
                                                                  ("k", (batch, tokens, heads_k, key_dim)),
                                                                  ("v", (batch, tokens, heads, value_dim))))
        if options.get("normalize"):  # as the usual feature maps make them
            q, k = q.abs(), k.abs()
        if values is not None:
            q, k, v = values(q, k, v)
        args: dict[str, Any] = {n: layout(x.to(device, dtype)) for n, x in (("q", q), ("k", k), ("v", v))}
        other = dtype if narrow else compute_dtype(dtype)
        if decay is not None:
            x = _decay(name + "decay", [sizes[axis] for axis in _DECAYS[decay]], strength)
            args["decay"] = (layout(x.to(device, other)) if decay == "channel" else x.to(device, other))
        if bonus:
            args["bonus"] = normal(name + "bonus", (heads, key_dim)).to(device, other)
        if lengths is not None:
            args["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        if state:
            count = batch if lengths is None else len(lengths)
            x = normal(name + "state", (count, heads, key_dim, value_dim + options.get("normalize", False)))
            args["initial_state"] = (x.abs() if options.get("normalize") else x).to(device, other)
        differentiable = tuple(n for n in ("q", "k", "v", "decay", "bonus", "initial_state") if n in args)
        return Sample({**args, **options}, differentiable)

    return Case(name, make) if dtypes is None else Case(name, make, dtypes)


CASES = (
    # Shapes: one, tiny, around the kernels' chunks and leaves, head sizes that are no multiple of anything.
    # In bfloat16 a single product of rounded factors has no others to average with, so its budget means nothing there.
    linear_case("one", tokens=1, heads=1, key_dim=1, dtypes=(torch.float32, torch.float16, torch.float64)),
    linear_case("tiny", batch=2, tokens=3, heads=3, key_dim=3, value_dim=5, decay="head", state=True),
    linear_case("plain", batch=2, tokens=130, key_dim=64),
    linear_case("head-decay", batch=2, tokens=130, key_dim=64, decay="head", state=True),
    linear_case("token-decay", batch=2, tokens=130, key_dim=64, decay="token", state=True),
    linear_case("channel-decay", batch=2, tokens=130, key_dim=64, decay="channel", state=True),
    linear_case("chunk-edges", tokens=64, key_dim=16, decay="channel"),
    linear_case("leaf-edges", tokens=49, key_dim=24, decay="channel", state=True),
    linear_case("key-33-value-70", tokens=70, key_dim=33, value_dim=70, decay="token", state=True),
    linear_case("key-1-value-17", tokens=33, key_dim=1, value_dim=17, decay="channel"),
    linear_case("key-111-value-1", tokens=47, key_dim=111, value_dim=1, decay="head", state=True),
    linear_case("key-256-value-512", tokens=40, heads=1, key_dim=256, value_dim=512, decay="head", state=True),
    linear_case("key-256-channel", tokens=37, heads=1, key_dim=256, value_dim=100, decay="channel"),
    # Heads.
    linear_case("grouped", batch=2, tokens=90, heads=6, heads_k=2, key_dim=16, value_dim=24, decay="token"),
    linear_case("grouped-channel", tokens=70, heads=4, heads_k=1, key_dim=20, decay="channel", state=True, bonus=True),
    # Options.
    linear_case("scale", tokens=60, decay="head", scale=-0.37),
    linear_case("bonus", tokens=75, decay="channel", bonus=True, state=True),
    linear_case("bonus-token", batch=2, tokens=75, key_dim=24, decay="token", bonus=True, state=True),
    linear_case("bonus-head", tokens=100, key_dim=24, decay="head", bonus=True),
    linear_case("bonus-alone", tokens=50, key_dim=16, bonus=True, state=True),
    linear_case("normalize", batch=2, tokens=100, key_dim=24, normalize=True),
    linear_case("normalize-decay", tokens=75, key_dim=32, value_dim=20, normalize=True, decay="token", state=True,
                scale=0.5),
    linear_case("normalize-channel-grouped", tokens=70, heads=4, heads_k=2, key_dim=16, normalize=True,
                decay="channel"),
    linear_case("reverse", batch=2, tokens=100, decay="token", reverse=True, state=True),
    linear_case("reverse-channel", tokens=80, key_dim=24, decay="channel", reverse=True, state=True, bonus=True),
    linear_case("narrow", tokens=70, decay="token", narrow=True, state=True, bonus=True),
    # Packed sequences, with empty ones, ones of length 1, and tokens that belong to none.
    linear_case("packed", tokens=170, decay="head", lengths=(65, 0, 1, 37, 60), state=True),
    linear_case("packed-channel", tokens=150, key_dim=16, decay="channel", lengths=(1, 100, 0, 41), state=True,
                bonus=True),
    linear_case("packed-causal-gqa", tokens=120, heads=4, heads_k=2, key_dim=20, decay="token", lengths=(33, 7, 0, 60),
                reverse=True),
    linear_case("packed-normalize", tokens=90, key_dim=20, lengths=(50, 40), normalize=True, state=True),
    linear_case("packed-none", tokens=10, key_dim=8, lengths=(), state=True),
    # Layouts.
    linear_case("layout-heads-first", batch=2, tokens=65, heads=3, decay="channel", layout=heads_first),
    linear_case("layout-strided-last", batch=2, tokens=33, key_dim=24, decay="channel", layout=strided),
    linear_case("layout-padded", batch=2, tokens=65, key_dim=33, value_dim=20, decay="channel", layout=padded),
    linear_case("layout-expanded", batch=3, tokens=20, layout=expanded),
)


def _scaled(q: float, k: float, v: float):
    return lambda *tensors: tuple(x * factor for x, factor in zip(tensors, (q, k, v)))


def _mixed(uniform: Tensor) -> Tensor:
    """Mostly weak decays, every few tokens one that ends everything before it."""
    return torch.where(uniform < 0.1, -50 - 100 * uniform, -0.1 * uniform)


def _clearing(uniform: Tensor) -> Tensor:
    return torch.where(uniform < 0.1, -torch.inf, -0.1 * uniform)


# A log factor of -inf has no derivative in the definition's exp either (0 * inf), so those cases have none to compare.
def _without_decay_gradient(case: Case) -> Case:
    def make(dtype: torch.dtype, device: str) -> Sample:
        sample = case.make(dtype, device)
        return Sample(sample.args, tuple(name for name in sample.differentiable if name != "decay"))

    return Case(case.name, make, case.dtypes)


EXTREMES = (
    *(linear_case(f"strong-{kind}", tokens=70, key_dim=24, decay=kind, strength=lambda x: -50 - 50 * x, state=True,
                  dtypes=(torch.float32, torch.float64)) for kind in ("head", "token", "channel")),
    *(linear_case(f"mixed-{kind}", tokens=100, key_dim=24, decay=kind, strength=_mixed, state=True)
      for kind in ("token", "channel")),
    *(linear_case(f"zero-{kind}", tokens=100, key_dim=24, decay=kind, strength=0.0, state=True)
      for kind in ("head", "token", "channel")),
    *(_without_decay_gradient(linear_case(f"clearing-{kind}", tokens=100, key_dim=24, decay=kind, strength=_clearing,
                                          state=True))
      for kind in ("token", "channel")),
    linear_case("strong-bonus", tokens=70, key_dim=24, decay="channel", strength=lambda x: -50 - 50 * x, bonus=True,
                dtypes=(torch.float32, torch.float64)),
    # Heads wide enough for matrix units, whose number formats must not show.
    *(linear_case(f"strong-wide-{kind}", tokens=130, key_dim=48, value_dim=64, decay=kind,
                  strength=lambda x: -50 - 50 * x, state=True,
                  dtypes=(torch.float32, torch.float64)) for kind in ("head", "token", "channel")),
    *(linear_case(f"mixed-wide-{kind}", tokens=130, key_dim=64, decay=kind, strength=_mixed, state=True, bonus=True,
                  dtypes=(torch.float32, torch.float64)) for kind in ("token", "channel")),
    _without_decay_gradient(linear_case("clearing-wide", tokens=130, key_dim=64, decay="channel", strength=_clearing,
                                        state=True)),
    linear_case("fading-wide", tokens=130, key_dim=64, decay="head", strength=lambda x: -85 - x,
                values=_scaled(1, 1, 0), state=True, dtypes=(torch.float32, torch.float64)),
    *(linear_case(f"wide-{name}", tokens=130, key_dim=64, decay="token", values=_scaled(*factors),
                  dtypes=(torch.float32, torch.float64))
      for name, factors in {"huge-values": (1, 1, 1e25), "huge-keys": (1e-8, 1e12, 1), "huge-state": (1e-12, 1e7, 1e15),
                            "tiny-values": (1, 1, 1e-27), "tiny-scores": (1e-14, 1e-14, 1e10),
                            "tiny-queries": (1e-30, 1, 1)}.items()),
    linear_case("large-values", tokens=60, key_dim=16, decay="head", values=_scaled(1, 1, 1e2)),
    linear_case("small-everything", tokens=60, key_dim=16, decay="token", values=_scaled(1e-2, 1e-2, 1e-2)),
    linear_case("denormal", tokens=60, key_dim=16, decay="head", values=_scaled(1, 1, 1e-40),
                dtypes=(torch.float32, torch.float64)),
    linear_case("zeros", tokens=40, decay="head", values=_scaled(0, 0, 1)),
    linear_case("zeros-normalized", tokens=40, normalize=True, values=_scaled(0, 1, 1),
                dtypes=(torch.float32, torch.float64)),
    linear_case("no-tokens", batch=2, tokens=0, decay="token", state=True),
    linear_case("no-batch", batch=0, tokens=5, decay="channel"),
    linear_case("no-heads", tokens=5, heads=0, heads_k=2, decay="head"),
    linear_case("packed-all-empty", tokens=0, key_dim=16, lengths=(0, 0), decay="channel", state=True),
)


def _options(sample: Sample) -> tuple[float, bool]:
    args = sample.args
    scale = args.get("scale")
    if scale is None:
        scale = 1.0 if args.get("normalize") else args["q"].shape[-1] ** -0.5
    return scale, args.get("normalize", False)


def _optional(sample: Sample, *names: str) -> tuple[Tensor | None, ...]:
    wide = compute_dtype(sample.args["q"].dtype)
    given = (sample.args.get(name) for name in names)
    return tuple(x.to(wide) if isinstance(x, Tensor) and x.is_floating_point() else x for x in given)


def _calls(sample: Sample, backend: str) -> Iterable[tuple[str, tuple]]:
    args = sample.args
    q, k, v = (args[name] for name in "qkv")
    decay, bonus, state, cu_seqlens = _optional(sample, "decay", "bonus", "initial_state", "cu_seqlens")
    options = *_options(sample), args.get("reverse", False)
    forward = f"linear_attention_fwd_{backend}"
    for checkpoint in (False, True):
        yield forward, (q, k, v, decay, bonus, state, cu_seqlens, *options, checkpoint)
    op = getattr(torch.ops.pykernels, forward)
    out, final, checkpoints, denominator = op(q, k, v, decay, bonus, state, cu_seqlens, *options, True)
    dout, dfinal = torch.randn_like(out), torch.randn_like(final)
    for dfinal, decay_gradient in ((dfinal, decay is not None), (None, False)):
        yield f"linear_attention_bwd_{backend}", (dout, dfinal, q, k, v, decay, bonus, cu_seqlens, out, checkpoints,
                                                  denominator, *options, decay_gradient)


def chunkwise(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, *, scale: float | None = None,
              chunk: int = 128) -> Tensor:
    """The best plain PyTorch: matrix products on chunks, a loop over chunk states. T is a multiple of chunk.

    With a decay per channel queries are multiplied by e^b and keys by e^-b, which overflows where a chunk decays by
    e^-88.
    """
    batch, tokens, heads, key_dim = q.shape
    scale = key_dim ** -0.5 if scale is None else scale
    wide, count = compute_dtype(q.dtype), tokens // chunk

    def split(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(batch, heads, count, chunk, -1)

    q, k, v = split(q), split(k), split(v)
    if decay is None or decay.dim() == 1:
        g = q.new_zeros(heads, dtype=wide) if decay is None else decay.to(wide)
        b = (torch.arange(1, chunk + 1, device=q.device) * g[:, None])[None, :, None, :, None]  # [1, H, 1, C, 1]
    else:
        b = split(decay.to(wide)).cumsum(3)  # [B, H, N, C, 1 or K]
    end = b[..., -1:, :]
    of_query, of_key = (b.exp() * scale).to(q.dtype), (end - b).exp().to(q.dtype)
    if b.shape[-1] == 1:
        weights = (b - b.transpose(-1, -2)).tril().exp().tril() * scale
        scores = q @ k.transpose(-1, -2) * weights.to(q.dtype)
    else:
        scores = ((q * of_query) @ (k * (-b).exp().to(q.dtype)).transpose(-1, -2)).tril()
    updates, factor = (k * of_key).transpose(-1, -2) @ v, end.exp().transpose(-1, -2)
    state, states = torch.zeros_like(updates[:, :, 0], dtype=wide), []
    for n in range(count):
        states.append(state.to(q.dtype))
        state = state * factor[:, :, min(n, factor.shape[2] - 1)] + updates[:, :, n]
    out = scores @ v + (q * of_query) @ torch.stack(states, 2)
    return out.reshape(batch, heads, tokens, -1).transpose(1, 2)


def _peer(sample: Sample) -> Callable[..., Tensor] | None:
    args = sample.args
    decay = args.get("decay")
    unserved = ("bonus", "normalize", "initial_state", "cu_seqlens", "reverse")
    if any(name in args for name in unserved) or args["q"].shape[2] != args["v"].shape[2] or args["q"].shape[1] % 128:
        return None
    chunk = 32 if decay is not None and decay.dim() == 4 else 128
    return lambda q, k, v, decay=None: chunkwise(q, k, v, decay, scale=args.get("scale"), chunk=chunk)


def _bad_inputs() -> Iterable[BadInput]:
    q, k, v = torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 8), torch.randn(2, 6, 4, 5)
    packed = {"q": q[:1], "k": k[:1], "v": v[:1], "decay": torch.full((1, 6, 4), -0.1), "initial_state": None}

    def cu(*offsets: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(offsets, dtype=dtype)

    yield from _bad_qkv(q, k, v, 4)
    yield BadInput("k-tokens", {"k": k[:, :5]}, ValueError, r"\bk\b.*T=6.*\[2, 5, ")
    yield BadInput("v-tokens", {"v": v[:, :5]}, ValueError, r"\bv\b.*T=6.*\[2, 5, ")
    yield from _bad_options()
    yield BadInput("decay-rank", {"decay": torch.zeros(2, 6)}, ValueError,
                   r"decay.*\[H\], \[B, T, H\], \[B, T, H, K\].*\[2, 6\]")
    yield BadInput("decay-heads", {"decay": torch.zeros(2)}, ValueError, r"decay.*H=4.*\[2\]")
    yield BadInput("decay-tokens", {"decay": torch.zeros(2, 5, 4)}, ValueError, r"decay.*T=6.*\[2, 5, 4\]")
    yield BadInput("decay-channels", {"decay": torch.zeros(2, 6, 4, 7)}, ValueError, r"decay.*K=8.*\[2, 6, 4, 7\]")
    yield BadInput("decay-positive", {"decay": torch.tensor([-1.0, 0.5, 0.0, 0.0])}, ValueError, r"decay.*<= 0.*0.5")
    yield BadInput("initial_state-type", {"initial_state": 1.0}, TypeError, r"initial_state.*tensor.*float")
    yield BadInput("initial_state-rank", {"initial_state": torch.zeros(4, 8, 5)}, ValueError,
                   r"initial_state.*4 axes.*\[4, 8, 5\]")
    yield BadInput("initial_state-shape", {"initial_state": torch.zeros(2, 4, 5, 8)}, ValueError,
                   r"initial_state.*K=8.*\[2, 4, 5, 8\]")
    yield BadInput("initial_state-count", {"initial_state": torch.zeros(3, 4, 8, 5)}, ValueError,
                   r"initial_state.*N=2.*\[3, 4, 8, 5\]")
    yield BadInput("initial_state-columns", {"normalize": True}, ValueError, r"initial_state.*V \+ 1=6.*\[2, 4, 8, 5\]")
    yield BadInput("initial_state-dtype", {"initial_state": torch.zeros(2, 4, 8, 5).half()}, TypeError,
                   r"initial_state.*float32.*float16")
    yield BadInput("initial_state-device", {"initial_state": torch.zeros(2, 4, 8, 5, device="meta")}, ValueError,
                   r"initial_state.*device")
    yield BadInput("return_final_state-type", {"return_final_state": 1}, TypeError,
                   r"return_final_state.*True or False.*1")
    yield BadInput("reverse-type", {"reverse": None}, TypeError, r"reverse.*True or False.*None")
    for name, value, exception, match in (("type", [0, 6], TypeError, "tensor.*list"),
                                          ("dtype", cu(0, 6).float(), TypeError, "int32 or int64"),
                                          ("rank", cu(0, 6)[None], ValueError, r"1 axes.*\[1, 2\]"),
                                          ("empty", cu(), ValueError, "empty"),
                                          ("start", cu(1, 6), ValueError, "start at 0.*1"),
                                          ("decreases", cu(0, 4, 3), ValueError, "not decrease.*4 then 3"),
                                          ("overruns", cu(0, 7), ValueError, "within the 6.*7"),
                                          ("device", cu(0, 6).to("meta"), ValueError, "device")):
        yield BadInput(f"cu_seqlens-{name}", {**packed, "cu_seqlens": value}, exception, f"cu_seqlens.*{match}")
    yield BadInput("cu_seqlens-batch", {"cu_seqlens": cu(0, 6)}, ValueError, r"\bq\b.*batch 1.*\[2, 6, 2, 8\]")
    yield BadInput("cu_seqlens-states", {**packed, "cu_seqlens": cu(0, 3, 6), "initial_state": torch.zeros(1, 4, 8, 5)},
                   ValueError, r"initial_state.*N=2.*\[1, 4, 8, 5\]")


def _bad_qkv(q: Tensor, k: Tensor, v: Tensor, rank: int) -> Iterable[BadInput]:
    for name, x in (("q", q), ("k", k), ("v", v)):
        yield BadInput(f"{name}-not-a-tensor", {name: x.tolist()}, TypeError, rf"\b{name}\b.*tensor.*list")
        yield BadInput(f"{name}-rank", {name: x[0]}, ValueError, rf"\b{name}\b.*{rank} axes")
        if name != "q":
            yield BadInput(f"{name}-dtype", {name: x.double()}, TypeError, rf"\b{name}\b.*float32.*float64")
            yield BadInput(f"{name}-device", {name: x.to("meta")}, ValueError, rf"\b{name}\b.*device")
            yield BadInput(f"{name}-batch", {name: x[:1]}, ValueError, rf"\b{name}\b.*B=2.*\[1, ")
    yield BadInput("q-dtype", {name: x.int() for name, x in zip("qkv", (q, k, v))}, TypeError, r"\bq\b.*int32")
    yield BadInput("k-heads", {"k": k[..., :1, :]}, ValueError, r"\bk\b.*H=2.*1, 8\]")
    yield BadInput("k-size", {"k": k[..., :7]}, ValueError, r"\bk\b.*K=8.*7\]")
    yield BadInput("v-heads", {"v": v[..., :3, :]}, ValueError, r"\bv\b.*3 heads.*\b2\b")
    yield BadInput("q-no-heads", {"q": q[..., :0, :], "k": k[..., :0, :]}, ValueError, r"\bq\b.*0")
    yield BadInput("q-size-0", {"q": q[..., :0], "k": k[..., :0]}, ValueError, r"\bq\b.*at least 1.*0")
    yield BadInput("v-size-0", {"v": v[..., :0]}, ValueError, r"\bv\b.*at least 1.*0")


def _bad_options() -> Iterable[BadInput]:
    """Of the options that linear_attention and linear_attention_step share."""
    yield BadInput("decay-type", {"decay": -1.0}, TypeError, r"decay.*tensor.*float")
    yield BadInput("decay-dtype", {"decay": torch.zeros(4, dtype=torch.float16)}, TypeError, r"decay.*float32.*float16")
    yield BadInput("decay-integer", {"decay": torch.zeros(4, dtype=torch.int64)}, TypeError, r"decay.*float32.*int64")
    yield BadInput("decay-device", {"decay": torch.zeros(4, device="meta")}, ValueError, r"decay.*device")
    yield BadInput("bonus-type", {"bonus": 1.0}, TypeError, r"bonus.*tensor.*float")
    yield BadInput("bonus-shape", {"bonus": torch.zeros(2, 8)}, ValueError, r"bonus.*H=4.*\[2, 8\]")
    yield BadInput("bonus-dtype", {"bonus": torch.zeros(4, 8).half()}, TypeError, r"bonus.*float32.*float16")
    yield BadInput("normalize-type", {"normalize": 1}, TypeError, r"normalize.*True or False.*1")
    yield BadInput("scale-type", {"scale": "1"}, TypeError, r"scale.*number.*str")
    yield BadInput("scale-nan", {"scale": float("nan")}, ValueError, r"scale.*finite.*nan")
    yield BadInput("backend-unknown", {"backend": "gpu"}, ValueError, r"backend.*'reference'.*'gpu'")


LINEAR_ATTENTION = Description(
    function=linear_attention,
    op=OP,
    outputs=("out", "final_state"),
    returns={"return_final_state": True},
    mutates=(),
    cases=CASES,
    extremes=EXTREMES,
    good=linear_case("good", batch=2, tokens=6, heads=4, heads_k=2, key_dim=8, value_dim=5, decay="token", state=True),
    bad_inputs=_bad_inputs,
    torch_ops=("linear_attention_fwd_{backend}", "linear_attention_bwd_{backend}"),
    calls=_calls,
    timing=linear_case("timing", tokens=4096, heads=8, key_dim=128, decay="head"),
    peer=_peer,
)

# ---- linear_attention_step ------------------------------------------------------------------------------------------


def step_case(name: str, *, batch: int = 2, heads: int = 3, heads_k: int | None = None, key_dim: int = 32,
              value_dim: int | None = None, decay: str | None = None,
              strength: float | Callable[[Tensor], Tensor] = 0.5, bonus: bool = False,
              slots: Sequence[int] | None = None, of: int | None = None,
              layout: Callable[[Tensor], Tensor] = contiguous, **options: Any) -> Case:
    """A step; with `slots`, entry b has slot slots[b] of `of`."""
    heads_k = heads if heads_k is None else heads_k
    value_dim = key_dim if value_dim is None else value_dim
    sizes = {"B": batch, "H": heads, "K": key_dim}

    def make(dtype: torch.dtype, device: str) -> Sample:
        args: dict[str, Any] = {}
        for axis, shape in (("q", (batch, heads_k, key_dim)), ("k", (batch, heads_k, key_dim)),
                            ("v", (batch, heads, value_dim))):
            x = normal(name + axis, shape)
            args[axis] = layout((x.abs() if options.get("normalize") else x).to(device, dtype))
        wide = compute_dtype(dtype)
        columns = value_dim + options.get("normalize", False)
        state = normal(name + "state", (batch if slots is None else of, heads, key_dim, columns))
        args["state"] = (state.abs() if options.get("normalize") else state).to(device, wide)
        if decay is not None:
            args["decay"] = _decay(name + "decay", [sizes[axis] for axis in _DECAYS[decay].replace("T", "")],
                                   strength).to(device, wide)
        if bonus:
            args["bonus"] = normal(name + "bonus", (heads, key_dim)).to(device, wide)
        if slots is not None:
            args["state_indices"] = torch.tensor(slots, dtype=torch.int32, device=device)
        return Sample({**args, **options})

    return Case(name, make)


STEP_CASES = (
    step_case("step"),
    step_case("step-head", key_dim=64, value_dim=128, decay="head"),
    step_case("step-token", batch=3, key_dim=33, value_dim=70, decay="token", scale=0.3),
    step_case("step-channel", key_dim=48, value_dim=1, decay="channel"),
    step_case("step-bonus", key_dim=40, value_dim=24, decay="channel", bonus=True),
    step_case("step-normalize", key_dim=24, value_dim=32, decay="head", normalize=True),
    step_case("step-grouped", heads=6, heads_k=2, key_dim=16, value_dim=36, decay="token"),
    step_case("step-slots", batch=3, decay="head", slots=(4, 0, 2), of=5),
    step_case("step-large", batch=1, heads=2, key_dim=256, value_dim=512, decay="channel"),
    step_case("step-tiny", batch=1, heads=1, key_dim=1, value_dim=1),
    step_case("layout-strided-last", key_dim=24, layout=strided),
    step_case("layout-padded", key_dim=24, layout=padded, decay="token"),
)
STEP_EXTREMES = (
    step_case("step-strong", decay="channel", strength=lambda x: -50 - 50 * x),
    step_case("step-zero", decay="token", strength=0.0),
    step_case("step-clearing", decay="channel", strength=_clearing),
    step_case("step-no-batch", batch=0),
)


def _step_calls(sample: Sample, backend: str) -> Iterable[tuple[str, tuple]]:
    args = sample.args
    yield f"linear_attention_step_{backend}", (args["state"].clone(), *(args[name] for name in "qkv"),
                                               *_optional(sample, "decay", "bonus", "state_indices"), *_options(sample))


def _step_peer(sample: Sample) -> Callable[..., Tensor] | None:
    """In-place operations on the state, then a product with it."""
    args = sample.args
    unlike = any(name in args for name in ("bonus", "normalize", "state_indices"))
    if unlike or args["q"].shape[1] != args["v"].shape[1]:
        return None
    scale, _ = _options(sample)

    def peer(q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor | None = None) -> Tensor:
        if decay is not None:
            state.mul_((decay if decay.dim() == 3 else decay[..., None]).exp()[..., None])
        state.addcmul_(k[..., :, None].to(state.dtype), v[..., None, :].to(state.dtype))
        return ((q[..., None, :].to(state.dtype) @ state)[..., 0, :] * scale).to(q.dtype)

    return peer


def _step_bad_inputs() -> Iterable[BadInput]:
    q, k, v, state = torch.randn(2, 2, 8), torch.randn(2, 2, 8), torch.randn(2, 4, 5), torch.randn(3, 4, 8, 5)
    slots = torch.tensor([2, 0], dtype=torch.int32)
    yield from _bad_qkv(q, k, v, 3)
    yield from _bad_options()
    yield BadInput("state-type", {"state": None}, TypeError, r"\bstate\b.*tensor.*NoneType")
    yield BadInput("state-rank", {"state": state[0]}, ValueError, r"\bstate\b.*4 axes.*\[4, 8, 5\]")
    yield BadInput("state-shape", {"state": state.transpose(2, 3)}, ValueError, r"\bstate\b.*K=8")
    yield BadInput("state-count", {"state_indices": None}, ValueError, r"\bstate\b.*N=2.*\[3, 4, 8, 5\]")
    yield BadInput("state-columns", {"normalize": True}, ValueError, r"\bstate\b.*V \+ 1=6.*\[3, 4, 8, 5\]")
    yield BadInput("state-dtype", {"state": state.bfloat16()}, TypeError, r"\bstate\b.*float32.*bfloat16")
    yield BadInput("state-device", {"state": state.to("meta")}, ValueError, r"\bstate\b.*device")
    yield BadInput("state-strided", {"state": torch.randn(3, 4, 8, 10)[..., ::2]}, ValueError,
                   r"\bstate\b.*contiguous.*strides")
    yield BadInput("state-expanded", {"state": state[:1].expand(state.shape)}, ValueError,
                   r"\bstate\b.*share memory.*strides")
    yield BadInput("decay-rank", {"decay": torch.zeros(2, 4, 8, 1)}, ValueError,
                   r"decay.*\[H\], \[B, H\], \[B, H, K\].*\[2, 4, 8, 1\]")
    yield BadInput("decay-shape", {"decay": torch.zeros(2, 3)}, ValueError, r"decay.*H=4.*\[2, 3\]")
    yield BadInput("decay-positive", {"decay": torch.ones(4)}, ValueError, r"decay.*<= 0.*1.0")
    yield BadInput("state_indices-type", {"state_indices": [0, 1]}, TypeError, r"state_indices.*tensor.*list")
    yield BadInput("state_indices-dtype", {"state_indices": slots.float()}, TypeError,
                   r"state_indices.*int32 or int64.*float32")
    yield BadInput("state_indices-shape", {"state_indices": slots[:1]}, ValueError, r"state_indices.*B=2.*\[1\]")
    yield BadInput("state_indices-device", {"state_indices": slots.to("meta")}, ValueError, r"state_indices.*device")
    yield BadInput("state_indices-beyond", {"state_indices": torch.tensor([0, 3])}, ValueError,
                   r"state_indices.*3 slots.*3 for batch entry 1")
    yield BadInput("state_indices-negative", {"state_indices": torch.tensor([-1, 2])}, ValueError,
                   r"state_indices.*-1 for batch entry 0")
    yield BadInput("state_indices-twice", {"state_indices": torch.tensor([2, 2])}, ValueError,
                   r"state_indices.*different.*\[2, 2\]")
    for name, x in (("q", q), ("k", k), ("v", v), ("state", state), ("decay", torch.zeros(4)),
                    ("bonus", torch.zeros(4, 8))):
        yield BadInput(f"{name}-requires-grad", {name: x.clone().requires_grad_()}, RuntimeError,
                       rf"\b{name}\b.*requires grad.*no_grad")


LINEAR_ATTENTION_STEP = Description(
    function=linear_attention_step,
    op=OP,
    outputs=("out",),
    returns={},
    mutates=("state",),
    cases=STEP_CASES,
    extremes=STEP_EXTREMES,
    good=step_case("good", heads=4, heads_k=2, key_dim=8, value_dim=5, decay="head", slots=(2, 0), of=3),
    bad_inputs=_step_bad_inputs,
    torch_ops=("linear_attention_step_{backend}",),
    calls=_step_calls,
    timing=step_case("timing", batch=8, heads=16, key_dim=128, decay="head"),
    peer=_step_peer,
)
