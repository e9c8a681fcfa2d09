"""What the tests of ops on the host executor share: the ordinary samples of an op, and calls that reach its kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from types import ModuleType
from unittest import mock

import pytest
import torch

from pykernels import _checks, backends


def samples(matrix: Iterable[tuple], dtypes: Iterable[torch.dtype]) -> pytest.MarkDecorator:
    """The (op, case) pairs in each dtype that the case has, as parameters `op, case, dtype`."""
    dtypes = tuple(dtypes)
    return pytest.mark.parametrize("op, case, dtype", [
        pytest.param(op, case, dtype, id=f"{op.name}-{case.name}-{str(dtype).removeprefix('torch.')}")
        for op, case in matrix for dtype in dtypes if dtype in case.dtypes])


@contextlib.contextmanager
def on_the_host(*modules: ModuleType) -> Iterator[None]:
    """Calls of these ops with backend="cuda" run on the executor, if the backend would take the call on a GPU."""

    def resolve(op: backends.Op, query: backends.Query, backend: str) -> str:
        if backend != "cuda":
            return backends.resolve(op, query, backend)
        if (reason := op.backends["cuda"](query)) is not None:
            raise backends.BackendUnavailable(reason)
        return "cuda_host"

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "resolve", resolve))
        stack.callback(_checks.forget)
        _checks.forget()
        yield
