"""What the checks remember: results for calls that look alike, and for those alone."""

from __future__ import annotations

import pytest
import torch

from pykernels import _checks, use_backend

X, Y = torch.zeros(3, 4), torch.zeros(4)
OTHERS = {
    "shape": (X[:2], Y),
    "strides": (X.t().contiguous().t(), Y),
    "dtype": (X, Y.double()),
    "device": (X, Y.to("meta")),
    "None": (X, None),
    "axes": (X, Y[None]),
}


@pytest.fixture
def remembering():
    """-> a function under by_metadata that counts how often it runs."""
    calls = []

    @_checks.by_metadata
    def function(x, y, flag):
        calls.append((x, y, flag))
        return len(calls)

    yield function, calls
    del _checks._recent[function.__wrapped__]


@pytest.mark.parametrize("other", OTHERS)
def test_calls_that_look_alike_are_remembered_and_no_others(remembering, other):
    function, calls = remembering
    for _ in range(4):
        assert function(X, Y, True) == 1
    assert function(torch.ones(3, 4), Y.clone(), True) == 1
    for _ in range(4):
        assert function(*OTHERS[other], True) == 2
    assert function(X, Y, 1) == 3 and function(X, Y, False) == 4  # equal is not alike
    with use_backend("reference"):
        assert function(X, Y, True) == 5
    assert function(X, Y, True) == 1 and function(*OTHERS[other], True) == 2 and len(calls) == 5


def test_a_tensor_may_come_twice(remembering):
    function, calls = remembering
    for _ in range(3):
        assert function(Y, Y, True) == 1
    assert function(Y, Y.clone(), True) == 1 and len(calls) == 1


def test_more_looks_than_the_recent_ones(remembering):
    function, calls = remembering
    sizes = range(1, 3 * _checks._MOST_RECENT)
    for _ in range(3):
        assert [function(torch.zeros(n), Y, True) for n in sizes] == list(sizes)
    assert len(calls) == len(sizes)
    assert len(_checks._recent[function.__wrapped__]) == _checks._MOST_RECENT


def test_what_cannot_be_looked_at_runs_each_time(remembering):
    function, calls = remembering
    sparse = X.to_sparse()
    for i in range(1, 4):
        assert function(sparse, Y, True) == i
    for i in range(4, 7):
        assert function(X, Y, [True]) == i


def test_forget(remembering):
    function, calls = remembering
    for _ in range(3):
        function(X, Y, True)
    _checks.forget()
    assert function(X, Y, True) == 2
