"""The description of selective_scan and selective_scan_step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.selective_scan import OP, selective_scan, selective_scan_step
from .causal_conv1d import cu_seqlens_bad_inputs, offsets, padded, state_indices_bad_inputs, token_first
from .kit import BadInput, Case, Description, Sample
from .layouts import compute_dtype, contiguous, expanded, normal, strided
from .targets import DTYPES

OPTIONAL = ("D", "z", "delta_bias", "initial_state")
_DIFFERENTIABLE = ("u", "delta", "A", "B", "C", *OPTIONAL)


def scan_case(name: str, *, batch: int = 1, channels: int, length: int, state: int = 16, B: str = "token",
              C: str = "token", groups: int = 2, given: Sequence[str] = OPTIONAL, lengths: Sequence[int] | None = None,
              layout: Callable[[Tensor], Tensor] = contiguous, wide: bool = False,
              values: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None, delta_softplus: bool = True,
              dtypes: tuple[torch.dtype, ...] = DTYPES) -> Case:
    """A call of selective_scan. B and C are "constant", "token" or "group"; `given` names the optional arguments;
    `wide` keeps delta, B and C in float32; `values` may change the inputs."""

    def make(dtype: torch.dtype, device: str) -> Sample:
        def projection(label: str, kind: str) -> Tensor:
            shape = {"constant": (channels, state), "token": (batch, state, length),
                     "group": (batch, groups, state, length)}
            return normal(name + label, shape[kind])

        sequences = batch if lengths is None else len(lengths)
        tokens = batch, channels, length
        tensors = {"u": normal(name + "u", tokens), "delta": normal(name + "delta", tokens) * 0.5 - 1.0,
                   "A": -normal(name + "A", (channels, state)).abs() * 2 - 0.05, "B": projection("B", B),
                   "C": projection("C", C)}
        optional = {"D": normal(name + "D", (channels,)), "z": normal(name + "z", tokens),
                    "delta_bias": normal(name + "delta_bias", (channels,)) * 0.3,
                    "initial_state": normal(name + "state", (sequences, channels, state))}
        if not delta_softplus:
            tensors["delta"] = tensors["delta"].exp()
            optional["delta_bias"] = optional["delta_bias"].abs()
        tensors |= {n: x for n, x in optional.items() if n in given}
        if values is not None:
            tensors = values(tensors)
        args: dict[str, Any] = {}
        for n, x in tensors.items():
            keep = n == "initial_state" or wide and n in ("delta", "A", "B", "C", "D", "delta_bias")
            x = x.to(device, compute_dtype(dtype) if keep else dtype)
            args[n] = layout(x) if n in ("u", "delta", "z") or n in "BC" and x.dim() == 3 else x
        if lengths is not None:
            args["cu_seqlens"] = offsets(lengths, device)
        return Sample({**args, "delta_softplus": delta_softplus}, tuple(n for n in _DIFFERENTIABLE if n in args))

    return Case(name, make, dtypes)


CASES = (
    scan_case("one", channels=1, length=1, state=1, given=()),
    scan_case("plain", batch=2, channels=19, length=70, given=()),
    scan_case("mamba", batch=2, channels=37, length=130, wide=True),
    scan_case("all-but-softplus", channels=20, length=65, delta_softplus=False),
    scan_case("no-state", channels=33, length=64, given=("D", "z", "delta_bias")),
    scan_case("gate-alone", channels=17, length=50, given=("z",)),
    scan_case("skip-alone", channels=17, length=50, given=("D",), delta_softplus=False),
    scan_case("long", channels=5, length=300, state=4),
    scan_case("many-channels", channels=150, length=66, state=8),
    scan_case("state-1", batch=2, channels=20, length=70, state=1),
    scan_case("state-7", channels=20, length=70, state=7, wide=True),
    scan_case("state-24", channels=20, length=40, state=24),
    scan_case("state-64", channels=18, length=33, state=64),
    scan_case("state-256", channels=3, length=20, state=256),
    scan_case("constant-B", channels=21, length=70, B="constant"),
    scan_case("constant-C", batch=2, channels=21, length=70, state=5, C="constant"),
    scan_case("constant-both", batch=2, channels=21, length=70, B="constant", C="constant"),
    scan_case("groups", batch=2, channels=42, length=70, B="group", C="group", groups=3),
    scan_case("many-groups", channels=14, length=50, B="group", C="group", groups=7, state=6),
    scan_case("groups-and-constant", channels=34, length=50, B="constant", C="group"),
    scan_case("many-tiles-of-a-group", channels=300, length=20, B="group", C="group", state=2),
    scan_case("packed", channels=21, length=200, lengths=(65, 0, 1, 63, 71)),
    scan_case("packed-rest", channels=21, length=150, lengths=(30, 64, 6), given=("D",), state=5),
    scan_case("packed-constant", channels=18, length=130, lengths=(128, 2), B="constant", C="constant"),
    scan_case("layout-token-first", batch=2, channels=35, length=70, layout=token_first),
    scan_case("layout-strided", batch=2, channels=18, length=40, layout=strided, state=4),
    scan_case("layout-padded", channels=18, length=70, layout=padded, state=8),
    scan_case("layout-expanded", batch=3, channels=18, length=30, layout=expanded),
)


def _times(**factors: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {n: x * factors.get(n, 1.0) for n, x in tensors.items()}


def _plus(**terms: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {n: x + terms.get(n, 0.0) for n, x in tensors.items()}


EXTREMES = (
    # exp(dt A) takes the rounding of dt A times its size. In float64 that would be the reference's own rounding, so
    # there dt and dt A are such that they have none.
    scan_case("forgets-at-once", channels=20, length=70, values=_times(A=1e4), dtypes=(torch.float32, torch.bfloat16,
                                                                                       torch.float16)),
    scan_case("forgets-at-once-exactly", channels=20, length=70, given=("D", "z", "initial_state"),
              delta_softplus=False,
              values=lambda t: {**t, "A": -torch.exp2((t["A"].abs() + 7).floor())}),
    scan_case("never-forgets", channels=20, length=150, values=_times(A=0.0)),
    scan_case("large-delta", channels=20, length=70, values=_plus(delta=60.0)),
    scan_case("softplus-around-its-threshold", channels=20, length=70,
              values=lambda t: {**t, "u": t["u"] * 1e-2, "delta": t["delta"] * 4 + 22, "A": t["A"] * 0.05}),
    scan_case("tiny-delta", channels=20, length=70, values=_plus(delta=-12.0)),
    scan_case("no-delta", channels=20, length=70, delta_softplus=False, given=("D", "initial_state"),
              values=_times(delta=0.0)),
    scan_case("large-inputs", channels=20, length=70, values=_times(u=1e3, initial_state=1e3)),
    scan_case("denormal-inputs", channels=20, length=70, given=(), values=_times(u=1e-38, C=1e-2)),
    scan_case("gates-open-and-shut", channels=20, length=70, values=_times(z=40.0)),
    scan_case("no-tokens", batch=2, channels=5, length=0),
    scan_case("no-batch", batch=0, channels=5, length=9),
    scan_case("no-channels", batch=2, channels=0, length=9, given=("D", "initial_state")),
    scan_case("packed-none", channels=5, length=20, lengths=(), given=("D",)),
    scan_case("packed-all-empty", channels=5, length=0, lengths=(0, 0)),
)


def _compute(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x if x is None or x.is_complex() else x.to(compute_dtype(dtype))


def _scan_calls(sample: Sample, backend: str) -> Iterable[tuple[str, tuple]]:
    args = sample.args
    u = args["u"]

    def projection(x: Tensor) -> Tensor:
        return _compute(x, u.dtype) if x.dim() == 2 else x[:, None] if x.dim() == 3 else x

    tensors = (u, args["delta"], _compute(args["A"], u.dtype), projection(args["B"]), projection(args["C"]),
               _compute(args.get("D"), u.dtype), args.get("z"), _compute(args.get("delta_bias"), u.dtype),
               args.get("initial_state"),
               args.get("cu_seqlens"), args["delta_softplus"])
    forward = f"selective_scan_fwd_{backend}"
    for keep in (False, True):
        yield forward, (*tensors, keep)
    out, state, chunks = getattr(torch.ops.pykernels, forward)(*tensors, True)
    for dstate in (torch.randn_like(state), None):
        yield f"selective_scan_bwd_{backend}", (torch.randn_like(out), dstate, *tensors, chunks)


def _slices(length: int, reverse: bool) -> Iterable[tuple[slice, slice]]:
    """The pairs (left, right) of token slices whose steps `parallel_scan` joins one after another; reversed, from the
    end."""
    widths = [1 << i for i in range((length - 1).bit_length())]
    for width, first in [(w, 2 * w - 1) for w in widths] + [(w, 3 * w - 1) for w in reversed(widths)]:
        step, count = 2 * width, len(range(first, length, 2 * width))
        if count == 0:
            continue
        slices = (slice(i, i + (count - 1) * step + 1, step) for i in (first - width, first))
        yield tuple(slice(length - x.stop, length - x.start, step) if reverse else x for x in slices)


class _ParallelScan(torch.autograd.Function):
    """h_t = a_t h_{t-1} + x_t along axis 1, in O(L) work and O(log L) steps; a and x are overwritten.

    Blelloch's two sweeps in place, forwards for h and backwards for its adjoint, as mambapy's pscan has them.
    """

    @staticmethod
    def sweep(a: Tensor, x: Tensor, reverse: bool) -> Tensor:
        for left, right in _slices(x.shape[1], reverse):
            x[:, right] += a[:, right] * x[:, left]
            a[:, right] *= a[:, left]
        return x

    @staticmethod
    def forward(ctx, a: Tensor, x: Tensor) -> Tensor:
        h = _ParallelScan.sweep(a.clone(), x.clone(), False)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx, dh: Tensor) -> tuple[Tensor, Tensor]:
        a, h = ctx.saved_tensors
        following = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], dim=1)
        dx = _ParallelScan.sweep(following, dh.clone(), True)
        da = torch.zeros_like(a)
        torch.mul(h[:, :-1], dx[:, 1:], out=da[:, 1:])
        return da, dx


parallel_scan = _ParallelScan.apply


def sequential_scan(a: Tensor, x: Tensor) -> Tensor:
    """The same, one token after another."""
    h = torch.zeros_like(x[:, 0])
    states = []
    for a_t, x_t in zip(a.unbind(1), x.unbind(1)):
        h = a_t * h + x_t
        states.append(h)
    return torch.stack(states, dim=1)


def composed(scan: Callable[[Tensor, Tensor], Tensor], u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
             D: Tensor | None = None, z: Tensor | None = None, delta_bias: Tensor | None = None, *,
             delta_softplus: bool = True) -> Tensor:
    """selective_scan of B and C [B, N, L] in PyTorch's own operations, around a scan of all states [B, L, D, N]."""
    dtype = u.dtype
    wide = torch.promote_types(dtype, torch.float32)
    u, dt = (x.transpose(1, 2).to(wide) for x in (u, delta))  # [B, L, D]
    B, C = (x.transpose(1, 2).to(wide) for x in (B, C))  # [B, L, N]
    dt = dt if delta_bias is None else dt + delta_bias
    dt = F.softplus(dt) if delta_softplus else dt
    h = scan(torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, None])
    y = (h @ C[..., None])[..., 0]
    y = y if D is None else y + D * u
    y = y.transpose(1, 2)
    return (y if z is None else y * F.silu(z.to(wide))).to(dtype)


def _scan_peer(sample: Sample) -> Callable[..., Tensor] | None:
    """A parallel scan over all states in memory, which is how plain PyTorch does it fastest."""
    args = sample.args
    if "initial_state" in args or "cu_seqlens" in args or args["B"].dim() != 3 or args["C"].dim() != 3:
        return None
    return functools.partial(composed, parallel_scan, delta_softplus=args["delta_softplus"])


def _bad_tensors(tensors: dict[str, Tensor], *, wide: Iterable[str]) -> Iterable[BadInput]:
    for name, x in tensors.items():
        word = rf"\b{name}\b"
        yield BadInput(f"{name}-type", {name: x.tolist()}, TypeError, rf"{word}.*tensor.*list")
        yield BadInput(f"{name}-device", {name: x.to("meta")}, ValueError, r"device.*meta|device.*cpu")
        if name not in ("D", "z", "delta_bias"):
            yield BadInput(f"{name}-none", {name: None}, TypeError, rf"{word}.*tensor.*NoneType")
        if name in wide:
            yield BadInput(f"{name}-dtype", {name: x.half()}, TypeError, rf"{word}.*float32.*float16")
            yield BadInput(f"{name}-double", {name: x.double()}, TypeError, rf"{word}.*float32.*float64")
        yield BadInput(f"{name}-integer", {name: x.int()}, TypeError, rf"{word}.*int32")
    yield BadInput("delta_softplus-type", {"delta_softplus": 1}, TypeError, "delta_softplus.*True or False.*1")
    yield BadInput("backend-unknown", {"backend": "gpu"}, ValueError, r"backend.*'reference'.*'gpu'")


def _scan_bad_inputs() -> Iterable[BadInput]:
    good = scan_case("bad", batch=2, channels=6, length=7, state=3, B="group", C="group").make(torch.float32,
                                                                                               "cpu").args
    tensors = {n: good[n] for n in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")}
    yield from _bad_tensors(tensors, wide=("delta", "A", "B", "C", "D", "z", "delta_bias"))
    for name in ("u", "delta", "z"):
        yield BadInput(f"{name}-rank", {name: good[name][0]}, ValueError, rf"\b{name}\b.*3 axes.*\[6, 7\]")
    for name in ("delta", "z"):
        yield BadInput(f"{name}-batch", {name: good[name][:1]}, ValueError, rf"\b{name}\b.*B=2.*\[1, 6, 7\]")
        yield BadInput(f"{name}-channels", {name: good[name][:, :5]}, ValueError, rf"\b{name}\b.*D=6.*\[2, 5, 7\]")
        yield BadInput(f"{name}-length", {name: good[name][..., :6]}, ValueError, rf"\b{name}\b.*L=7.*\[2, 6, 6\]")
    yield BadInput("u-complex", {"u": good["u"].to(torch.complex64)}, TypeError, r"\bu\b.*complex64")
    yield BadInput("A-rank", {"A": good["A"][0]}, ValueError, r"\bA\b.*2 axes.*\[3\]")
    yield BadInput("A-channels", {"A": good["A"][:5]}, ValueError, r"\bA\b.*D=6.*\[5, 3\]")
    yield BadInput("A-no-states", {"A": good["A"][:, :0]}, ValueError, r"\bA\b.*1 to 256.*\[6, 0\]")
    yield BadInput("A-states", {"A": torch.zeros(6, 257)}, ValueError, r"\bA\b.*1 to 256.*\[6, 257\]")
    yield BadInput("A-complex128", {"A": good["A"].to(torch.complex128)}, TypeError, r"\bA\b.*complex64.*complex128")
    for name in "BC":
        x = good[name]
        yield BadInput(f"{name}-rank-1", {name: x[0, 0, 0]}, ValueError, rf"\b{name}\b.*4 axes.*\[7\]")
        yield BadInput(f"{name}-rank-5", {name: x[None]}, ValueError, rf"\b{name}\b.*4 axes")
        yield BadInput(f"{name}-constant-channels", {name: torch.zeros(5, 3)}, ValueError,
                       rf"\b{name}\b.*D=6.*\[5, 3\]")
        yield BadInput(f"{name}-constant-states", {name: torch.zeros(6, 4)}, ValueError, rf"\b{name}\b.*N=3.*\[6, 4\]")
        yield BadInput(f"{name}-states", {name: x[:, 0, :2]}, ValueError, rf"\b{name}\b.*N=3.*\[2, 2, 7\]")
        yield BadInput(f"{name}-length", {name: x[..., :6]}, ValueError, rf"\b{name}\b.*L=7.*\[2, 2, 3, 6\]")
        yield BadInput(f"{name}-batch", {name: x[:1]}, ValueError, rf"\b{name}\b.*B=2.*\[1, 2, 3, 7\]")
        yield BadInput(f"{name}-groups", {name: torch.zeros(2, 4, 3, 7)}, ValueError,
                       rf"\b{name}\b.*groups.*6 channels.*4")
        yield BadInput(f"{name}-no-groups", {name: x[:, :0]}, ValueError, rf"\b{name}\b.*groups.*6 channels.*0")
        yield BadInput(f"{name}-complex", {name: x.to(torch.complex64)}, TypeError, rf"\b{name}\b.*float32.*complex64")
    yield BadInput("C-other-groups", {"C": torch.zeros(2, 3, 3, 7)}, ValueError, r"\bC\b.*2 groups.*3")
    for name in ("D", "delta_bias"):
        yield BadInput(f"{name}-rank", {name: good[name][None]}, ValueError, rf"\b{name}\b.*1 axes.*\[1, 6\]")
        yield BadInput(f"{name}-channels", {name: good[name][:5]}, ValueError, rf"\b{name}\b.*D=6.*\[5\]")
    state = good["initial_state"]
    yield BadInput("initial_state-type", {"initial_state": 0}, TypeError, "initial_state.*tensor.*int")
    yield BadInput("initial_state-rank", {"initial_state": state[0]}, ValueError, "initial_state.*3 axes")
    yield BadInput("initial_state-batch", {"initial_state": state[:1]}, ValueError, r"initial_state.*B=2.*\[1, 6, 3\]")
    yield BadInput("initial_state-states", {"initial_state": state[..., :2]}, ValueError,
                   r"initial_state.*N=3.*\[2, 6, 2\]")
    yield BadInput("initial_state-dtype", {"initial_state": state.half()}, TypeError, "initial_state.*float32.*float16")
    yield BadInput("initial_state-device", {"initial_state": state.to("meta")}, ValueError,
                   "initial_state.*device.*meta")
    yield BadInput("return_final_state-type", {"return_final_state": None}, TypeError,
                   "return_final_state.*True or False.*None")
    yield BadInput("cu_seqlens-batch", {"cu_seqlens": torch.tensor([0, 7])}, ValueError, r"\bu\b.*batch 1.*\[2, 6, 7\]")
    packed = {n: good[n][:1] for n in ("u", "delta", "z", "B", "C")} | {"initial_state": None}
    yield from cu_seqlens_bad_inputs(packed, 7)
    yield BadInput("initial_state-sequences", {**packed, "cu_seqlens": torch.tensor([0, 7]), "initial_state": state},
                   ValueError,
                   r"initial_state.*sequences=1.*\[2, 6, 3\]")


SELECTIVE_SCAN = Description(
    function=selective_scan,
    op=OP,
    outputs=("out", "final_state"),
    returns={"return_final_state": True},
    mutates=(),
    cases=CASES,
    extremes=EXTREMES,
    good=scan_case("good", batch=2, channels=6, length=7, state=3, B="group", C="group"),
    bad_inputs=_scan_bad_inputs,
    torch_ops=("selective_scan_fwd_{backend}", "selective_scan_bwd_{backend}"),
    calls=_scan_calls,
    timing=scan_case("timing", channels=1536, length=512, wide=True, given=("D", "z", "delta_bias")),
    peer=_scan_peer,
)

# ---- selective_scan_step --------------------------------------------------------------------------------------------


def scan_step_case(name: str, *, batch: int, axes: tuple[int, ...], state: int = 16, groups: int | None = None,
                   given: Sequence[str] = ("D", "z", "delta_bias"), indices: Sequence[int] | None = None,
                   slots: int | None = None,
                   tied: bool = False, wide: bool = False, strided_state: bool = False,
                   delta_softplus: bool = True) -> Case:
    """A step of x [B, *axes]; `tied` expands A, delta and the rest from one number per head; slots that no entry has
    are NaN."""
    slots = batch if slots is None else slots

    def make(dtype: torch.dtype, device: str) -> Sample:
        def per_head(label: str, leading: tuple[int, ...] = (), trailing: tuple[int, ...] = ()) -> Tensor:
            if not tied:
                return normal(name + label, (*leading, *axes, *trailing))
            x = normal(name + label, (*leading, axes[0], *[1] * (len(axes) - 1 + len(trailing))))
            return x.expand(*leading, *axes, *trailing)

        projection = (batch, state) if groups is None else (batch, groups, state)
        tensors = {"x": normal(name + "x", (batch, *axes)), "delta": per_head("delta", (batch,)),
                   "A": -per_head("A", (), (state,)).abs(), "B": normal(name + "B", projection),
                   "C": normal(name + "C", projection),
                   "D": per_head("D"), "z": normal(name + "z", (batch, *axes)), "delta_bias": per_head("delta_bias")}
        args: dict[str, Any] = {}
        for n, x in tensors.items():
            if n in ("D", "z", "delta_bias") and n not in given:
                continue
            args[n] = x.to(device, compute_dtype(dtype) if wide and n not in ("x", "z") else dtype)
        states = normal(name + "state", (slots, *axes, state))
        if indices is not None:
            states[[i for i in range(slots) if i not in indices]] = torch.nan
            args["state_indices"] = torch.tensor(indices, device=device)
        states = states.to(device, compute_dtype(dtype))
        args["state"] = states.transpose(1, -1).contiguous().transpose(1, -1) if strided_state else states
        return Sample({**args, "delta_softplus": delta_softplus})

    return Case(name, make)


STEP_CASES = (
    scan_step_case("mamba", batch=3, axes=(37,), wide=True),
    scan_step_case("one", batch=1, axes=(1,), state=1, given=()),
    scan_step_case("plain", batch=2, axes=(150,), given=(), delta_softplus=False),
    scan_step_case("groups", batch=2, axes=(36,), groups=3, state=7),
    scan_step_case("heads", batch=2, axes=(6, 20), state=24),
    scan_step_case("heads-groups", batch=2, axes=(6, 5), groups=2, state=64),
    scan_step_case("mamba-2", batch=2, axes=(4, 64), groups=1, state=128, tied=True, wide=True),
    scan_step_case("state-256", batch=1, axes=(9,), state=256, given=("z",)),
    scan_step_case("indexed", batch=4, axes=(37,), indices=(5, 0, -1, 2), slots=7),
    scan_step_case("indexed-heads", batch=2, axes=(3, 10), indices=(2, 0), slots=3, given=("D",)),
    scan_step_case("layout-strided-state", batch=2, axes=(20,), strided_state=True, state=5),
    scan_step_case("layout-strided-state-heads", batch=2, axes=(3, 8), strided_state=True),
)

STEP_EXTREMES = (
    scan_step_case("no-batch", batch=0, axes=(5,)),
    scan_step_case("no-channels", batch=2, axes=(0,)),
    scan_step_case("all-padding", batch=2, axes=(5,), indices=(-1, -1), slots=1),
)


def _step_calls(sample: Sample, backend: str) -> Iterable[tuple[str, tuple]]:
    args = sample.args
    x, indices = args["x"], args.get("state_indices")
    named = {n: args.get(n) for n in ("state", "delta", "A", "B", "C", "D", "z", "delta_bias")}
    if named["B"].dim() == 2:
        named |= {n: named[n][:, None] for n in "BC"}
    named |= {n: _compute(named[n], x.dtype) for n in ("A", "D", "delta_bias")}
    named["state"] = named["state"].clone()
    if x.dim() == 2:
        split = named["B"].shape[1], -1
        x = x.unflatten(1, split)
        named |= {n: named[n].unflatten(1, split) for n in ("state", "delta", "z") if named[n] is not None}
        named |= {n: named[n].unflatten(0, split) for n in ("A", "D", "delta_bias") if named[n] is not None}
    yield f"selective_scan_step_{backend}", (x, *named.values(), None if indices is None else indices.int(),
                                             args["delta_softplus"])


def _step_bad_inputs() -> Iterable[BadInput]:
    good = scan_step_case("bad", batch=2, axes=(6,), state=3, groups=2).make(torch.float32, "cpu").args
    tensors = {n: good[n] for n in ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "state")}
    yield from _bad_tensors(tensors, wide=("delta", "A", "B", "C", "D", "z", "delta_bias", "state"))
    yield BadInput("x-rank-1", {"x": good["x"][0]}, ValueError, r"\bx\b.*2 axes.*\[6\]")
    yield BadInput("x-rank-4", {"x": good["x"][..., None, None]}, ValueError, r"\bx\b.*3 axes")
    yield BadInput("x-heads-others-not", {"x": good["x"][..., None]}, ValueError, r"\bdelta\b.*3 axes.*\[2, 6\]")
    for name in ("delta", "z"):
        yield BadInput(f"{name}-channels", {name: good[name][:, :5]}, ValueError, rf"\b{name}\b.*D=6.*\[2, 5\]")
    yield BadInput("A-channels", {"A": good["A"][:5]}, ValueError, r"\bA\b.*D=6.*\[5, 3\]")
    yield BadInput("A-states", {"A": torch.zeros(6, 257)}, ValueError, r"\bA\b.*1 to 256.*\[6, 257\]")
    for name in "BC":
        yield BadInput(f"{name}-rank", {name: good[name][0, 0]}, ValueError, rf"\b{name}\b.*3 axes.*\[3\]")
        yield BadInput(f"{name}-states", {name: good[name][..., :2]}, ValueError, rf"\b{name}\b.*N=3.*\[2, 2, 2\]")
        yield BadInput(f"{name}-groups", {name: torch.zeros(2, 4, 3)}, ValueError,
                       rf"\b{name}\b.*groups.*6 channels.*4")
    yield BadInput("C-other-groups", {"C": torch.zeros(2, 3, 3)}, ValueError, r"\bC\b.*2 groups.*3")
    for name in ("D", "delta_bias"):
        yield BadInput(f"{name}-channels", {name: good[name][:5]}, ValueError, rf"\b{name}\b.*D=6.*\[5\]")
    yield BadInput("state-rank", {"state": good["state"][0]}, ValueError, r"\bstate\b.*3 axes")
    yield BadInput("state-slots", {"state": good["state"][:1]}, ValueError, r"\bstate\b.*slots=2.*\[1, 6, 3\]")
    yield BadInput("state-states", {"state": good["state"][..., :2]}, ValueError, r"\bstate\b.*N=3.*\[2, 6, 2\]")
    for name, x in tensors.items():
        yield BadInput(f"{name}-requires-grad", {name: x.clone().requires_grad_()}, RuntimeError,
                       rf"\b{name}\b.*requires grad.*no_grad")
    yield from state_indices_bad_inputs(good["state"])


def _step_peer(sample: Sample) -> Callable[..., Tensor] | None:
    """Operations on the whole state, in place."""
    args = sample.args
    if "state_indices" in args or args["x"].dim() != 2 or args["B"].dim() != 2:
        return None

    def peer(x: Tensor, state: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
             z: Tensor | None = None, delta_bias: Tensor | None = None) -> Tensor:
        u, dt = x.to(state.dtype), delta.to(state.dtype)
        dt = dt if delta_bias is None else dt + delta_bias
        dt = F.softplus(dt) if args["delta_softplus"] else dt
        state.mul_(torch.exp(dt[..., None] * A)).add_((dt * u)[..., None] * B[:, None])
        y = (state @ C.to(state.dtype)[..., None])[..., 0]
        y = y if D is None else y + D * u
        return (y if z is None else y * F.silu(z.to(y.dtype))).to(x.dtype)

    return peer


SELECTIVE_SCAN_STEP = Description(
    function=selective_scan_step,
    op=OP,
    outputs=("out",),
    returns={},
    mutates=("state",),
    cases=STEP_CASES,
    extremes=STEP_EXTREMES,
    good=scan_step_case("good", batch=2, axes=(6,), state=3, groups=2),
    bad_inputs=_step_bad_inputs,
    torch_ops=("selective_scan_step_{backend}",),
    calls=_step_calls,
    timing=scan_step_case("timing", batch=1, axes=(1536,), wide=True),
    peer=_step_peer,
)
