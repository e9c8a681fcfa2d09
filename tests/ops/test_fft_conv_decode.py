"""fft_conv_init and fft_conv_step: equal to the whole sequence at once, whatever the prefix; cost; bad input."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from pykernels import _checks, _library, fft_conv, fft_conv_init, fft_conv_step, testing
from pykernels.ops.fft_conv.decode import BLOCK

BACKENDS = sorted({t.backend for t in testing.targets(testing.FFT_CONV.op, every_isa=False) if t.device == "cpu"})
on_backends = pytest.mark.parametrize("backend", BACKENDS)
F64 = torch.float64


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape and expected.norm() > 0
    assert float((actual - expected).norm() / expected.norm()) < tolerance


def steps(state, u: Tensor, pre: Tensor | None = None, post: Tensor | None = None) -> Tensor:
    def at(x, t):
        return None if x is None else x[..., t]

    return torch.stack(
        [fft_conv_step(u[..., t], state, pre_gate=at(pre, t), post_gate=at(post, t)) for t in range(u.shape[2])], 2
    )


@on_backends
@pytest.mark.parametrize(
    "prefix, tokens, taps",
    (
        (0, 5, 1),
        (0, 3 * BLOCK, 1),
        (0, 200, 3),
        (0, 2 * BLOCK + 1, BLOCK),
        (0, 300, BLOCK + 1),
        (0, 700, 300),
        (0, 600, 1000),
        (1, 150, 100),
        (37, 400, 1000),
        (500, 300, BLOCK),
        (500, 300, 130),
        (90, 1100, 257),
    ),
)
def test_steps_equal_the_whole_sequence(backend, prefix, tokens, taps):
    u, k, D = torch.randn(2, 6, prefix + tokens, dtype=F64), torch.randn(3, taps, dtype=F64), torch.randn(6, dtype=F64)
    whole = fft_conv(u, k, D=D, backend=backend)
    start = {"u_prefix": u[..., :prefix]} if prefix else {"batch": 2, "channels": 6}
    state = fft_conv_init(k, **start, D=D, backend=backend)
    near(steps(state, u[..., prefix:]), whole[..., prefix:])


@on_backends
@pytest.mark.parametrize("batch, channels", ((0, 4), (1, 0), (0, 0)))
def test_nothing_to_convolve(backend, batch, channels):
    state = fft_conv_init(torch.randn(channels, 300), batch=batch, channels=channels, backend=backend)
    for _ in range(2 * BLOCK + 1):
        assert fft_conv_step(torch.ones(batch, channels), state).shape == (batch, channels)


@on_backends
def test_autocast_leaves_a_state_as_it_is(backend):
    u, k = torch.randn(2, 4, 300), torch.randn(4, 200)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = fft_conv_init(k, u[..., :100], backend=backend)
        out = steps(state, u[..., 100:])
    assert state.inputs.dtype == out.dtype == torch.float32
    near(out.double(), fft_conv(u.double(), k.double(), backend="reference")[..., 100:], 2e-6)


@on_backends
def test_a_state_is_its_own(backend):
    """What becomes of the arguments later changes nothing."""
    u, k, D = torch.randn(1, 4, 100), torch.randn(4, 80), torch.randn(4)
    wanted = steps(fft_conv_init(k, u[..., :50], D=D, backend=backend), u[..., 50:])
    prefix = u[..., :50].clone()
    state = fft_conv_init(k, prefix, D=D, backend=backend)
    for x in (k, D, prefix):
        x.zero_()
    assert wanted.abs().max() > 0 and torch.equal(steps(state, u[..., 50:]), wanted)


@on_backends
def test_gates(backend):
    u, pre, post = torch.randn(3, 2, 4, 300, dtype=F64)
    k = torch.randn(4, 200, dtype=F64)
    whole = fft_conv(u, k, pre_gate=pre, post_gate=post, backend=backend)
    state = fft_conv_init(k, u[..., :100], pre_gate=pre[..., :100], backend=backend)
    near(steps(state, u[..., 100:], pre[..., 100:], post[..., 100:]), whole[..., 100:])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_dtypes_are_as_exact_as_the_whole_sequence(dtype):
    u, pre = torch.randn(2, 2, 3, 400).to(dtype)
    k = torch.randn(3, 400)
    whole = fft_conv(u, k, pre_gate=pre, backend="cpu")
    out = steps(fft_conv_init(k, u[..., :50], pre_gate=pre[..., :50]), u[..., 50:], pre[..., 50:])
    assert out.dtype == dtype
    exact = fft_conv(u.double(), k.double(), pre_gate=pre.double(), backend="cpu")[..., 50:]
    near(out.double(), exact, 2 * float((whole[..., 50:].double() - exact).norm() / exact.norm()) + 4e-7)


def test_a_sequence_longer_than_the_rings():
    """The rings hold 64 samples for 20 taps; state and cost stay those of the kernel."""
    u, k = torch.randn(1, 2, 1000, dtype=F64), torch.randn(2, 20, dtype=F64)
    state = fft_conv_init(k, u[..., :1])
    near(steps(state, u[..., 1:]), fft_conv(u, k, backend="cpu")[..., 1:])
    assert state.inputs.shape == state.pending.shape == (1, 2, BLOCK)


def test_sequences_do_not_mix():
    u, k = torch.randn(3, 2, 200), torch.randn(2, 150)
    together = steps(fft_conv_init(k, u[..., :20]), u[..., 20:])
    for b in range(3):
        assert torch.equal(steps(fft_conv_init(k, u[b : b + 1, :, :20]), u[b : b + 1, :, 20:]), together[b : b + 1])


def test_steps_cost_far_less_than_a_sum_over_the_kernel():
    taps, tokens, channels = 16384, 512, 64
    k, u = torch.randn(channels, taps), torch.randn(1, channels, tokens)
    history = torch.randn(1, channels, taps)

    def by_sum(t):
        history[..., t] = u[..., t]
        return (history * k).sum(-1)

    def seconds(function):
        start = time.thread_time()
        for t in range(tokens):
            function(t)
        return time.thread_time() - start

    with testing.use_threads(1), torch.no_grad():
        state = fft_conv_init(k, torch.randn(1, channels, taps), backend="cpu")
        steps(fft_conv_init(k, torch.randn(1, channels, taps), backend="cpu"), u)
        assert 4 * min(seconds(lambda t: fft_conv_step(u[..., t], state)) for _ in range(2)) < seconds(by_sum)


# ---- the native steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", _library.machine_isas())
@pytest.mark.parametrize("dtype", (F64, torch.float32, torch.bfloat16), ids=str)
def test_native_steps_on_every_instruction_set(isa, dtype):
    """Squares of every kind: summed directly, in a transform longer than they need, exact ones, and those at the end of
    the rings."""
    u, post = torch.randn(2, 2, 6, 1300).to(dtype)
    k = torch.randn(3, 1000, dtype=F64).to(F64 if dtype == F64 else torch.float32)
    D = torch.randn(6, dtype=F64).to(dtype)
    with testing.use_isa(isa):
        state = fft_conv_init(k, u[..., :30], D=D, backend="cpu")
        out = steps(state, u[..., 30:], post=post[..., 30:])
        exact = fft_conv(u.double(), k.double(), D=D.double(), post_gate=post.double(), backend="reference")
    assert state.spectra is not None and out.dtype == dtype
    near(out.double(), exact[..., 30:], {F64: 1e-12, torch.float32: 1e-6}.get(dtype, 4e-3))


def test_steps_do_not_depend_on_the_thread_count():
    u, k = torch.randn(8, 70, 260), torch.randn(70, 200)
    results = []
    for threads in (1, 2):
        with testing.use_threads(threads):
            results.append(steps(fft_conv_init(k, u[..., :4], backend="cpu"), u[..., 4:]))
    assert torch.equal(*results)


def _step_arguments(tokens: int, dtype: torch.dtype) -> tuple:
    state = fft_conv_init(torch.randn(2, 300), batch=2, channels=4, D=torch.randn(4), dtype=dtype, backend="cpu")
    side = min((tokens + 1) & -(tokens + 1), state.capacity)
    spectrum = state.spectra[(side // BLOCK).bit_length() - 2] if side > BLOCK else None
    u, pre, post = (torch.randn(2, 4, 3).to(dtype)[..., 1] for _ in range(3))
    return u, state.inputs.normal_(), state.pending.normal_(), state.k, spectrum, state.D, pre, post, tokens


@pytest.mark.parametrize("tokens", (5, 63, 511))
def test_opcheck_and_version_counters(tokens):
    ops = torch.ops.pykernels
    torch.library.opcheck(ops.fft_conv_spectrum_cpu.default, (torch.randn(2, 512), None, 1, False, 512, 256))
    for dtype in (torch.float32, torch.bfloat16):
        arguments = _step_arguments(tokens, dtype)
        torch.library.opcheck(ops.fft_conv_step_cpu.default, arguments)
        before = [x._version for x in arguments[1:3]]
        ops.fft_conv_step_cpu(*arguments)
        assert [x._version for x in arguments[1:3]] == [v + 1 for v in before]


def test_the_op_refuses_what_it_would_read_or_write_wrongly():
    step = torch.ops.pykernels.fft_conv_step_cpu
    arguments = _step_arguments(511, torch.float32)
    isas = _library.machine_isas()
    for i, wrong, match in (
        (1, arguments[1][:1], "inputs has size 1"),
        (2, arguments[2].double(), "pending has the wrong dtype"),
        (3, arguments[3][:, :100], "k has size 100"),
        (4, None, "spectrum of 1024 taps"),
        (4, arguments[4][:-1], "make it again"),
        (8, -1, "tokens"),
    ):
        with pytest.raises(RuntimeError, match=match):
            step(*arguments[:i], wrong, *arguments[i + 1 :])
    with (
        testing.use_isa(isas[0] if _library.active_isa() != isas[0] else isas[-1]),
        pytest.raises(RuntimeError, match="another instruction set.*make it again"),
    ):
        step(*arguments)


def test_states_are_for_inference():
    k, u = torch.randn(2, 5, requires_grad=True), torch.randn(1, 2)
    with pytest.raises(RuntimeError, match=r"\bk\b requires grad.*inference"):
        fft_conv_init(k)
    with torch.no_grad():
        state = fft_conv_init(k)
        fft_conv_step(u.requires_grad_(), state)
    for name in ("u_t", "pre_gate", "post_gate"):
        args = {"u_t": u.detach(), "pre_gate": None, "post_gate": None, name: u}
        with pytest.raises(RuntimeError, match=rf"{name} requires grad.*inference"):
            fft_conv_step(state=state, **args)


def test_a_steps_checks_are_remembered_for_calls_that_look_alike():
    u = torch.randn(1, 2)
    narrow, *states = (fft_conv_init(torch.randn(2, 5), dtype=dtype) for dtype in (torch.bfloat16, None, None))
    _checks.forget()
    for state in states:
        fft_conv_step(u, state)
        fft_conv_step(u, state)
    assert len(_checks._remembered) == 1
    fft_conv_step(u, states[0], pre_gate=u)
    assert len(_checks._remembered) == 2
    # The state's tensors look alike, its dtype is another.
    with pytest.raises(TypeError, match="u_t.*bfloat16"):
        fft_conv_step(u, narrow)
    fft_conv_step(u.bfloat16(), narrow, post_gate=u)
    with pytest.raises(RuntimeError, match="requires grad"):
        fft_conv_step(u.clone().requires_grad_(), states[0])
    assert len(_checks._remembered) == 3


@pytest.mark.parametrize(
    "args, exception, match",
    (
        ({"k": [1.0]}, TypeError, r"\bk\b.*tensor.*list"),
        ({"k": torch.zeros(2, 3, 4)}, ValueError, r"\bk\b.*2 axes"),
        ({"k": torch.zeros(2, 0)}, ValueError, r"\bk\b.*at least one tap"),
        ({"u_prefix": torch.zeros(2, 4)}, ValueError, r"u_prefix.*3 axes"),
        ({"u_prefix": torch.zeros(1, 3, 4)}, ValueError, r"\bk\b.*3 channels.*2 rows"),
        ({"u_prefix": torch.zeros(1, 2, 4), "batch": 1}, ValueError, r"batch.*None.*u_prefix"),
        (
            {"u_prefix": torch.zeros(1, 2, 4), "pre_gate": torch.zeros(1, 2, 3)},
            ValueError,
            r"pre_gate.*L=4.*\[1, 2, 3\]",
        ),
        ({"pre_gate": torch.zeros(1, 2, 3)}, ValueError, r"pre_gate.*without u_prefix"),
        ({"batch": -1}, ValueError, r"batch.*-1"),
        ({"channels": 2.0}, ValueError, r"channels.*2\.0"),
        ({"dtype": torch.int32}, TypeError, r"int32"),
        ({"D": torch.zeros(3)}, ValueError, r"\bD\b.*D=2.*\[3\]"),
        ({"backend": "gpu"}, ValueError, r"backend.*'gpu'"),
    ),
)
def test_bad_input_of_init(args, exception, match):
    with pytest.raises(exception, match=match):
        fft_conv_init(**{"k": torch.zeros(2, 5), **args})


@pytest.mark.parametrize(
    "args, exception, match",
    (
        ({"state": None}, TypeError, r"state.*fft_conv_init.*NoneType"),
        ({"u_t": [0.0]}, TypeError, r"u_t.*tensor.*list"),
        ({"u_t": torch.zeros(2, 2, 1)}, ValueError, r"u_t.*2 axes"),
        ({"u_t": torch.zeros(3, 2)}, ValueError, r"u_t.*B=2.*\[3, 2\]"),
        ({"u_t": torch.zeros(2, 2).half()}, TypeError, r"u_t.*float32.*float16"),
        ({"u_t": torch.zeros(2, 2, device="meta")}, ValueError, r"u_t.*device"),
        ({"pre_gate": torch.zeros(2, 3)}, ValueError, r"pre_gate.*D=2.*\[2, 3\]"),
        ({"post_gate": torch.zeros(2, 2).double()}, TypeError, r"post_gate.*float32.*float64"),
    ),
)
def test_bad_input_of_step_changes_nothing(args, exception, match):
    state = fft_conv_init(torch.randn(2, 5), torch.randn(2, 2, 3))
    before = state.inputs.clone(), state.pending.clone(), state.tokens
    with pytest.raises(exception, match=match):
        fft_conv_step(**{"u_t": torch.zeros(2, 2), "state": state, **args})
    assert torch.equal(state.inputs, before[0]) and torch.equal(state.pending, before[1]) and state.tokens == before[2]
