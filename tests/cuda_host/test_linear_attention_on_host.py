"""The CUDA kernels of linear attention, executed on the host: the op's ordinary cases against the float64 definition."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import host_build
import pytest
import torch

from pykernels.ops.linear_attention import OP, _query, registration
from pykernels.testing import (LINEAR_ATTENTION, LINEAR_ATTENTION_STEP, RETENTION, RETENTION_STEP, Case, compare,
                               cotangents, expected)
from pykernels.testing.linear_attention import _optional, _options, linear_case
from pykernels.testing.kit import seed

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HALF = (BF16, FP16)


def _served(case: Case) -> bool:
    decay = case.make(FP16, "cpu").args.get("decay")
    return decay is None or decay.dim() < 4


CASES = [case for case in (*LINEAR_ATTENTION.cases, *LINEAR_ATTENTION.extremes) if _served(case)]
# Every instantiation, several slices of columns, inner axes of more than one walk, several segments of 512 tokens.
SIZES = [
    linear_case("size-64", tokens=80, key_dim=64, value_dim=130, decay="token", state=True),
    linear_case("size-128", tokens=80, heads=1, key_dim=128, value_dim=128, decay="token", state=True),
    linear_case("size-256", tokens=40, heads=1, key_dim=250, value_dim=200, decay="token", state=True),
    linear_case("parts", tokens=40, heads=1, key_dim=70, value_dim=300, decay="token", normalize=True, state=True),
    linear_case("parts-bonus", tokens=40, heads=2, heads_k=1, key_dim=24, value_dim=260, decay="token", bonus=True),
    linear_case("segments", tokens=1100, heads=1, key_dim=20, value_dim=24, decay="token", strength=0.02, state=True),
    linear_case("segments-plain-reverse", batch=2, tokens=530, heads=1, key_dim=16, reverse=True),
    linear_case("segments-normalize", tokens=600, heads=1, key_dim=16, value_dim=20, decay="token", strength=0.01,
                normalize=True, state=True),
    linear_case("segments-bonus", tokens=520, heads=2, heads_k=1, key_dim=20, value_dim=16, decay="token", bonus=True,
                strength=0.02, state=True),
    linear_case("segments-packed", tokens=1700, heads=1, key_dim=16, decay="head", strength=0.02,
                lengths=(520, 0, 512, 1, 600), state=True),
]


def _run(host, case: Case, dtype: torch.dtype, seed_: int) -> dict[str, torch.Tensor]:
    """Outputs and gradients, as pykernels.testing.run gives them."""
    sample = case.make(dtype, "cpu")
    host.set_seed(seed_)
    leaves = {name: sample.args[name].detach().requires_grad_() for name in sample.differentiable}
    sample = sample.replace(**leaves)
    args = sample.args
    optional = _optional(sample, "decay", "bonus", "initial_state")
    options = (*_options(sample), args.get("reverse", False))
    out, final_state, _, _ = registration.LinearAttention.apply(
        args["q"], args["k"], args["v"], *optional, args.get("cu_seqlens"), options, "cuda_host")
    values = {"out": out, "final_state": final_state}
    given = cotangents(values)
    gradients = torch.autograd.grad([*values.values()], [*leaves.values()], [given[name] for name in values])
    return {name: x.detach() for name, x in values.items()} | {f"d{name}": x for name, x in zip(leaves, gradients)}


def _check(host, case: Case, dtype: torch.dtype, seed_: int) -> None:
    actual = _run(host, case, dtype, seed_)
    reference, yardstick = expected(LINEAR_ATTENTION, case, dtype)
    errors = [compare(name, actual[name], reference[name], yardstick[name]) for name in reference]
    assert all(error.ok for error in errors), [str(error) for error in errors]


@pytest.fixture(scope="module", autouse=True)
def ops(host):
    import linear_ops

    return linear_ops


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", HALF, ids=_named)
@pytest.mark.parametrize("case", [*CASES, *SIZES], ids=str)
def test_numbers(host, case, dtype):
    if dtype not in case.dtypes:
        pytest.skip("the case leaves this dtype out")
    _check(host, case, dtype, seed(case.name + str(dtype)))  # another order of events for each
