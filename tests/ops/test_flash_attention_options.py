"""Flash attention's options (ALiBi, bias, sinks, dropout, pages) beyond what tests/test_ops.py asks of every op."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from pykernels import backends, flash_attention, flash_attention_decode
from pykernels.ops.flash_attention import reference
from pykernels.testing import FLASH_ATTENTION as OP
from pykernels.testing import FLASH_ATTENTION_DECODE as DECODE
from pykernels.testing import Target, check, run, serves, targets, use_threads
from pykernels.testing.flash_attention import attention_case, decode_case


def _targets(op, case, dtype=torch.float32):
    """The compiled targets that serve what the case needs."""
    return [
        target for target in targets(op.op) if target.backend != "reference" and serves(op, case, target, dtype)
    ]


def _on(op, **needs):
    case = (attention_case if op is OP else decode_case)("needs", **needs)
    return pytest.mark.parametrize("target", _targets(op, case), ids=str)


on_bias = _on(OP, tq=1, bias=(1, 1))
on_alibi = _on(OP, tq=1, alibi=(2,))
on_sinks = _on(OP, tq=1, sinks=0.0)
on_dropout = _on(OP, tq=1, dropout_p=0.5)
on_all_options = _on(OP, tq=1, bias=(1, 1), alibi=(2,), sinks=0.0, dropout_p=0.5)
on_pages = _on(DECODE, lengths=(1,), capacity=1, page_size=1)
on_paged_alibi_sinks = _on(DECODE, lengths=(1,), capacity=1, page_size=1, alibi=(4,), sinks=0.0)
NATIVE = [target for target in targets(OP.op) if target.backend == "cpu"]
on_native = pytest.mark.parametrize("target", NATIVE, ids=str)


def _qkv(target, dtype=torch.float32, **sizes):
    case = attention_case("qkv", **{"batch": 2, "tq": 70, "tk": 90, "heads_q": 4, "heads_k": 2, "head_dim": 32} | sizes)
    return [case.make(dtype, target.device).args[name] for name in "qkv"]


# ---- Dropout -------------------------------------------------------------------------------------------------


def test_philox_against_published_words():
    """The first known answer of Random123's philox4x32-10, and one with counters in every place but the last."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = [int(x) for x in reference.philox(zero, zero, zero, zero)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_philox_against_scalar_arithmetic():
    def scalar(key, counter):
        keys, counter = [key & 0xFFFFFFFF, key >> 32], list(counter)
        for _ in range(10):
            a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
            counter = [b >> 32 ^ counter[1] ^ keys[0], b & 0xFFFFFFFF, a >> 32 ^ counter[3] ^ keys[1], a & 0xFFFFFFFF]
            keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return counter

    for key, counter in ((2**63 - 5, (7, 2**31, 2**32 - 1)),
                         (0x299F31D0_24093822, (0x243F6A88, 0x85A308D3, 0x13198A2E))):
        tensors = (torch.tensor([x], dtype=torch.int64) for x in (key, *counter))
        assert [int(x) for x in reference.philox(*tensors)] == scalar(key, (*counter, 0))


def _kept(target, dtype, tk=150, heads_q=4, heads_k=2, p=0.3, **options):
    """The weights that dropout keeps, seen through values that are the rows of an identity."""
    q, k, _ = _qkv(target, dtype, tk=tk, heads_q=heads_q, heads_k=heads_k)
    v = torch.eye(tk, device=target.device, dtype=dtype)[None, :, None].expand(2, tk, heads_k, tk)
    torch.manual_seed(3)
    out = flash_attention(q * 0.1, k, v, dropout_p=p, backend=target.backend, **options)
    return out.transpose(1, 2)


@on_dropout
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_dropout_keeps_what_the_definition_keeps(target, dtype):
    if not serves(OP, attention_case("d", tq=1, dropout_p=0.5), target, dtype):
        return  # this target has no such dtype
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=target.device)
    of = [torch.arange(n, device=target.device) for n in (8, 70, 150)]
    wanted = reference.dropout(seed, 0.3, *of).unflatten(0, (2, 4)) > 0
    with target.active():
        assert torch.equal(_kept(target, dtype) > 0, wanted)
    assert 0.69 < wanted.double().mean() < 0.71
    assert (wanted[0] != wanted[1]).any() and (wanted[:, 0] != wanted[:, 1]).any()


@on_dropout
def test_dropout_is_a_fair_coin(target):
    """Kept shares by head, row and column within 5 standard deviations; neighbours are independent."""
    p = 0.17
    with target.active():
        kept = (_kept(target, torch.float32, tk=500, p=p) > 0).double()
    for axes in ((1, 2, 3), (0, 1, 3), (0, 1, 2), (0, 1, 2, 3)):
        share = kept.mean(axes)
        deviation = (p * (1 - p) / (kept.numel() / share.numel())) ** 0.5
        assert ((share - (1 - p)).abs() < 5 * deviation).all(), axes
    centred = kept - (1 - p)
    for axis in range(4):
        product = (centred.narrow(axis, 1, kept.shape[axis] - 1) * centred.narrow(axis, 0, kept.shape[axis] - 1)).mean()
        assert abs(product) < 5 * p * (1 - p) / kept.numel() ** 0.5 * 2, axis


@on_dropout
def test_dropout_repeats_by_torchs_seed_alone(target):
    leaves = [x.requires_grad_() for x in _qkv(target)]

    def call(seed):
        torch.manual_seed(seed)
        out, lse = flash_attention(*leaves, dropout_p=0.4, return_lse=True, backend=target.backend)
        return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))

    with target.active():
        first, again, other = call(1), call(1), call(2)
        plain, plain_lse = flash_attention(*leaves, return_lse=True, backend=target.backend)
        mean = torch.stack([call(seed)[0] for seed in range(100)]).mean(0)
    assert all(torch.equal(x, y) for x, y in zip(first, again))
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[2], other[2])
    torch.testing.assert_close(first[1], plain_lse, rtol=1e-6, atol=1e-6)
    assert (mean - plain).abs().max() < 0.25 < (first[0] - plain).abs().max()


# ---- Bias and ALiBi ------------------------------------------------------------------------------------------


@on_bias
def test_gradients_of_every_broadcast_are_sums_of_the_whole_ones(target):
    q, k, v = (x.requires_grad_() for x in _qkv(target, tq=50, tk=140))
    full = (2, 4, 50, 140)
    with target.active():
        for which in itertools.product((False, True), repeat=4):
            shape = [1 if one else size for one, size in zip(which, full)]
            bias = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(target.device).requires_grad_()
            whole = bias.detach().expand(full).contiguous().requires_grad_()
            results = []
            for x in (bias, whole):
                out, lse = flash_attention(q, k, v, bias=x, causal=True, return_lse=True, backend=target.backend)
                loss = (out * torch.linspace(-1, 1, 50)[:, None, None].to(out)).sum() + (lse**2).sum()
                results.append((out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v, x))))
            summed = results[1][-1]
            if any(which):
                summed = summed.sum([i for i, one in enumerate(which) if one], keepdim=True)
            for x, y in zip(results[0], (*results[1][:-1], summed)):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))
            assert results[0][-1].abs().max() > 0 and results[0][-1].shape == bias.shape


@on_bias
@pytest.mark.parametrize("shape", ((90,), (70, 90), (4, 1, 1), (2, 1, 1, 90), (1, 4, 70, 1)), ids=str)
def test_a_bias_with_fewer_axes_gets_its_gradient_in_its_shape(target, shape):
    q, k, v = _qkv(target)
    bias = torch.randn(shape, device=target.device, requires_grad=True)
    with target.active():
        out, lse = flash_attention(q, k, v, bias=bias, return_lse=True, backend=target.backend)
        (gradient,) = torch.autograd.grad(out.sum() + lse.sin().sum(), bias)
    assert gradient.shape == bias.shape and gradient.abs().max() > 0


@on_bias
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_masks_said_in_three_ways_agree(target, dtype):
    """A window, a boolean bias and an additive one that hide the same keys."""
    leaves = [x.requires_grad_() for x in _qkv(target, dtype)]
    visible = reference.visible(70, 90, 30, 4, torch.device(target.device))
    hiding = torch.zeros(70, 90, device=target.device).masked_fill(~visible, -torch.inf)

    def call(**options):
        out, lse = flash_attention(*leaves, **options, return_lse=True, backend=target.backend)
        return out, lse, *torch.autograd.grad(out.float().square().sum() + lse.sum(), leaves)

    with target.active():
        window = call(window=(30, 4))
        for bias in (visible, hiding, hiding.to(dtype)):
            for x, y in zip(call(bias=bias), window):
                slack = 1e-5 if dtype == torch.float32 else 2e-2
                torch.testing.assert_close(x, y, rtol=slack, atol=slack * float(y.detach().abs().max()))


@on_alibi
@pytest.mark.parametrize("tq, tk", ((70, 90), (90, 70), (300, 300)))
def test_alibi_is_a_bias_of_distances(target, tq, tk):
    leaves = [x.requires_grad_() for x in _qkv(target, tq=tq, tk=tk)]
    slopes = torch.tensor([[0.5, 0.25, 1.0, 0.0], [0.1, 3.0, 0.02, -0.3]], device=target.device)
    distance = (torch.arange(tk) - torch.arange(tq)[:, None] - (tk - tq)).abs().to(target.device)

    def call(**options):
        out, lse = flash_attention(*leaves, **options, return_lse=True, backend=target.backend)
        return out, lse.nan_to_num(neginf=0.0), *torch.autograd.grad(out.square().sum(), leaves)

    with target.active():
        for options in ({}, {"causal": True}):
            for x, y in zip(call(alibi_slopes=slopes, **options),
                            call(bias=-slopes[:, :, None, None] * distance, **options)):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * float(y.detach().abs().max()))


@on_bias
@pytest.mark.parametrize("size", (1e2, 1e4, 1e9))
def test_large_biases(target, size):
    """As for large scores: what is recomputed from the lse is off by a few roundings of the largest of them."""
    case = attention_case("bias-large", tq=70, tk=190, head_dim=32, bias=(1, 2, 70, 190),
                          bias_values=lambda x: size * x)
    sample = case.make(torch.float32, target.device)
    wanted = run(OP, sample.map(torch.Tensor.double), "reference")
    with target.active():
        actual = run(OP, sample, target.backend)
    for name, x in wanted.items():
        error = (actual[name].double() - x).abs().max() / x.abs().max()
        assert error < max(1e-5, min(1.0, 8 * 5 * size * torch.finfo(torch.float32).eps)), (name, float(error))
        assert actual[name].isfinite().all() and x.abs().max() > 0.1


def _masked(x):
    """Half of it hidden, and some keys far above all others."""
    return torch.where(x < -2.5, 100 * x.abs(), x.masked_fill(x > 0, -torch.inf))


# Long and large enough for the path that folds the options into its only look at the scores; edges within its blocks.
FOLDED = {
    "alibi": {"alibi": (4,)},
    "alibi-causal": {"alibi": (4,), "causal": True},
    "alibi-window": {"alibi": (4,), "window": (300, 40)},
    "bias": {"bias": (4, 520, 600)},
    "bias-fp32": {"bias": (4, 520, 600), "bias_dtype": torch.float32, "causal": True},
    "bias-of-keys": {"bias": (4, 1, 600)},
    "bias-of-queries": {"bias": (4, 520, 1)},
    "bias-hidden": {"bias": (4, 520, 600), "bias_values": _masked},
    "mask": {"bias": (4, 520, 600), "bias_dtype": torch.bool},
    "softcap": {"softcap": 20.0, "causal": True},
    "softcap-tight": {"softcap": 3.0, "causal": True},
    "all": {"alibi": (4,), "bias": (4, 520, 600), "softcap": 30.0, "causal": True, "scale": -0.5},
}


@on_native
@pytest.mark.parametrize("name", FOLDED)
def test_options_of_long_sequences(target, name):
    case = attention_case(f"folded-{name}", tq=520, tk=600, heads_q=4, heads_k=2, **{"scale": 0.5, **FOLDED[name]})
    errors = check(OP, case, torch.bfloat16, target)
    assert all(error.ok for error in errors), [str(error) for error in errors]


@on_native
@pytest.mark.parametrize("options", ({}, {"causal": True}, {"window": (300, 90)}), ids=str)
def test_a_bias_has_the_same_effect_in_either_type(target, options):
    """Bit by bit: one of bf16 that is the only term has a path of its own, and the next tile's is looked up beside it.
    The tiles here hold rows of three heads and end anywhere; the bias is a view with rows of odd length."""
    q, k, v = _qkv(target, torch.bfloat16, tq=430, tk=700, heads_q=6)
    bias = torch.randn(2, 6, 430, 721, generator=torch.Generator().manual_seed(3)).bfloat16()[..., 3:703]
    bias[..., ::7] = -torch.inf
    with target.active():
        came, wanted = (flash_attention(q, k, v, bias=x, **options, return_lse=True, backend=target.backend)
                        for x in (bias, bias.float()))
        apart = flash_attention(q, *(x.repeat_interleave(3, 2) for x in (k, v)), bias=bias, **options,
                                backend=target.backend)
    assert all(torch.equal(x, y) for x, y in zip(came, wanted))
    torch.testing.assert_close(came[0], apart, rtol=0, atol=0.02)


@on_native
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_a_bias_that_is_not_finite_stays_in_its_row(target, value):
    q, k, v = _qkv(target, torch.bfloat16, tq=300, tk=300)
    bias = torch.randn(300, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    with target.active():
        clean = flash_attention(q, k, v, bias=bias, backend=target.backend)
        bias[40, 290] = value
        dirty = flash_attention(q, k, v, bias=bias, backend=target.backend)
    assert dirty[:, 40].isnan().all()
    others = torch.arange(300) != 40
    torch.testing.assert_close(dirty[:, others], clean[:, others], rtol=0, atol=0.02)
    with target.active():
        bias[40, 290] = 0
        clean = flash_attention(q, k, v, bias=bias, causal=True, backend=target.backend)
        hidden = bias.masked_fill(torch.ones_like(bias, dtype=torch.bool).triu(1), value)
        dirty = flash_attention(q, k, v, bias=hidden, causal=True, backend=target.backend)
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0.02)


@on_bias
def test_a_mask_keeps_nan_in_padding_out(target):
    """Keys that a boolean bias hides from all rows may hold anything."""
    q, k, v = _qkv(target)
    mask = torch.arange(90, device=target.device) < 60
    with target.active():
        clean = flash_attention(q, k, v, bias=mask, backend=target.backend)
        v[:, 60:] = torch.nan
        dirty = flash_attention(q, k, v, bias=mask, backend=target.backend)
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


@on_native
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_keys_and_values_that_a_bias_hides_may_be_anything(target, dtype, value):
    """A bias that is boolean, or -inf."""
    q, k, v = _qkv(target, dtype)
    mask = torch.arange(90, device=target.device) < 60
    for bias in (mask, torch.where(mask, 0.5, -torch.inf)):
        for poisoned in (v, k):
            with target.active():
                clean = flash_attention(q, k, v, bias=bias, backend=target.backend)
                poisoned[:, 60:] = value
                dirty = flash_attention(q, k, v, bias=bias, backend=target.backend)
            torch.testing.assert_close(dirty, clean, rtol=0, atol=0 if poisoned is v else 0.02)
        q, k, v = _qkv(target, dtype)


@on_native
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
@pytest.mark.parametrize("option", ("alibi", "alibi, softcap", "bias", "mask"))
def test_a_value_that_is_not_finite_reaches_the_rows_that_see_it_and_no_others(target, dtype, value, option):
    """Also those that give it a weight of zero: that of a key far away is too small for any format.

    (In the reference zero weights of hidden keys bring NaN to the other rows as well.)
    """
    q, k, v = _qkv(target, dtype, tq=520, tk=520, heads_q=2, heads_k=1)
    distance = (torch.arange(520) - torch.arange(520)[:, None]).abs()
    sees = (torch.arange(520) >= 7)[:, None].expand(-1, 2).clone()
    options = {"causal": True}
    if "alibi" in option:
        options["alibi_slopes"] = torch.tensor([0.5, 0.01])
    if "softcap" in option:
        options["softcap"] = 20.0
    if option == "bias":
        options["bias"] = -0.5 * distance
    if option == "mask":
        options["bias"] = (-2.0 * distance).masked_fill(distance % 3 == 1, -torch.inf)
        sees &= (torch.arange(520) % 3 != 2)[:, None]
    with target.active():
        clean = flash_attention(q, k, v, backend=target.backend, **options)
        v[:, 7] = value
        dirty = flash_attention(q, k, v, backend=target.backend, **options)
    assert clean.isfinite().all()
    assert not dirty[:, sees].isfinite().any()
    torch.testing.assert_close(dirty[:, ~sees], clean[:, ~sees], rtol=0, atol=0.02)


@pytest.mark.parametrize("target", [*NATIVE, Target("reference", "cpu")], ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("options", ({}, {"causal": True}, {"sinks": torch.zeros(4)}, {"bias": torch.zeros(70, 300)}),
                         ids=lambda options: "-".join(options) or "plain")
def test_a_score_of_minus_infinity_is_of_a_key_that_is_not_seen(target, dtype, options):
    """Also one that products overflowed to, in whole blocks that no mask cuts, in both passes; and in every key."""
    q, k, v = _qkv(target, dtype, tk=300)
    q = q.abs() + 10
    for hidden in (150, 300):
        k[:, :hidden] = -3e38
        whole = [x.clone().requires_grad_() for x in (q, k, v)]
        seen = [x.clone().requires_grad_() for x in (q, k[:, hidden:], v[:, hidden:])]
        shorter = options | ({"bias": options["bias"][:, hidden:]} if "bias" in options else {})
        with target.active():
            got = flash_attention(*whole, return_lse=True, backend=target.backend, **options)
            expected = flash_attention(*seen, return_lse=True, backend=target.backend, **shorter)
            gradients = torch.autograd.grad(got[0].sum(), whole)
            wanted = torch.autograd.grad(expected[0].sum(), seen)
        assert hidden < 300 or (expected[0] == 0).all()
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        for x, y in zip(gradients, wanted):
            unseen = x.shape[1] - y.shape[1]
            assert not x[:, :unseen].any()
            torch.testing.assert_close(x[:, unseen:], y, rtol=tolerance, atol=10 * tolerance)


@on_native
def test_bias_gradients_repeat_bitwise_whatever_the_threads(target):
    """The sums over batch and heads go through memory that all threads write: races would show here."""
    with target.active():
        for shape in ((1, 1, 150, 150), (2, 1, 1, 150), (1, 4, 150, 150)):
            case = attention_case("race", batch=2, tq=150, heads_q=4, heads_k=2, head_dim=16, bias=shape, causal=True)
            sample = case.make(torch.float32, "cpu").replace(deterministic=True)
            with use_threads(1):
                wanted = run(OP, sample, "cpu")
            for attempt in range(60):
                with use_threads(2 + attempt % 3):
                    came = run(OP, sample, "cpu")
                assert all(torch.equal(came[name], x) for name, x in wanted.items()), (shape, attempt)
            assert wanted["dbias"].abs().max() > 0


@pytest.mark.parametrize("what", ["attention", "decode"])
def test_ten_thousand_calls_are_bitwise_one(what):
    """Races on shapes so small that all threads are at the same few tiles; on the machine's best instruction set."""
    if what == "attention":
        case = attention_case("race", batch=2, tq=9, tk=70, heads_q=4, heads_k=2, head_dim=16, bias=(1, 1, 9, 70),
                              alibi=(4,), sinks=0.0, causal=True)
        sample = case.make(torch.bfloat16, "cpu")
        inputs = [sample.args[name].requires_grad_() for name in sample.differentiable]
        dout = torch.randn(2, 9, 4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()

        def call():
            out = flash_attention(**sample.args, backend="cpu")
            return (out, *torch.autograd.grad(out, inputs, dout))
    else:  # one sequence and one key head: the keys are split among the threads
        case = decode_case("race", lengths=(500,), capacity=512, heads_q=4, heads_k=1, head_dim=16)
        sample = case.make(torch.bfloat16, "cpu")

        def call():
            return (flash_attention_decode(**sample.args, backend="cpu"),)

    with use_threads(1):
        wanted = call()
    assert all(x.isfinite().all() and x.abs().max() > 0 for x in wanted)
    with use_threads(3):
        for attempt in range(10_000):
            assert all(map(torch.equal, call(), wanted)), attempt


# ---- Sinks ---------------------------------------------------------------------------------------------------


@on_sinks
@pytest.mark.parametrize("options", ({}, {"causal": True}, {"window": (5, 3)}), ids=str)
def test_sinks_are_an_extra_column(target, options):
    """By an additional key of score `sink` and value zero, in plain PyTorch."""
    q, k, v = (x.requires_grad_() for x in _qkv(target))
    sinks = torch.tensor([0.5, -3.0, 4.0, -torch.inf], device=target.device, requires_grad=True)
    left, right = options.get("window", (-1, 0 if options.get("causal") else -1))
    mask = reference.visible(70, 90, left, right, torch.device(target.device))
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) / 32**0.5
    column = sinks[None, :, None, None].expand(2, 4, 70, 1)
    together = torch.cat([scores.masked_fill(~mask, -torch.inf), column], -1)
    weights = together.softmax(-1)[..., :-1]
    wanted = torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(2, 2)), together.logsumexp(-1)
    with target.active():
        came = flash_attention(q, k, v, sinks=sinks, **options, return_lse=True, backend=target.backend)
        torch.testing.assert_close(came, wanted, rtol=1e-5, atol=1e-5)
        gradients = [
            torch.autograd.grad(out.square().sum() + lse.sin().sum(), (q, k, v, sinks)) for out, lse in (came, wanted)
        ]
    for x, y in zip(*gradients):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    assert gradients[0][3][:3].abs().min() > 0 and gradients[0][3][3] == 0


# ---- Derivatives and transformations -------------------------------------------------------------------------

GRADIENT_CASES = (
    attention_case("gradient-bias", batch=2, tq=4, tk=5, heads_q=4, heads_k=2, head_dim=3, bias=(1, 4, 4, 5),
                   sinks=0.0),
    attention_case("gradient-bias-rows", batch=2, tq=4, tk=5, head_dim=3, bias=(2, 1, 1, 5), softcap=1.5, alibi=(2, 2)),
    attention_case("gradient-bias-keys", batch=2, tq=4, tk=5, head_dim=3, bias=(2, 1, 4, 1), sinks=0.0, causal=True),
    attention_case("gradient-dropout", tq=5, tk=6, head_dim=3, dropout_p=0.4, bias=(5, 6)),
    attention_case("gradient-packed", tq=8, head_dim=2, bias=(8, 8), sinks=0.0, lengths_q=(3, 0, 4), causal=True),
)


def _function(case, backend):
    sample = case.make(torch.float64, "cpu")
    names = sample.differentiable

    def function(*tensors):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            args = {**sample.args, **dict(zip(names, tensors))}
            out, lse = flash_attention(**args, return_lse=True, backend=backend)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    return function, [sample.args[name].requires_grad_() for name in names]


@pytest.mark.parametrize("target", [Target("reference", "cpu"), *NATIVE], ids=str)
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradcheck(target, case):
    function, leaves = _function(case, target.backend)
    with target.active():
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradgradcheck(case):
    function, leaves = _function(case, "cpu")
    with NATIVE[-1].active():
        assert torch.autograd.gradgradcheck(function, leaves)


@on_all_options
def test_func_grad_and_compile_with_all_options(target):
    case = attention_case("compile-options", batch=2, tq=40, tk=50, heads_q=4, heads_k=2, head_dim=16, alibi=(4,),
                          bias=(4, 40, 50), sinks=0.0)
    sample = case.make(torch.float32, target.device)
    names = sample.differentiable

    def loss(*tensors):
        args = {**sample.args, **dict(zip(names, tensors))}
        out, lse = flash_attention(**args, return_lse=True, backend=target.backend)
        return out.sin().sum() + lse.sum()

    def training_step(*tensors):
        return torch.autograd.grad(loss(*tensors), tensors)

    leaves = [sample.args[name].requires_grad_() for name in names]
    with target.active():
        wanted = training_step(*leaves)
        by_func = torch.func.grad(loss, argnums=tuple(range(len(names))))(*(x.detach() for x in leaves))
        torch.testing.assert_close(by_func, wanted, rtol=0, atol=0)
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), wanted, rtol=1e-5, atol=1e-5)
    assert all(x.abs().max() > 0 for x in wanted)


@on_dropout
def test_dropout_compiles_and_checkpoints(target):
    q, k, v = (x.requires_grad_() for x in _qkv(target))

    def attend(q, k, v):
        return flash_attention(q, k, v, dropout_p=0.3, backend=target.backend)

    with target.active():
        torch.manual_seed(5)
        out = attend(q, k, v)
        wanted = torch.autograd.grad(out.square().sum(), (q, k, v))
        torch.manual_seed(5)
        again = torch.utils.checkpoint.checkpoint(attend, q, k, v, use_reentrant=False)
        assert torch.equal(out, again)
        for x, y in zip(torch.autograd.grad(again.square().sum(), (q, k, v)), wanted):
            assert torch.equal(x, y)
        torch._dynamo.reset()
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        first, second = compiled(q, k, v), compiled(q, k, v)
    assert not torch.equal(first, second), "each call draws its own seed"
    assert first.shape == out.shape and first.abs().max() > 0


# ---- Scores far apart ----------------------------------------------------------------------------------------


@on_native
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("size", (1e13, 1e17, 1e30))
@pytest.mark.parametrize("tq", (5, 130))
def test_finite_scores_far_apart_select_a_value(target, dtype, size, tq):
    """Scores whose rounding alone passes the range of exp2: the largest wins, and gradients are finite."""
    q, k, v = _qkv(target, dtype, tq=tq, tk=150, head_dim=16, value_dim=24, heads_q=2, heads_k=2)
    leaves = [q.requires_grad_(), (k * size).requires_grad_(), v.requires_grad_()]
    wide = [x.detach().double() for x in leaves]
    with target.active():
        out, lse = flash_attention(*leaves, scale=1e-3, return_lse=True, backend="cpu")
        wanted, wanted_lse = flash_attention(*wide, scale=1e-3, return_lse=True, backend="reference")
        gradients = torch.autograd.grad(out.double().square().sum(), leaves)
        lengths = torch.full((2,), 150)
        stepped, _ = flash_attention_decode(*(x.detach() for x in leaves), lengths, causal=False, scale=1e-3,
                                            return_lse=True, backend="cpu")
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    for x in (out, stepped):
        torch.testing.assert_close(x.double(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=max(tolerance, 1e-5), atol=0)
    assert all(x.isfinite().all() for x in gradients) and gradients[2].abs().max() > 0


# ---- The cache -----------------------------------------------------------------------------------------------


def _paged(k, v, page_size, seed):
    """Contiguous caches [B, T, H, K] in pages, in random order."""
    batch, tokens = k.shape[:2]
    per_entry = -(-tokens // page_size)
    order = torch.randperm(batch * per_entry, generator=torch.Generator().manual_seed(seed))
    padded = [F.pad(x, (0, 0, 0, 0, 0, per_entry * page_size - tokens)) for x in (k, v)]
    pages = [x.unflatten(1, (per_entry, page_size)).flatten(0, 1) for x in padded]
    pools = [torch.empty_like(x).index_copy_(0, order.to(x.device), x) for x in pages]
    return *pools, order.view(batch, per_entry).to(k.device)


@on_pages
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("tq", (1, 5, 70))
@pytest.mark.parametrize("page_size", (1, 16, 100, 256))
def test_pages_in_any_order_give_what_a_contiguous_cache_gives(target, dtype, tq, page_size):
    q, k, v = _qkv(target, dtype, tq=tq, tk=600, head_dim=40, value_dim=24)
    lengths = torch.tensor([600, 333], device=target.device)
    with target.active():
        wanted = flash_attention_decode(q, k, v, lengths, return_lse=True, backend=target.backend)
        for seed in range(2):
            k_pages, v_pages, table = _paged(k, v, page_size, seed)
            came = flash_attention_decode(q, k_pages, v_pages, lengths, block_table=table, return_lse=True,
                                          backend=target.backend)
            assert all(torch.equal(x, y) for x, y in zip(came, wanted))
    assert wanted[0].abs().max() > 0


@on_pages
def test_entries_share_pages(target):
    """A common prefix stored once; each entry goes on in pages of its own."""
    q, k, v = _qkv(target, tq=1, tk=96)
    k[1, :64], v[1, :64] = k[0, :64], v[0, :64]
    with target.active():
        wanted = flash_attention_decode(q, k, v, torch.tensor([96, 80], device=target.device), backend=target.backend)
        pools = [torch.cat([x[0, :64], x[0, 64:], x[1, 64:]]).unflatten(0, (4, 32)) for x in (k, v)]
        table = torch.tensor([[0, 1, 2], [0, 1, 3]], device=target.device, dtype=torch.int32)
        lengths = torch.tensor([95, 79], device=target.device)
        new = [torch.stack([x[0, 95], x[1, 79]])[:, None] for x in (k, v)]
        pools[0][2, 31], pools[1][3, 15] = torch.nan, torch.nan  # where the new tokens go
        came = flash_attention_decode(q, *pools, lengths, k=new[0], v=new[1], block_table=table, backend=target.backend)
    assert torch.equal(came, wanted)


@on_paged_alibi_sinks
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("paged", (False, True), ids=("contiguous", "paged"))
def test_drafts_and_chunks_of_a_prompt_are_the_whole_at_once(target, dtype, paged):
    """Steps of 1 to 8 tokens, and prompts in chunks, against a growing cache, with options."""
    tokens = 200
    q, k, v = _qkv(target, dtype, tq=tokens, tk=tokens)
    options = {"alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.3], device=target.device), "softcap": 20.0,
               "sinks": torch.tensor([0.0, 1.0, -1.0, 2.0], device=target.device), "window": (90, None)}
    pools = [x.new_full((2, 208, *x.shape[2:]), torch.nan) for x in (k, v)]
    table = None
    if paged:
        pools = [x.reshape(26, 16, *x.shape[2:]) for x in pools]
        order = torch.randperm(26, generator=torch.Generator().manual_seed(0))
        table = order.view(2, 13).to(target.device, torch.int32)
    outs, lses, start = [], [], 0
    with target.active():
        whole = flash_attention(q, k, v, causal=True, **options, return_lse=True, backend=target.backend)
        for step in (70, 1, 2, 3, 4, 5, 6, 7, 8, 64, 30):
            now = slice(start, start + step)
            lengths = torch.full((2,), start, device=target.device)
            out, lse = flash_attention_decode(q[:, now], *pools, lengths, k=k[:, now], v=v[:, now], block_table=table,
                                              **options, return_lse=True, backend=target.backend)
            outs.append(out)
            lses.append(lse)
            start += step
    assert start == tokens
    slack = {torch.float32: 5e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close((torch.cat(outs, 1), torch.cat(lses, 2)), whole, rtol=slack, atol=slack)


@on_pages
def test_pages_that_do_not_exist_are_clamped_where_they_are_not_checked(target):
    """The ops below the checks: no table makes them leave the cache, or write what was not asked for."""
    q, k, v = _qkv(target, tq=1, tk=8)
    pools = [x.reshape(4, 4, *x.shape[2:]).clone() for x in (k, v)]
    before = [x.clone() for x in pools]
    table = torch.tensor([[0, 10**9], [-(2**31), 3]], dtype=torch.int32, device=target.device)
    lengths = torch.tensor([8, 8], dtype=torch.int32, device=target.device)
    ops, suffix = torch.ops.pykernels, target.backend
    with target.active():
        out, lse = getattr(ops, f"flash_attention_decode_{suffix}")(q, *pools, lengths, 0, 0.2, 0.0, -1, -1, table)
        clamped = table.clamp(0, 3)
        wanted = getattr(ops, f"flash_attention_decode_{suffix}")(q, *pools, lengths, 0, 0.2, 0.0, -1, -1, clamped)
        new = [x[:, :1].contiguous() + 9 for x in (k, v)]
        append = getattr(ops, f"flash_attention_append_{suffix}")
        append(*pools, *new, torch.tensor([5, 1], dtype=torch.int32, device=target.device), table)
        assert all(torch.equal(x, y) for x, y in zip(pools, before))
        append(*pools, *new, torch.tensor([3, 100], dtype=torch.int32, device=target.device), table)
    assert torch.equal(out, wanted[0]) and torch.equal(lse, wanted[1])
    before[0][0, 3], before[1][0, 3] = new[0][0, 0], new[1][0, 0]
    assert all(torch.equal(x, y) for x, y in zip(pools, before))


def test_what_the_cuda_kernels_serve():
    """A pure function of the call; what they leave to Triton says why."""
    gpu = backends.Environment(cpu=None, cuda=None, triton=None, triton_interpret=False, capability=(9, 0))

    def choose(op: backends.Op, requested: str, dtype: torch.dtype, key_dim: int, *options: str) -> backends.Choice:
        sizes = {"head_dim": key_dim, "value_dim": 128}
        query = backends.Query("cuda", dtype, sizes, frozenset(options), grad=op is OP.op)
        return backends.choose(op, query, requested, gpu)

    served = "alibi_slopes", "sinks", "varlen", "softcap", "window"
    for dtype in (torch.bfloat16, torch.float16):
        assert choose(OP.op, "cuda", dtype, 256, *served).backend == "cuda"
        assert choose(DECODE.op, "cuda", dtype, 576, "alibi_slopes", "sinks", "block_table").backend == "cuda"
        reason = choose(OP.op, "cuda", dtype, 64, "bias", "dropout_p").reason
        assert reason == "the CUDA kernels have no bias and no dropout_p"
        assert "up to 256" in choose(OP.op, "cuda", dtype, 257).reason
        assert choose(OP.op, "auto", dtype, 64, "alibi_slopes").backend == "triton"  # not measured yet
    assert choose(OP.op, "auto", torch.bfloat16, 64, "bias").backend == "triton"
    for op in (OP.op, DECODE.op):
        assert "bfloat16 and float16" in choose(op, "cuda", torch.float32, 64).reason
