"""The executor finds what it is for in the real kernels: a wait, barrier or fence that is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import host_build
import planted
import pytest
import torch
from test_flash_attention_decode_on_host import _check as check_decode
from test_flash_attention_on_host import _check as check_attention
from test_flash_attention_on_host import _check_fwd as check_attention_fwd

from pykernels.testing import FFT_CONV, LINEAR_ATTENTION, LINEAR_ATTENTION_STEP, Target, check
from pykernels.testing.fft_conv import conv_case
from pykernels.testing.flash_attention import attention_case, decode_case
from pykernels.testing.linear_attention import linear_case, step_case

BF16 = torch.bfloat16
SEEDS = range(12)  # every combination of the executor's policies


@pytest.fixture(scope="module")
def faulty():
    if (reason := host_build.unavailable()) is not None:
        pytest.skip(reason)
    return planted.load()


@pytest.fixture
def host(faulty, monkeypatch):
    module, _ = faulty
    monkeypatch.setattr(host_build, "load", lambda: module)
    return module


@contextlib.contextmanager
def _left_out(faulty, index: int) -> Iterator[None]:
    _, variable = faulty
    variable.value = index
    try:
        yield
    finally:
        variable.value = -1


def _forward(host, seed: int) -> None:
    import host_ops

    case = attention_case("planted", tq=300, tk=420, heads_q=2, heads_k=1, head_dim=64)
    host.set_capability(90)
    check_attention_fwd(host, host_ops, case, BF16, seed)


def _forward_short(host, seed: int) -> None:
    """One tile of keys: with several, the waits before the last values nearly always bring those too."""
    import host_ops

    host.set_capability(90)
    case = attention_case("planted-short", tq=300, tk=100, heads_q=2, heads_k=1, head_dim=64)
    check_attention_fwd(host, host_ops, case, BF16, seed)


def _backward(host, seed: int, head_dim: int = 64) -> None:
    import host_ops  # noqa: F401 (defines the ops)

    case = attention_case("planted-backward", tq=300, tk=200, heads_q=2, heads_k=1, head_dim=head_dim)
    host.set_capability(90)
    check_attention(host, case, BF16, seed)


def _backward_large(host, seed: int) -> None:
    _backward(host, seed, head_dim=192)


def _decode(host, seed: int) -> None:
    import host_ops

    case = decode_case("planted-decode", lengths=(300, 200), capacity=320, new_tokens=2)
    check_decode(host, host_ops, case, BF16, seed)


def _paged(host, seed: int) -> None:
    import host_ops

    case = decode_case("planted-paged", lengths=(300, 200), capacity=320, page_size=16)
    check_decode(host, host_ops, case, BF16, seed)


def _linear(host, seed: int) -> None:
    _linear_check(host, LINEAR_ATTENTION, linear_case("planted", tokens=140, heads=1, key_dim=40, value_dim=130,
                                                      decay="token", state=True), seed)


def _wide(host, seed: int) -> None:
    sizes = dict(tokens=70, heads=1, key_dim=70, value_dim=40, state=True)  # several panels, the walks of one unit
    _linear_check(host, LINEAR_ATTENTION, linear_case("planted-wide", decay="channel", bonus=True, **sizes), seed)
    _linear_check(host, LINEAR_ATTENTION, linear_case("planted-float", decay="token", **sizes), seed, torch.float32)


def _step(host, seed: int) -> None:
    _linear_check(host, LINEAR_ATTENTION_STEP, step_case("planted-step", key_dim=40, value_dim=200, decay="channel",
                                                         normalize=True), seed)


def _linear_check(host, op, case, seed: int, dtype: torch.dtype = BF16) -> None:
    import linear_ops

    host.set_seed(seed)
    with linear_ops.on_the_host():
        errors = check(op, case, dtype, Target("cuda", "cpu"))
    assert all(error.ok for error in errors), "\n".join(map(str, errors))


def _fft(host, seed: int, batch: int = 1, length: int = 1000) -> None:
    import fft_conv_ops

    host.set_seed(seed)
    with fft_conv_ops.on_the_host():
        case = conv_case("planted-fft", batch=batch, channels=1, length=length)
        errors = check(FFT_CONV, case, BF16, Target("cuda", "cpu"))
    assert all(error.ok for error in errors), "\n".join(map(str, errors))


def _fft_parts(host, seed: int) -> None:
    """Transforms of a warp each, four to a block, that share a part."""
    _fft(host, seed, batch=5, length=500)


RUNS: dict[str, Callable] = {"fwd": _forward, "fwd-short": _forward_short, "bwd": _backward,
                             "bwd-large": _backward_large, "decode": _decode, "paged": _paged, "linear": _linear,
                             "wide": _wide, "step": _step, "fft": _fft, "fft-parts": _fft_parts}


@pytest.fixture(autouse=True)
def sm_80_afterwards(host):
    yield
    host.set_capability(80)


@pytest.mark.parametrize("group", RUNS)
def test_nothing_is_found_where_nothing_is_missing(host, group):
    for seed in SEEDS:
        RUNS[group](host, seed)


@pytest.mark.parametrize("index", range(len(planted.FAULTS)), ids=[fault.name for fault in planted.FAULTS])
def test_what_is_missing_is_found(host, faulty, index):
    """By an error of the executor or a wrong result, in one of the orders of events at least."""
    with _left_out(faulty, index):
        for seed in SEEDS:
            try:
                RUNS[planted.FAULTS[index].group](host, seed)
            except (RuntimeError, AssertionError):
                return
    pytest.fail("no order of events showed it")
