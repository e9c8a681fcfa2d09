"""Decoding with a key/value cache, beyond what tests/test_ops.py asks of every op."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pykernels import flash_attention, flash_attention_decode
from pykernels.testing import FLASH_ATTENTION_DECODE as OP
from pykernels.testing import check, dtypes, run, targets
from pykernels.testing.flash_attention import decode_case

TARGETS = targets(OP.op)
COMPILED = [target for target in TARGETS if target.backend != "reference"]
on_all = pytest.mark.parametrize("target", TARGETS, ids=str)
on_compiled = pytest.mark.parametrize("target", COMPILED, ids=str)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def _same(x, y):
    return torch.equal(x.nan_to_num(nan=12345.0), y.nan_to_num(nan=12345.0))


def _sequence(target, dtype, batch=2, tokens=40, heads_q=4, heads_k=2, head_dim=24, value_dim=32):
    sizes = ((heads_q, head_dim), (heads_k, head_dim), (heads_k, value_dim))
    return [torch.randn(batch, tokens, heads, dim).to(target.device, dtype) for heads, dim in sizes]


def _caches(k, v, capacity):
    return [x.new_full((x.shape[0], capacity, *x.shape[2:]), torch.nan) for x in (k, v)]


@on_all
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "options", ({}, {"window": (9, None), "softcap": 3.0}), ids=("plain", "window-softcap")
)
def test_decoding_step_by_step_is_the_whole_at_once(target, dtype, options):
    if dtype not in dtypes(OP.op, target):
        return  # this target has no such dtype
    q, k, v = _sequence(target, dtype)
    caches = _caches(k, v, 45)
    lengths = torch.zeros(2, dtype=torch.int32, device=target.device)
    steps = []
    with target.active():
        whole = flash_attention(q, k, v, causal=True, **options, return_lse=True, backend=target.backend)
        for t in range(40):
            now = slice(t, t + 1)
            steps.append(
                flash_attention_decode(
                    q[:, now],
                    *caches,
                    lengths,
                    k=k[:, now],
                    v=v[:, now],
                    **options,
                    return_lse=True,
                    backend=target.backend,
                )
            )
            lengths += 1
    out, lse = torch.cat([out for out, _ in steps], 1), torch.cat([lse for _, lse in steps], 2)
    torch.testing.assert_close((out, lse), whole, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(caches[0][:, :40], k) and torch.equal(caches[1][:, :40], v)


@on_compiled
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_prompt_in_chunks_is_the_whole_at_once(target, dtype):
    q, k, v = _sequence(target, dtype, tokens=150)
    caches = _caches(k, v, 150)
    outs, start = [], 0
    with target.active():
        whole = flash_attention(q, k, v, causal=True, backend=target.backend)
        for length in (70, 1, 9, 64, 6):
            now = slice(start, start + length)
            lengths = torch.full((2,), start, dtype=torch.int64, device=target.device)
            outs.append(
                flash_attention_decode(
                    q[:, now], *caches, lengths, k=k[:, now], v=v[:, now], backend=target.backend
                )
            )
            start += length
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@on_all
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_append_writes_the_new_tokens_and_nothing_else(target, dtype):
    if dtype not in dtypes(OP.op, target):
        return  # this target has no such dtype
    capacity, new_tokens, lengths = 20, 3, (0, 5, 17, 9)
    q, k, v = _sequence(target, dtype, batch=4, tokens=new_tokens)
    # The caches are parts of larger tensors, so that writes beside them show as well.
    wholes = [torch.randn(6, capacity + 4, 4, x.shape[3] + 8).to(target.device, dtype) for x in (k, v)]
    caches = [whole[1:5, 2:-2, 1:3, 3:-5] for whole in wholes]
    wanted = [whole.clone() for whole in wholes]
    for whole, new in zip(wanted, (k, v)):
        for b, length in enumerate(lengths):
            whole[1 + b, 2 + length : 2 + length + new_tokens, 1:3, 3:-5] = new[b]
    versions = [cache._version for cache in caches]
    seqlens = torch.tensor(lengths, device=target.device)
    with target.active():
        out = flash_attention_decode(q, *caches, seqlens, k=k, v=v, backend=target.backend)
    for whole, expected in zip(wholes, wanted):
        assert torch.equal(whole, expected)
    assert all(cache._version > version for cache, version in zip(caches, versions))
    assert seqlens.tolist() == list(lengths)
    assert out.abs().max() > 0


@on_compiled
def test_without_new_tokens_nothing_is_written(target):
    q, k, v = _sequence(target, torch.float32)
    versions = k._version, v._version
    before = k.clone(), v.clone()
    with target.active():
        out = flash_attention_decode(
            q[:, -1:], k, v, torch.tensor([40, 33], device=target.device), backend=target.backend
        )
    assert torch.equal(k, before[0]) and torch.equal(v, before[1]) and (k._version, v._version) == versions
    assert out.abs().max() > 0


@on_compiled
def test_autograd_notices_that_the_cache_was_overwritten(target):
    q, k, v = _sequence(target, torch.float32)
    weight = torch.ones_like(k, requires_grad=True)
    product = (weight * k).sum()  # keeps k for its backward
    with target.active(), torch.no_grad():
        flash_attention_decode(
            q[:, :1],
            k,
            v,
            torch.tensor([3, 4], device=target.device),
            k=k[:, :1].clone(),
            v=v[:, :1].clone(),
            backend=target.backend,
        )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@on_compiled
@pytest.mark.parametrize("tq", (1, 3, 40))
def test_nothing_beyond_the_valid_length_is_read(target, tq):
    """NaN, and then other values, in the rest of the cache change nothing."""
    q, k, v = _sequence(target, torch.float32, batch=3, tokens=200)
    lengths = torch.tensor([0, 77, 199], device=target.device)
    with target.active():
        results = []
        for filler in (0.0, torch.nan, torch.inf, 1e30):
            caches = k.clone(), v.clone()
            for b, length in enumerate(lengths.tolist()):
                for cache in caches:
                    cache[b, length:] = filler
            results.append(
                flash_attention_decode(
                    q[:, :tq], *caches, lengths, causal=False, return_lse=True, backend=target.backend
                )
            )
    for result in results[1:]:
        assert all(_same(x, y) for x, y in zip(result, results[0]))
    out, lse = results[0]
    assert (
        (out[0] == 0).all()
        and (lse[0] == -torch.inf).all()
        and out[1:].isfinite().all()
        and out[2].abs().max() > 0
    )


@on_compiled
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_batch_entry_alone_is_the_same_bitwise(target, dtype):
    case = decode_case(
        "alone", lengths=(3, 150, 77, 0), capacity=160, new_tokens=1, heads_q=8, heads_k=2, head_dim=64
    )
    sample = case.make(dtype, target.device)
    with target.active():
        together = run(OP, sample, target.backend)
        for b in range(4):
            part = sample.replace(**{name: x[b : b + 1] for name, x in sample.tensors().items()})
            for name, x in run(OP, part, target.backend).items():
                assert _same(x, together[name][b : b + 1]), (b, name)
    assert together["out"].abs().max() > 0


@on_compiled
def test_int32_and_int64_lengths_agree(target):
    sample = OP.good.make(torch.float32, target.device)
    wide = sample.replace(cache_seqlens=sample.args["cache_seqlens"].long())
    strided = sample.replace(cache_seqlens=sample.args["cache_seqlens"].repeat_interleave(2)[::2])
    with target.active():
        narrow, *others = (run(OP, s, target.backend) for s in (sample, wide, strided))
    for other in others:
        assert all(_same(other[name], x) for name, x in narrow.items())


@on_compiled
@settings(max_examples=15)
@given(data=st.data())
def test_property_any_step_matches_the_reference(target, data):
    draw, integers = data.draw, st.integers
    new_tokens = draw(st.none() | integers(0, 5))
    lengths = draw(st.lists(integers(0, 90), min_size=1, max_size=3))
    heads_k = draw(integers(1, 3))
    case = decode_case(
        "property",
        lengths=lengths,
        capacity=max(lengths) + (new_tokens or 0) + draw(integers(0, 3)),
        tq=draw(integers(1, 7)),
        new_tokens=new_tokens,
        heads_k=heads_k,
        heads_q=heads_k * draw(integers(1, 6)),
        head_dim=draw(integers(1, 150)),
        value_dim=draw(integers(1, 150)),
        causal=draw(st.booleans()),
        softcap=draw(st.sampled_from((0.0, 2.0))),
        window=(draw(st.none() | integers(0, 50)), None),
    )
    errors = check(OP, case, draw(st.sampled_from(dtypes(OP.op, target))), target)
    assert all(error.ok for error in errors), "\n".join(map(str, errors))


@on_compiled
def test_lengths_are_clamped_where_they_are_not_checked(target):
    """The ops below the checks: lengths beyond the cache stay inside it."""
    q, k, v = _sequence(target, torch.float32, tokens=4)
    lengths = torch.tensor([3, 10**6], dtype=torch.int32, device=target.device)
    ops, suffix, options = torch.ops.pykernels, target.backend, (24**-0.5, 0.0, -1, 0)
    with target.active():
        wanted = flash_attention_decode(
            q[:, :1], k, v, torch.tensor([3, 4], device=target.device), backend=target.backend
        )
        out, _ = getattr(ops, f"flash_attention_decode_{suffix}")(q[:, :1], k, v, lengths, 0, *options)
        assert torch.equal(out, wanted)
        negative = torch.tensor([-5, -(2**31)], dtype=torch.int32, device=target.device)
        out, lse = getattr(ops, f"flash_attention_decode_{suffix}")(q[:, :1], k, v, negative, 0, *options)
        assert (out == 0).all() and (lse == -torch.inf).all()
        before = k.clone(), v.clone()
        appended = [x[:, :2].clone() + 100 for x in (k, v)]
        outside = torch.tensor([3, 2**31 - 1], dtype=torch.int32, device=target.device)
        getattr(ops, f"flash_attention_append_{suffix}")(k, v, *appended, outside)
    before[0][0, 3], before[1][0, 3] = appended[0][0, 0], appended[1][0, 0]  # the one token that has a place
    assert torch.equal(k, before[0]) and torch.equal(v, before[1])
