"""What must hold for every op: numbers within their budgets on every backend, clean inputs, repeatability, bad input.

Everything here is driven by the descriptions in `pykernels.testing.OPS`; what is particular to an op is in tests/ops.
"""

from __future__ import annotations

import inspect

import pytest
import torch

from pykernels import _library, testing
from pykernels.testing import OPS, check, dtypes, run, serves, targets, use_threads

assert _library.error() is None, f"the tests need the native library: {_library.error()}"


def _compiled(op):
    return [target for target in targets(op.op) if target.backend != "reference"]


def _selected(op):
    """Enough cases to vary everything, for tests that are not about the numbers."""
    return op.cases[2::5]


def _ids(*parts) -> str:
    return "-".join(str(part).replace("torch.", "") for part in parts)


def _matrix(cases, targets_of=targets):
    return [
        pytest.param(op, target, dtype, case, id=_ids(op, target, dtype, case))
        for op in OPS
        for target in targets_of(op if targets_of is _compiled else op.op)
        for dtype in dtypes(op.op, target)
        for case in cases(op)
        if serves(op, case, target, dtype)
    ]


def _assert_bitwise(actual, expected, context=""):
    for name, x in expected.items():
        assert torch.equal(actual[name].nan_to_num(nan=12345.0), x.nan_to_num(nan=12345.0)), (
            f"{name} differs {context}"
        )


def _assert_meaningful(values):
    assert any(bool((x.nan_to_num() != 0).any()) for x in values.values()), "nothing but zeros proves nothing"


@pytest.mark.parametrize("op, target, dtype, case", _matrix(lambda op: op.cases + op.extremes))
def test_matches_the_float64_reference(op, target, dtype, case):
    options = {"deterministic": False} if "deterministic" in inspect.signature(op.function).parameters else {}
    errors = check(op, case, dtype, target, **options)
    assert {error.tensor for error in errors} >= {*op.outputs, *op.mutates}
    assert all(error.ok for error in errors), "\n".join(map(str, errors))


@pytest.mark.parametrize("op, target, dtype, case", _matrix(_selected, _compiled))
def test_deterministic_results_are_bitwise_repeatable_and_as_exact(op, target, dtype, case):
    if "deterministic" not in inspect.signature(op.function).parameters:
        sample, options = case.make(dtype, target.device), {}
    else:
        sample, options = case.make(dtype, target.device).replace(deterministic=True), {"deterministic": True}
    with target.active():
        first = run(op, sample, target.backend)
        _assert_meaningful(first)
        for attempt in range(3):
            _assert_bitwise(run(op, sample, target.backend), first, f"on repeat {attempt}")
    errors = check(op, case, dtype, target, **options)
    assert all(error.ok for error in errors), "\n".join(map(str, errors))


@pytest.mark.parametrize(
    "op, target, dtype, case", [p for p in _matrix(_selected, _compiled) if p.values[1].device == "cpu"]
)
def test_deterministic_results_do_not_depend_on_the_thread_count(op, target, dtype, case):
    sample = case.make(dtype, target.device)
    if "deterministic" in inspect.signature(op.function).parameters:
        sample = sample.replace(deterministic=True)
    with target.active():
        results = []
        for threads in (1, 2, 3):
            with use_threads(threads):
                results.append(run(op, sample, target.backend))
    _assert_meaningful(results[0])
    for threads, result in zip((2, 3), results[1:]):
        _assert_bitwise(result, results[0], f"on {threads} threads")


@pytest.mark.parametrize(
    "op, target, dtype, case",
    [p for p in _matrix(_selected, _compiled) if p.values[1].device == "cpu" and p.values[0].outputs],
)
def test_forward_does_not_depend_on_the_thread_count_or_grad_mode(op, target, dtype, case):
    sample = case.make(dtype, target.device)
    with target.active():
        with use_threads(1):
            alone = run(op, sample, target.backend, grad=False)
        with use_threads(2):
            together, training = run(op, sample, target.backend, grad=False), run(op, sample, target.backend)
    _assert_meaningful(alone)
    _assert_bitwise(together, alone)
    _assert_bitwise(training, alone)


@pytest.mark.parametrize("op, target, dtype, case", _matrix(_selected))
def test_inputs_are_not_modified_and_outputs_do_not_alias_them(op, target, dtype, case):
    sample = case.make(dtype, target.device)
    before = {name: x.clone() for name, x in sample.tensors().items()}
    versions = {name: x._version for name, x in sample.tensors().items()}
    with target.active():
        # Overwritten arguments are copied by `run`; the op's own tests look at those.
        result = run(op, sample, target.backend)
    for name, x in sample.tensors().items():
        assert torch.equal(x.nan_to_num(nan=12345.0), before[name].nan_to_num(nan=12345.0)), (
            f"{name} was modified"
        )
        assert x._version == versions[name], f"{name}'s version was bumped"
    storages = [
        x.untyped_storage().data_ptr() for x in [*sample.tensors().values(), *result.values()] if x.numel()
    ]
    of_inputs = {x.untyped_storage().data_ptr() for x in sample.tensors().values() if x.numel()}
    of_outputs = [x.untyped_storage().data_ptr() for x in result.values() if x.numel()]
    assert not of_inputs & set(of_outputs) and len(set(of_outputs)) == len(of_outputs), storages


@pytest.mark.parametrize(
    "op, bad", [pytest.param(op, bad, id=_ids(op, bad)) for op in OPS for bad in op.bad_inputs()]
)
def test_bad_input_is_rejected_before_anything_is_written(op, bad):
    good = op.good.make(torch.float32, "cpu")
    for backend in {target.backend for target in targets(op.op)}:
        args = {**good.args, "backend": backend, **bad.args}
        before = {name: args[name].clone() for name in op.mutates if isinstance(args[name], torch.Tensor)}
        with pytest.raises(bad.exception, match=bad.match) as caught:
            op.function(**args)
        assert type(caught.value) is bad.exception
        for name, x in before.items():
            if x.device.type != "meta":
                assert torch.equal(args[name].nan_to_num(nan=12345.0), x.nan_to_num(nan=12345.0)), (
                    f"{name} was written"
                )


@pytest.mark.parametrize("op", OPS, ids=str)
def test_the_sample_that_bad_inputs_change_is_good(op):
    for target in targets(op.op):
        assert all(error.ok for error in check(op, op.good, torch.float32, target))


@pytest.mark.parametrize("op", OPS, ids=str)
def test_every_argument_is_used_and_every_wrong_argument_is_tried(op):
    """A new parameter must appear among the cases, or among the bad inputs as not served."""
    parameters = set(inspect.signature(op.function).parameters) - {"backend", *op.returns}
    tried_bad = set().union(*(bad.args for bad in op.bad_inputs()))
    used = {"deterministic"}.union(*(case.make(torch.float32, "cpu").args for case in op.cases))
    assert parameters <= tried_bad | {"dropout_p"}, parameters - tried_bad
    unserved = {bad.name for bad in op.bad_inputs() if "not served" in bad.match} | {"dropout_p"}
    assert parameters - unserved <= used, parameters - unserved - used


@pytest.mark.parametrize("op", OPS, ids=str)
def test_every_instruction_set_of_this_machine_is_tested(op):
    tested = {target.isa for target in targets(op.op) if target.backend == "cpu"}
    assert tested == set(_library.machine_isas()) and "baseline" in tested


@pytest.mark.parametrize("op", OPS, ids=str)
def test_poison_reaches_the_memory_that_the_native_library_allocates(op):
    sample = op.good.make(torch.float32, "cpu")

    def allocations_and_fills():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run(op, sample, "cpu", grad=False)
        names = [event.name for event in profile.events()]
        return names.count("aten::empty"), names.count("aten::fill_")

    run(op, sample, "cpu", grad=False)
    _, fills_before = allocations_and_fills()
    with testing.poisoned_memory():
        assert torch.empty(5).isnan().all()
        allocations, fills = allocations_and_fills()
    # (out, lse) come from the library; each is filled after its allocation.
    assert allocations >= len(op.outputs) and fills - fills_before >= len(op.outputs)
    assert not torch.are_deterministic_algorithms_enabled()
