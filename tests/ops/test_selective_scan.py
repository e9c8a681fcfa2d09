"""The selective scan beyond what tests/test_ops.py asks of every op."""

from __future__ import annotations

import itertools
import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pykernels
from pykernels import _checks, _library, selective_scan, selective_scan_step
from pykernels.testing import SELECTIVE_SCAN as OP
from pykernels.testing import check, targets, use_isa, use_threads
from pykernels.testing.selective_scan import OPTIONAL, scan_case

TARGETS = targets(OP.op)
COMPILED = [target for target in TARGETS if target.backend != "reference"]
NATIVE = [target for target in COMPILED if target.backend == "cpu"]
on_all = pytest.mark.parametrize("target", TARGETS, ids=str)
on_compiled = pytest.mark.parametrize("target", COMPILED, ids=str)
on_native = pytest.mark.parametrize("target", NATIVE, ids=str)


def _args(device="cpu", dtype=torch.float32, name="scan", **shape):
    return dict(scan_case(name, **{"batch": 2, "channels": 21, "length": 90, "state": 5, **shape}).make(dtype,
                                                                                                        device).args)


def _complex_args(dtype=torch.float64, B="token", C="token", batch=2, channels=6, length=11, state=3, packed=False):
    """Everything with a complex A; B and C complex too, or real where asked for."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape, complex=False):
        x = torch.randn(*shape, generator=generator, dtype=torch.complex128 if complex else torch.float64)
        return x.to({torch.float64: torch.complex128}.get(dtype, torch.complex64) if complex else dtype)

    def projection(kind):
        shape = {"constant": (channels, state), "token": (batch, state, length), "group": (batch, 2, state,
                                                                                           length)}[kind.split("-")[0]]
        return normal(*shape, complex=not kind.endswith("real"))

    A = normal(channels, state, complex=True)
    args = {"u": normal(batch, channels, length), "delta": normal(batch, channels, length),
            "A": torch.complex(-A.real.abs(), A.imag * 4), "B": projection(B), "C": projection(C),
            "D": normal(channels),
            "z": normal(batch, channels, length), "delta_bias": normal(channels), "delta_softplus": True}
    sequences = batch
    if packed:
        args["cu_seqlens"] = torch.tensor([0, length // 3, length // 3, length - 1])
        sequences = 3
    return args | {"initial_state": normal(sequences, channels, state, complex=True)}


# ---- The definition
# ----------------------------------------------------------------------------------------------------


@on_all
@pytest.mark.parametrize("is_complex", (False, True))
def test_by_hand(target, is_complex):
    if is_complex and target.backend not in ("reference", "cpu"):
        pytest.skip("complex A is served by the reference and cpu backends")
    args = _complex_args(length=4, channels=2) if is_complex else _args(dtype=torch.float32, length=4, channels=2,
                                                                        state=3)
    with target.active():
        out, final = selective_scan(**args, return_final_state=True, backend=target.backend)
    for b, d in itertools.product(range(2), range(2)):
        h = [x.item() for x in args["initial_state"][b, d]]
        for t in range(4):
            dt = torch.nn.functional.softplus(args["delta"][b, d, t] + args["delta_bias"][d]).item()
            u = args["u"][b, d, t].item()
            h = [torch.exp(dt * a).item() * x + dt * u * beta.item() for a, x, beta in zip(args["A"][d], h,
                                                                                           args["B"][b, :, t])]
            y = sum(c.item() * x for c, x in zip(args["C"][b, :, t], h))
            y = (2 * y.real if is_complex else y) + args["D"][d].item() * u
            z = args["z"][b, d, t]
            assert out[b, d, t].item() == pytest.approx(y * (z * torch.sigmoid(z)).item(), rel=1e-4, abs=1e-5)
        assert final[b, d].tolist() == pytest.approx(h, rel=1e-4, abs=1e-5)


def _compare(actual, expected, tolerance):
    for name in expected:
        x, y = actual[name], expected[name]
        assert x.shape == y.shape and x.dtype == y.dtype, name
        assert y.abs().max() > 0 and (x - y).abs().max() <= tolerance * y.abs().max(), name


def _with_gradients(args, backend):
    leaves = {n: x.detach().requires_grad_() for n, x in args.items() if isinstance(x,
                                                                                    torch.Tensor) and n != "cu_seqlens"}
    out, final = selective_scan(**{**args, **leaves}, return_final_state=True, backend=backend)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in (out, final)]
    gradients = torch.autograd.grad([out, final], list(leaves.values()), cotangents)
    return {"out": out.detach(), "final": final.detach()} | {"d" + n: x for n, x in zip(leaves, gradients)}


@on_native
@pytest.mark.parametrize("B, C", (("token", "token"), ("constant", "group"), ("group", "constant"), ("token-real",
                                                                                                     "constant-real")))
@pytest.mark.parametrize("packed", (False, True))
def test_complex_A(target, B, C, packed):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-5)):
        args = _complex_args(dtype, B, C, batch=1 if packed else 2, channels=18, length=80, state=6, packed=packed)
        with target.active():
            _compare(_with_gradients(args, "cpu"), _with_gradients(args, "reference"), tolerance)


@on_native
def test_complex_A_with_fast_rotation(target):
    """Angles beyond what the vector sine reduces."""
    args = _complex_args(torch.float32, channels=18, length=20)
    args["A"] = torch.complex(args["A"].real * 1e-3, args["A"].imag.sign() * torch.logspace(0, 6, 18)[:, None])
    exact = {n: x.to(torch.complex128 if x.is_complex() else torch.float64) if isinstance(x, torch.Tensor) else x
             for n, x in args.items()}
    with target.active():
        out = selective_scan(**args, backend="cpu")
    reference = selective_scan(**exact, backend="reference")
    plain = selective_scan(**args, backend="reference")
    slow = args["A"].imag.abs().amax(1) < 100  # any implementation loses the phase of faster ones to dt A's rounding
    assert (out - reference)[:, slow].abs().max() <= 2 * (plain - reference)[:, slow].abs().max() + 1e-5
    assert out.isfinite().all() and out.abs().max() < 2 * reference.abs().max() + 1


@on_native
@pytest.mark.parametrize("state", (1, 2, 3, 4, 5, 8, 12, 16, 17, 31, 128, 255))
def test_every_blocking_of_the_states(target, state):
    errors = check(OP, scan_case(f"blocks-{state}", channels=18, length=67, state=state), torch.float32, target)
    assert all(error.ok for error in errors), "\n".join(map(str, errors))


# ---- States and packing
# ------------------------------------------------------------------------------------------------


def _slice(args, start, end):
    return {n: x[..., start:end] if n in ("u", "delta", "z") or n in "BC" and x.dim() > 2 else x for n,
            x in args.items()}


@on_all
@pytest.mark.parametrize("split", (0, 1, 37, 64, 89, 90))
def test_two_halves_are_the_whole(target, split):
    args = _args(target.device)
    with target.active():
        whole, last = selective_scan(**args, return_final_state=True, backend=target.backend)
        first, middle = selective_scan(**_slice(args, 0, split), return_final_state=True, backend=target.backend)
        second, end = selective_scan(**{**_slice(args, split, 90), "initial_state": middle}, return_final_state=True,
                                     backend=target.backend)
    assert torch.allclose(torch.cat([first, second], dim=2), whole, rtol=1e-5, atol=1e-6)
    assert torch.allclose(end, last, rtol=1e-5, atol=1e-6)


@on_all
@pytest.mark.parametrize("B", ("token", "group"))
def test_steps_continue_a_prefill(target, B):
    args = _args(target.device, channels=20, B=B, C=B)
    with target.active(), torch.no_grad():
        whole, last = selective_scan(**args, return_final_state=True, backend=target.backend)
        _, state = selective_scan(**_slice(args, 0, 60), return_final_state=True, backend=target.backend)
        step = {n: x for n, x in args.items() if n not in ("u", "initial_state")}
        outs = []
        for t in range(60, 90):
            now = {n: x[..., t] if n in ("delta", "z", "B", "C") else x for n, x in step.items()}
            outs.append(selective_scan_step(args["u"][..., t], state, **now, backend=target.backend))
    assert torch.allclose(torch.stack(outs, dim=2), whole[..., 60:], rtol=1e-5, atol=1e-5)
    assert torch.allclose(state, last, rtol=1e-5, atol=1e-5)


@on_native
def test_complex_steps_continue_a_prefill(target):
    args = _complex_args(length=8)
    with target.active(), torch.no_grad():
        whole, last = selective_scan(**args, return_final_state=True)
        state = args["initial_state"].clone()
        for t in range(8):
            now = {n: x[..., t] if n in ("delta", "z", "B", "C") else x
                   for n, x in args.items() if n not in ("u", "initial_state")}
            assert torch.allclose(selective_scan_step(args["u"][..., t], state, **now), whole[..., t])
    assert torch.allclose(state, last)


@on_compiled
@settings(max_examples=15)
@given(lengths=st.lists(st.integers(0, 140), max_size=5), channels=st.integers(1, 40), state=st.integers(1, 20),
       seed=st.integers(0, 99))
def test_packed_is_separate_sequences(target, lengths, channels, state, seed):
    total = sum(lengths)
    args = _args(target.device, batch=1, channels=channels, state=state, length=total + 3, name=f"packed-{seed}",
                 lengths=lengths)
    cu = args.pop("cu_seqlens").tolist()
    states = args.pop("initial_state")
    with target.active():
        out, final = selective_scan(**args, initial_state=states, cu_seqlens=torch.tensor(cu, device=target.device),
                                    return_final_state=True, backend=target.backend)
        for s, (start, end) in enumerate(zip(cu, cu[1:])):
            alone, last = selective_scan(**_slice(args, start, end), initial_state=states[s:s + 1],
                                         return_final_state=True,
                                         backend=target.backend)
            assert torch.equal(out[..., start:end], alone) and torch.equal(final[s:s + 1], last)
    assert not out[..., total:].any()


def test_a_step_bumps_the_states_version_and_leaves_other_slots_alone():
    args = {n: x[..., 0] if n in ("delta", "z", "B", "C") else x for n, x in _args().items() if n != "initial_state"}
    x, state = args.pop("u")[..., 0], torch.randn(5, 21, 5)
    before, version = state.clone(), state._version
    out = selective_scan_step(x, state, **args, state_indices=torch.tensor([3, -1]))
    assert state._version > version
    assert torch.equal(state[[0, 1, 2, 4]], before[[0, 1, 2, 4]]) and not torch.equal(state[3], before[3])
    assert out[0].any() and not out[1].any()


def test_a_steps_checks_are_remembered_for_calls_that_look_alike():
    args = {n: x[..., 0] if n in ("delta", "z", "B", "C") else x for n, x in _args().items() if n != "initial_state"}
    x, state = args.pop("u")[..., 0], torch.randn(2, 21, 5)

    def step(**changes):
        return selective_scan_step(**{"x": x, "state": state, **args, **changes})

    _checks.forget()
    step(), step()
    assert len(_checks._remembered) == 1
    step(state=state.transpose(1, 2).contiguous().transpose(1, 2))
    assert len(_checks._remembered) == 2
    # Equal to what was remembered, but not alike.
    with pytest.raises(TypeError, match="delta_softplus"):
        step(delta_softplus=int(args["delta_softplus"]))
    with pytest.raises(ValueError, match="share memory"):
        step(state=state[:1].expand(state.shape))
    with pytest.raises(RuntimeError, match="requires grad"):
        step(A=args["A"].clone().requires_grad_())
    before = state.clone()
    with pykernels.use_backend("reference"):
        step()
    assert len(_checks._remembered) == 3 and not torch.equal(state, before)
    # What the native op does not take as it is, is converted, or refused by name.
    low = {name: t.bfloat16() if isinstance(t, torch.Tensor) else t for name, t in ({"x": x} | args).items()}
    wide = {**low, "A": low["A"].float(), "D": low["D"].float()}
    assert torch.equal(step(**low, state=before.clone()), step(**wide, state=before.clone()))
    with pytest.raises(ValueError, match="A must have 2 axes"):
        step(A=args["A"][..., None].expand(-1, -1, 2))
    with pytest.raises(ValueError, match="z must have shape"):
        step(z=args["z"][:, 1:])
    with pytest.raises(TypeError, match="delta must be a tensor"):
        step(delta=0.5)


# ---- Derivatives
# -------------------------------------------------------------------------------------------------------


def _check_gradients(checker, args, backend, **options):
    leaves = {n: x.requires_grad_() for n, x in args.items() if isinstance(x, torch.Tensor) and n != "cu_seqlens"}

    def function(*tensors):
        return selective_scan(**{**args, **dict(zip(leaves, tensors))}, return_final_state=True, backend=backend)

    assert checker(function, list(leaves.values()), **options)


@pytest.mark.parametrize("isa", _library.machine_isas())
@pytest.mark.parametrize("B, C", (("constant", "constant"), ("constant", "token"), ("token", "constant"), ("token",
                                                                                                           "token"),
                                  ("group", "group"), ("group", "constant")))
def test_gradcheck(isa, B, C):
    with use_isa(isa):
        _check_gradients(torch.autograd.gradcheck, _args(dtype=torch.float64, channels=4, length=3, state=2, B=B, C=C),
                         "cpu", fast_mode=True)


@pytest.mark.parametrize("packed", (False, True))
def test_gradcheck_complex(packed):
    args = _complex_args(batch=1, channels=2, length=5, state=2, packed=packed)
    _check_gradients(torch.autograd.gradcheck, args, "cpu")


@pytest.mark.parametrize("given", (OPTIONAL, ()))
def test_gradgradcheck(given):
    args = _args(dtype=torch.float64, batch=1, channels=2, length=3, state=2, given=given)
    _check_gradients(torch.autograd.gradgradcheck, args, "cpu")


def test_gradgradcheck_packed():
    args = _args(dtype=torch.float64, batch=1, channels=2, length=4, state=2, lengths=(2, 0, 1))
    _check_gradients(torch.autograd.gradgradcheck, args, "cpu", fast_mode=True)


@on_compiled
def test_gradients_through_the_final_state_alone(target):
    args = {n: x.requires_grad_() if isinstance(x, torch.Tensor) else x for n, x in _args(target.device).items()}
    with target.active():
        _, final = selective_scan(**args, return_final_state=True, backend=target.backend)
        dstate, du = torch.autograd.grad(final.sum(), [args["initial_state"], args["u"]])
    reference = selective_scan(**args, return_final_state=True, backend="reference")[1]
    for ours, theirs in zip((dstate, du), torch.autograd.grad(reference.sum(), [args["initial_state"], args["u"]])):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5) and theirs.abs().max() > 0


@on_compiled
def test_func_grad(target):
    args = _args(target.device)

    def loss(u, backend):
        return selective_scan(**{**args, "u": u}, backend=backend).square().sum()

    with target.active():
        gradient = torch.func.grad(loss)(args["u"], target.backend)
    assert torch.allclose(gradient, torch.func.grad(loss)(args["u"], "reference"), rtol=1e-3, atol=1e-4)


@on_compiled
def test_compile_with_dynamic_shapes(target):
    def step(args):
        out, final = selective_scan(**{**args, "u": args["u"] * 2}, return_final_state=True, backend=target.backend)
        return out.sin().sum() + final.sum()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with target.active():
        for length in (33, 70, 129):
            args = _args(target.device, length=length)
            leaves = [x.requires_grad_() for x in args.values() if isinstance(x, torch.Tensor)]
            eager, fast = step(args), compiled(args)
            torch.testing.assert_close(fast, eager)
            for ours, theirs in zip(torch.autograd.grad(fast, leaves), torch.autograd.grad(eager, leaves)):
                torch.testing.assert_close(ours, theirs)
                assert theirs.abs().max() > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@on_native
def test_compile_complex(target):
    args = _complex_args(torch.float32, length=9)
    leaves = [x.requires_grad_() for x in args.values() if isinstance(x, torch.Tensor)]
    torch._dynamo.reset()
    compiled = torch.compile(lambda: selective_scan(**args, backend="cpu"), fullgraph=True, backend="aot_eager")
    with target.active():
        for ours, theirs in zip(torch.autograd.grad(compiled().sum(), leaves),
                                torch.autograd.grad(selective_scan(**args, backend="cpu").sum(), leaves)):
            torch.testing.assert_close(ours, theirs)


# ---- Layouts, limits, memory
# -------------------------------------------------------------------------------------------


@on_native
def test_many_tasks_add_to_the_same_gradients_in_order(target):
    """More runs of tiles than threads, all adding to one dB and dC, whatever the number of threads."""
    args = _args(channels=700, batch=3, length=130, state=2)
    results = []
    with target.active():
        for threads in (1, 2, 4):
            with use_threads(threads):
                results += [_with_gradients(args, "cpu") for _ in range(3)]
    for result in results[1:]:
        for name, x in results[0].items():
            assert torch.equal(result[name], x), name
    _compare(results[0], _with_gradients(args, "reference"), 1e-4)


@on_native
@pytest.mark.parametrize("case", ("group", "constant", "complex", "packed"))
def test_few_channels_are_divided_among_threads(target, case):
    """Few tiles of channels, long: states in parts, chunks in rounds, the same bits for any number of threads."""
    shape = {"batch": 1, "channels": 40, "length": 1100, "state": 21}
    if case == "complex":
        args = _complex_args(torch.float32, **shape)
    elif case == "packed":
        args = _args(**shape | {"channels": 5}, lengths=(3, 0, 897, 190))
    else:
        args = _args(**shape, B=case, C="token" if case == "constant" else case)
    results = []
    with target.active():
        for threads in (1, 2, 3, 5, 8):
            with use_threads(threads):
                results.append(_with_gradients(args, "cpu"))
    for result in results[1:]:
        for name, x in results[0].items():
            assert torch.equal(result[name], x), name
    _compare(results[0], _with_gradients(args, "reference"), 1e-4)


@on_native
@pytest.mark.parametrize("state", (16, 21))
def test_a_steps_channels_are_divided_among_threads(target, state):
    args = _args(batch=3, channels=1100, length=1, state=state)
    x, h, _ = args.pop("u")[..., 0], torch.randn(3, 1100, state), args.pop("initial_state")
    args = {name: y[..., 0] if name in ("delta", "z", "B", "C") else y for name, y in args.items()}
    results = []
    with target.active():
        for threads in (1, 2, 3, 8):
            with use_threads(threads):
                after = h.clone()
                results.append((selective_scan_step(x, after, **args, backend="cpu"), after))
    assert all(torch.equal(y, z) for result in results[1:] for y, z in zip(result, results[0]))


def test_offsets_past_2_to_the_31_elements():
    """Channels more than 2^31 elements apart, in memory that is mapped but hardly touched."""
    distance = 2**31 + 2**20
    no_reserve = 0x4000  # MAP_NORESERVE, which Python before 3.13 does not name
    args = _args(dtype=torch.bfloat16, batch=1, channels=2, length=100)
    memory = mmap.mmap(-1, 2 * (distance + 100), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    far = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((1, 2, 100), (0, distance, 1))
    for name in ("u", "delta", "z"):
        near = args[name].clone()
        far.copy_(near)
        assert torch.equal(selective_scan(**{**args, name: far}), selective_scan(**args))
        ours, theirs = (_with_gradients({**args, name: x}, "cpu") for x in (far, near))
        assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_memory_is_linear_and_small():
    """Forward takes its output, backward the gradients and the states of chunks: nothing of size D L N."""
    channels, length, state = 64, 4096, 64
    u = torch.randn(1, channels, length)
    args = {"u": u, "delta": torch.rand_like(u) * 0.1, "A": -torch.rand(channels, state),
            "B": torch.randn(1, state, length), "C": torch.randn(1, state, length)}
    allocated = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            results = result if isinstance(result, tuple) else (result,)
            allocated.extend(x.numel() for x in results if isinstance(x, torch.Tensor))
            return result

    with Sizes():
        leaves = {n: x.requires_grad_() for n, x in args.items()}
        torch.autograd.grad(selective_scan(**leaves).sum(), list(leaves.values()))
    assert max(allocated) <= max(x.numel() for x in args.values()) * 1.1  # the states: D L N / 64


def test_linear_in_the_length():
    """A million tokens in one call, continued from two halves."""
    length = 2**20
    generator = torch.Generator().manual_seed(0)
    u, delta, B, C = (torch.randn(1, n, length, generator=generator, dtype=torch.bfloat16) for n in (3, 3, 4, 4))
    A = -torch.rand(3, 4) - 0.1
    out, last = selective_scan(u, delta, A, B, C, delta_softplus=True, return_final_state=True)
    half = length // 2
    first, middle = selective_scan(u[..., :half], delta[..., :half], A, B[..., :half], C[..., :half],
                                   delta_softplus=True,
                                   return_final_state=True)
    second, end = selective_scan(u[..., half:], delta[..., half:], A, B[..., half:], C[..., half:], delta_softplus=True,
                                 initial_state=middle, return_final_state=True)
    assert torch.equal(torch.cat([first, second], dim=2), out) and torch.equal(end, last) and out.abs().max() > 1


@on_compiled
def test_outputs_and_gradients_follow_the_layouts(target):
    args = _args(target.device)
    args["u"] = args["u"].transpose(1, 2).contiguous().transpose(1, 2)
    leaves = {n: args[n].detach().requires_grad_() for n in ("u", "delta", "z")}
    with target.active():
        out = selective_scan(**{**args, **leaves}, backend=target.backend)
        gradients = torch.autograd.grad(out.sum(), list(leaves.values()))
    assert out.stride() == args["u"].stride()
    assert [x.stride() for x in gradients] == [x.stride() for x in leaves.values()]


@on_compiled
def test_nan_stays_in_its_channel_and_after_its_token(target):
    args = _args(target.device, given=("D", "z"))
    with target.active():
        before = selective_scan(**args, backend=target.backend)
        args["u"] = args["u"].clone()
        args["u"][0, 5, 40] = torch.nan
        after = selective_scan(**args, backend=target.backend)
    same = torch.ones_like(after, dtype=torch.bool)
    same[0, 5, 40:] = False
    assert torch.equal(after[same], before[same]) and after[~same].isnan().all()


def test_autocast_narrows_u_and_keeps_delta():
    args = _args()
    with torch.autocast("cpu", torch.bfloat16):
        out, state = selective_scan(**args, return_final_state=True)
        mixed = selective_scan(**{**args, "u": args["u"].bfloat16()})
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    narrow = {**args, "u": args["u"].bfloat16(), "z": args["z"].bfloat16()}
    assert torch.equal(out, selective_scan(**narrow)) and torch.equal(mixed, out)


@on_compiled
@settings(max_examples=15)
@given(batch=st.integers(1, 3), channels=st.integers(8, 60), length=st.integers(1, 150), state=st.integers(1, 20),
       B=st.sampled_from(("constant", "token")), C=st.sampled_from(("constant", "token")),
       given_=st.sets(st.sampled_from(OPTIONAL)), softplus=st.booleans())
def test_any_shape(target, batch, channels, length, state, B, C, given_, softplus):
    case = scan_case("any", batch=batch, channels=channels, length=length, state=state, B=B, C=C, given=sorted(given_),
                     delta_softplus=softplus)
    errors = check(OP, case, torch.float32, target)
    assert all(error.ok for error in errors), "\n".join(map(str, errors))
