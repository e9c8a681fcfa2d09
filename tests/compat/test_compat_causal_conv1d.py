"""pykernels.compat.causal_conv1d against the convolution written out in float64, and the original's conventions."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pykernels.compat import causal_conv1d as compat

B, D, L, W = 3, 5, 11, 4
SIGNATURES = {
    "causal_conv1d_fn": "(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, "
    "final_states_out=None, activation=None)",
    "causal_conv1d_update": "(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, "
    "conv_state_indices=None)",
    "causal_conv1d_varlen_states": "(x, cu_seqlens, state_len)",
}


def test_signatures():
    assert {name: str(inspect.signature(getattr(compat, name))) for name in compat.__all__} == SIGNATURES


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape and expected.abs().max() > 1e-2
    assert float((actual - expected).abs().max() / expected.abs().max()) < tolerance


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None, before: Tensor | None = None,
              silu: bool = False) -> Tensor:
    """Token by token; `before` are the W - 1 inputs before x."""
    width = weight.shape[1]
    seen = torch.cat((x.new_zeros(*x.shape[:2], width - 1) if before is None else before, x), 2)
    taps = [(seen[:, :, t : t + width] * weight).sum(2) for t in range(x.shape[2])]
    out = torch.stack(taps, 2) + (0 if bias is None else bias[:, None])
    return out * torch.sigmoid(out) if silu else out


def inputs(dtype: torch.dtype = torch.float64, **sizes) -> dict[str, Tensor]:
    shapes = {"x": (B, D, sizes.get("tokens", L)), "weight": (D, W), "bias": (D,), "before": (B, D, W - 1)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(s, dtype=torch.float64, generator=generator).to(dtype) for name, s in shapes.items()}


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("activation", (None, "silu", "swish"))
def test_is_the_convolution(activation, channels_last):
    x = inputs()
    if channels_last:
        x["x"] = x["x"].mT.contiguous().mT
    silu = activation is not None
    near(compat.causal_conv1d_fn(x["x"], x["weight"], activation=activation),
         convolved(x["x"], x["weight"], silu=silu))
    out, final = compat.causal_conv1d_fn(x["x"], x["weight"], x["bias"], None, x["before"], True, None, activation)
    near(out, convolved(x["x"], x["weight"], x["bias"], x["before"], silu))
    near(final, x["x"][..., 1 - W :])


def test_final_states_are_written_where_they_should_be():
    x = inputs(tokens=2)
    place = torch.full((B, W - 1, D), torch.nan, dtype=torch.float64).mT
    out, final = compat.causal_conv1d_fn(x["x"], x["weight"], initial_states=x["before"], return_final_states=True,
                                         final_states_out=place)
    assert final is place
    near(final, torch.cat((x["before"], x["x"]), 2)[..., 1 - W :])


SEQ_IDX = torch.tensor([[0] * 4 + [1] * 7, [3] * 11, [0] * 2 + [1] * 5 + [-1] * 4])


def by_sequence(x: dict[str, Tensor]) -> Tensor:
    out = torch.zeros_like(x["x"])
    for b, row in enumerate(SEQ_IDX):
        for number in row.unique():
            own = row == number
            if number >= 0:
                out[b : b + 1, :, own] = convolved(x["x"][b : b + 1, :, own], x["weight"], x["bias"], silu=True)
    return out


def test_sequences_see_only_themselves():
    x = inputs()
    out = compat.causal_conv1d_fn(x["x"], x["weight"], x["bias"], SEQ_IDX.int(), activation="silu")
    near(out, by_sequence(x))
    assert not out[2, :, 7:].any()


@pytest.mark.parametrize("packed", (False, True))
def test_gradients(packed):
    x = {name: y.requires_grad_() for name, y in inputs().items()}
    names = ["x", "weight", "bias"] + ([] if packed else ["before"])
    if packed:
        results = compat.causal_conv1d_fn(x["x"], x["weight"], x["bias"], SEQ_IDX, activation="silu"), by_sequence(x)
        cotangents = [torch.randn(B, D, L, dtype=torch.float64)]
        results = [(y,) for y in results]
    else:
        actual = compat.causal_conv1d_fn(x["x"], x["weight"], x["bias"], None, x["before"], True,
                                         torch.empty(B, D, W - 1, dtype=torch.float64), "silu")
        results = actual, (convolved(x["x"], x["weight"], x["bias"], x["before"], True), x["x"][..., 1 - W :])
        cotangents = [torch.randn_like(y) for y in actual]
    for a, e in zip(*(torch.autograd.grad(y, [x[name] for name in names], cotangents) for y in results)):
        near(a, e)


@pytest.mark.parametrize("weights", (torch.bfloat16, torch.float32, torch.float16), ids=str)
def test_dtypes(weights):
    x = inputs(torch.bfloat16)
    x |= {name: x[name].to(weights) for name in ("weight", "bias")}
    out, final = compat.causal_conv1d_fn(x["x"], x["weight"], x["bias"], None, x["before"], True, None, "silu")
    assert out.dtype == final.dtype == torch.bfloat16
    wide = {name: y.double() for name, y in x.items()}
    near(out, convolved(wide["x"], wide["weight"], wide["bias"], wide["before"], True), 1e-2)
    assert torch.equal(final, x["x"][..., 1 - W :])


# ---- One step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", (False, True))
@pytest.mark.parametrize("indices", (None, (4, -1, 1), (2, 0, -1)), ids=str)
@pytest.mark.parametrize("tokens", (None, 1, 3, 9))
@pytest.mark.parametrize("size", (3, 4, 7))
def test_update(size, tokens, indices, grad):
    x, slots = inputs(tokens=tokens or 1), B if indices is None else 5
    state = torch.randn(slots, D, size, dtype=torch.float64)
    before, new = state.clone(), x["x"] if tokens else x["x"][..., 0]
    index = None if indices is None else torch.tensor(indices, dtype=torch.int32)
    weight = x["weight"].requires_grad_(grad)
    out = compat.causal_conv1d_update(new, state, weight, x["bias"], "silu", conv_state_indices=index)
    assert out.shape == new.shape and out.requires_grad == grad
    out = out.view(B, D, -1)
    expected = before.clone()
    for b, slot in enumerate(range(B) if indices is None else indices):
        if slot < 0:
            assert not out[b].any()
            continue
        rows = slice(b, b + 1)
        near(out[rows], convolved(x["x"][rows], weight, x["bias"], before[slot : slot + 1, :, size - W + 1 :], True))
        expected[slot] = torch.cat((before[slot], x["x"][b]), 1)[:, -size:]
    assert torch.equal(state, expected)


@pytest.mark.parametrize("indices", (None, (4, -1, 1)), ids=str)
@pytest.mark.parametrize("tokens", (1, 3, 9))
@pytest.mark.parametrize("size", (3, 7))
def test_update_of_a_ring(size, tokens, indices):
    x = inputs(tokens=tokens)
    slots = list(range(B)) if indices is None else list(indices)
    state = torch.randn(B if indices is None else 5, D, size, dtype=torch.float64)
    before, seen = state.clone(), torch.tensor((0, 5, 13))
    index = None if indices is None else torch.tensor(indices)
    out = compat.causal_conv1d_update(x["x"], state, x["weight"], cache_seqlens=seen.int(), conv_state_indices=index)
    expected = before.clone()
    for b, slot in enumerate(slots):
        if slot < 0:
            assert not out[b].any()
            continue
        recent = torch.stack([before[slot, :, (int(seen[b]) - i) % size] for i in range(W - 1, 0, -1)], 1)[None]
        near(out[b : b + 1], convolved(x["x"][b : b + 1], x["weight"], before=recent))
        for t in range(tokens):
            expected[slot, :, (int(seen[b]) + t) % size] = x["x"][b, :, t]
    assert torch.equal(state, expected)


def test_update_continues_the_convolution():
    x = inputs()
    expected = convolved(x["x"], x["weight"], x["bias"])
    state, ring = torch.zeros(B, D, W, dtype=torch.float64), torch.zeros(B, D, 5, dtype=torch.float64)
    for t in range(L):
        near(compat.causal_conv1d_update(x["x"][..., t], state, x["weight"], x["bias"]), expected[..., t])
        seen = torch.full((B,), t)
        near(compat.causal_conv1d_update(x["x"][..., t], ring, x["weight"], x["bias"], cache_seqlens=seen),
             expected[..., t])


def test_update_takes_gradients():
    x = {name: y.requires_grad_() for name, y in inputs(tokens=2).items()}
    state = x["before"] * 1
    out = compat.causal_conv1d_update(x["x"], state, x["weight"], x["bias"], "silu")
    expected = convolved(x["x"], x["weight"], x["bias"], x["before"], True)
    kept = torch.cat((x["before"], x["x"]), 2)[..., -(W - 1) :]
    cotangents = torch.randn_like(out), torch.randn_like(state)
    for a, e in zip(*(torch.autograd.grad(y, list(x.values()), cotangents) for y in ((out, state), (expected, kept)))):
        near(a, e)


@pytest.mark.parametrize("indices", ((-1, 3, -1), (-1, 0, -1), (0, -1, 2)), ids=str)
def test_update_with_padding_takes_gradients(indices):
    """Of slots that nobody names too, slot 0 among them, which is what padding writes to: itself."""
    x = {name: y.requires_grad_() for name, y in inputs(tokens=2).items()}
    slots = torch.randn(4, D, W - 1, dtype=torch.float64, requires_grad=True)
    state = slots * 1
    out = compat.causal_conv1d_update(x["x"], state, x["weight"], x["bias"], conv_state_indices=torch.tensor(indices))
    expected, kept = torch.zeros_like(out), list(slots.unbind(0))
    for b, slot in enumerate(indices):
        if slot >= 0:
            row, before = x["x"][b : b + 1], slots[slot][None]
            expected = expected.index_copy(0, torch.tensor([b]), convolved(row, x["weight"], x["bias"], before, False))
            kept[slot] = torch.cat((before, row), 2)[0, :, -(W - 1) :]
    wanted, cotangents = (x["x"], x["weight"], slots), (torch.randn_like(out), torch.randn_like(state))
    near(state, torch.stack(kept))
    both = (out, state), (expected, torch.stack(kept))
    for a, e in zip(*(torch.autograd.grad(y, wanted, cotangents) for y in both)):
        near(a, e)


def test_varlen_states():
    x, cu_seqlens = torch.randn(10, D), torch.tensor([0, 6, 6, 8, 10], dtype=torch.int32)
    states = compat.causal_conv1d_varlen_states(x, cu_seqlens, 3)
    expected = torch.zeros(4, D, 3)
    expected[0], expected[2, :, 1:], expected[3, :, 1:] = x[3:6].T, x[6:8].T, x[8:10].T
    assert torch.equal(states, expected)
    # What it gives is where the convolution goes on from.
    weight = torch.randn(D, 4)
    _, final = compat.causal_conv1d_fn(x[None, 6:8].mT, weight, return_final_states=True)
    assert torch.equal(states[2:3], final)


X = inputs()
STATE = torch.zeros(B, D, W, dtype=torch.float64)
fn, update = compat.causal_conv1d_fn, compat.causal_conv1d_update


@pytest.mark.parametrize(
    ("function", "error", "words"),
    (
        (lambda: fn(X["x"], X["weight"], activation="gelu"), ValueError, "activation must be None, 'silu' or 'swish'"),
        (lambda: fn(X["x"][0], X["weight"]), ValueError, r"x must have shape \[B, D, L\]"),
        (lambda: fn(None, X["weight"]), TypeError, "x must be a tensor"),
        (lambda: fn(X["x"], X["weight"], None, SEQ_IDX, X["before"]), ValueError, "initial_states must be None"),
        (lambda: fn(X["x"], X["weight"], None, SEQ_IDX, None, True), ValueError, "return_final_states must be False"),
        (lambda: fn(X["x"], X["weight"], None, SEQ_IDX[:, 1:]), ValueError, r"seq_idx must have shape \[B=3, L=11\]"),
        (lambda: fn(X["x"], X["weight"], None, SEQ_IDX.float()), TypeError, "seq_idx must be int32 or int64"),
        (lambda: fn(X["x"], X["weight"], None, SEQ_IDX % 2 + torch.arange(L) % 2), ValueError, "in one run"),
        (lambda: fn(X["x"], X["weight"], final_states_out=X["before"]), ValueError, "return_final_states must be True"),
        (
            lambda: fn(X["x"], X["weight"], return_final_states=True, final_states_out=STATE),
            ValueError,
            "final_states_out must have shape",
        ),
        (lambda: update(X["x"], STATE[..., :2], X["weight"]), ValueError, "S at least 3, got"),
        (lambda: update(X["x"], STATE[:2], X["weight"]), ValueError, "conv_state must have shape .B"),
        (lambda: update(X["x"], STATE.float(), X["weight"]), TypeError, "conv_state must have x's dtype"),
        (
            lambda: update(X["x"], STATE, X["weight"], conv_state_indices=torch.tensor([0, 1, 1])),
            ValueError,
            "conv_state_indices must name each of 3 slots",
        ),
        (
            lambda: update(X["x"], STATE, X["weight"], cache_seqlens=torch.tensor([0, 1])),
            ValueError,
            "cache_seqlens must be",
        ),
        (
            lambda: compat.causal_conv1d_varlen_states(X["x"][0], torch.tensor([0, 6]), 3),
            ValueError,
            "cu_seqlens must rise from 0 to at most 5",
        ),
        (
            lambda: compat.causal_conv1d_varlen_states(X["x"][0], torch.tensor([0, 5]), -1),
            ValueError,
            "state_len must be an integer",
        ),
    ),
)
def test_raises(function, error, words):
    before = STATE.clone()
    with pytest.raises(error, match=words):
        function()
    assert torch.equal(STATE, before)


def test_compiles_whole():
    def function(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        out = fn(x, X["weight"], X["bias"], activation="silu")
        return out, update(x[..., 0], state, X["weight"], X["bias"], "silu")

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for state in (torch.randn(B, D, W - 1, dtype=torch.float64), torch.randn(B, D, W, dtype=torch.float64)):
        theirs = state.clone()
        for a, e in zip(compiled(X["x"], state), function(X["x"], theirs)):
            near(a, e)
        near(state, theirs)
    near(F.silu(fn(X["x"], X["weight"])), fn(X["x"], X["weight"], activation="silu"))
