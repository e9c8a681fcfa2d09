"""The causal convolution beyond what tests/test_ops.py asks of every op."""

from __future__ import annotations

import mmap

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pykernels import causal_conv1d, causal_conv1d_step
from pykernels.testing import CAUSAL_CONV1D as OP
from pykernels.testing import Target, check, targets, use_threads
from pykernels.testing.causal_conv1d import conv_case

TARGETS = targets(OP.op)
COMPILED = [target for target in TARGETS if target.backend != "reference"]
ON_CPU = [target for target in COMPILED if target.device == "cpu"]
NATIVE = [Target("cpu", "cpu")]
on_all = pytest.mark.parametrize("target", TARGETS, ids=str)
on_compiled = pytest.mark.parametrize("target", COMPILED, ids=str)


def _inputs(device="cpu", dtype=torch.float32, batch=2, channels=19, length=45, width=4):
    torch.manual_seed(1)
    shapes = (batch, channels, length), (channels, width), (channels,), (batch, channels, width - 1)
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes]


# ---- The definition
# ----------------------------------------------------------------------------------------------------


@on_all
@pytest.mark.parametrize("width", (1, 2, 4, 7))
def test_by_hand(target, width):
    x, weight, bias, state = _inputs(target.device, channels=3, length=9, width=width)
    with target.active():
        out, final = causal_conv1d(x, weight, bias=bias, initial_state=state, activation="silu",
                                   return_final_state=True,
                                   backend=target.backend)
    for b in range(2):
        for d in range(3):
            seen = state[b, d].tolist() + x[b, d].tolist()
            for t in range(9):
                y = bias[d].item() + sum(weight[d, w].item() * seen[t + w] for w in range(width))
                assert out[b, d, t].item() == pytest.approx(y * torch.sigmoid(torch.tensor(y)).item(), rel=1e-4,
                                                            abs=1e-5)
            assert final[b, d].tolist() == pytest.approx(seen[9:])


@on_compiled
def test_is_torchs_depthwise_convolution(target):
    x, weight, bias, _ = _inputs(target.device)
    with target.active():
        out = causal_conv1d(x, weight, bias=bias, backend=target.backend)
    expected = F.conv1d(x, weight[:, None], bias, padding=3, groups=19)[..., :45]
    assert torch.allclose(out, expected, atol=1e-5)


# ---- States and packing
# ------------------------------------------------------------------------------------------------


@on_all
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("split", (0, 1, 2, 20, 44, 45))
def test_two_halves_are_the_whole(target, dtype, split):
    x, weight, bias, state = _inputs(target.device, dtype)
    options = {"bias": bias, "activation": "silu", "return_final_state": True, "backend": target.backend}
    with target.active():
        whole, last = causal_conv1d(x, weight, initial_state=state, **options)
        first, middle = causal_conv1d(x[:, :, :split], weight, initial_state=state, **options)
        second, end = causal_conv1d(x[:, :, split:], weight, initial_state=middle, **options)
    assert torch.allclose(torch.cat([first, second], dim=2).float(), whole.float(),
                          rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-6)
    assert torch.equal(end, last)


@on_all
@pytest.mark.parametrize("tokens", (1, 3))
def test_steps_continue_a_prefill(target, tokens):
    x, weight, bias, state = _inputs(target.device)
    options = {"bias": bias, "activation": "silu", "backend": target.backend}
    with target.active(), torch.no_grad():
        whole, last = causal_conv1d(x, weight, initial_state=state, return_final_state=True, **options)
        _, state = causal_conv1d(x[:, :, :30], weight, initial_state=state, return_final_state=True, **options)
        outs = [causal_conv1d_step(x[:, :, t:t + tokens] if tokens > 1 else x[:, :, t], state, weight,
                                   **options).view(2, 19, -1)
                for t in range(30, 45, tokens)]
    assert torch.allclose(torch.cat(outs, dim=2), whole[:, :, 30:], rtol=1e-5, atol=1e-6)
    assert torch.equal(state, last)


@on_compiled
@settings(max_examples=20)
@given(lengths=st.lists(st.integers(0, 60), max_size=5), width=st.integers(1, 9), channels=st.integers(1, 40),
       seed=st.integers(0, 99))
def test_packed_is_separate_sequences(target, lengths, width, channels, seed):
    torch.manual_seed(seed)
    total = sum(lengths)
    x = torch.randn(1, channels, total + 3, device=target.device)
    weight, states = torch.randn(channels, width, device=target.device), torch.randn(len(lengths), channels, width - 1,
                                                                                     device=target.device)
    cu = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], device=target.device)
    options = {"return_final_state": True, "backend": target.backend}
    with target.active():
        out, final = causal_conv1d(x, weight, initial_state=states, cu_seqlens=cu, **options)
        for s in range(len(lengths)):
            alone, last = causal_conv1d(x[:, :, cu[s]:cu[s + 1]], weight, initial_state=states[s:s + 1], **options)
            assert torch.equal(out[:, :, cu[s]:cu[s + 1]], alone) and torch.equal(final[s:s + 1], last)
    assert not out[:, :, total:].any()


def test_a_step_bumps_the_states_version_and_leaves_other_slots_alone():
    x, weight, _, _ = _inputs()
    for backend in {target.backend for target in ON_CPU}:
        state = torch.randn(5, 19, 3)
        before, version = state.clone(), state._version
        out = causal_conv1d_step(x[:, :, 0], state, weight, state_indices=torch.tensor([3, -1]), backend=backend)
        assert state._version > version
        assert torch.equal(state[[0, 1, 2, 4]], before[[0, 1, 2, 4]])
        assert torch.equal(state[3, :, -1], x[0, :, 0]) and torch.equal(state[3, :, :-1], before[3, :, 1:])
        assert out[0].any() and not out[1].any()


# ---- Derivatives
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [t for t in ON_CPU if t.backend == "cpu"], ids=str)
@pytest.mark.parametrize("width", (1, 3, 4, 6))
@pytest.mark.parametrize("activation", (None, "silu"))
def test_gradcheck(target, width, activation):
    inputs = [x.requires_grad_() for x in _inputs(dtype=torch.float64, batch=2, channels=3, length=4, width=width)]

    def function(x, weight, bias, state):
        return causal_conv1d(x, weight, bias=bias, initial_state=state, activation=activation, return_final_state=True,
                             backend="cpu")

    with target.active():
        assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("packed", (False, True))
def test_gradgradcheck(packed):
    x, weight, bias, state = _inputs(dtype=torch.float64, batch=1 if packed else 2, channels=2, length=5, width=3)
    cu = torch.tensor([0, 2, 2, 5]) if packed else None
    state = torch.randn(3, 2, 2, dtype=torch.float64) if packed else state

    def function(x, weight, bias, state):
        return causal_conv1d(x, weight, bias=bias, initial_state=state, activation="silu", return_final_state=True,
                             cu_seqlens=cu,
                             backend="cpu")

    assert torch.autograd.gradgradcheck(function, [t.requires_grad_() for t in (x, weight, bias, state)])


def test_second_derivatives_without_the_optional_arguments():
    x, weight, _, _ = _inputs(dtype=torch.float64, channels=2, length=5, width=3)

    def function(x, weight):
        return causal_conv1d(x, weight, activation="silu", backend="cpu")

    assert torch.autograd.gradgradcheck(function, [x.requires_grad_(), weight.requires_grad_()])


@on_compiled
def test_gradients_through_the_state_alone(target):
    x, weight, _, state = (t.requires_grad_() for t in _inputs(target.device, length=2))
    with target.active():
        _, final = causal_conv1d(x, weight, initial_state=state, return_final_state=True, backend=target.backend)
        dx, dstate = torch.autograd.grad(final.sum(), [x, state])
    assert torch.equal(dx, torch.ones_like(x))
    assert torch.equal(dstate, torch.tensor([0.0, 0.0, 1.0], device=x.device).expand_as(state))


@on_compiled
def test_func_grad(target):
    x, weight, _, _ = _inputs(target.device)
    with target.active():
        gradient = torch.func.grad(lambda x: causal_conv1d(x, weight, backend=target.backend).square().sum())(x)
    assert torch.allclose(gradient, torch.func.grad(lambda x: causal_conv1d(x, weight,
                                                                            backend="reference").square().sum())(x),
                                                                            atol=1e-4)


@on_compiled
def test_compile_with_dynamic_shapes(target):
    def step(x, weight, bias, state):
        out, final = causal_conv1d(x * 2, weight, bias=bias, initial_state=state, activation="silu",
                                   return_final_state=True,
                                   backend=target.backend)
        return out.sin().sum() + final.sum()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with target.active():
        for length in (33, 70):
            leaves = [x.requires_grad_() for x in _inputs(target.device, length=length)]
            eager, fast = step(*leaves), compiled(*leaves)
            torch.testing.assert_close(fast, eager)
            for ours, theirs in zip(torch.autograd.grad(fast, leaves), torch.autograd.grad(eager, leaves)):
                torch.testing.assert_close(ours, theirs)
                assert theirs.abs().max() > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("target", NATIVE, ids=str)
def test_compiled_steps_update_the_state(target):
    x, weight, bias, state = _inputs(length=1)
    torch._dynamo.reset()
    step = torch.compile(lambda *args: causal_conv1d_step(*args, backend=target.backend), fullgraph=True,
                         backend="aot_eager")
    other = state.clone()
    with torch.no_grad():
        assert torch.equal(step(x, state, weight), causal_conv1d_step(x, other, weight, backend=target.backend))
    assert torch.equal(state, other) and torch.equal(state[..., -1:], x)


# ---- Layouts, dtypes, limits
# -------------------------------------------------------------------------------------------


@on_compiled
def test_outputs_and_gradients_follow_the_layout_of_x(target):
    x, weight, _, _ = _inputs(target.device)
    for layout in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        layout = layout.detach().requires_grad_()
        with target.active():
            out = causal_conv1d(layout, weight, backend=target.backend)
            (dx,) = torch.autograd.grad(out, layout, torch.ones_like(out))
        assert out.stride() == dx.stride() == layout.stride()


@pytest.mark.parametrize("width", (2, 4, 6))
def test_no_token_sees_a_later_one_or_another_channel(width):
    x, weight, bias, _ = _inputs(width=width, length=600)
    before = causal_conv1d(x, weight, bias=bias)
    x[:, 5, 300:] = torch.nan
    after = causal_conv1d(x, weight, bias=bias)
    assert torch.equal(after[:, 5, :300], before[:, 5, :300]) and after[:, 5, 300:].isnan().all()
    others = [d for d in range(19) if d != 5]
    assert torch.equal(after[:, others], before[:, others])


def test_infinities_and_nan_reach_only_the_tokens_that_see_them():
    x, weight, _, _ = _inputs(channels=2, length=100)
    x[0, 0, 50], x[0, 1, 60] = torch.inf, torch.nan
    out = causal_conv1d(x, weight.abs(), activation="silu")
    assert torch.equal(out[0, 0].isfinite(), torch.tensor([not 50 <= t < 54 for t in range(100)]))
    assert torch.equal(out[0, 1].isnan(), torch.tensor([60 <= t < 64 for t in range(100)]))


@pytest.mark.parametrize("target", [target for target in COMPILED if target.backend == "cpu"], ids=str)
def test_silu_of_every_bf16(target):
    """SiLU that is to be rounded to bf16 is less exact than in fp32: within a sixteenth of what the rounding may do."""
    x = torch.arange(-2**15, 2**15, dtype=torch.int16).view(torch.bfloat16)
    x = x[x.abs() <= 2**13]
    weight = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    with target.active():
        out = causal_conv1d(x[None, None], weight, activation="silu", backend=target.backend)[0, 0].double()
    expected = F.silu(x.double())
    # Where it would be denormal, sigmoid stays 2^-126.
    assert ((out - expected).abs() <= expected.abs() * 2**-8 * (1 + 1 / 16) + 2**-112).all()


@pytest.mark.parametrize("target", [target for target in ON_CPU if target.backend == "cpu"], ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_channels_are_divided_among_threads(target, dtype):
    """The same bits for any number of threads, forward, backward and in a step."""
    x, weight, bias, state = _inputs(dtype=dtype, batch=9, channels=1100, length=1)
    y, *tensors = _inputs(dtype=dtype, batch=2, channels=100, length=130)
    tensors = [t.requires_grad_() for t in (y, *tensors)]
    results = []
    with target.active():
        for threads in (1, 2, 3, 8):
            with use_threads(threads):
                after = state.clone()
                out = causal_conv1d_step(x[..., 0], after, weight, bias=bias, activation="silu", backend="cpu")
                both = causal_conv1d(*tensors[:2], bias=tensors[2], activation="silu", initial_state=tensors[3],
                                     return_final_state=True, backend="cpu")
                results.append((out, after, *both, *torch.autograd.grad(both, tensors, both)))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0]))


def test_offsets_past_2_to_the_31_elements():
    """Two channels more than 2^31 elements apart, in memory that is mapped but hardly touched."""
    distance, length = 2**31 + 2**20, 100
    no_reserve = 0x4000  # MAP_NORESERVE, which Python before 3.13 does not name
    memory = mmap.mmap(-1, 2 * (distance + length), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    x = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((1, 2, length), (0, distance, 1))
    x.copy_(torch.randn(1, 2, length))
    weight = torch.randn(2, 4)
    for backend in {target.backend for target in ON_CPU}:
        assert torch.equal(causal_conv1d(x, weight, backend=backend), causal_conv1d(x.clone(), weight, backend=backend))


@pytest.mark.parametrize("target", NATIVE, ids=str)
def test_autocast_takes_the_lower_dtype(target):
    x, weight, bias, state = _inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out, final = causal_conv1d(x, weight, bias=bias, initial_state=state, return_final_state=True,
                                   backend=target.backend)
    assert out.dtype == final.dtype == torch.bfloat16


@on_compiled
@settings(max_examples=20)
@given(batch=st.integers(1, 3), channels=st.integers(8, 70), length=st.integers(1, 300), width=st.integers(1, 12),
       state=st.booleans(), bias=st.booleans(), silu=st.booleans(), token_first=st.booleans())
def test_any_shape(target, batch, channels, length, width, state, bias, silu, token_first):
    from pykernels.testing import causal_conv1d as kit

    case = conv_case("any", batch=batch, channels=channels, length=length, width=width, state=state, bias=bias,
                     layout=kit.token_first if token_first else kit.contiguous,
                     **({"activation": "silu"} if silu else {}))
    errors = check(OP, case, torch.float32, target)
    assert all(error.ok for error in errors), "\n".join(map(str, errors))
