"""The description of causal_conv1d and causal_conv1d_step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.causal_conv1d import OP, causal_conv1d, causal_conv1d_step
from .kit import BadInput, Case, Description, Sample
from .layouts import compute_dtype, contiguous, expanded, normal, strided
from .targets import DTYPES

# ---- Tensors of [B, D, L], also for the scan ------------------------------------------------------------------------


def token_first(x: Tensor) -> Tensor:
    """As the transpose of a contiguous [B, L, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def padded(x: Tensor) -> Tensor:
    """A slice of a larger tensor; what surrounds it is NaN."""
    batch, channels, length = x.shape
    whole = x.new_full((batch, channels + 1, length + 5), torch.nan)
    inner = whole[:, :channels, 3:length + 3]
    inner.copy_(x)
    return inner


def offsets(lengths: Sequence[int], device: str, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=device)


# ---- causal_conv1d --------------------------------------------------------------------------------------------------


def conv_case(name: str, *, batch: int = 1, channels: int, length: int, width: int = 4, bias: bool = True,
              state: bool = False,
              lengths: Sequence[int] | None = None, layout: Callable[[Tensor], Tensor] = contiguous, scale: float = 1.0,
              wide: bool = False, grain: float | None = None, dtypes: tuple[torch.dtype, ...] = DTYPES,
              **options: Any) -> Case:
    """A call of causal_conv1d; `wide` keeps weight and bias in float32, `lengths` packs.

    `grain` rounds x to integers, weight and bias to multiples of itself, so that their products add up without
    rounding.
    """

    def make(dtype: torch.dtype, device: str) -> Sample:
        parameter = torch.float32 if wide and dtype != torch.float64 else dtype
        args: dict[str, Any] = {
            "x": layout((normal(name + "x", (batch, channels, length)) * scale).to(device, dtype)),
            "weight": (normal(name + "weight", (channels, width)) * width ** -0.5).to(device, parameter),
        }
        if bias:
            args["bias"] = normal(name + "bias", (channels,)).to(device, parameter)
        sequences = batch
        if lengths is not None:
            args["cu_seqlens"] = offsets(lengths, device)
            sequences = len(lengths)
        if state:
            args["initial_state"] = (normal(name + "state", (sequences, channels, width - 1)) * scale).to(device, dtype)
        differentiable = tuple(name for name in ("x", "weight", "bias", "initial_state") if name in args)
        if grain is not None:
            args |= {n: (args[n] / g).round() * g for n, g in (("x", 1.0), ("weight", grain), ("bias",
                                                                                               grain)) if n in args}
        return Sample({**args, **options}, differentiable)

    return Case(name, make, dtypes)


CASES = (
    conv_case("one", channels=1, length=1),
    conv_case("plain", batch=2, channels=37, length=130, bias=False),
    conv_case("silu", batch=2, channels=37, length=130, activation="silu"),
    conv_case("state", batch=3, channels=19, length=45, activation="silu", state=True),
    conv_case("long", channels=3, length=9001, activation="silu", state=True),
    conv_case("many-channels", channels=333, length=67, activation="silu", state=True, wide=True),
    conv_case("shorter-than-the-filter", batch=2, channels=20, length=2, width=4, state=True),
    conv_case("much-shorter", batch=2, channels=5, length=3, width=9, state=True, activation="silu"),
    conv_case("width-1", channels=40, length=100, width=1, state=True, activation="silu"),
    conv_case("width-2", batch=2, channels=40, length=100, width=2, state=True, activation="silu"),
    conv_case("width-3", channels=40, length=100, width=3, activation="silu", wide=True),
    conv_case("width-5", channels=40, length=100, width=5, state=True),
    conv_case("width-8", channels=40, length=100, width=8, activation="silu", state=True),
    conv_case("width-100", channels=4, length=250, width=100, activation="silu", state=True),
    conv_case("packed", channels=21, length=190, lengths=(65, 0, 1, 3, 120), activation="silu", state=True),
    conv_case("packed-rest", channels=21, length=90, lengths=(30, 1, 40), bias=False),
    conv_case("packed-long", channels=2, length=9500, lengths=(4096, 1, 5000, 0, 400), activation="silu"),
    conv_case("layout-token-first", batch=2, channels=75, length=130, activation="silu", state=True,
              layout=token_first),
    conv_case("layout-token-first-packed", channels=130, length=99, width=3, layout=token_first, lengths=(50, 2, 47),
              state=True),
    conv_case("layout-strided", batch=2, channels=18, length=70, activation="silu", layout=strided),
    conv_case("layout-padded", batch=2, channels=18, length=70, activation="silu", layout=padded, state=True),
    conv_case("layout-expanded", batch=3, channels=18, length=40, layout=expanded),
)

EXTREMES = (
    # SiLU's slope takes the rounding of sums a thousand times larger than what it resolves. In float64 that would be
    # the reference's own rounding, so there the sums are such that they have none.
    conv_case("large", channels=20, length=80, activation="silu", scale=1e3, dtypes=(torch.float32, torch.bfloat16,
                                                                                     torch.float16)),
    conv_case("large-exact-sums", channels=20, length=80, activation="silu", scale=1e3, grain=2.0**-4),
    conv_case("small", channels=20, length=80, activation="silu", scale=1e-4),
    conv_case("denormal", channels=20, length=80, bias=False, scale=1e-39),
    conv_case("no-tokens", batch=2, channels=20, length=0, state=True),
    conv_case("no-batch", batch=0, channels=20, length=9, state=True, activation="silu"),
    conv_case("no-channels", batch=2, channels=0, length=9, state=True),
    conv_case("packed-none", channels=5, length=20, lengths=()),
    conv_case("packed-all-empty", channels=4, length=0, lengths=(0, 0), state=True),
)


def _compute(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A parameter as the torch ops take it."""
    return None if x is None else x.to(compute_dtype(dtype))


def _conv_calls(sample: Sample, backend: str) -> Iterable[tuple[str, tuple]]:
    args = sample.args
    x = args["x"]
    tensors = (x, _compute(args["weight"], x.dtype), _compute(args.get("bias"), x.dtype), args.get("initial_state"),
               args.get("cu_seqlens"), args.get("activation") == "silu")
    yield f"causal_conv1d_fwd_{backend}", tensors
    out, state = getattr(torch.ops.pykernels, f"causal_conv1d_fwd_{backend}")(*tensors)
    for dstate in (torch.randn_like(state), None):
        yield f"causal_conv1d_bwd_{backend}", (torch.randn_like(out), dstate, *tensors)


def _conv_peer(sample: Sample) -> Callable[..., Tensor] | None:
    """torch's depthwise convolution."""
    if "initial_state" in sample.args or "cu_seqlens" in sample.args:
        return None

    def peer(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = F.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[1])[..., :x.shape[2]]
        return F.silu(out) if sample.args.get("activation") == "silu" else out

    return peer


def cu_seqlens_bad_inputs(packed: dict[str, Any], total: int) -> Iterable[BadInput]:
    """For a good packed call of `total` tokens, at least 4."""

    def bad(label: str, value: object, exception: type[Exception], match: str) -> BadInput:
        return BadInput(f"cu_seqlens-{label}", {**packed, "cu_seqlens": value}, exception, f"cu_seqlens.*{match}")

    def cu(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    yield bad("type", [0, total], TypeError, "tensor.*list")
    yield bad("dtype", cu(0, 3, total).float(), TypeError, "int32 or int64.*float32")
    yield bad("rank", cu(0, 3, total)[None], ValueError, r"1 axes.*\[1, 3\]")
    yield bad("empty", cu(), ValueError, "empty")
    yield bad("start", cu(1, 3), ValueError, "start at 0.*1")
    yield bad("decreases", cu(0, 4, 3), ValueError, "not decrease.*4 then 3")
    yield bad("overruns", cu(0, 3, total + 1), ValueError, f"within the {total}.*{total + 1}")
    yield bad("overruns-int32", cu(0, 3, 2**32, dtype=torch.int64), ValueError, f"within the {total}.*{2**32}")
    yield bad("device", cu(0, 3, total).to("meta"), ValueError, "device")


def _bad_parameters(x: Tensor, weight: Tensor, bias: Tensor) -> Iterable[BadInput]:
    for name, value, axes in (("weight", weight, 2), ("bias", bias, 1)):
        yield BadInput(f"{name}-type", {name: value.tolist()}, TypeError, rf"\b{name}\b.*tensor.*list")
        yield BadInput(f"{name}-rank", {name: value[None]}, ValueError, rf"\b{name}\b.*{axes} axes")
        yield BadInput(f"{name}-channels", {name: value[:2]}, ValueError, rf"\b{name}\b.*D=5.*\[2")
        yield BadInput(f"{name}-dtype", {name: value.half()}, TypeError, rf"\b{name}\b.*float32.*float16")
        yield BadInput(f"{name}-device", {name: value.to("meta")}, ValueError, rf"\b{name}\b.*device.*meta")
    yield BadInput("weight-none", {"weight": None}, TypeError, r"\bweight\b.*tensor.*NoneType")
    yield BadInput("weight-width-0", {"weight": weight[:, :0]}, ValueError, r"\bweight\b.*at least 1.*\[5, 0\]")
    yield BadInput("activation-name", {"activation": "relu"}, ValueError, "activation.*'silu'.*'relu'")
    yield BadInput("activation-type", {"activation": True}, ValueError, "activation.*'silu'.*True")
    yield BadInput("backend-unknown", {"backend": "gpu"}, ValueError, r"backend.*'reference'.*'gpu'")


def _conv_bad_inputs() -> Iterable[BadInput]:
    x, weight, bias, state = torch.randn(2, 5, 6), torch.randn(5, 4), torch.randn(5), torch.randn(2, 5, 3)
    yield BadInput("x-type", {"x": x.tolist()}, TypeError, r"\bx\b.*tensor.*list")
    yield BadInput("x-none", {"x": None}, TypeError, r"\bx\b.*tensor.*NoneType")
    yield BadInput("x-rank", {"x": x[0]}, ValueError, r"\bx\b.*3 axes.*\[5, 6\]")
    for dtype in (torch.int64, torch.bool, torch.complex64):
        yield BadInput(f"x-{dtype}".replace("torch.", ""), {"x": x.to(dtype)}, TypeError, rf"\bx\b.*{dtype}")
    yield from _bad_parameters(x, weight, bias)
    yield BadInput("initial_state-type", {"initial_state": 0}, TypeError, "initial_state.*tensor.*int")
    yield BadInput("initial_state-rank", {"initial_state": state[0]}, ValueError, "initial_state.*3 axes")
    yield BadInput("initial_state-batch", {"initial_state": state[:1]}, ValueError, r"initial_state.*B=2.*\[1, 5, 3\]")
    yield BadInput("initial_state-channels", {"initial_state": state[:, :4]}, ValueError,
                   r"initial_state.*D=5.*\[2, 4, 3\]")
    yield BadInput("initial_state-width", {"initial_state": torch.randn(2, 5, 4)}, ValueError,
                   r"initial_state.*W-1=3.*\[2, 5, 4\]")
    yield BadInput("initial_state-dtype", {"initial_state": state.half()}, TypeError, "initial_state.*float32.*float16")
    yield BadInput("initial_state-device", {"initial_state": state.to("meta")}, ValueError,
                   "initial_state.*device.*meta")
    yield BadInput("return_final_state-type", {"return_final_state": 1}, TypeError,
                   "return_final_state.*True or False.*1")
    yield BadInput("cu_seqlens-batch", {"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"\bx\b.*batch 1.*\[2, 5, 6\]")
    packed = {"x": x[:1], "initial_state": None}
    yield from cu_seqlens_bad_inputs(packed, 6)
    yield BadInput("initial_state-sequences", {"x": x[:1], "cu_seqlens": torch.tensor([0, 2, 4, 6])}, ValueError,
                   r"initial_state.*sequences=3.*\[2, 5, 3\]")


CAUSAL_CONV1D = Description(
    function=causal_conv1d,
    op=OP,
    outputs=("out", "final_state"),
    returns={"return_final_state": True},
    mutates=(),
    cases=CASES,
    extremes=EXTREMES,
    good=conv_case("good", batch=2, channels=5, length=6, state=True),
    bad_inputs=_conv_bad_inputs,
    torch_ops=("causal_conv1d_fwd_{backend}", "causal_conv1d_bwd_{backend}"),
    calls=_conv_calls,
    timing=conv_case("timing", channels=1536, length=2048, activation="silu"),
    peer=_conv_peer,
)

# ---- causal_conv1d_step ---------------------------------------------------------------------------------------------


def conv_step_case(name: str, *, batch: int, channels: int, width: int = 4, tokens: int | None = None,
                   indices: Sequence[int] | None = None, slots: int | None = None, bias: bool = True,
                   layout: Callable[[Tensor], Tensor] = contiguous, wide: bool = False, **options: Any) -> Case:
    """A step of one token (tokens None) or a few; slots that no entry has are NaN."""
    slots = batch if slots is None else slots

    def make(dtype: torch.dtype, device: str) -> Sample:
        parameter = torch.float32 if wide and dtype != torch.float64 else dtype
        state = normal(name + "state", (slots, channels, width - 1))
        args: dict[str, Any] = {"x": normal(name + "x", (batch, channels) if tokens is None else (batch, channels,
                                                                                                  tokens))}
        if indices is not None:
            state[[i for i in range(slots) if i not in indices]] = torch.nan
            args["state_indices"] = torch.tensor(indices, dtype=torch.int64, device=device)
        args["x"] = args["x"].to(device, dtype)
        args["state"] = layout(state.to(device, dtype))
        args["weight"] = normal(name + "weight", (channels, width)).to(device, parameter)
        if bias:
            args["bias"] = normal(name + "bias", (channels,)).to(device, parameter)
        return Sample({**args, **options})

    return Case(name, make)


STEP_CASES = (
    conv_step_case("step", batch=3, channels=37, activation="silu"),
    conv_step_case("one", batch=1, channels=1, width=2, bias=False),
    conv_step_case("wide", batch=2, channels=300, activation="silu", wide=True),
    conv_step_case("width-1", batch=2, channels=20, width=1),
    conv_step_case("width-9", batch=2, channels=20, width=9),
    conv_step_case("tokens", batch=2, channels=70, tokens=3, activation="silu"),
    conv_step_case("many-tokens", batch=2, channels=33, tokens=11, activation="silu"),
    conv_step_case("indexed", batch=4, channels=37, indices=(5, 0, -1, 2), slots=7, activation="silu"),
    conv_step_case("indexed-tokens", batch=3, channels=20, tokens=2, indices=(2, -1, 0), slots=4),
    conv_step_case("layout-token-first", batch=2, channels=40, tokens=2, layout=token_first, activation="silu"),
    conv_step_case("layout-padded", batch=2, channels=40, layout=padded, activation="silu"),
    conv_step_case("layout-strided", batch=2, channels=40, layout=strided, indices=(1, 0)),
)

STEP_EXTREMES = (
    conv_step_case("no-batch", batch=0, channels=5),
    conv_step_case("no-channels", batch=2, channels=0),
    conv_step_case("no-tokens", batch=2, channels=5, tokens=0),
    conv_step_case("all-padding", batch=2, channels=5, indices=(-1, -1), slots=1),
)


def _step_calls(sample: Sample, backend: str) -> Iterable[tuple[str, tuple]]:
    args = sample.args
    x = args["x"] if args["x"].dim() == 3 else args["x"][..., None]
    indices = args.get("state_indices")
    yield f"causal_conv1d_step_{backend}", (x, args["state"].clone(), _compute(args["weight"], x.dtype),
                                            _compute(args.get("bias"), x.dtype),
                                            None if indices is None else indices.int(),
                                            args.get("activation") == "silu")


def state_indices_bad_inputs(state: Tensor) -> Iterable[BadInput]:
    """For a good call of batch 2 with 2 slots."""

    def bad(label: str, value: object, exception: type[Exception], match: str) -> BadInput:
        return BadInput(f"state_indices-{label}", {"state_indices": value}, exception, f"state_indices.*{match}")

    yield bad("type", [0, 1], TypeError, "tensor.*list")
    yield bad("dtype", torch.tensor([0.0, 1.0]), TypeError, "int32 or int64.*float32")
    yield bad("rank", torch.tensor([[0, 1]]), ValueError, r"1 axes.*\[1, 2\]")
    yield bad("batch", torch.tensor([0]), ValueError, r"B=2.*\[1\]")
    yield bad("beyond", torch.tensor([0, 2]), ValueError, "below 2.*2 for batch entry 1")
    yield bad("negative", torch.tensor([-2, 0]), ValueError, "below 2.*-2 for batch entry 0")
    yield bad("twice", torch.tensor([1, 1]), ValueError, "once.*1 again for batch entry 1")
    yield bad("device", torch.tensor([0, 1]).to("meta"), ValueError, "device.*meta")
    yield BadInput("state-expanded", {"state": state[:1].expand(state.shape)}, ValueError,
                   r"\bstate\b.*share memory.*strides")


def _step_bad_inputs() -> Iterable[BadInput]:
    x, state, weight, bias = torch.randn(2, 5), torch.randn(2, 5, 3), torch.randn(5, 4), torch.randn(5)
    yield BadInput("x-type", {"x": x.tolist()}, TypeError, r"\bx\b.*tensor.*list")
    yield BadInput("x-rank-1", {"x": x[0]}, ValueError, r"\bx\b.*2 axes.*\[5\]")
    yield BadInput("x-rank-4", {"x": x[..., None, None]}, ValueError, r"\bx\b.*3 axes.*\[2, 5, 1, 1\]")
    yield BadInput("x-int", {"x": x.int()}, TypeError, r"\bx\b.*int32")
    yield from _bad_parameters(x, weight, bias)
    yield BadInput("state-type", {"state": None}, TypeError, r"\bstate\b.*tensor.*NoneType")
    yield BadInput("state-rank", {"state": state[0]}, ValueError, r"\bstate\b.*3 axes")
    yield BadInput("state-slots", {"state": state[:1]}, ValueError, r"\bstate\b.*slots=2.*\[1, 5, 3\]")
    yield BadInput("state-width", {"state": state[..., :2]}, ValueError, r"\bstate\b.*W-1=3.*\[2, 5, 2\]")
    yield BadInput("state-dtype", {"state": state.half()}, TypeError, r"\bstate\b.*float32.*float16")
    yield BadInput("state-device", {"state": state.to("meta")}, ValueError, r"\bstate\b.*device.*meta")
    for name, value in (("x", x), ("state", state), ("weight", weight), ("bias", bias)):
        yield BadInput(f"{name}-requires-grad", {name: value.clone().requires_grad_()}, RuntimeError,
                       rf"\b{name}\b.*requires grad.*no_grad")
    yield from state_indices_bad_inputs(state)


def _step_peer(sample: Sample) -> Callable[..., Tensor] | None:
    """A product with the joined state and token, which then shifts."""
    args = sample.args
    if "state_indices" in args or args["x"].dim() != 2:
        return None

    def peer(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen = torch.cat([state, x[..., None]], dim=2)
        state.copy_(seen[..., 1:])
        out = (seen * weight).sum(2)
        out = out if bias is None else out + bias
        return F.silu(out) if args.get("activation") == "silu" else out

    return peer


CAUSAL_CONV1D_STEP = Description(
    function=causal_conv1d_step,
    op=OP,
    outputs=("out",),
    returns={},
    mutates=("state",),
    cases=STEP_CASES,
    extremes=STEP_EXTREMES,
    good=conv_step_case("good", batch=2, channels=5),
    bad_inputs=_step_bad_inputs,
    torch_ops=("causal_conv1d_step_{backend}",),
    calls=_step_calls,
    timing=conv_step_case("timing", batch=8, channels=1536, activation="silu"),
    peer=_step_peer,
)
