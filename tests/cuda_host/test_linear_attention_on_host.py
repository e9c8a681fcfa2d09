"""The CUDA kernels of linear attention, executed on the host: the ops' usual cases against the float64 definition."""

from __future__ import annotations

import host_build
import pytest
import torch

from pykernels import BackendUnavailable, linear_attention, linear_attention_step
from pykernels.testing import (LINEAR_ATTENTION, LINEAR_ATTENTION_STEP, RETENTION, RETENTION_STEP, Case, Description,
                               Target, check, run)
from pykernels.testing.kit import seed
from pykernels.testing.linear_attention import linear_case

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HALF = (BF16, FP16)
CUDA = Target("cuda", "cpu")


# Every instantiation, several slices of columns, inner axes of more than one walk, several segments of 512 tokens.
SIZES = [
    linear_case("size-64", tokens=80, key_dim=64, value_dim=130, decay="token", state=True),
    linear_case("size-128", tokens=80, heads=1, key_dim=128, value_dim=128, decay="token", state=True),
    linear_case("size-128-bonus", tokens=40, heads=1, key_dim=100, value_dim=128, decay="head", bonus=True),
    linear_case("size-256", tokens=40, heads=1, key_dim=250, value_dim=200, decay="token", state=True),
    linear_case("size-256-plain", tokens=40, heads=1, key_dim=256, value_dim=256),
    linear_case("parts", tokens=40, heads=1, key_dim=70, value_dim=300, decay="token", normalize=True, state=True),
    linear_case("parts-bonus", tokens=40, heads=2, heads_k=1, key_dim=24, value_dim=260, decay="token", bonus=True),
    linear_case("segments", tokens=1100, heads=1, key_dim=20, value_dim=24, decay="token", strength=0.02, state=True),
    linear_case("segments-plain-reverse", batch=2, tokens=530, heads=1, key_dim=16, reverse=True),
    linear_case("segments-128", tokens=520, heads=1, key_dim=80, value_dim=100, decay="token", strength=0.02),
    linear_case("segments-256", tokens=520, heads=1, key_dim=130, value_dim=140, decay="token", strength=0.02),
    linear_case("segments-normalize", tokens=600, heads=1, key_dim=16, value_dim=20, decay="token", strength=0.01,
                normalize=True, state=True),
    linear_case("segments-bonus", tokens=520, heads=2, heads_k=1, key_dim=20, value_dim=16, decay="token", bonus=True,
                strength=0.02, state=True),
    linear_case("segments-packed", tokens=1700, heads=1, key_dim=16, decay="head", strength=0.02,
                lengths=(520, 0, 512, 1, 600), state=True),
    linear_case("segments-packed-reverse", tokens=1300, heads=2, heads_k=1, key_dim=16, decay="token", strength=0.02,
                lengths=(1, 700, 590), reverse=True, normalize=True),
]
# The same of the kernels for a decay per channel and for fp32.
WIDE_SIZES = [
    linear_case("wide-128", tokens=80, heads=1, key_dim=100, value_dim=128, decay="channel", bonus=True, state=True),
    linear_case("wide-256", tokens=40, heads=1, key_dim=250, value_dim=200, decay="channel", state=True),
    linear_case("wide-parts", tokens=40, heads=2, heads_k=1, key_dim=70, value_dim=300, decay="channel", normalize=True,
                bonus=True, state=True),
    linear_case("wide-segments", tokens=1100, heads=1, key_dim=20, value_dim=24, decay="channel", strength=0.02,
                state=True),
    linear_case("wide-segments-bonus-reverse", batch=2, tokens=530, heads=1, key_dim=70, decay="channel", strength=0.02,
                normalize=True, bonus=True, reverse=True, state=True),
    linear_case("wide-segments-256", tokens=520, heads=1, key_dim=130, value_dim=140, decay="channel", strength=0.02),
    linear_case("wide-segments-packed", tokens=1700, heads=2, heads_k=1, key_dim=16, decay="channel", strength=0.02,
                lengths=(520, 0, 512, 1, 600), state=True),
]
NUMBERS = [(op, case, dtype) for op in (LINEAR_ATTENTION, RETENTION, LINEAR_ATTENTION_STEP, RETENTION_STEP)
           for dtype in (*HALF, FP32) for case in (*op.cases, *op.extremes)]
NUMBERS += [(LINEAR_ATTENTION, case, dtype) for dtype in HALF for case in SIZES]
NUMBERS += [(LINEAR_ATTENTION, case, dtype) for dtype in (BF16, FP32) for case in WIDE_SIZES]


@pytest.fixture(autouse=True)
def ops(host):
    import linear_ops

    with linear_ops.on_the_host():
        yield linear_ops


def _check(host, op: Description, case: Case, dtype: torch.dtype, seed_: int) -> None:
    host.set_seed(seed_)
    errors = check(op, case, dtype, CUDA)
    assert {error.tensor for error in errors} >= {*op.outputs, *op.mutates}
    assert all(error.ok for error in errors), "\n".join(map(str, errors))


@pytest.mark.parametrize("op, case, dtype", [
    pytest.param(op, case, dtype, id=f"{op.name}-{case}-{str(dtype).removeprefix('torch.')}")
    for op, case, dtype in NUMBERS if dtype in case.dtypes])
def test_numbers(host, op, case, dtype):
    _check(host, op, case, dtype, seed(case.name + str(dtype)))  # another order of events for each


@pytest.mark.parametrize("seed_", range(12))
def test_every_order_of_events(host, seed_):
    case = linear_case("orders", tokens=550, heads=1, key_dim=24, value_dim=70, decay="token", bonus=True,
                       normalize=True, strength=0.02, state=True)
    _check(host, LINEAR_ATTENTION, case, BF16, seed_)


@pytest.mark.parametrize("case", (
    linear_case("repeat", batch=2, tokens=600, heads=2, heads_k=1, key_dim=20, value_dim=80, decay="token", state=True),
    linear_case("repeat-bonus", tokens=70, key_dim=20, decay="head", bonus=True, normalize=True),
    linear_case("repeat-channel", tokens=600, heads=2, heads_k=1, key_dim=20, value_dim=80, decay="channel", bonus=True,
                normalize=True, state=True),
), ids=str)
def test_bitwise_repeatable(host, case):
    """Whatever the order of the blocks and threads."""
    results = []
    for seed_ in (0, 7, 11):
        host.set_seed(seed_)
        results.append(run(LINEAR_ATTENTION, case.make(FP16, "cpu"), "cuda"))
    for other in results[1:]:
        for name, x in results[0].items():
            assert torch.equal(x, other[name]), name


@pytest.mark.parametrize("decay, dtype", (("token", BF16), ("channel", BF16), ("token", FP32)), ids=str)
def test_results_do_not_depend_on_the_batch(host, decay, dtype):
    """Not on the other sequences of a batch or of packed input, not even where their values are not finite."""
    lengths, options = (70, 600, 100), {"decay": decay, "strength": 0.02, "state": True}
    case = linear_case("batch", tokens=sum(lengths), key_dim=20, lengths=lengths, **options)
    args = dict(case.make(dtype, "cpu").args)
    for name in "qkv":
        args[name][:, 60:70], args[name][:, 670:] = torch.nan, torch.inf
    names = [*"qkv", "decay"]
    leaves = {name: args[name].requires_grad_() for name in [*names, "initial_state"]}
    rest = {"cu_seqlens": args["cu_seqlens"], "backend": "cuda", "return_final_state": True}
    packed = linear_attention(**leaves, **rest)
    given = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype) for x in packed]
    gradients = dict(zip(leaves, torch.autograd.grad(packed, list(leaves.values()), given)))
    part, one = slice(70, 670), slice(1, 2)
    alone_leaves = {name: (x[one] if name == "initial_state" else x[:, part]).detach().clone().requires_grad_()
                    for name, x in leaves.items()}
    alone = linear_attention(**alone_leaves, backend="cuda", return_final_state=True)
    assert torch.equal(alone[0], packed[0][:, part]) and torch.equal(alone[1], packed[1][one])
    assert all(x.isfinite().all() for x in alone)
    of_part = torch.autograd.grad(alone, list(alone_leaves.values()), [given[0][:, part], given[1][one]])
    for name, x in zip(alone_leaves, of_part):
        assert torch.equal(x, gradients[name][one] if name == "initial_state" else gradients[name][:, part]), name


@pytest.mark.parametrize("offsets", ((0, 700, 20), (0, 5000, 900), (-7, 100, 100), (900, 30, 600)), ids=str)
def test_lying_offsets_stay_inside(host, ops, offsets):
    """Offsets in device memory are not checked: whatever they are, no access leaves the tensors."""
    q, k, v = (torch.randn(1, 900, 1, 16, generator=torch.Generator().manual_seed(i)).half() for i in range(3))
    cu = torch.tensor(offsets, dtype=torch.int32)
    for g, u in ((torch.full((1,), -0.01), None), (torch.full((1, 900, 1, 16), -0.01), torch.ones(1, 16))):
        out, final, checkpoints, denominator = ops.fwd(q, k, v, g, u, None, cu, 0.25, False, False, True)
        assert out.isfinite().all() and final.isfinite().all()
        for x in ops.bwd(q, None, q, k, v, g, u, cu, out, checkpoints, denominator, 0.25, False, False, True):
            assert x.isfinite().all()


def test_a_forward_without_gradients_needs_no_states(host):
    case = linear_case("inference", tokens=600, heads=1, key_dim=20, decay="token", strength=0.02, state=True)
    args = case.make(BF16, "cpu").args
    out, final = linear_attention(**args, backend="cuda", return_final_state=True)
    leaves = {name: x.clone().requires_grad_() if name == "q" else x for name, x in args.items()}
    other, state = linear_attention(**leaves, backend="cuda", return_final_state=True)
    assert out.abs().max() > 0 and torch.equal(out, other) and torch.equal(final, state)


def test_steps_continue_a_prompt(host):
    """In the same state, to the roundings of bfloat16."""
    args = linear_case("steps", tokens=40, key_dim=24, value_dim=20, decay="token").make(BF16, "cpu").args
    whole, final = linear_attention(**args, backend="cuda", return_final_state=True)
    prompt = {name: x[:, :37] for name, x in args.items()}
    _, state = linear_attention(**prompt, backend="cuda", return_final_state=True)
    for t in range(37, 40):
        out = linear_attention_step(**{name: x[:, t] for name, x in args.items()}, state=state, backend="cuda")
        assert torch.allclose(out.float(), whole[:, t].float(), rtol=2e-2, atol=2e-2)
    assert torch.allclose(state, final, rtol=2e-2, atol=2e-2) and state.abs().max() > 0.1


@pytest.mark.parametrize("size", (64, 128, 256))
@pytest.mark.parametrize("decay", ("token", "channel"))
def test_fits_the_shared_memory_of_every_gpu(host, decay, size):
    """sm_86, sm_89 and sm_120 have 99 KiB for a block."""
    host.set_shared_limit(99 * 1024)
    try:
        _check(host, LINEAR_ATTENTION, linear_case("small", tokens=3, heads=1, key_dim=size, decay=decay), FP16, 0)
    finally:
        host.set_shared_limit(227 * 1024)


def test_what_the_kernels_do_not_take(host, ops):
    q = torch.zeros(1, 4, 1, 8, dtype=FP16)
    with pytest.raises(BackendUnavailable, match="no float64"):
        linear_attention(*[q.double()] * 3, backend="cuda")
    with pytest.raises(BackendUnavailable, match="no float64"):
        linear_attention_step(*[q[:, 0].double()] * 3, torch.zeros(1, 1, 8, 8, dtype=torch.float64), backend="cuda")
    options = (None, None, None, 1.0, False, False, False)
    with pytest.raises(RuntimeError, match="no float64"):
        ops.fwd(*[q.double()] * 3, None, *options)
    host.set_shared_limit(16 * 1024)
    try:
        with pytest.raises(RuntimeError, match="invalid argument"):
            ops.fwd(*[torch.zeros(1, 4, 1, 256, dtype=FP16)] * 3, None, *options)
    finally:
        host.set_shared_limit(227 * 1024)


# Ragged shapes, every way of loading rows, packed and empty sequences, every instantiation, several segments.
SANITIZED = (
    *(f"linear_attention-{case}" for case in (
        "tiny-float16", "key-33-value-70-bfloat16", "key-111-value-1-float16", "packed-float16",
        "packed-normalize-bfloat16", "bonus-token-float16", "layout-expanded-bfloat16", "size-128-bonus-bfloat16",
        "packed-channel-float16", "layout-padded-bfloat16", "wide-parts-float32", "parts-float16",
        "segments-packed-reverse-bfloat16")),
    *(f"linear_attention_step-{case}" for case in (
        "step-slots-float16", "step-normalize-float32", "layout-padded-bfloat16")),
)


def test_under_the_sanitizers(compiler):
    tests = [f"test_numbers[{name}]" for name in SANITIZED]
    host_build.check_sanitized(__file__, tests)
