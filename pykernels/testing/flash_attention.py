"""The description of flash_attention and flash_attention_decode."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.flash_attention import DECODE_OP, OP, flash_attention, flash_attention_decode
from .kit import BadInput, Case, Description, Sample
from .layouts import compute_dtype, contiguous, expanded, generator, heads_first, normal, strided
from .targets import DTYPES

# ---- Tensors -------------------------------------------------------------------------------------------------


def _padded(x: Tensor) -> Tensor:
    """A slice of a tensor with more tokens, heads and columns than needed; what surrounds it is NaN."""
    batch, tokens, heads, dim = x.shape
    whole = x.new_full((batch, tokens + 3, heads + 1, dim + 5), torch.nan)
    inner = whole[:, 1 : tokens + 1, :heads, 3 : dim + 3]
    inner.copy_(x)
    return inner


# ---- flash_attention -----------------------------------------------------------------------------------------


def attention_case(
    name: str,
    *,
    batch: int = 1,
    tq: int,
    tk: int | None = None,
    heads_q: int = 2,
    heads_k: int | None = None,
    head_dim: int = 64,
    value_dim: int | None = None,
    lengths_q: Sequence[int] | None = None,
    lengths_k: Sequence[int] | None = None,
    layout: Callable[[Tensor], Tensor] = contiguous,
    values: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
    alibi: Sequence[int] | None = None,
    bias: Sequence[int] | None = None,
    bias_dtype: torch.dtype | None = None,
    bias_values: Callable[[Tensor], Tensor] = contiguous,
    sinks: float | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    **options: Any,
) -> Case:
    """A call of flash_attention with normal inputs; `values` may change them, `layout` places them in memory.

    `alibi` and `bias` are the shapes of the slopes and the bias (of `bias_dtype`, None: that of q), `sinks` is their
    mean.
    """
    tk = tq if tk is None else tk
    heads_k = heads_q if heads_k is None else heads_k
    value_dim = head_dim if value_dim is None else value_dim

    def make(dtype: torch.dtype, device: str) -> Sample:
        q, k, v = (
            normal(name + axis, shape)
            for axis, shape in (
                ("q", (batch, tq, heads_q, head_dim)),
                ("k", (batch, tk, heads_k, head_dim)),
                ("v", (batch, tk, heads_k, value_dim)),
            )
        )
        if values is not None:
            q, k, v = values(q, k, v)
        args: dict[str, Any] = {n: layout(x.to(device, dtype)) for n, x in (("q", q), ("k", k), ("v", v))}
        for side, lengths in (("q", lengths_q), ("k", lengths_k)):
            if lengths is not None:
                offsets = [0, *itertools.accumulate(lengths)]
                args["cu_seqlens_" + side] = torch.tensor(offsets, dtype=torch.int32, device=device)
        differentiable = ["q", "k", "v"]
        if alibi is not None:
            args["alibi_slopes"] = normal(name + "alibi", alibi).abs().to(device, dtype)
        if bias is not None and bias_dtype == torch.bool:
            args["bias"] = bias_values(normal(name + "bias", bias) > -0.5).to(device)
        elif bias is not None:
            wide = bias_values(normal(name + "bias", bias))
            args["bias"] = wide.to(device, bias_dtype if bias_dtype is not None and dtype != torch.float64 else dtype)
            differentiable.append("bias")
        if sinks is not None:
            args["sinks"] = (normal(name + "sinks", (heads_q,)) + sinks).to(device, dtype)
            differentiable.append("sinks")
        return Sample({**args, **options}, tuple(differentiable))

    given = {"alibi_slopes": alibi, "bias": bias, "sinks": sinks, "dropout_p": options.get("dropout_p")}
    needs = frozenset(option for option, value in given.items() if value is not None)
    return Case(name, make, DTYPES if dtypes is None else dtypes, needs, {"head_dim": head_dim, "value_dim": value_dim})


CASES = (
    # Shapes: one, tiny, around and across the kernels' tiles, head sizes that are no multiple of anything.
    attention_case("one", tq=1, heads_q=1, head_dim=1),
    attention_case("tiny", batch=2, tq=3, tk=2, heads_q=3, head_dim=3, value_dim=5),
    attention_case("tiny-causal", batch=2, tq=5, heads_q=3, head_dim=7, value_dim=2, causal=True),
    attention_case("square-64", batch=2, tq=128, head_dim=64),
    attention_case("causal-64", batch=2, tq=128, head_dim=64, causal=True),
    attention_case("ragged", batch=2, tq=113, tk=203, head_dim=64),
    attention_case("ragged-causal", batch=1, tq=203, tk=267, heads_q=3, head_dim=59, value_dim=61, causal=True),
    attention_case("long-causal", tq=577, head_dim=128, causal=True),
    attention_case("head-1", tq=33, head_dim=1, value_dim=17, causal=True),
    attention_case("head-31-value-1", tq=47, tk=70, head_dim=31, value_dim=1),
    attention_case("head-111", tq=70, tk=131, head_dim=111, causal=True),
    attention_case("head-256", tq=65, tk=129, heads_q=1, head_dim=256),
    attention_case("head-512", tq=40, tk=72, heads_q=1, head_dim=512, causal=True),
    attention_case("head-192-value-128", tq=64, tk=96, heads_q=2, head_dim=192, value_dim=128, causal=True),
    attention_case("head-72-value-511", tq=20, tk=37, heads_q=1, head_dim=72, value_dim=511),
    attention_case("one-query", batch=3, tq=1, tk=300, heads_q=4, head_dim=64, causal=True),
    attention_case("one-key", batch=3, tq=129, tk=1, heads_q=4, head_dim=40),
    # Heads.
    attention_case("gqa", batch=2, tq=100, heads_q=6, heads_k=2, head_dim=32, causal=True),
    attention_case("mqa", batch=2, tq=75, tk=90, heads_q=5, heads_k=1, head_dim=48, value_dim=24),
    # Options.
    attention_case("scale", tq=60, head_dim=32, scale=0.37),
    attention_case("scale-negative", tq=60, head_dim=32, scale=-0.2, causal=True),
    attention_case("scale-zero", tq=60, head_dim=32, scale=0.0),
    attention_case("softcap", batch=2, tq=90, head_dim=64, softcap=1.5, scale=0.5),
    attention_case("softcap-causal-gqa", tq=150, heads_q=4, heads_k=2, head_dim=64, softcap=20.0, causal=True),
    attention_case("window", tq=260, head_dim=64, window=(31, 17)),
    attention_case("window-causal", tq=300, tk=333, head_dim=32, window=(64, None), causal=True),
    attention_case("window-right", tq=90, tk=150, head_dim=32, window=(None, 5)),
    attention_case("window-self", tq=70, head_dim=32, value_dim=16, window=(0, 0)),
    attention_case(
        "window-softcap-mqa", tq=200, heads_q=4, heads_k=1, head_dim=40, window=(20, 3), softcap=3.0
    ),
    attention_case("window-one-large-side", tq=50, head_dim=16, window=(10**9, 2**40)),
    # Packed sequences, with empty ones, ones of length 1, and tokens that belong to none.
    attention_case("packed", tq=170, heads_q=2, head_dim=64, lengths_q=(65, 0, 1, 37, 67)),
    attention_case(
        "packed-causal-gqa", tq=170, heads_q=4, heads_k=2, head_dim=32, lengths_q=(1, 128, 0, 41), causal=True
    ),
    attention_case(
        "packed-different",
        tq=120,
        tk=180,
        head_dim=40,
        value_dim=24,
        lengths_q=(33, 7, 0, 1, 60),
        lengths_k=(70, 0, 12, 30, 60),
        causal=True,
    ),
    attention_case("packed-window", tq=220, head_dim=32, lengths_q=(150, 3, 67), window=(20, 8), softcap=4.0),
    attention_case("packed-one", tq=100, head_dim=32, lengths_q=(100,), causal=True),
    attention_case("packed-none", tq=10, head_dim=8, lengths_q=()),
    # Layouts.
    attention_case(
        "layout-heads-first", batch=2, tq=65, tk=80, heads_q=3, head_dim=32, layout=heads_first, causal=True
    ),
    attention_case("layout-strided-last", batch=2, tq=33, tk=50, head_dim=24, layout=strided),
    attention_case(
        "layout-padded", batch=2, tq=65, tk=70, head_dim=33, value_dim=20, layout=_padded, causal=True
    ),
    attention_case("layout-expanded", batch=3, tq=20, head_dim=32, layout=expanded),
    # ALiBi.
    attention_case("alibi", batch=2, tq=130, tk=150, heads_q=4, heads_k=2, head_dim=32, alibi=(4,), causal=True),
    attention_case("alibi-batch-softcap", batch=2, tq=90, tk=75, heads_q=3, head_dim=64, alibi=(2, 3), softcap=3.0),
    attention_case("alibi-window", tq=300, head_dim=40, alibi=(2,), window=(70, 3), scale=-0.3),
    attention_case(
        "alibi-packed", tq=170, head_dim=64, alibi=(4, 2), lengths_q=(65, 0, 38, 67), causal=True
    ),
    attention_case("alibi-scale-zero", tq=70, head_dim=16, alibi=(2,), scale=0.0),
    # Biases, by what they are broadcast over.
    attention_case("bias", batch=2, tq=113, tk=203, heads_q=4, heads_k=2, head_dim=32, bias=(2, 4, 113, 203)),
    attention_case("bias-over-batch", batch=3, tq=90, tk=130, heads_q=4, heads_k=2, head_dim=64, bias=(1, 4, 90, 130)),
    attention_case("bias-over-heads", batch=2, tq=130, heads_q=4, heads_k=2, bias=(2, 1, 130, 130), causal=True),
    attention_case("bias-over-batch-and-heads", batch=3, tq=140, tk=133, heads_q=6, heads_k=2, head_dim=40,
                   bias=(140, 133)),
    attention_case("bias-over-rows", batch=2, tq=150, tk=90, heads_q=4, heads_k=2, head_dim=32, bias=(2, 4, 1, 90)),
    attention_case("bias-over-all-but-keys", batch=2, tq=150, tk=270, heads_q=4, heads_k=1, head_dim=32, bias=(270,)),
    attention_case("bias-over-keys", batch=2, tq=70, tk=90, heads_q=4, heads_k=2, head_dim=32, bias=(2, 4, 70, 1),
                   sinks=0.0),
    # The gradient is a sum of 10^4 terms that cancel, for which float64's budget has no yardstick's error.
    attention_case("bias-over-everything", batch=2, tq=70, heads_q=2, head_dim=32, bias=(1, 1, 1, 1), causal=True,
                   dtypes=(torch.float32, torch.bfloat16, torch.float16)),
    attention_case("bias-fp32", batch=1, tq=75, tk=301, head_dim=59, bias=(1, 2, 75, 301), bias_dtype=torch.float32),
    attention_case("bias-softcap-window", tq=190, heads_q=4, heads_k=2, head_dim=32, bias=(4, 190, 190), softcap=2.0,
                   window=(60, 20)),
    attention_case("bias-packed", tq=170, heads_q=4, heads_k=2, head_dim=32, bias=(4, 170, 170),
                   lengths_q=(65, 0, 1, 37), causal=True),
    attention_case("bias-strided", batch=2, tq=50, tk=77, head_dim=32, bias=(2, 2, 50, 77),
                   bias_values=lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)),
    attention_case("bias-boolean", batch=2, tq=113, tk=140, heads_q=4, heads_k=2, head_dim=64, bias=(2, 1, 113, 140),
                   bias_dtype=torch.bool),
    attention_case("bias-boolean-padding", batch=3, tq=70, heads_q=2, head_dim=32, bias=(3, 1, 1, 70),
                   bias_dtype=torch.bool, causal=True),
    attention_case("bias-hides", batch=2, tq=90, tk=170, heads_q=2, head_dim=32, bias=(2, 1, 90, 170),
                   bias_values=lambda x: x.masked_fill(x > 1, -torch.inf)),
    # Sinks and dropout.
    attention_case("sinks", batch=2, tq=113, tk=150, heads_q=4, heads_k=2, head_dim=64, sinks=1.0),
    attention_case("sinks-causal-window", tq=300, heads_q=3, head_dim=32, sinks=-1.0, causal=True, window=(40, None)),
    attention_case("sinks-packed", tq=120, tk=130, head_dim=40, sinks=0.5, lengths_q=(33, 7, 0, 60),
                   lengths_k=(70, 0, 12, 30), causal=True),
    attention_case("dropout", batch=2, tq=113, tk=203, heads_q=4, heads_k=2, head_dim=32, dropout_p=0.17),
    attention_case("dropout-causal-packed", tq=170, head_dim=64, lengths_q=(65, 1, 37, 66), dropout_p=0.5, causal=True),
    attention_case("everything", batch=2, tq=130, tk=160, heads_q=4, heads_k=2, head_dim=48, value_dim=40, softcap=4.0,
                   window=(90, 30), alibi=(2, 4), bias=(1, 4, 130, 160), sinks=0.0, dropout_p=0.1),
    attention_case("everything-fp32-bias-packed", tq=150, heads_q=4, heads_k=1, head_dim=64, alibi=(3, 4),
                   bias=(1, 1, 150, 150), bias_dtype=torch.float32, sinks=0.0, dropout_p=0.1, causal=True,
                   lengths_q=(70, 3, 60)),
)


def _scaled(q: float, k: float, v: float):
    return lambda *tensors: tuple(x * factor for x, factor in zip(tensors, (q, k, v)))


def _far_apart(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every third column of the keys 2^64 as large as the others, of the queries 2^-64; one query the other way about.

    Some values are 2^62 as large as the others too: magnitudes that a kernel on split numbers must take another way.
    """
    q, k, v = q.clone(), k.clone(), v.clone()
    q[..., ::3] *= 2.0**-64
    k[..., ::3] *= 2.0**64
    q[:, 7, :, 1], k[..., 1] = q[:, 7, :, 1] * 2.0**64, k[..., 1] * 2.0**-64
    v[:, 1::5, :, ::4] *= 2.0**62
    return q, k, v


def _denormal(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every other column of queries and keys, and every other value, denormal (in float32 and bfloat16)."""
    q, k, v = q.clone(), k.clone(), v.clone()
    q[..., ::2] *= 1e-39
    k[..., ::2] *= 1e-39
    v[:, ::2] *= 1e-39
    return q, k, v


EXTREMES = (
    attention_case("large-values", tq=40, head_dim=32, values=_scaled(1, 1, 1e3), causal=True),
    attention_case("small-everything", tq=40, head_dim=32, values=_scaled(1e-3, 1e-3, 1e-3)),
    attention_case(
        "rising-logits",
        tq=70,
        tk=300,
        head_dim=16,
        values=lambda q, k, v: (q, torch.linspace(0, 4, 300)[None, :, None, None] * k, v),
    ),
    attention_case("softcap-saturated", tq=60, head_dim=32, values=_scaled(3, 3, 1), softcap=1.0),
    attention_case("denormal", tq=40, head_dim=32, values=_denormal, causal=True),
    attention_case(
        "far-apart",
        tq=70,
        tk=200,
        heads_q=4,
        heads_k=2,
        head_dim=32,
        values=_far_apart,
        causal=True,
        dtypes=(torch.float32, torch.bfloat16, torch.float64),
    ),
    attention_case(
        "tiny-values", tq=70, tk=150, head_dim=32, values=_scaled(1, 1, 1e-31), dtypes=(torch.float32, torch.float64)
    ),
    # The instructions that multiply bfloat16 take denormals as zero, so this leaves bfloat16 out.
    attention_case(
        "denormal-values",
        tq=40,
        head_dim=32,
        values=_scaled(1, 1, 1e-40),
        dtypes=(torch.float32, torch.float64),
    ),
    attention_case("zeros", tq=40, head_dim=32, values=_scaled(0, 0, 1)),
    # Rows that see nothing: zeros, lse -inf, no gradient.
    attention_case("blind-rows", batch=2, tq=100, tk=30, head_dim=32, causal=True),
    attention_case("blind-window", tq=150, tk=40, head_dim=32, window=(10, 10)),
    attention_case("blind-all-but-one", tq=70, tk=1, head_dim=16, causal=True),
    attention_case("no-keys", batch=2, tq=33, tk=0, head_dim=16),
    attention_case("no-queries", batch=2, tq=0, tk=33, head_dim=16, causal=True),
    attention_case("no-batch", batch=0, tq=5, head_dim=16),
    attention_case("no-heads", tq=5, heads_q=0, heads_k=2, head_dim=16),
    attention_case("packed-all-empty", tq=0, head_dim=16, lengths_q=(0, 0)),
    attention_case("sinks-blind-rows", batch=2, tq=100, tk=30, head_dim=32, causal=True, sinks=2.0),
    attention_case("sinks-no-keys", batch=2, tq=33, tk=0, head_dim=16, sinks=0.0),
    attention_case("sinks-dominate", tq=60, head_dim=32, sinks=9.0),
    # Weights of e^-60: in float64 the rounding of the exponents alone is beyond a budget without a yardstick's own
    # error.
    attention_case("sinks-overwhelm", tq=60, head_dim=32, sinks=60.0,
                   dtypes=(torch.float32, torch.bfloat16, torch.float16)),
    attention_case("bias-blind-rows", batch=2, tq=90, tk=130, head_dim=32, bias=(1, 1, 90, 130), bias_dtype=torch.bool,
                   bias_values=lambda x: x & (torch.arange(90) % 7 > 0)[:, None], sinks=0.0),
    attention_case("bias-hides-all", batch=2, tq=40, tk=50, head_dim=32, bias=(2, 1, 40, 50),
                   bias_values=lambda x: x.masked_fill(torch.tensor([True, False])[:, None, None, None], -torch.inf)),
    attention_case("alibi-steep", tq=70, tk=600, head_dim=32, alibi=(1, 2), causal=True, values=_scaled(0.1, 1, 1)),
    attention_case(
        "packed-blind", tq=90, tk=50, head_dim=16, lengths_q=(40, 50), lengths_k=(0, 50), causal=True
    ),
)


def _options(sample: Sample, causal: bool) -> tuple[float, float, int, int]:
    """-> (scale, softcap, window_left, window_right) as the torch ops take them."""
    args = sample.args
    left, right = (-1 if side is None else side for side in args.get("window") or (None, None))
    scale = args.get("scale")
    return (
        args["q"].shape[3] ** -0.5 if scale is None else scale,
        args.get("softcap", 0.0),
        left,
        0 if args.get("causal", causal) else right,
    )


def _extras(sample: Sample) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float]:
    """-> (alibi_slopes, bias, sinks, seed, dropout_p) as the torch ops take them."""
    args = sample.args
    q, bias, dropout_p = args["q"], args.get("bias"), args.get("dropout_p", 0.0)
    wide = compute_dtype(q.dtype)
    slopes, sinks = (x if x is None else x.to(wide) for x in (args.get("alibi_slopes"), args.get("sinks")))
    return (slopes, None if bias is None else bias[(None,) * (4 - bias.dim())], sinks,
            torch.tensor([-(2**40) + 7], device=q.device) if dropout_p else None, dropout_p)


def _attention_calls(sample: Sample, backend: str) -> Iterable[tuple[str, tuple]]:
    q, k, v = (sample.args[name] for name in "qkv")
    cu_q = sample.args.get("cu_seqlens_q")
    cu_k = sample.args.get("cu_seqlens_k", cu_q)
    options, extras = _options(sample, causal=False), _extras(sample)
    forward = f"flash_attention_fwd_{backend}"
    yield forward, (q, k, v, cu_q, cu_k, *options, *extras)
    out, lse = getattr(torch.ops.pykernels, forward)(q, k, v, cu_q, cu_k, *options, *extras)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    for dlse_or_none, deterministic in ((dlse, False), (None, True)):
        yield (
            f"flash_attention_bwd_{backend}",
            (dout, dlse_or_none, q, k, v, out, lse, cu_q, cu_k, *options, deterministic, *extras, "bias" in
             sample.differentiable),
        )


def _attention_peer(sample: Sample) -> Callable[..., Tensor] | None:
    """scaled_dot_product_attention, where it computes the same."""
    args = sample.args
    causal = args.get("causal", False)
    if (
        args.get("window")
        or args.get("softcap")
        or args.keys() & {"cu_seqlens_q", "alibi_slopes", "bias", "sinks", "dropout_p"}
        or causal
        and args["q"].shape[1] != args["k"].shape[1]
    ):
        return None

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=causal,
            scale=args.get("scale"),
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2)

    return peer


def _attention_bad_inputs() -> Iterable[BadInput]:
    q, k, v = (torch.randn(2, 6, heads, 8) for heads in (4, 2, 2))
    one = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 8)
    packed = dict(zip("qkv", one))

    def cu(*offsets: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(offsets, dtype=dtype)

    for name, x in (("q", q), ("k", k), ("v", v)):
        yield BadInput(f"{name}-not-a-tensor", {name: x.tolist()}, TypeError, rf"\b{name}\b.*tensor.*list")
        yield BadInput(f"{name}-none", {name: None}, TypeError, rf"\b{name}\b.*tensor.*NoneType")
        yield BadInput(f"{name}-rank", {name: x[0]}, ValueError, rf"\b{name}\b.*4 axes.*\[6, ")
        yield BadInput(f"{name}-rank-5", {name: x[None]}, ValueError, rf"\b{name}\b.*4 axes.*\[1, 2, 6, ")
        yield BadInput(
            f"{name}-meta",
            {name: x.to("meta")},
            ValueError,
            r"\bk\b.*device" if name == "q" else rf"\b{name}\b.*device",
        )
        if name != "q":
            yield BadInput(f"{name}-dtype", {name: x.double()}, TypeError, rf"\b{name}\b.*float32.*float64")
            yield BadInput(f"{name}-batch", {name: x[:1]}, ValueError, rf"\b{name}\b.*B=2.*\[1, ")
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        yield BadInput(
            f"q-{dtype}".replace("torch.", ""),
            {name: x.to(dtype) for name, x in zip("qkv", (q, k, v))},
            TypeError,
            rf"\bq\b.*{dtype}",
        )
    yield BadInput("q-dtype-alone", {"q": q.half()}, TypeError, r"\bk\b.*float16.*float32")
    yield BadInput("k-head-dim", {"k": k[..., :7]}, ValueError, r"\bk\b.*K=8.*7\]")
    yield BadInput("v-tokens", {"v": v[:, :5]}, ValueError, r"\bv\b.*T=6.*\[2, 5, ")
    yield BadInput("v-heads", {"v": v[:, :, :1]}, ValueError, r"\bv\b.*H=2.*1, 8\]")
    yield BadInput("q-heads-ratio", {"q": q[:, :, :3]}, ValueError, r"\bq\b.*3 heads.*\b2\b")
    yield BadInput("q-fewer-heads", {"q": q[:, :, :1]}, ValueError, r"\bq\b.*1 heads.*\b2\b")
    yield BadInput("k-no-heads", {"k": k[:, :, :0], "v": v[:, :, :0]}, ValueError, r"\bk\b.*0")
    yield BadInput("head-dim-0", {"q": q[..., :0], "k": k[..., :0]}, ValueError, r"\bq\b.*1 to 512.*0")
    yield BadInput(
        "head-dim-513",
        {"q": torch.randn(2, 6, 4, 513), "k": torch.randn(2, 6, 2, 513)},
        ValueError,
        r"\bq\b.*512.*513",
    )
    yield BadInput("value-dim-0", {"v": v[..., :0]}, ValueError, r"\bv\b.*1 to 512.*0")
    yield BadInput("value-dim-513", {"v": torch.randn(2, 6, 2, 513)}, ValueError, r"\bv\b.*512.*513")
    yield from _bad_options()
    yield BadInput("deterministic-type", {"deterministic": 1}, TypeError, r"deterministic.*True or False.*1")
    yield BadInput("bias-type", {"bias": 0.5}, TypeError, r"bias.*tensor.*float")
    yield BadInput("bias-rank", {"bias": torch.zeros(1, 2, 4, 6, 6)}, ValueError,
                   r"bias.*broadcastable.*Tk=6.*\[1, 2, 4")
    yield BadInput("bias-heads", {"bias": torch.zeros(2, 6, 6)}, ValueError, r"bias.*broadcastable.*H=4.*\[2, 6, 6\]")
    yield BadInput("bias-keys", {"bias": torch.zeros(6, 5)}, ValueError, r"bias.*broadcastable.*Tk=6.*\[6, 5\]")
    yield BadInput("bias-dtype", {"bias": torch.zeros(6, 6, dtype=torch.float64)}, TypeError,
                   r"bias.*bool.*float32.*float64")
    yield BadInput("bias-integer", {"bias": torch.zeros(6, 6, dtype=torch.uint8)}, TypeError, r"bias.*bool.*uint8")
    yield BadInput("bias-device", {"bias": torch.zeros(6, 6, device="meta")}, ValueError, r"bias.*device.*meta")
    yield BadInput("dropout-type", {"dropout_p": "0.1"}, TypeError, r"dropout_p.*number.*str")
    yield BadInput("dropout-one", {"dropout_p": 1}, ValueError, r"dropout_p.*less than 1.*1")
    yield BadInput("dropout-negative", {"dropout_p": -0.1}, ValueError, r"dropout_p.*at least 0.*-0.1")
    yield BadInput("dropout-nan", {"dropout_p": float("nan")}, ValueError, r"dropout_p.*finite.*nan")
    yield BadInput("alibi-packed", {**packed, "cu_seqlens_q": cu(0, 3, 6), "alibi_slopes": torch.zeros(1, 4)},
                   ValueError, r"alibi_slopes.*sequences=2.*\[1, 4\]")

    both = {"cu_seqlens_q", "cu_seqlens_k"}
    for name in sorted(both):
        (other,) = both - {name}

        def bad(label: str, value: object, exception: type[Exception], match: str) -> BadInput:
            return BadInput(
                f"{name}-{label}", {**packed, other: cu(0, 3, 6), name: value}, exception, rf"{name}.*{match}"
            )

        yield bad("type", [0, 6], TypeError, "tensor.*list")
        yield bad("dtype", torch.tensor([0.0, 3.0, 6.0]), TypeError, "int32 or int64.*float32")
        yield bad("rank", cu(0, 3, 6)[None], ValueError, r"1 axes.*\[1, 3\]")
        yield bad("empty", cu(), ValueError, "empty")
        yield bad("start", cu(1, 3, 6), ValueError, "start at 0.*1")
        yield bad("decreases", cu(0, 4, 3), ValueError, "not decrease.*4 then 3")
        yield bad("negative", cu(0, -2, 6), ValueError, "not decrease.*0 then -2")
        yield bad("overruns", cu(0, 3, 7), ValueError, r"within the 6.*7")
        yield bad(
            "overruns-int32", cu(0, 3, 2**32 + 6, dtype=torch.int64), ValueError, f"within the 6.*{2**32 + 6}"
        )
        yield bad("device", cu(0, 3, 6).to("meta"), ValueError, "device")
    yield BadInput(
        "cu_seqlens_k-count",
        {**packed, "cu_seqlens_q": cu(0, 6), "cu_seqlens_k": cu(0, 3, 6)},
        ValueError,
        r"cu_seqlens_k.*2.*3",
    )
    yield BadInput(
        "cu_seqlens_k-alone", {**packed, "cu_seqlens_k": cu(0, 6)}, ValueError, r"cu_seqlens_q.*None"
    )
    yield BadInput(
        "cu_seqlens-batch", {"cu_seqlens_q": cu(0, 6)}, ValueError, r"\bq\b.*batch 1.*\[2, 6, 4, 8\]"
    )
    yield BadInput(
        "cu_seqlens_q-for-shorter-k",
        {"q": one[0], "k": one[1][:, :5], "v": one[2][:, :5], "cu_seqlens_q": cu(0, 6)},
        ValueError,
        "cu_seqlens_q.*within the 5.*6",
    )


def _bad_options() -> Iterable[BadInput]:
    """Of the options that flash_attention and flash_attention_decode share."""
    yield BadInput("causal-type", {"causal": 1}, TypeError, r"causal.*True or False.*1")
    yield BadInput("window-type", {"window": 5}, TypeError, r"window.*\(left, right\).*5")
    yield BadInput("window-length", {"window": (1, 2, 3)}, TypeError, r"window.*\(left, right\).*\(1, 2, 3\)")
    yield BadInput("window-element", {"window": (1.5, 0)}, TypeError, r"window.*integers.*1\.5")
    yield BadInput("window-bool", {"window": (True, 0)}, TypeError, r"window.*integers.*True")
    yield BadInput("window-negative", {"window": (-1, 0)}, ValueError, r"window.*>= 0.*-1")
    yield BadInput("scale-type", {"scale": "1"}, TypeError, r"scale.*number.*str")
    yield BadInput("scale-tensor", {"scale": torch.tensor(1.0)}, TypeError, r"scale.*number.*Tensor")
    yield BadInput("scale-nan", {"scale": float("nan")}, ValueError, r"scale.*finite.*nan")
    yield BadInput("scale-infinite", {"scale": float("inf")}, ValueError, r"scale.*finite.*inf")
    yield BadInput("softcap-type", {"softcap": None}, TypeError, r"softcap.*number.*NoneType")
    yield BadInput("softcap-negative", {"softcap": -1.0}, ValueError, r"softcap.*positive.*-1")
    yield BadInput("softcap-nan", {"softcap": float("nan")}, ValueError, r"softcap.*finite.*nan")
    yield BadInput("return_lse-type", {"return_lse": None}, TypeError, r"return_lse.*True or False.*None")
    yield BadInput("alibi-type", {"alibi_slopes": 0.5}, TypeError, r"alibi_slopes.*tensor.*float")
    yield BadInput("alibi-rank", {"alibi_slopes": torch.zeros(1, 2, 4)}, ValueError, r"alibi_slopes.*axes.*\[1, 2, 4\]")
    yield BadInput("alibi-heads", {"alibi_slopes": torch.zeros(2)}, ValueError, r"alibi_slopes.*H=4.*\[2\]")
    yield BadInput("alibi-batch", {"alibi_slopes": torch.zeros(3, 4)}, ValueError, r"alibi_slopes.*B=2.*\[3, 4\]")
    yield BadInput("alibi-dtype", {"alibi_slopes": torch.zeros(4).half()}, TypeError, r"alibi_slopes.*float32.*float16")
    yield BadInput("alibi-device", {"alibi_slopes": torch.zeros(4, device="meta")}, ValueError,
                   r"alibi_slopes.*device.*meta")
    yield BadInput("alibi-grad", {"alibi_slopes": torch.zeros(4, requires_grad=True)}, ValueError,
                   r"alibi_slopes.*require grad")
    yield BadInput("sinks-type", {"sinks": [0.0] * 4}, TypeError, r"sinks.*tensor.*list")
    yield BadInput("sinks-rank", {"sinks": torch.zeros(1, 4)}, ValueError, r"sinks.*1 axes.*\[1, 4\]")
    yield BadInput("sinks-heads", {"sinks": torch.zeros(2)}, ValueError, r"sinks.*H=4.*\[2\]")
    yield BadInput("sinks-dtype", {"sinks": torch.zeros(4).bfloat16()}, TypeError, r"sinks.*float32.*bfloat16")
    yield BadInput("sinks-device", {"sinks": torch.zeros(4, device="meta")}, ValueError, r"sinks.*device.*meta")
    yield BadInput("backend-unknown", {"backend": "gpu"}, ValueError, r"backend.*'reference'.*'gpu'")
    yield BadInput("backend-type", {"backend": None}, ValueError, r"backend.*'reference'.*None")


FLASH_ATTENTION = Description(
    function=flash_attention,
    op=OP,
    outputs=("out", "lse"),
    returns={"return_lse": True},
    mutates=(),
    cases=CASES,
    extremes=EXTREMES,
    good=attention_case("good", batch=2, tq=6, heads_q=4, heads_k=2, head_dim=8),
    bad_inputs=_attention_bad_inputs,
    torch_ops=("flash_attention_fwd_{backend}", "flash_attention_bwd_{backend}"),
    calls=_attention_calls,
    timing=attention_case("timing", tq=1024, heads_q=4, head_dim=64, causal=True),
    peer=_attention_peer,
)

# ---- flash_attention_decode ----------------------------------------------------------------------------------


def decode_case(
    name: str,
    *,
    lengths: Sequence[int],
    capacity: int,
    tq: int = 1,
    new_tokens: int | None = None,
    heads_q: int = 4,
    heads_k: int = 2,
    head_dim: int = 64,
    value_dim: int | None = None,
    layout: Callable[[Tensor], Tensor] = contiguous,
    page_size: int | None = None,
    shared_pages: int = 0,
    alibi: Sequence[int] | None = None,
    sinks: float | None = None,
    **options: Any,
) -> Case:
    """A step with `lengths` valid tokens per entry, to which `new_tokens` are appended (None: none are given).

    The rest of the cache is NaN. With a `page_size` it is paged, the pages in random order; all entries have the first
    `shared_pages` of the first one.
    """
    value_dim = head_dim if value_dim is None else value_dim
    batch = len(lengths)

    def make(dtype: torch.dtype, device: str) -> Sample:
        args: dict[str, Any] = {"q": normal(name + "q", (batch, tq, heads_q, head_dim)).to(device, dtype)}
        for axis, dim in (("k", head_dim), ("v", value_dim)):
            cache = torch.full((batch, capacity, heads_k, dim), torch.nan, dtype=torch.float64)
            for b, length in enumerate(lengths):
                cache[b, :length] = normal(f"{name}{axis}{b}", (length, heads_k, dim))
            args[axis + "_cache"] = layout(cache.to(device, dtype))
            if new_tokens is not None:
                args[axis] = normal(name + "new" + axis, (batch, new_tokens, heads_k, dim)).to(device, dtype)
        if page_size is not None:
            args |= _paged(name, args["k_cache"], args["v_cache"], page_size, shared_pages, lengths, new_tokens or 0)
            args |= {axis + "_cache": layout(args[axis + "_cache"]) for axis in "kv"}
        if alibi is not None:
            args["alibi_slopes"] = normal(name + "alibi", alibi).abs().to(device, dtype)
        if sinks is not None:
            args["sinks"] = (normal(name + "sinks", (heads_q,)) + sinks).to(device, dtype)
        args["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32, device=device)
        return Sample({**args, **options})

    given = {"alibi_slopes": alibi, "sinks": sinks, "block_table": page_size}
    needs = frozenset(option for option, value in given.items() if value is not None)
    return Case(name, make, needs=needs, sizes={"head_dim": head_dim, "value_dim": value_dim})


def _paged(name: str, k_cache: Tensor, v_cache: Tensor, page_size: int, shared: int, lengths: Sequence[int],
           new_tokens: int) -> dict[str, Tensor]:
    """The same caches in pages; the table names pages that don't exist where there are no tokens."""
    batch, capacity = k_cache.shape[:2]
    per_entry = -(-capacity // page_size)
    order = torch.randperm(batch * per_entry + 3, generator=generator(name + "pages"))
    table = order[: batch * per_entry].view(batch, per_entry)
    table[:, :shared] = table[:1, :shared]
    result = {}
    for key, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        pages = cache.new_full((batch * per_entry + 3, page_size, *cache.shape[2:]), torch.nan)
        for b in reversed(range(batch)):  # what is shared is the first entry's
            for i in range(per_entry):
                part = cache[b, i * page_size : (i + 1) * page_size]
                pages[table[b, i], : part.shape[0]] = part
        result[key] = pages
    for b, length in enumerate(lengths):
        table[b, -(-(length + new_tokens) // page_size) :] = -1 if b % 2 else 10**6
    return result | {"block_table": table.to(k_cache.device, torch.int32)}


DECODE_CASES = (
    decode_case("step", lengths=(0, 17, 63, 199), capacity=200, new_tokens=1),
    decode_case("step-long", lengths=(1500,), capacity=1600, new_tokens=1, heads_q=8, heads_k=2, head_dim=128),
    decode_case("no-append", lengths=(1, 64, 130), capacity=130),
    decode_case("draft", lengths=(5, 90), capacity=128, tq=4, new_tokens=4),
    decode_case("draft-not-causal", lengths=(5, 90), capacity=128, tq=4, new_tokens=4, causal=False),
    decode_case("draft-long", lengths=(1500, 700), capacity=1600, tq=8, new_tokens=8, heads_q=8, heads_k=2,
                head_dim=128, window=(900, None)),
    decode_case("prompt", lengths=(0, 0), capacity=150, tq=130, new_tokens=130, head_dim=32),
    decode_case("prompt-chunk", lengths=(70, 3), capacity=150, tq=65, new_tokens=65, head_dim=40, value_dim=24),
    decode_case("fewer-new-than-queries", lengths=(30, 40), capacity=50, tq=3, new_tokens=1),
    decode_case("nothing-new", lengths=(3, 8), capacity=9, new_tokens=0),
    decode_case(
        "mha", lengths=(33, 70), capacity=80, new_tokens=1, heads_q=3, heads_k=3, head_dim=59, value_dim=31
    ),
    decode_case(
        "mqa-tiny", lengths=(2,), capacity=3, new_tokens=1, heads_q=7, heads_k=1, head_dim=1, value_dim=3
    ),
    decode_case("head-512", lengths=(40, 7), capacity=50, new_tokens=1, head_dim=512, value_dim=300),
    decode_case("softcap-scale", lengths=(50, 77), capacity=100, new_tokens=1, softcap=2.0, scale=0.4),
    decode_case("window", lengths=(50, 130), capacity=140, new_tokens=1, window=(40, None)),
    decode_case(
        "window-draft", lengths=(50, 130), capacity=140, tq=5, new_tokens=5, window=(16, 2), causal=False
    ),
    decode_case("layout-heads-first", lengths=(20, 33), capacity=40, new_tokens=2, tq=2, layout=heads_first),
    decode_case("layout-padded", lengths=(20, 33), capacity=40, new_tokens=1, head_dim=33, layout=_padded),
    decode_case("layout-strided-last", lengths=(20, 33), capacity=40, head_dim=24, layout=strided),
    decode_case("head-576", lengths=(40, 300), capacity=310, new_tokens=1, heads_q=16, heads_k=1, head_dim=576,
                value_dim=512),
    decode_case("head-576-prompt", lengths=(0, 30), capacity=130, tq=70, new_tokens=70, heads_q=2, heads_k=1,
                head_dim=576, value_dim=512),
    decode_case("alibi", lengths=(50, 300), capacity=310, new_tokens=1, alibi=(4,)),
    decode_case("alibi-draft", lengths=(50, 130), capacity=140, tq=3, new_tokens=3, alibi=(2, 4), softcap=3.0),
    decode_case("sinks", lengths=(50, 600), capacity=610, new_tokens=1, sinks=1.0),
    decode_case("sinks-prompt", lengths=(0, 70), capacity=150, tq=65, new_tokens=65, head_dim=32, sinks=0.0,
                alibi=(4,)),
    # Pages.
    decode_case("paged", lengths=(50, 0, 300), capacity=320, new_tokens=1, page_size=16),
    decode_case("paged-odd", lengths=(50, 130), capacity=160, tq=4, new_tokens=4, page_size=7, head_dim=40,
                value_dim=24),
    decode_case("paged-one-token", lengths=(5, 13), capacity=16, tq=2, new_tokens=3, page_size=1, head_dim=16),
    decode_case("paged-large", lengths=(700, 513), capacity=1024, page_size=256, head_dim=128, heads_q=8),
    decode_case("paged-shared", lengths=(77, 90, 64), capacity=120, new_tokens=1, page_size=32, shared_pages=2,
                window=(70, None), sinks=0.0),
    decode_case("paged-prompt", lengths=(0, 33), capacity=300, tq=130, new_tokens=130, page_size=32, head_dim=32),
    decode_case("paged-draft", lengths=(260, 511), capacity=600, tq=8, new_tokens=8, page_size=64, alibi=(4,),
                softcap=5.0),
    decode_case("paged-draft-odd", lengths=(20, 433), capacity=448, tq=3, new_tokens=3, page_size=7, heads_q=7,
                heads_k=1, head_dim=40, value_dim=72, sinks=0.0),
    decode_case("paged-padded", lengths=(20, 33), capacity=48, new_tokens=1, page_size=8, head_dim=33, layout=_padded),
)

DECODE_EXTREMES = (
    decode_case("empty-cache", lengths=(0, 5), capacity=6),
    decode_case("all-empty", lengths=(0, 0), capacity=4),
    decode_case("no-capacity", lengths=(0,), capacity=0),
    decode_case("more-queries-than-keys", lengths=(0, 2), capacity=9, tq=5, new_tokens=1),
    decode_case("no-queries", lengths=(3, 4), capacity=9, tq=0, new_tokens=2),
    decode_case("no-batch", lengths=(), capacity=9, new_tokens=1),
    decode_case("sinks-empty-cache", lengths=(0, 5), capacity=6, sinks=0.5),
    decode_case("paged-empty", lengths=(0, 3), capacity=8, page_size=4),
)


def _decode_calls(sample: Sample, backend: str) -> Iterable[tuple[str, tuple]]:
    args = sample.args
    k_cache, v_cache, new_tokens = args["k_cache"].clone(), args["v_cache"].clone(), 0
    table, (slopes, _, sinks, _, _) = args.get("block_table"), _extras(sample)
    if "k" in args:
        new_tokens = args["k"].shape[1]
        append = (args["k"], args["v"], args["cache_seqlens"], table)
        yield f"flash_attention_append_{backend}", (k_cache, v_cache, *append)
        getattr(torch.ops.pykernels, f"flash_attention_append_{backend}")(k_cache, v_cache, *append)
    options = _options(sample, causal=True)
    yield (
        f"flash_attention_decode_{backend}",
        (args["q"], k_cache, v_cache, args["cache_seqlens"], new_tokens, *options, table, slopes, sinks),
    )


def _decode_peer(sample: Sample) -> Callable[..., Tensor] | None:
    """Writing into the cache, then scaled_dot_product_attention on its valid part, equally long in all entries."""
    args = sample.args
    lengths = set(args["cache_seqlens"].tolist())
    other = args.get("window") or args.get("softcap") or args.keys() & {"alibi_slopes", "sinks", "block_table"}
    if other or args["q"].shape[1] != 1 or len(lengths) != 1:
        return None
    (length,) = lengths

    def peer(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        cache_seqlens: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
    ) -> Tensor:
        end = length
        if k is not None:
            end += k.shape[1]
            k_cache[:, length:end] = k
            v_cache[:, length:end] = v
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k_cache[:, :end].transpose(1, 2),
            v_cache[:, :end].transpose(1, 2),
            scale=args.get("scale"),
            enable_gqa=q.shape[2] != k_cache.shape[2],
        )
        return out.transpose(1, 2)

    return peer


def _decode_bad_inputs() -> Iterable[BadInput]:
    q, new = torch.randn(2, 1, 4, 8), torch.randn(2, 2, 2, 8)
    cache, lengths = torch.randn(2, 9, 2, 8), torch.tensor([3, 7], dtype=torch.int32)
    for name, x in (("q", q), ("k_cache", cache), ("v_cache", cache), ("k", new), ("v", new)):
        yield BadInput(f"{name}-not-a-tensor", {name: x.tolist()}, TypeError, rf"\b{name}\b.*tensor.*list")
        yield BadInput(f"{name}-rank", {name: x[0]}, ValueError, rf"\b{name}\b.*4 axes")
        if name != "q":
            yield BadInput(f"{name}-dtype", {name: x.double()}, TypeError, rf"\b{name}\b.*float32.*float64")
            yield BadInput(f"{name}-device", {name: x.to("meta")}, ValueError, rf"\b{name}\b.*device.*meta")
            yield BadInput(f"{name}-batch", {name: x[:1]}, ValueError, rf"\b{name}\b.*B=2.*\[1, ")
    for name, x in (("k", new), ("v", new)):
        axis = name.upper()
        yield BadInput(
            f"{name}-alone",
            {({"k", "v"} - {name}).pop(): None},
            ValueError,
            rf"\b[kv]\b.*given with.*\b{name}\b.*None",
        )
        yield BadInput(f"{name}-heads", {name: x[:, :, :1]}, ValueError, rf"\b{name}\b.*H=2.*1, 8\]")
        yield BadInput(f"{name}-size", {name: x[..., :7]}, ValueError, rf"\b{name}\b.*{axis}=8.*7\]")
        strided = torch.randn(2, 9, 2, 16)[..., ::2]
        yield BadInput(
            f"{name}_cache-strided",
            {f"{name}_cache": strided},
            ValueError,
            rf"\b{name}_cache\b.*contiguous.*strides",
        )
        yield BadInput(
            f"{name}_cache-expanded",
            {f"{name}_cache": cache[:1].expand(cache.shape)},
            ValueError,
            rf"\b{name}_cache\b.*share memory.*strides",
        )
    yield BadInput("v-tokens", {"v": new[:, :1]}, ValueError, r"\bv\b.*Tnew=2.*\[2, 1, ")
    yield BadInput("v_cache-tokens", {"v_cache": cache[:, :8]}, ValueError, r"\bv_cache\b.*T=9.*\[2, 8, ")
    yield BadInput("k_cache-head-dim", {"k_cache": cache[..., :7]}, ValueError, r"\bk_cache\b.*K=8.*7\]")
    yield BadInput("q-heads-ratio", {"q": q[:, :, :3]}, ValueError, r"\bq\b.*3 heads.*\b2\b")
    integers = {"q": q, "k_cache": cache, "v_cache": cache, "k": new, "v": new}
    yield BadInput("q-dtype", {name: x.int() for name, x in integers.items()}, TypeError, r"\bq\b.*int32")
    yield BadInput("cache_seqlens-type", {"cache_seqlens": [3, 7]}, TypeError, r"cache_seqlens.*tensor.*list")
    yield BadInput("cache_seqlens-int", {"cache_seqlens": 3}, TypeError, r"cache_seqlens.*tensor.*int")
    yield BadInput(
        "cache_seqlens-dtype",
        {"cache_seqlens": lengths.float()},
        TypeError,
        r"cache_seqlens.*int32 or int64.*float32",
    )
    yield BadInput(
        "cache_seqlens-rank", {"cache_seqlens": lengths[None]}, ValueError, r"cache_seqlens.*1 axes.*\[1, 2\]"
    )
    yield BadInput(
        "cache_seqlens-batch", {"cache_seqlens": lengths[:1]}, ValueError, r"cache_seqlens.*B=2.*\[1\]"
    )
    yield BadInput(
        "cache_seqlens-device",
        {"cache_seqlens": lengths.to("meta")},
        ValueError,
        r"cache_seqlens.*device.*meta",
    )
    yield BadInput(
        "cache_seqlens-negative",
        {"cache_seqlens": torch.tensor([3, -1])},
        ValueError,
        r"cache_seqlens.*-1 for batch entry 1",
    )
    yield BadInput(
        "cache-overflow",
        {"cache_seqlens": torch.tensor([8, 3])},
        ValueError,
        r"cache_seqlens.*2 new.*cache of 9.*8 for batch entry 0",
    )
    yield BadInput(
        "cache-overflow-int32",
        {"cache_seqlens": torch.tensor([3, 2**32])},
        ValueError,
        rf"cache_seqlens.*{2**32} for batch entry 1",
    )
    yield BadInput(
        "cache-overflow-without-append",
        {"k": None, "v": None, "cache_seqlens": torch.tensor([3, 10])},
        ValueError,
        r"cache_seqlens.*cache of 9.*10 for batch entry 1",
    )
    wide = {"q": torch.randn(2, 1, 4, 577), "k_cache": torch.randn(2, 9, 2, 577), "k": None, "v": None}
    yield BadInput("head-dim-577", wide,
                   ValueError, r"\bq\b.*576.*577")
    pages, table = torch.randn(6, 4, 2, 8), torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32)
    paged = {"k_cache": pages, "v_cache": pages.clone(), "block_table": table}
    yield BadInput("table-type", {**paged, "block_table": [[0, 1, 2], [3, 4, 5]]}, TypeError,
                   r"block_table.*tensor.*list")
    yield BadInput("table-dtype", {**paged, "block_table": table.float()}, TypeError, r"block_table.*int32.*float32")
    yield BadInput("table-rank", {**paged, "block_table": table[0]}, ValueError, r"block_table.*2 axes.*\[3\]")
    yield BadInput("table-batch", {**paged, "block_table": table[:1]}, ValueError, r"block_table.*B=2.*\[1, 3\]")
    yield BadInput("table-device", {**paged, "block_table": table.to("meta")}, ValueError, r"block_table.*device.*meta")
    yield BadInput("table-page", {**paged, "block_table": table + 1}, ValueError,
                   r"block_table.*below 6.*6 at \[1, 2\]")
    yield BadInput("table-negative", {**paged, "block_table": table - 1}, ValueError, r"block_table.*-1 at \[0, 0\]")
    yield BadInput("table-shared-append", {**paged, "cache_seqlens": torch.tensor([8, 8]),
                                           "block_table": torch.tensor([[0, 1, 2], [3, 4, 2]])},
                   ValueError, r"block_table.*page 2.*entries 0 and 1")
    yield BadInput("table-overflow", {**paged, "cache_seqlens": torch.tensor([3, 11])}, ValueError,
                   r"cache_seqlens.*cache of 12.*11 for batch entry 1")
    yield BadInput("pages-heads", {**paged, "v_cache": pages[:, :, :1]}, ValueError, r"\bv_cache\b.*H=2.*1, 8\]")
    yield BadInput("sinks-grad", {"sinks": torch.zeros(4, requires_grad=True)}, RuntimeError, r"sinks.*requires grad")
    for name, x in integers.items():
        yield BadInput(
            f"{name}-requires-grad",
            {name: x.clone().requires_grad_()},
            RuntimeError,
            rf"\b{name}\b.*requires grad.*no_grad",
        )
    yield from _bad_options()


FLASH_ATTENTION_DECODE = Description(
    function=flash_attention_decode,
    op=DECODE_OP,
    outputs=("out", "lse"),
    returns={"return_lse": True},
    mutates=("k_cache", "v_cache"),
    cases=DECODE_CASES,
    extremes=DECODE_EXTREMES,
    good=decode_case("good", lengths=(3, 7), capacity=9, new_tokens=2, head_dim=8),
    bad_inputs=_decode_bad_inputs,
    torch_ops=("flash_attention_append_{backend}", "flash_attention_decode_{backend}"),
    calls=_decode_calls,
    timing=decode_case(
        "timing", lengths=(2000, 2000), capacity=2048, new_tokens=1, heads_q=32, heads_k=8, head_dim=128
    ),
    peer=_decode_peer,
)
