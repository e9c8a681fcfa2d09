"""Flash attention beyond what tests/test_ops.py asks of every op."""

from __future__ import annotations

import math
import mmap
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import pykernels
from pykernels import flash_attention
from pykernels.testing import FLASH_ATTENTION as OP
from pykernels.testing import Target, check, cotangents, dtypes, expected, run, targets, use_threads
from pykernels.testing.flash_attention import attention_case

TARGETS = targets(OP.op)
COMPILED = [target for target in TARGETS if target.backend != "reference"]
ON_CPU = [target for target in COMPILED if target.device == "cpu"]
NATIVE = [target for target in COMPILED if target.backend == "cpu"]
on_all = pytest.mark.parametrize("target", TARGETS, ids=str)
on_compiled = pytest.mark.parametrize("target", COMPILED, ids=str)
on_native = pytest.mark.parametrize("target", NATIVE, ids=str)


def _qkv(
    target,
    dtype=torch.float32,
    batch=1,
    tq=40,
    tk=40,
    heads_q=2,
    heads_k=2,
    head_dim=16,
    value_dim=16,
    name="qkv",
):
    case = attention_case(
        name,
        batch=batch,
        tq=tq,
        tk=tk,
        heads_q=heads_q,
        heads_k=heads_k,
        head_dim=head_dim,
        value_dim=value_dim,
    )
    return [case.make(dtype, target.device).args[n] for n in "qkv"]


def _gradients(outputs, inputs):
    """Of all outputs at once, with `cotangents`."""
    named = {str(i): x for i, x in enumerate(outputs)}
    return torch.autograd.grad(outputs, inputs, list(cotangents(named).values()))


# ---- The definition ------------------------------------------------------------------------------------------


def _by_hand(q, k, v, *, causal=False, window=(None, None), scale=None, softcap=0.0):
    """Attention as the docstring says it, one number at a time."""
    batch, tq, heads, head_dim = q.shape
    tk, groups = k.shape[1], heads // k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    left, right = window
    out, lse = (
        torch.zeros(batch, tq, heads, v.shape[3], dtype=q.dtype),
        torch.full((batch, heads, tq), -torch.inf, dtype=q.dtype),
    )
    for b in range(batch):
        for h in range(heads):
            for i in range(tq):
                p = i + tk - tq
                seen = [
                    j
                    for j in range(tk)
                    if (left is None or j >= p - left)
                    and (right is None or j <= p + right)
                    and not (causal and j > p)
                ]
                scores = [scale * math.fsum((q[b, i, h] * k[b, j, h // groups]).tolist()) for j in seen]
                if softcap:
                    scores = [softcap * math.tanh(s / softcap) for s in scores]
                if seen:
                    total = math.fsum(math.exp(s) for s in scores)
                    lse[b, h, i] = math.log(total)
                    out[b, i, h] = sum(math.exp(s) / total * v[b, j, h // groups] for s, j in zip(scores, seen))
    return out, lse


@on_all
@pytest.mark.parametrize(
    "shape, options",
    (
        ((7, 7), {}),
        ((5, 9), {"causal": True}),
        ((9, 5), {"causal": True}),
        ((6, 8), {"window": (2, 1), "softcap": 0.7}),
        ((8, 6), {"window": (None, 0), "scale": -1.3}),
        ((7, 7), {"window": (3, None), "causal": True}),
    ),
)
def test_against_attention_by_hand(target, shape, options):
    dtype = torch.float64 if target.device == "cpu" and target.backend != "triton" else torch.float32
    q, k, v = _qkv(target, dtype, 2, *shape, heads_q=4, head_dim=5, value_dim=3)
    with target.active():
        out, lse = flash_attention(q, k, v, **options, return_lse=True, backend=target.backend)
    by_hand = _by_hand(*(x.double().cpu() for x in (q, k, v)), **options)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(
        (out.double().cpu(), lse.double().cpu()), by_hand, rtol=tolerance, atol=tolerance
    )


def test_reference_against_pytorch_with_gradients():
    for options in ({}, {"causal": True}, {"scale": 0.3}):
        q, k, v = (x.requires_grad_() for x in _qkv(Target("reference", "cpu"), torch.float64, 2, heads_q=4))
        ours = flash_attention(q, k, v, **options, backend="reference")
        torchs = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)),
            is_causal=options.get("causal", False),
            scale=options.get("scale"),
            enable_gqa=True,
        ).transpose(1, 2)
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            _gradients([ours], (q, k, v)), _gradients([torchs], (q, k, v)), rtol=1e-11, atol=1e-11
        )


@on_compiled
def test_window_is_masked_full_attention(target):
    q, k, v = _qkv(target, batch=2, tq=150, tk=170)
    position, key = torch.arange(150)[:, None] + 20, torch.arange(170)
    mask = ((key >= position - 13) & (key <= position + 4)).to(target.device)
    masked = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(
        1, 2
    )
    with target.active():
        torch.testing.assert_close(
            flash_attention(q, k, v, window=(13, 4), backend=target.backend), masked, rtol=1e-5, atol=1e-5
        )


# ---- Gradients -----------------------------------------------------------------------------------------------


@on_compiled
@pytest.mark.parametrize("outputs", (("out",), ("lse",)), ids=lambda names: names[0])
@pytest.mark.parametrize(
    "options",
    ({"causal": True, "heads_k": 1}, {"softcap": 2.0, "window": (30, 9), "lengths_q": (70, 0, 30)}),
    ids=("causal-mqa", "softcap-window-packed"),
)
def test_gradients_of_one_output_alone(target, outputs, options):
    case = attention_case("one-output", tq=100, head_dim=24, value_dim=40, **options)
    for dtype in dtypes(OP.op, target):
        errors = check(OP, case, dtype, target, through=outputs)
        assert all(error.ok for error in errors), "\n".join(map(str, errors))
    reference, _ = expected(OP, case, dtype, target.device, outputs)
    assert reference["dq"].abs().max() > 0 and (reference["dv"] == 0).all() == (outputs == ("lse",))


GRADCHECK_CASES = (
    attention_case("gradcheck-gqa", batch=2, tq=4, tk=5, heads_q=4, heads_k=2, head_dim=3, value_dim=2),
    attention_case("gradcheck-causal", tq=5, tk=7, heads_q=2, heads_k=1, head_dim=3, causal=True),
    attention_case("gradcheck-window-softcap", tq=6, head_dim=3, window=(2, 1), softcap=1.3, scale=0.8),
    attention_case("gradcheck-packed", tq=9, tk=9, head_dim=2, lengths_q=(4, 0, 1, 3), causal=True),
)


def _function(case, backend, visible_lse=True):
    """The function of (q, k, v) alone that gradcheck takes; where lse is -inf (tokens of no sequence) it gives 0."""
    args = {name: x for name, x in case.make(torch.float64, "cpu").args.items() if name not in ("q", "k", "v")}

    def function(q, k, v):
        out, lse = flash_attention(q, k, v, **args, return_lse=True, backend=backend)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    return function


def _leaves(case):
    return [
        x.requires_grad_()
        for name, x in case.make(torch.float64, "cpu").args.items()
        if name in ("q", "k", "v")
    ]


@pytest.mark.parametrize("target", [TARGETS[0], *NATIVE], ids=str)
@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=str)
def test_gradcheck(target, case):
    with target.active():
        assert torch.autograd.gradcheck(_function(case, target.backend), _leaves(case))


@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=str)
def test_gradgradcheck(case):
    target = NATIVE[-1]
    with target.active():
        assert torch.autograd.gradgradcheck(_function(case, target.backend), _leaves(case))


@on_compiled
def test_second_derivative_of_out_alone(target):
    """Without a gradient for lse: a gradient penalty, as users write it."""

    def penalty(backend):
        q, k, v = (x.requires_grad_() for x in _qkv(target, tq=9, tk=11))
        (dq,) = torch.autograd.grad(
            flash_attention(q, k, v, causal=True, backend=backend).pow(2).sum(), q, create_graph=True
        )
        return torch.autograd.grad(dq.pow(2).sum(), (q, k, v))

    with target.active():
        torch.testing.assert_close(penalty(target.backend), penalty("reference"), rtol=1e-4, atol=1e-5)
    assert all(x.abs().max() > 1e-3 for x in penalty("reference"))


@on_compiled
def test_func_grad_and_vjp_are_autograd(target):
    q, k, v = _qkv(target, heads_k=1)

    def function(q, k, v):
        return flash_attention(q, k, v, causal=True, return_lse=True, backend=target.backend)

    with target.active():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        outputs = function(*leaves)
        by_autograd = _gradients(outputs, leaves)
        weights = tuple(cotangents({str(i): x for i, x in enumerate(outputs)}).values())
        values, vjp = torch.func.vjp(function, q, k, v)
        torch.testing.assert_close(values, tuple(x.detach() for x in outputs), rtol=0, atol=0)
        torch.testing.assert_close(vjp(weights), by_autograd, rtol=0, atol=0)
        by_grad = torch.func.grad(
            lambda *qkv: sum((w * x).sum() for w, x in zip(weights, function(*qkv))), argnums=(0, 1, 2)
        )
        torch.testing.assert_close(by_grad(q, k, v), by_autograd, rtol=1e-6, atol=1e-6)


@on_compiled
def test_only_what_requires_grad_gets_one(target):
    for i in range(3):
        leaves = _qkv(target, heads_k=1)
        leaves[i].requires_grad_()
        with target.active():
            flash_attention(*leaves, backend=target.backend).sum().backward()
        assert [x.grad is not None for x in leaves] == [j == i for j in range(3)]
        assert i == 2 or leaves[i].grad.abs().max() > 0
    with target.active():
        assert not flash_attention(*_qkv(target), backend=target.backend).requires_grad


# ---- Forms that must agree -----------------------------------------------------------------------------------


@on_compiled
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_packed_is_separate_sequences(target, dtype):
    lengths, options = (70, 0, 1, 130, 29), {"causal": True, "window": (50, None), "softcap": 5.0}
    packed = attention_case(
        "packed-separate", tq=sum(lengths), heads_q=4, heads_k=2, head_dim=32, lengths_q=lengths, **options
    )
    whole = packed.make(dtype, target.device)
    with target.active():
        together = run(OP, whole, target.backend)
        given, start = cotangents({name: together[name] for name in OP.outputs}), 0
        for length in lengths:
            rows = slice(start, start + length)
            alone = {name: whole.args[name][:, rows] for name in "qkv"}
            sample = whole.replace(**alone, cu_seqlens_q=None)
            result = run(
                OP, sample, target.backend, grad={"out": given["out"][:, rows], "lse": given["lse"][..., rows]}
            )
            for name, x in result.items():
                torch.testing.assert_close(
                    together[name][..., rows] if name == "lse" else together[name][:, rows],
                    x,
                    rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-5,
                    atol=1e-2 if dtype == torch.bfloat16 else 1e-5,
                )
            start += length


@on_compiled
def test_halves_of_the_keys_merge_by_their_lse(target):
    q, k, v = _qkv(target, batch=2, tq=50, tk=140, head_dim=40)
    with target.active():
        whole = flash_attention(q, k, v, return_lse=True, backend=target.backend)
        out_a, lse_a = flash_attention(q, k[:, :61], v[:, :61], return_lse=True, backend=target.backend)
        out_b, lse_b = flash_attention(q, k[:, 61:], v[:, 61:], return_lse=True, backend=target.backend)
    lse = torch.logaddexp(lse_a, lse_b)
    out = sum(o * (part - lse).exp().transpose(1, 2)[..., None] for o, part in ((out_a, lse_a), (out_b, lse_b)))
    torch.testing.assert_close(whole, (out, lse), rtol=1e-5, atol=1e-5)


@on_compiled
def test_grouped_heads_are_repeated_heads(target):
    q, k, v = _qkv(target, batch=2, tq=70, tk=90, heads_q=6, heads_k=2)
    with target.active():
        grouped = flash_attention(q, k, v, causal=True, return_lse=True, backend=target.backend)
        repeated = flash_attention(
            q,
            *(x.repeat_interleave(3, dim=2) for x in (k, v)),
            causal=True,
            return_lse=True,
            backend=target.backend,
        )
    torch.testing.assert_close(grouped, repeated, rtol=2e-6, atol=2e-6)


@on_compiled
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_a_batch_entry_alone_is_the_same_bitwise(target, dtype):
    q, k, v = _qkv(target, dtype, batch=5, tq=90, tk=130, heads_q=4, heads_k=2, head_dim=64, value_dim=64)
    for options in ({}, {"causal": True, "window": (60, None)}):
        with target.active():
            together = flash_attention(q, k, v, **options, return_lse=True, backend=target.backend)
            for b in range(5):
                rows = slice(b, b + 1)
                alone = flash_attention(
                    q[rows], k[rows], v[rows], **options, return_lse=True, backend=target.backend
                )
                assert all(torch.equal(x, y[rows]) for x, y in zip(alone, together))
        assert together[0].abs().max() > 0


@on_compiled
def test_layout_does_not_matter(target):
    """The same numbers in other strides: bitwise the same outputs and gradients."""
    plain = attention_case("layout", batch=2, tq=60, tk=75, heads_q=3, head_dim=24, causal=True)
    sample = plain.make(torch.float32, target.device)
    layouts = {
        "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "last axis strided": lambda x: torch.stack([x, x], dim=-1)[..., 0],
        "time last": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "offset": lambda x: F.pad(x, (3, 2, 1, 0, 0, 4), value=torch.nan)[:, :-4, 1:, 3:-2],
    }
    with target.active():
        contiguous = run(OP, sample, target.backend)
        for name, layout in layouts.items():
            for key, x in run(OP, sample.map(layout), target.backend).items():
                assert torch.equal(x, contiguous[key]), (name, key)


@on_compiled
def test_cotangents_of_any_layout(target):
    q, k, v = (x.requires_grad_() for x in _qkv(target, batch=2))
    with target.active():
        out, lse = flash_attention(q, k, v, return_lse=True, backend=target.backend)
        dout, dlse = torch.randn_like(out), torch.randn_like(lse)
        wanted = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse), retain_graph=True)
        strided = (
            dout.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
            torch.stack([dlse, dlse], -1)[..., 0],
        )
        came = torch.autograd.grad((out, lse), (q, k, v), strided, retain_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(came, wanted))
        # What sum() sends back: one number, expanded with strides of 0.
        ones = torch.autograd.grad(
            (out, lse), (q, k, v), (torch.ones_like(dout), torch.ones_like(dlse)), retain_graph=True
        )
        expanded = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
        assert all(torch.equal(x, y) for x, y in zip(expanded, ones))


# ---- Properties ----------------------------------------------------------------------------------------------


@st.composite
def _cases(draw):
    heads_k = draw(st.integers(1, 3))
    bound = st.none() | st.integers(0, 40)
    options = {"causal": draw(st.booleans()), "softcap": draw(st.sampled_from((0.0, 0.0, 0.8, 15.0)))}
    if draw(st.booleans()):
        options["window"] = (draw(bound), draw(bound))
    if draw(st.booleans()):
        options["scale"] = draw(st.floats(-1, 1))
    sizes = {"batch": draw(st.integers(1, 2)), "tq": draw(st.integers(1, 70)), "tk": draw(st.integers(1, 150))}
    if draw(st.integers(0, 2)) == 0:
        sequences = draw(st.integers(1, 4))
        lengths = st.lists(st.integers(0, 50), min_size=sequences, max_size=sequences)
        options["lengths_q"], options["lengths_k"] = draw(lengths), draw(lengths)
        sizes = {
            "tq": sum(options["lengths_q"]) + draw(st.integers(0, 3)),
            "tk": sum(options["lengths_k"]) + draw(st.integers(0, 3)),
        }
    return attention_case(
        "property",
        **sizes,
        heads_k=heads_k,
        heads_q=heads_k * draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 80)),
        value_dim=draw(st.integers(1, 80)),
        **options,
    )


@on_compiled
@settings(max_examples=25)
@given(case=_cases(), data=st.data())
def test_property_any_call_matches_the_reference(target, case, data):
    dtype = data.draw(st.sampled_from(dtypes(OP.op, target)))
    errors = [error for error in check(OP, case, dtype, target) if not _cancelled(error, case, dtype)]
    assert all(error.ok for error in errors), "\n".join(map(str, errors))


def _cancelled(error, case, dtype):
    """Whether a gradient is a difference that all but vanishes: there its error is no share of what is left of it.

    Where every row sees one key, or the scale is tiny, dq and dk are rounding errors of terms of the size of dv.
    """
    reference, _ = expected(OP, case, dtype)
    return (
        error.tensor in ("dq", "dk")
        and error.problem is None
        and bool((reference[error.tensor].abs() < 1e-3).all())
    )


@on_compiled
@settings(max_examples=10)
@given(tq=st.integers(1, 50), tk=st.integers(1, 90), power=st.integers(-6, 6))
def test_property_outputs_are_averages_of_values(target, tq, tk, power):
    q, k, v = _qkv(target, tq=tq, tk=tk)
    with target.active():
        out = flash_attention(q, k, v, backend=target.backend)
        scaled = flash_attention(q, k, v * 2.0**power, backend=target.backend)
    slack = 1e-6 * v.abs().max()
    assert (out <= v.amax(1, keepdim=True) + slack).all() and (out >= v.amin(1, keepdim=True) - slack).all()
    assert torch.equal(scaled, out * 2.0**power)  # a power of two commutes with every rounding
    assert out.abs().max() > 0


# ---- Extremes ------------------------------------------------------------------------------------------------


@on_compiled
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_dominant_score_selects_its_value(target, dtype):
    """Scores of up to 1e8, one per row far above the others: the output is its value, the gradient stays finite."""
    q, k, v = _qkv(target, dtype, tq=60, tk=60, head_dim=64, value_dim=24)
    k = 1e4 * F.normalize(k, dim=-1)
    order = torch.randperm(60)
    q = (1e4 * F.normalize(k[:, order].float(), dim=-1)).to(dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with target.active():
        out, lse = flash_attention(*leaves, return_lse=True, backend=target.backend)
        gradients = _gradients((out, lse), leaves)
    torch.testing.assert_close(out, v[:, order], rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=0)
    assert lse.min() > 1e6
    assert all(x.isfinite().all() and x.abs().max() > 0 for x in gradients)


@on_compiled
@pytest.mark.parametrize("size", (50.0, 3000.0))
def test_large_scores_that_differ_little(target, size):
    """Scores of size^2 / 8, where exp overflows, that differ by a few: the error is a few roundings of such a score.

    The plain composition recomputes nothing, so its gradients are better than any that are recomputed from the lse,
    and the usual budget, which it sets, does not apply.
    """
    q, k, v = _qkv(target, tq=80, tk=100, head_dim=64)
    q[..., 0] = k[..., 0] = size
    wanted = run(
        OP,
        OP.good.make(torch.float64, target.device).replace(q=q.double(), k=k.double(), v=v.double()),
        "reference",
    )
    with target.active():
        actual = run(OP, OP.good.make(torch.float32, target.device).replace(q=q, k=k, v=v), target.backend)
    score = size**2 / 8
    assert wanted["lse"].min() > 0.9 * score
    for name, x in wanted.items():
        error = (actual[name].double() - x).abs().max() / x.abs().max()
        assert error < 8 * score * torch.finfo(torch.float32).eps and x.abs().max() > 0.1, (name, float(error))


@on_compiled
def test_scores_beyond_the_range_of_float16(target):
    """q.k reaches 1e6 where float16 ends at 65504; the scaled score is harmless."""
    q, k, v = _qkv(target, torch.float16, tq=60, tk=60, head_dim=64)
    q, k = q * 200, k * 200
    wanted = flash_attention(
        q.double(), k.double(), v.double(), scale=1e-5, return_lse=True, backend="reference"
    )
    with target.active():
        out, lse = flash_attention(q, k, v, scale=1e-5, return_lse=True, backend=target.backend)
    torch.testing.assert_close((out.double(), lse.double()), wanted, rtol=2e-3, atol=2e-3)
    assert float((q.double()[0, :, 0] @ k.double()[0, :, 0].T).abs().max()) > 2**17


# ---- NaN and infinity ----------------------------------------------------------------------------------------


@on_all
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_nan_and_infinity_reach_what_they_must_and_nothing_else(target, dtype, value):
    if dtype not in dtypes(OP.op, target):
        return  # this target has no such dtype
    q, k, v = (
        x.abs() for x in _qkv(target, dtype, batch=2, tq=100, tk=100, heads_q=4, head_dim=32, value_dim=32)
    )  # positive, so that inf * q is inf

    def call():
        with target.active():
            return flash_attention(q, k, v, causal=True, return_lse=True, backend=target.backend)

    clean_out, clean_lse = call()
    assert clean_out.isfinite().all() and clean_lse.isfinite().all()

    def assert_only(x, clean, bad, heads):
        """Not finite where `bad`; elsewhere as before, in other batch entries and key heads bitwise.

        Rows of one tile, also of query heads that share a key head, may share the decision when to rescale.
        """
        assert not x[bad].isfinite().any()
        torch.testing.assert_close(x[~bad], clean[~bad], rtol=4 * torch.finfo(dtype).eps, atol=0)
        touched = torch.zeros_like(bad)
        touched[heads] = True
        assert torch.equal(x[~touched], clean[~touched])

    # In a query: its own row.
    q[1, 40, 2, 3] = value
    out, lse = call()
    row, row_lse = torch.zeros_like(out, dtype=torch.bool), torch.zeros_like(lse, dtype=torch.bool)
    row[1, 40, 2], row_lse[1, 2, 40] = True, True
    assert_only(out, clean_out, row, (1, slice(None), slice(2, None)))
    assert_only(lse, clean_lse, row_lse, (1, slice(2, None)))
    q[1, 40, 2, 3] = 1.0
    clean_out, clean_lse = call()

    # In a key: the rows of its two query heads that see it.
    k[0, 60, 1, 5] = value
    out, lse = call()
    rows, rows_lse = torch.zeros_like(out, dtype=torch.bool), torch.zeros_like(lse, dtype=torch.bool)
    rows[0, 60:, 2:], rows_lse[0, 2:, 60:] = True, True
    assert_only(out, clean_out, rows, (0, slice(None), slice(2, None)))
    assert_only(lse, clean_lse, rows_lse, (0, slice(2, None)))
    k[0, 60, 1, 5] = 1.0
    clean_out, clean_lse = call()

    # In a value: one column of the rows that see it. Other batch entries, heads and columns stay clean.
    v[1, 60, 0, 7] = value
    out, lse = call()
    assert not out[1, 60:, :2, 7].isfinite().any()
    elsewhere = torch.ones_like(out, dtype=torch.bool)
    elsewhere[1, :, :2, 7] = False
    assert torch.equal(out[elsewhere], clean_out[elsewhere])
    assert torch.equal(lse, clean_lse)


@on_compiled
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("value", (float("nan"), 2.0**100), ids=str)
def test_gradients_of_other_heads_stay_the_same_bitwise(target, dtype, value):
    """Whatever one head and batch entry holds, also what makes a kernel take another way for it."""
    if dtype not in dtypes(OP.op, target):
        return  # this target has no such dtype
    leaves = _qkv(target, dtype, batch=2, tq=70, tk=70, heads_q=4, head_dim=32, value_dim=32)
    cotangent = torch.randn_like(leaves[0])

    def gradients():
        args = [x.clone().requires_grad_() for x in leaves]
        with target.active():
            out = flash_attention(*args, causal=True, backend=target.backend)
            return torch.autograd.grad(out, args, cotangent)

    clean = gradients()
    leaves[1][1, 40, 1, 5] = value
    for x, before in zip(gradients(), clean):
        half = x.shape[2] // 2
        assert before.abs().max() > 0
        assert torch.equal(x[0], before[0]) and torch.equal(x[1, :, :half], before[1, :, :half])
        assert not torch.equal(x[1, :, half:], before[1, :, half:])


@on_compiled
def test_infinite_scores_saturate_under_softcap(target):
    q, k, v = _qkv(target)
    k[:, 5] = torch.inf * k[:, 5].sign()
    q = q.abs()
    k[:, 5] = torch.inf
    with target.active():
        out, lse = flash_attention(q, k, v, softcap=2.0, return_lse=True, backend=target.backend)
        k[:, 5] = 1e30
        finite_out, finite_lse = flash_attention(q, k, v, softcap=2.0, return_lse=True, backend=target.backend)
    torch.testing.assert_close(out, finite_out)
    torch.testing.assert_close(lse, finite_lse)
    assert out.isfinite().all()


@on_compiled
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_packed_sequences_do_not_see_each_others_nans(target, dtype):
    lengths = (33, 0, 50, 7, 64)
    case = attention_case(
        "packed-nan", tq=170, head_dim=40, lengths_q=lengths
    )  # 16 tokens belong to no sequence
    sample = case.make(dtype, target.device)
    with target.active():
        clean = run(OP, sample, target.backend)
        for name in "qkv":
            sample.args[name][:, 33:83] = torch.nan
            sample.args[name][:, 154:] = torch.nan
        dirty = run(OP, sample, target.backend)
    for name, x in dirty.items():
        rows = (x.movedim(2, 1) if name == "lse" else x)[0]
        wanted = (clean[name].movedim(2, 1) if name == "lse" else clean[name])[0]
        for start, end in ((0, 33), (83, 154)):
            assert torch.equal(rows[start:end], wanted[start:end]), (name, start)
        if name != "lse":
            assert rows[33:83].isnan().all() and (rows[154:] == 0).all(), name


# ---- Threads, memory, offsets --------------------------------------------------------------------------------


@on_compiled
def test_calls_from_several_python_threads(target):
    cases = [
        attention_case(f"thread-{i}", tq=60 + 37 * i, heads_q=4, head_dim=32 + 16 * i, causal=True)
        for i in range(4)
    ]
    samples = [case.make(torch.float32, target.device) for case in cases]
    with target.active():
        wanted = [run(OP, sample, target.backend) for sample in samples]
        wrong = []

        def work(i):
            for _ in range(10):
                came = run(OP, samples[i], target.backend)
                if not all(torch.equal(came[name], x) for name, x in wanted[i].items()):
                    wrong.append(i)

        workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong
    assert wanted[0]["dq"].abs().max() > 0


@on_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_that_a_row_does_not_see_decide_nothing_on_any_number_of_threads(target, dtype):
    """Where threads part the rows changes which keys are at hand with them: here some very unlike the others."""
    q, k, v = _qkv(target, dtype, tq=144, tk=144, heads_q=1, heads_k=1, head_dim=64)
    for scale_k, scale_v in ((200.0, 1.0), (1.0, 2.0**100), (1e20, 1.0)):
        k_far, v_far = k.clone(), v.clone() * 2.0**-100 if scale_v > 1 else v
        k_far[:, 96:] *= scale_k
        v_far[:, 96:] *= scale_v
        results = []
        for threads in (1, 2):
            with target.active(), use_threads(threads):
                results.append(flash_attention(q, k_far, v_far, causal=True, backend=target.backend))
        assert torch.equal(*results)
        assert results[0].abs().max() > 0


@on_native
def test_scratch_can_be_released_between_any_two_calls(target):
    case = attention_case("scratch", tq=200, head_dim=64, causal=True)
    sample = case.make(torch.float32, "cpu")
    with target.active(), use_threads(2):
        first = run(OP, sample, "cpu")
        for _ in range(3):
            pykernels.release_scratch()
            pykernels.release_scratch()
            second = run(OP, sample, "cpu")
            assert all(torch.equal(second[name], x) for name, x in first.items())
    assert first["out"].abs().max() > 0


def _untouched_memory(elements, device):
    """bfloat16 memory of which only the pages that are written take space (on a GPU: all of it)."""
    if device != "cpu":
        return torch.empty(elements, dtype=torch.bfloat16, device=device)
    no_reserve = 0x4000 if sys.platform == "linux" else 0
    return torch.frombuffer(
        mmap.mmap(-1, 2 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve),
        dtype=torch.bfloat16,
    )


@on_compiled
def test_offsets_beyond_32_bits(target):
    """A small problem whose tokens, heads or batch entries lie more than 2**31 elements apart."""
    far, head_dim = 2**31 + 64, 16
    small = _qkv(target, torch.bfloat16, batch=2, tq=3, tk=3, head_dim=head_dim)
    dout = _qkv(target, torch.bfloat16, batch=2, tq=3, tk=3, head_dim=head_dim, name="dout")[0]

    def call(q, k, v, dout):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = flash_attention(*leaves, causal=True, backend=target.backend)
        return out, *torch.autograd.grad(out, leaves, dout)

    with target.active():
        wanted = call(*small, dout)
        for spread in range(4):
            for strides in (
                (far, 2 * head_dim, head_dim, 1),
                (6 * head_dim, far, head_dim, 1),
                (3 * head_dim, head_dim, far, 1),
            ):
                inputs = [*small, dout]
                extent = sum((size - 1) * stride for size, stride in zip((2, 3, 2, head_dim), strides)) + 1
                inputs[spread] = _untouched_memory(extent, target.device).as_strided(
                    (2, 3, 2, head_dim), strides
                )
                inputs[spread].copy_([*small, dout][spread])
                assert all(torch.equal(x, y) for x, y in zip(call(*inputs), wanted)), (spread, strides)
                del inputs
    assert all(x.abs().max() > 0 for x in wanted)


def test_memory_is_linear_in_length():
    """Forward and backward over 16384 tokens: one head's scores alone would be 1 GiB."""
    script = """
import re, torch
from pykernels import flash_attention

def peak():
    # MiB, of this program alone: ru_maxrss starts from the size of the process that started it.
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

def step(tokens):
    q, k, v = (torch.randn(1, tokens, 1, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    out = flash_attention(q, k, v, causal=True, backend="cpu")
    out.backward(torch.randn_like(out))
    assert all(x.grad.abs().max() > 0 for x in (q, k, v))

step(128)
before = peak()
step(16384)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    # Ten tensors of 2 MiB, their likes in fp32, packed tiles.
    assert float(done.stdout) < 80, f"{float(done.stdout):.0f} MiB"
