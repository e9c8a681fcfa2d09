"""The descriptions of retention and retention_step: linear attention's, where the decay is one number per head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..ops.retention import retention, retention_step
from .kit import BadInput, Case, Sample
from .layouts import compute_dtype, expanded
from .linear_attention import LINEAR_ATTENTION, LINEAR_ATTENTION_STEP, linear_case, step_case


def _with_gamma(case: Case) -> Case:
    """The case with gamma in place of the log decay."""
    def make(dtype: torch.dtype, device: str) -> Sample:
        sample = case.make(dtype, device)
        args = {"gamma" if name == "decay" else name: x.exp() if name == "decay" else x
                for name, x in sample.args.items()}
        return Sample(args, tuple("gamma" if name == "decay" else name for name in sample.differentiable))

    return Case(case.name, make, case.dtypes)


CASES = (
    linear_case("plain", batch=2, tokens=130, key_dim=64),
    *map(_with_gamma, (
        linear_case("gamma", batch=2, tokens=100, heads=4, key_dim=32, value_dim=64, decay="head", state=True),
        linear_case("scale-reverse", tokens=70, key_dim=24, decay="head", scale=1.5, reverse=True),
        linear_case("packed", tokens=120, decay="head", lengths=(65, 0, 55), state=True),
    )),
    linear_case("layout-heads-first", batch=2, tokens=65, heads=3,
                layout=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    linear_case("layout-expanded", batch=3, tokens=20, layout=expanded),
)
EXTREMES = (
    *map(_with_gamma, (
        linear_case("gamma-tiny", tokens=70, key_dim=24, decay="head", strength=lambda x: -50 - 30 * x,
                    dtypes=(torch.float32, torch.float64)),
        linear_case("gamma-one", tokens=100, key_dim=24, decay="head", strength=0.0, state=True),
    )),
    linear_case("many-heads", tokens=40, heads=30, key_dim=4),  # gamma rounds to 1 in float32
)


def _as_linear(sample: Sample) -> Sample:
    args = dict(sample.args)
    gamma = args.pop("gamma", None)
    if gamma is None:
        v = args["v"]
        wide = compute_dtype(v.dtype)
        gamma = 1 - 2.0 ** (-5 - torch.arange(v.shape[-2], device=v.device, dtype=wide))
    return Sample({**args, "decay": gamma.log()}, sample.differentiable)


def _bad_gamma(shape: tuple[int, ...]) -> Iterable[BadInput]:
    good = torch.full(shape, 0.5)
    yield BadInput("gamma-type", {"gamma": 0.9}, TypeError, r"gamma.*tensor.*float")
    yield BadInput("gamma-rank", {"gamma": good[None]}, ValueError, r"gamma.*1 axes.*\[1, 4\]")
    yield BadInput("gamma-heads", {"gamma": good[:3]}, ValueError, r"gamma.*H=4.*\[3\]")
    yield BadInput("gamma-dtype", {"gamma": good.half()}, TypeError, r"gamma.*float32.*float16")
    yield BadInput("gamma-device", {"gamma": good.to("meta")}, ValueError, r"gamma.*device")
    for value in (0.0, -0.5, 1.5):
        gamma = good.clone()
        gamma[2] = value
        yield BadInput(f"gamma-{value}", {"gamma": gamma}, ValueError, rf"gamma.*above 0.*{value} for head 2")


def _without(inputs: Iterable[BadInput], *names: str) -> Iterable[BadInput]:
    """Those of linear attention's that are retention's too."""
    for bad in inputs:
        if not set(bad.args) & set(names) and bad.name != "v-device":
            # A gamma of another number of heads would be what the message names.
            yield dataclasses.replace(bad, args={**bad.args, "gamma": None}) if bad.name == "v-heads" else bad


def _bad_inputs() -> Iterable[BadInput]:
    yield from _bad_gamma((4,))
    yield from _without(LINEAR_ATTENTION.bad_inputs(), "decay", "bonus", "normalize")
    packed = {name: torch.randn(1, 6, 4, 8) for name in "qkv"}
    for name, offsets in (("overruns", (0, 7)), ("start", (1, 6))):
        yield BadInput(f"cu_seqlens-{name}", {**packed, "initial_state": None, "cu_seqlens": torch.tensor(offsets)},
                       ValueError, "cu_seqlens")


def _step_bad_inputs() -> Iterable[BadInput]:
    yield from _bad_gamma((4,))
    yield BadInput("gamma-requires-grad", {"gamma": torch.full((4,), 0.5, requires_grad=True)}, RuntimeError,
                   r"gamma.*requires grad.*no_grad")
    yield from _without(LINEAR_ATTENTION_STEP.bad_inputs(), "decay", "bonus", "normalize")


def _peer(of: Callable) -> Callable[[Sample], Callable[..., Tensor] | None]:
    def peer(sample: Sample) -> Callable[..., Tensor] | None:
        linear = _as_linear(sample)
        plain = of(linear)
        if plain is None:
            return None
        return lambda gamma=None, **args: plain(**args, decay=linear.args["decay"] if gamma is None else gamma.log())

    return peer


RETENTION = dataclasses.replace(
    LINEAR_ATTENTION, function=retention, cases=CASES, extremes=EXTREMES,
    good=_with_gamma(linear_case("good", batch=2, tokens=6, heads=4, heads_k=2, key_dim=8, value_dim=5, decay="head",
                                 state=True)),
    bad_inputs=_bad_inputs, calls=lambda sample, backend: LINEAR_ATTENTION.calls(_as_linear(sample), backend),
    timing=linear_case("timing", tokens=4096, heads=8, key_dim=128), peer=_peer(LINEAR_ATTENTION.peer),
)

RETENTION_STEP = dataclasses.replace(
    LINEAR_ATTENTION_STEP, function=retention_step,
    cases=(
        step_case("plain", key_dim=64, value_dim=128),
        _with_gamma(step_case("gamma", batch=3, decay="head", slots=(4, 0, 2), of=5)),
        step_case("scale-grouped", heads=6, heads_k=2, key_dim=16, value_dim=36, scale=0.7),
        step_case("layout-strided-last", key_dim=24, layout=lambda x: torch.stack([x, x], dim=-1)[..., 0]),
        step_case("layout-expanded", batch=3, key_dim=24, layout=expanded),
    ),
    extremes=(_with_gamma(step_case("gamma-tiny", decay="head", strength=lambda x: -50 - 30 * x)),),
    good=_with_gamma(step_case("good", heads=4, heads_k=2, key_dim=8, value_dim=5, decay="head", slots=(2, 0), of=3)),
    bad_inputs=_step_bad_inputs, calls=lambda sample, backend: LINEAR_ATTENTION_STEP.calls(_as_linear(sample), backend),
    timing=step_case("timing", batch=8, heads=16, key_dim=128), peer=_peer(LINEAR_ATTENTION_STEP.peer),
)
