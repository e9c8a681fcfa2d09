"""The description of fft_conv."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.fft_conv import OP, fft_conv
from .kit import BadInput, Case, Description, Sample
from .layouts import compute_dtype, contiguous, expanded, normal, padded, strided


def _channels_last(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def conv_case(
    name: str,
    *,
    batch: int = 1,
    channels: int = 2,
    length: int,
    taps: int | None = None,
    groups: int | None = None,
    taps_rev: int | None = None,
    lag: int | None = None,
    skip: bool = False,
    pre: bool = False,
    post: bool = False,
    mode: str | None = None,
    narrow: bool = False,
    wide_gates: bool = False,
    layout: Callable[[Tensor], Tensor] = contiguous,
    scale: float = 1.0,
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> Case:
    """A call of fft_conv with normal inputs, u times `scale`; `narrow` keeps kernels and D in the dtype of u,
    `wide_gates` has gates in float32 (float64)."""
    groups = channels if groups is None else groups
    taps = length if taps is None else taps

    def make(dtype: torch.dtype, device: str) -> Sample:
        of_kernel, of_gate = dtype if narrow else compute_dtype(dtype), compute_dtype(dtype) if wide_gates else dtype
        row = batch, channels, length
        args: dict[str, Any] = {
            "u": layout((scale * normal(name + "u", row)).to(device, dtype)),
            "k": layout(normal(name + "k", (groups, taps)).to(device, of_kernel)),
        }
        if taps_rev is not None:
            args["k_rev"] = layout(normal(name + "k_rev", (groups, taps_rev)).to(device, of_kernel))
        if skip:
            args["D"] = normal(name + "D", (channels,)).to(device, of_kernel)
        for gate, on in (("pre_gate", pre), ("post_gate", post)):
            if on:
                args[gate] = layout(normal(name + gate, row).to(device, of_gate))
        differentiable = tuple(args)
        options = {name: x for name, x in (("k_rev_lag", lag), ("mode", mode)) if x is not None}
        return Sample({**args, **options}, differentiable)

    return Case(name, make) if dtypes is None else Case(name, make, dtypes)


_ALL: dict[str, Any] = {"skip": True, "pre": True, "post": True}

CASES = (
    # Short kernels, computed directly: one tap, around vectors and tiles, longer than the sequence.
    conv_case("one", length=1, channels=1, **_ALL),
    conv_case("tiny", batch=2, channels=3, length=5, taps=3, **_ALL),
    conv_case("short", batch=2, length=150, taps=4, **_ALL),
    conv_case("short-tiles", length=2100, taps=33, **_ALL),
    conv_case("short-one-tap", batch=2, length=70, taps=1),
    conv_case("short-beyond", length=11, taps=40, **_ALL),
    conv_case("short-two-sided", length=1100, taps=9, taps_rev=14, **_ALL),
    conv_case("short-lag-0", batch=2, length=90, taps=3, taps_rev=8, lag=0),
    conv_case("short-circular", batch=2, length=1200, taps=12, mode="circular", **_ALL),
    conv_case("short-circular-two-sided", channels=4, length=45, taps=5, taps_rev=6, lag=0, mode="circular", **_ALL),
    conv_case("short-circular-beyond", length=10, taps=37, taps_rev=4, mode="circular"),
    # Kernels as long as the sequence: exact and ragged lengths, both factors of the transform.
    conv_case("long", batch=2, length=256, **_ALL),
    conv_case("long-prime", batch=3, length=509, **_ALL),
    conv_case("long-three", length=700, **_ALL),
    conv_case("long-1024", batch=2, length=1024),
    conv_case("long-1531", length=1531, **_ALL),
    conv_case("long-skip", batch=2, length=300, skip=True),
    conv_case("long-pre", batch=2, length=300, pre=True),
    conv_case("long-post", batch=2, length=300, post=True),
    conv_case("long-beyond", length=400, taps=1000, **_ALL),
    conv_case("long-two-sided", batch=2, length=600, taps_rev=600, **_ALL),
    conv_case("long-two-sided-lag-0", length=333, taps_rev=500, lag=0, skip=True),
    conv_case("long-reverse", length=500, taps=1, taps_rev=450, post=True),
    conv_case("long-circular", batch=2, length=512, mode="circular", **_ALL),
    conv_case("long-circular-prime", length=401, taps=300, mode="circular", **_ALL),
    conv_case("long-circular-beyond", length=300, taps=777, taps_rev=310, mode="circular", **_ALL),
    conv_case("long-circular-two-sided", length=1000, taps=300, taps_rev=200, lag=0, mode="circular", post=True),
    # In between: several windows.
    conv_case("windows", length=5000, taps=150, channels=4, **_ALL),
    conv_case("windows-two-sided", length=4500, taps=100, taps_rev=130, channels=4, **_ALL),
    conv_case("windows-circular", length=4200, taps=170, taps_rev=60, channels=4, mode="circular", **_ALL),
    # Kernels shared by groups of channels; dtypes; layouts.
    conv_case("groups", batch=2, channels=6, groups=2, length=300, **_ALL),
    conv_case("groups-short", batch=2, channels=6, groups=3, length=60, taps=7, taps_rev=3, **_ALL),
    conv_case("groups-one", batch=3, channels=4, groups=1, length=270, taps_rev=100, **_ALL),
    conv_case("narrow", batch=2, length=280, narrow=True, taps_rev=30, **_ALL),
    conv_case("wide-gates", batch=2, length=280, wide_gates=True, **_ALL),
    conv_case("many-channels", channels=70, length=40, **_ALL),
    conv_case("layout-channels-last", batch=2, length=260, layout=_channels_last, taps_rev=20, **_ALL),
    conv_case("layout-strided-last", batch=2, length=60, taps=20, layout=strided, **_ALL),
    conv_case("layout-padded", batch=2, length=301, layout=padded, **_ALL),
    conv_case("layout-expanded", batch=3, length=260, layout=expanded, groups=2, **_ALL),
)

EXTREMES = (
    conv_case("large-values", length=300, scale=1e3, skip=True),
    conv_case("large-32-bit", length=300, scale=1e30, skip=True, dtypes=(torch.float32, torch.bfloat16, torch.float64)),
    conv_case(
        "small-32-bit", length=300, scale=1e-30, skip=True, dtypes=(torch.float32, torch.bfloat16, torch.float64)
    ),
    conv_case("denormal", length=40, taps=8, scale=1e-40, dtypes=(torch.float32, torch.float64)),
    conv_case("zeros", length=300, scale=0.0, **_ALL),
    conv_case("no-samples", batch=2, length=0, taps=4, **_ALL),
    conv_case("no-batch", batch=0, length=300, taps_rev=7, **_ALL),
    conv_case("no-channels", channels=0, length=300, taps=4, **_ALL),
)


def _calls(sample: Sample, backend: str) -> Iterable[tuple[str, tuple]]:
    args = sample.args
    wide, u = compute_dtype(sample.args["u"].dtype), args["u"]
    kernels = [None if args.get(name) is None else args[name].to(wide) for name in ("k", "k_rev", "D")]
    gates = [None if args.get(name) is None else args[name].to(u.dtype) for name in ("pre_gate", "post_gate")]
    arguments = (u, *kernels, *gates, args.get("k_rev_lag", 1), args.get("mode") == "circular")
    yield f"fft_conv_fwd_{backend}", arguments
    dout = torch.randn_like(u)
    for input_gradient, kernel_gradient in ((True, True), (True, False), (False, True), (False, False)):
        yield f"fft_conv_bwd_{backend}", (dout, *arguments, input_gradient, kernel_gradient)


def torch_fft(
    u: Tensor, k: Tensor, D: Tensor | None = None, pre_gate: Tensor | None = None, post_gate: Tensor | None = None
) -> Tensor:
    """The usual composition: real transforms of twice the length."""
    length = u.shape[-1]
    size, wide = 2 * length, compute_dtype(u.dtype)
    x = u if pre_gate is None else pre_gate * u
    out = torch.fft.irfft(torch.fft.rfft(x.to(wide), n=size) * torch.fft.rfft(k.to(wide), n=size), n=size)[..., :length]
    if D is not None:
        out = out + x * D[:, None]
    out = out.to(u.dtype)
    return out if post_gate is None else post_gate * out


def _peer(sample: Sample) -> Callable[..., Tensor] | None:
    args = sample.args
    served = not {"k_rev", "mode"} & set(args) and args["k"].shape == args["u"].shape[1:]
    return torch_fft if served else None


def _bad_inputs() -> Iterable[BadInput]:
    u, k = torch.randn(2, 4, 6), torch.randn(4, 5)
    for name, x, axes in (
        ("u", u, 3),
        ("k", k, 2),
        ("k_rev", k, 2),
        ("D", torch.ones(4), 1),
        ("pre_gate", u, 3),
        ("post_gate", u, 3),
    ):
        yield BadInput(f"{name}-not-a-tensor", {name: x.tolist()}, TypeError, rf"\b{name}\b.*tensor.*list")
        yield BadInput(f"{name}-rank", {name: x[None]}, ValueError, rf"\b{name}\b.*{axes} axes")
        if name != "u":
            yield BadInput(f"{name}-dtype", {name: x.double()}, TypeError, rf"\b{name}\b.*float32.*float64")
            yield BadInput(f"{name}-integer", {name: x.int()}, TypeError, rf"\b{name}\b.*float32.*int32")
            yield BadInput(f"{name}-device", {name: x.to("meta")}, ValueError, rf"\b{name}\b.*device")
    yield BadInput("u-dtype", {"u": u.int()}, TypeError, r"\bu\b.*int32")
    yield BadInput("k-groups", {"k": k[:3]}, ValueError, r"\bk\b.*group.*4 channels.*3 rows")
    yield BadInput("k-no-groups", {"k": k[:0]}, ValueError, r"\bk\b.*group.*4 channels.*0 rows")
    yield BadInput("k-no-taps", {"k": k[:, :0]}, ValueError, r"\bk\b.*at least one tap.*\[4, 0\]")
    yield BadInput("k_rev-no-taps", {"k_rev": k[:, :0]}, ValueError, r"k_rev.*at least one tap.*\[4, 0\]")
    yield BadInput("k_rev-groups", {"k_rev": k[:2]}, ValueError, r"k_rev.*G=4.*\[2, 5\]")
    yield BadInput("k_rev_lag-value", {"k_rev_lag": 2}, ValueError, r"k_rev_lag.*0 or 1.*2")
    yield BadInput("k_rev_lag-type", {"k_rev_lag": True}, ValueError, r"k_rev_lag.*0 or 1.*True")
    yield BadInput("D-size", {"D": torch.ones(3)}, ValueError, r"\bD\b.*D=4.*\[3\]")
    for name in ("pre_gate", "post_gate"):
        yield BadInput(f"{name}-shape", {name: u[:, :, :5]}, ValueError, rf"{name}.*L=6.*\[2, 4, 5\]")
        yield BadInput(f"{name}-half", {name: u.half()}, TypeError, rf"{name}.*float32.*float16")
    yield BadInput("mode-value", {"mode": "same"}, ValueError, r"mode.*'causal'.*'circular'.*'same'")
    yield BadInput("mode-type", {"mode": True}, ValueError, r"mode.*'causal'.*True")
    yield BadInput("backend-unknown", {"backend": "gpu"}, ValueError, r"backend.*'reference'.*'gpu'")


FFT_CONV = Description(
    function=fft_conv,
    op=OP,
    outputs=("out",),
    returns={},
    mutates=(),
    cases=CASES,
    extremes=EXTREMES,
    good=conv_case("good", batch=2, channels=4, length=6, taps=5, taps_rev=3, lag=0, mode="causal", **_ALL),
    bad_inputs=_bad_inputs,
    torch_ops=("fft_conv_fwd_{backend}", "fft_conv_bwd_{backend}"),
    calls=_calls,
    timing=conv_case("timing", batch=4, channels=64, length=4096, skip=True),
    peer=_peer,
)
