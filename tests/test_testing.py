"""The kit itself: a check that cannot fail checks nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pykernels.testing import OPS, Target, check, compare, expected, run
from pykernels.testing.kit import cotangents

REFERENCE = Target("reference", "cpu")


def _tampered(op, change):
    """The description with a function whose outputs are changed."""

    def function(**args):
        return tuple(change(x) for x in op.function(**args))

    return dataclasses.replace(op, function=function)


def _errors(op, change, dtype=torch.float32):
    """Of the tampered function against the expectations of the true one."""
    reference, yardstick = expected(op, op.good, dtype)
    actual = run(_tampered(op, change), op.good.make(dtype, "cpu"), "reference", grad=False)
    return [compare(name, actual[name], reference[name], yardstick[name]) for name in op.outputs]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_wrong_functions_are_caught(op, dtype):
    assert all(error.ok for error in _errors(op, lambda x: x, dtype))
    small = 40 * torch.finfo(dtype).eps
    for change in (
        torch.zeros_like,
        lambda x: x * (1 + small),
        lambda x: x.flip(0),
        lambda x: x + torch.nan,
        lambda x: x.to(torch.float16),
        lambda x: x[:1],
    ):
        assert not any(error.ok for error in _errors(op, change, dtype))


def test_compare_wants_infinities_and_nans_where_they_belong():
    reference = torch.tensor([1.0, -torch.inf, torch.nan, torch.inf], dtype=torch.float64)
    right = reference.float()
    assert compare("x", right, reference, right).ok
    for i, wrong in (
        (0, torch.nan),
        (0, torch.inf),
        (1, torch.inf),
        (1, torch.nan),
        (1, -3e38),
        (2, 0.0),
        (2, torch.inf),
        (3, 1.0),
    ):
        x = right.clone()
        x[i] = wrong
        assert not compare("x", x, reference, right).ok, (i, wrong)


def test_compare_wants_shape_and_dtype():
    x = torch.ones(3, dtype=torch.float64)
    assert compare("x", x, x, x).ok
    assert not compare("x", x.float(), x, x).ok
    assert not compare("x", x[:2], x, x).ok


def test_the_budget_is_that_of_the_design():
    reference = torch.tensor([2.0, 1.0], dtype=torch.float64)
    plain = torch.tensor([2.03125, 1.0], dtype=torch.bfloat16)  # relative error 1/64
    budget = compare("x", plain, reference, plain).budget
    assert budget == pytest.approx(2 / 64 + 4 * 2**-23 + 2**-8)
    assert compare("x", torch.tensor([2.0625, 1.0], dtype=torch.bfloat16), reference, plain).ok
    assert not compare("x", torch.tensor([2.09375, 1.0], dtype=torch.bfloat16), reference, plain).ok


def test_exact_zeros_are_demanded_of_a_zero_tensor():
    zero = torch.zeros(4, dtype=torch.float64)
    assert compare("x", zero.float(), zero, zero.float()).ok
    assert not compare("x", zero.float() + 1e-30, zero, zero.float()).ok


@pytest.mark.parametrize("op", OPS, ids=str)
def test_samples_are_the_same_every_time_and_for_every_dtype(op):
    for case in op.cases[:6]:
        wide, again, narrow = (
            case.make(dtype, "cpu").tensors() for dtype in (torch.float64, torch.float64, torch.bfloat16)
        )
        for name, x in wide.items():
            assert torch.equal(x.nan_to_num(), again[name].nan_to_num())
            if x.is_floating_point():
                assert torch.equal(x.nan_to_num().bfloat16(), narrow[name].nan_to_num())


def test_cotangents_reach_every_output():
    given = cotangents({"out": torch.empty(2, 3), "lse": torch.empty(4)})
    assert given["out"].abs().min() > 0 and given["lse"].abs().min() > 0


@pytest.mark.parametrize("op", OPS, ids=str)
def test_case_names_are_unique(op):
    names = [case.name for case in op.cases + op.extremes]
    assert len(set(names)) == len(names)
    assert all(len(check(op, case, torch.float64, REFERENCE)) > 0 for case in op.cases[:1])
