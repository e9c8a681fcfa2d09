"""pykernels.compat.flash_attn against attention written out in float64, and flash-attn's own conventions."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from pykernels import _library
from pykernels.compat import flash_attn as fa

INFINITE = (-1, -1)
COMMON = (
    ("dropout_p", 0.0),
    ("softmax_scale", None),
    ("causal", False),
    ("window_size", INFINITE),
    ("softcap", 0.0),
    ("alibi_slopes", None),
    ("deterministic", False),
    ("return_attn_probs", False),
)
SIGNATURES = {
    "flash_attn_func": ("q", "k", "v", *COMMON),
    "flash_attn_kvpacked_func": ("q", "kv", *COMMON),
    "flash_attn_qkvpacked_func": ("qkv", *COMMON),
    "flash_attn_varlen_func": (
        "q",
        "k",
        "v",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "max_seqlen_q",
        "max_seqlen_k",
        *COMMON,
        ("block_table", None),
    ),
    "flash_attn_varlen_kvpacked_func": (
        "q",
        "kv",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "max_seqlen_q",
        "max_seqlen_k",
        *COMMON,
    ),
    "flash_attn_varlen_qkvpacked_func": ("qkv", "cu_seqlens", "max_seqlen", *COMMON),
    "flash_attn_with_kvcache": (
        "q",
        "k_cache",
        "v_cache",
        ("k", None),
        ("v", None),
        ("rotary_cos", None),
        ("rotary_sin", None),
        ("cache_seqlens", None),
        ("cache_batch_idx", None),
        ("cache_leftpad", None),
        ("block_table", None),
        ("softmax_scale", None),
        ("causal", False),
        ("window_size", INFINITE),
        ("softcap", 0.0),
        ("rotary_interleaved", True),
        ("alibi_slopes", None),
        ("num_splits", 0),
        ("return_softmax_lse", False),
    ),
    "index_first_axis": ("input", "indices"),
    "index_put_first_axis": ("values", "indices", "first_axis_dim"),
    "pad_input": ("hidden_states", "indices", "batch", "seqlen"),
    "unpad_input": ("hidden_states", "attention_mask", ("unused_mask", None)),
    "unpad_input_for_concatenated_sequences": ("hidden_states", "attention_mask_in_length"),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.5e-2}


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(actual[~finite], expected[~finite]) and expected[finite].abs().max() > 1e-2
    assert float((actual - expected)[finite].abs().max() / expected[finite].abs().max()) < tolerance


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal=False, window=INFINITE, softcap=0.0, scale=None, slopes=None, keep=None
) -> tuple[Tensor, Tensor]:
    """One batch entry by the definition: q [Tq, Hq, K], k [Tk, Hk, K], v [Tk, Hk, V] -> out, lse [Hq, Tq].

    slopes [Hq] of ALiBi; keep [Hq, Tq, Tk]: what dropout multiplies the weights by.
    """
    (tq, heads, size), tk = q.shape, k.shape[0]
    out, lse = q.new_zeros(tq, heads, v.shape[2]), q.new_full((heads, tq), -torch.inf)
    for h in range(heads):
        g = h // (heads // k.shape[1])
        for i in range(tq):
            p = i + tk - tq
            low = 0 if window[0] < 0 else max(0, p - window[0])
            high = tk if window[1] < 0 else min(tk, p + window[1] + 1)
            high = min(high, p + 1) if causal else high
            if low >= high:
                continue
            scores = k[low:high, g] @ q[i, h] * (size**-0.5 if scale is None else scale)
            scores = softcap * torch.tanh(scores / softcap) if softcap > 0 else scores
            if slopes is not None:
                scores = scores - slopes[h] * (p - torch.arange(low, high)).abs()
            lse[h, i] = torch.logsumexp(scores, 0)
            weights = torch.softmax(scores, 0)
            out[i, h] = (weights if keep is None else weights * keep[h, i, low:high]) @ v[low:high, g]
    return out, lse


def batched(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
    both = [attention(*x, **options) for x in zip(q.double(), k.double(), v.double())]
    return torch.stack([x[0] for x in both]), torch.stack([x[1] for x in both])


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    signature = tuple(
        x.name if x.default is x.empty else (x.name, x.default)
        for x in inspect.signature(getattr(fa, name)).parameters.values()
    )
    assert signature == SIGNATURES[name]


def test_every_function_has_its_signature_tested():
    assert set(SIGNATURES) == set(fa.__all__)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "local": {"window_size": (3, 1), "softmax_scale": 0.3},
    "left": {"window_size": (2, -1), "causal": True},
    "softcap": {"softcap": 2.0, "deterministic": True},
}


def expected_of(options: dict) -> dict:
    names = {"window_size": "window", "softmax_scale": "scale"}
    return {names.get(key, key): value for key, value in options.items() if key != "deterministic"}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_dense(option, dtype):
    q, k, v = randn(2, 9, 4, 8, dtype=dtype), randn(2, 7, 2, 8, dtype=dtype), randn(2, 7, 2, 8, dtype=dtype)
    out, lse = batched(q, k, v, **expected_of(OPTIONS[option]))
    actual = fa.flash_attn_func(q, k, v, **OPTIONS[option])
    assert isinstance(actual, Tensor) and actual.dtype == dtype
    near(actual, out, TOLERANCE[dtype])
    actual, actual_lse, pattern = fa.flash_attn_func(q, k, v, **OPTIONS[option], return_attn_probs=True)
    near(actual, out, TOLERANCE[dtype])
    near(actual_lse, lse, TOLERANCE[dtype])
    assert actual_lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and pattern.numel() == 0
    kv = torch.stack((k, v), dim=2)
    assert torch.equal(fa.flash_attn_kvpacked_func(q, kv, **OPTIONS[option]), actual)
    qkv = torch.stack((q, q.flip(1), q.flip(2)), dim=2)
    near(
        fa.flash_attn_qkvpacked_func(qkv, **OPTIONS[option]),
        batched(*qkv.unbind(2), **expected_of(OPTIONS[option]))[0],
        TOLERANCE[dtype],
    )


def test_arguments_by_position():
    q = randn(1, 5, 2, 4)
    near(
        fa.flash_attn_func(q, q, q, 0.0, 0.4, True, (2, -1), 3.0, None, True),
        batched(q, q, q, scale=0.4, causal=True, window=(2, -1), softcap=3.0)[0],
    )


@pytest.mark.parametrize("option", OPTIONS)
def test_varlen(option):
    lengths_q, lengths_k = (3, 0, 6, 1), (4, 2, 3, 5)
    q, k, v = randn(10, 4, 8), randn(14, 2, 8), randn(14, 2, 8)
    cu_q, cu_k = (
        torch.tensor([0, *torch.tensor(x).cumsum(0).tolist()], dtype=torch.int32) for x in (lengths_q, lengths_k)
    )
    parts = [
        attention(*x, **expected_of(OPTIONS[option]))
        for x in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k))
    ]
    out, lse = torch.cat([x[0] for x in parts]), torch.cat([x[1] for x in parts], dim=1)
    near(fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 6, 5, **OPTIONS[option]), out)
    actual = fa.flash_attn_varlen_kvpacked_func(
        q, torch.stack((k, v), 1), cu_q, cu_k, 6, 5, **OPTIONS[option], return_attn_probs=True
    )
    near(actual[0], out)
    near(actual[1], lse)
    assert len(actual) == 3 and actual[2].numel() == 0
    qkv = torch.stack((q, q.flip(0), q.flip(1)), 1)
    parts = [attention(*x.unbind(1), **expected_of(OPTIONS[option]))[0] for x in qkv.split(lengths_q)]
    near(fa.flash_attn_varlen_qkvpacked_func(qkv, cu_q, 6, **OPTIONS[option]), torch.cat(parts))


def test_gradients():
    qkv, dout, dlse = randn(2, 6, 3, 2, 4).requires_grad_(), randn(2, 6, 2, 4), randn(2, 2, 6)
    out, lse, _ = fa.flash_attn_qkvpacked_func(qkv, causal=True, return_attn_probs=True)
    (actual,) = torch.autograd.grad((out, lse), qkv, (dout, dlse))
    (expected,) = torch.autograd.grad(batched(*qkv.unbind(2), causal=True), qkv, (dout, dlse))
    near(actual, expected)
    packed, cu = qkv.detach().flatten(0, 1).requires_grad_(), torch.tensor([0, 6, 12], dtype=torch.int32)
    near(
        torch.autograd.grad(
            fa.flash_attn_varlen_qkvpacked_func(packed, cu, 6, causal=True), packed, dout.flatten(0, 1)
        )[0],
        torch.autograd.grad(batched(*qkv.unbind(2), causal=True)[0], qkv, dout)[0].flatten(0, 1),
    )


@pytest.mark.skipif(_library.error() is not None, reason="the reference looks into cu_seqlens")
def test_compiles_whole():
    q, cu = randn(7, 2, 8), torch.tensor([0, 3, 7], dtype=torch.int32)

    def function(q: Tensor, k_cache: Tensor) -> Tensor:
        out, lse, _ = fa.flash_attn_varlen_func(q, q, q, cu, cu, 4, 4, causal=True, return_attn_probs=True)
        pages = q.detach().view(1, 7, 2, 8), q.detach().view(1, 7, 2, 8)
        out = out + fa.flash_attn_varlen_func(q, *pages, cu, cu, 4, 4, block_table=torch.zeros(2, 1, dtype=torch.int32))
        more = fa.flash_attn_with_kvcache(
            q[None, :1].detach(),
            k_cache,
            k_cache.clone(),
            q[None, :1].detach(),
            q[None, :1].detach(),
            cache_seqlens=3,
            cache_leftpad=cu[1:2] - 1,
        )
        return out + fa.flash_attn_func(q[None], q[None], q[None])[0] + lse.T[..., None] + more[0]

    caches = randn(1, 5, 2, 8), randn(1, 5, 2, 8)
    caches[1].copy_(caches[0])
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")(q, caches[0])
    near(compiled, function(q, caches[1]))
    assert torch.equal(*caches)


# ---- Key/value cache -------------------------------------------------------------------------------------------------


def rotate(x: Tensor, position: int, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [H, K] by hand, as complex numbers."""
    r, x = cos.shape[1], x.clone()
    first, second = (slice(0, 2 * r, 2), slice(1, 2 * r, 2)) if interleaved else (slice(0, r), slice(r, 2 * r))
    turned = torch.complex(x[:, first], x[:, second]) * torch.complex(cos[position], sin[position])
    x[:, first], x[:, second] = turned.real, turned.imag
    return x


def with_kvcache(q, k_cache, v_cache, k, v, lengths, rows, leftpad, cos, sin, interleaved, **options):
    """The definition, token by token; changes the caches."""
    outs, lses = [], []
    ordered = options.get("causal") or options.get("window", INFINITE) != INFINITE
    for b, (row, first, length) in enumerate(zip(rows, leftpad, lengths)):
        queries = q[b]
        if cos is not None:
            queries = torch.stack([rotate(x, length + ordered * t, cos, sin, interleaved) for t, x in enumerate(q[b])])
        for t in range(0 if k is None else k.shape[1]):
            k_cache[row, length + t] = k[b, t] if cos is None else rotate(k[b, t], length + t, cos, sin, interleaved)
            v_cache[row, length + t] = v[b, t]
        last = length + (0 if k is None else k.shape[1])
        out, lse = attention(queries, k_cache[row, first:last], v_cache[row, first:last], **options)
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)


@pytest.mark.parametrize("options", ({}, {"causal": True}, {"window": (2, 0), "softcap": 3.0}), ids=str)
@pytest.mark.parametrize("rotary", (None, True, False))
@pytest.mark.parametrize("where", ("rows", "batch_idx", "leftpad", "both"))
def test_with_kvcache(where, rotary, options):
    rows = [4, 0, 2] if where in ("batch_idx", "both") else [0, 1, 2]
    leftpad = [2, 0, 3] if where in ("leftpad", "both") else [0, 0, 0]
    lengths, new = [5, 7, 3], 3
    q, k, v = randn(3, new, 4, 8), randn(3, new, 2, 8), randn(3, new, 2, 8)
    k_cache, v_cache = randn(5 if "b" in where else 3, 12, 2, 8), randn(5 if "b" in where else 3, 12, 2, 8)
    caches = [k_cache.clone(), v_cache.clone()]
    angles = randn(12, 3)
    cos, sin = (None, None) if rotary is None else (angles.cos(), angles.sin())
    out, lse = with_kvcache(q, *caches, k, v, lengths, rows, leftpad, cos, sin, rotary, **options)
    actual, actual_lse = fa.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos=cos,
        rotary_sin=sin,
        rotary_interleaved=bool(rotary),
        cache_seqlens=torch.tensor(lengths, dtype=torch.int32),
        cache_batch_idx=torch.tensor(rows, dtype=torch.int32) if where in ("batch_idx", "both") else None,
        cache_leftpad=torch.tensor(leftpad, dtype=torch.int32) if where in ("leftpad", "both") else None,
        causal=options.get("causal", False),
        window_size=options.get("window", INFINITE),
        softcap=options.get("softcap", 0.0),
        return_softmax_lse=True,
    )
    near(actual, out)
    near(actual_lse, lse)
    near(k_cache, caches[0])
    assert torch.equal(v_cache, caches[1])


def test_with_kvcache_lengths_as_an_int_or_none_and_no_append():
    q, k_cache, v_cache = randn(2, 1, 2, 8), randn(2, 6, 2, 8), randn(2, 6, 2, 8)
    before = k_cache.clone()
    near(fa.flash_attn_with_kvcache(q, k_cache, v_cache), batched(q, k_cache, v_cache)[0])
    near(
        fa.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=4), batched(q, k_cache[:, :4], v_cache[:, :4])[0]
    )
    assert torch.equal(k_cache, before)
    k, v = randn(2, 1, 2, 8), randn(2, 1, 2, 8)
    near(
        fa.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=4, num_splits=2),
        batched(q, torch.cat((before[:, :4], k), 1), torch.cat((v_cache[:, :4], v), 1))[0],
    )
    assert torch.equal(k_cache, torch.cat((before[:, :4], k, before[:, 5:]), 1))


# ---- Padding ---------------------------------------------------------------------------------------------------------


def test_unpad_and_pad():
    x = randn(3, 5, 2, 4).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 0], [1, 1, 1, 1, 1]])
    tokens, indices, cu_seqlens, longest, used = fa.unpad_input(x, mask)
    assert torch.equal(tokens, x[mask.bool()]) and cu_seqlens.tolist() == [0, 3, 5, 10] and longest == 5
    assert used.tolist() == [3, 2, 5] and cu_seqlens.dtype == used.dtype == torch.int32 and indices.dtype == torch.int64
    back = fa.pad_input(tokens, indices, 3, 5)
    assert torch.equal(back, x * mask[..., None, None])
    dout = randn(3, 5, 2, 4)
    assert torch.equal(torch.autograd.grad(back, x, dout)[0], dout * mask[..., None, None])
    unused = torch.tensor([[0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    tokens, indices, cu_seqlens, longest, used = fa.unpad_input(x, mask, unused)
    assert torch.equal(tokens, x[(mask + unused).bool()]) and cu_seqlens.tolist() == [0, 4, 6, 11]
    assert used.tolist() == [3, 2, 5]


def test_unpad_concatenated_sequences():
    x = randn(3, 6, 4)
    tokens, indices, cu_seqlens, longest = fa.unpad_input_for_concatenated_sequences(
        x, torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    )
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16] and longest == 6 and cu_seqlens.dtype == torch.int32
    assert torch.equal(tokens, torch.cat((x[0, :5], x[1, :5], x[2]))) and torch.equal(tokens, x.flatten(0, 1)[indices])


# ---- Options that pass through ---------------------------------------------------------------------------------------


LENGTHS_Q, LENGTHS_K = (3, 0, 6, 1), (4, 2, 3, 5)
CU_Q, CU_K = (torch.tensor([0, *torch.tensor(x).cumsum(0).tolist()], dtype=torch.int32) for x in (LENGTHS_Q, LENGTHS_K))


@pytest.mark.parametrize("options", ({}, {"causal": True}, {"window": (3, 1), "softcap": 2.0}), ids=str)
@pytest.mark.parametrize("shared", (True, False))
def test_alibi(shared, options):
    """By the distance from the query's place at the end of the keys; slopes for all, or for each sequence."""
    theirs = {"window_size" if key == "window" else key: value for key, value in options.items()}
    q, k, v = randn(2, 9, 4, 8), randn(2, 7, 2, 8), randn(2, 7, 2, 8)
    slopes = torch.rand(4, 4, dtype=torch.float64)

    def by_hand(qs, ks, vs):
        both = [
            attention(*x, **options, slopes=slopes[0 if shared else s]) for s, x in enumerate(zip(qs, ks, vs))
        ]
        return [x[0] for x in both], [x[1] for x in both]

    out, lse, _ = fa.flash_attn_func(
        q, k, v, alibi_slopes=slopes[0] if shared else slopes[:2], return_attn_probs=True, **theirs
    )
    outs, lses = by_hand(q, k, v)
    near(out, torch.stack(outs))
    near(lse, torch.stack(lses))
    given = slopes[0] if shared else slopes
    q, k, v = randn(10, 4, 8), randn(14, 2, 8), randn(14, 2, 8)
    outs, _ = by_hand(q.split(LENGTHS_Q), k.split(LENGTHS_K), v.split(LENGTHS_K))
    near(fa.flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 6, 5, alibi_slopes=given, **theirs), torch.cat(outs))
    lengths = torch.tensor([5, 2, 7, 6], dtype=torch.int32)
    q, k, v = randn(4, 2, 4, 8), randn(4, 7, 2, 8), randn(4, 7, 2, 8)
    outs, _ = by_hand(q, *([x[:n] for x, n in zip(cache, lengths)] for cache in (k, v)))
    near(
        fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, alibi_slopes=given, **theirs), torch.stack(outs)
    )


@pytest.mark.parametrize("size", (4, 5, 700))
def test_dropout(size):
    """What it says it drops is dropped, about as often as asked for, the rest grows; the next draw is another."""
    p, q, v = 0.3, randn(2, size, 2, 8).requires_grad_(), randn(2, size, 2, 8)
    k = randn(2, size, 2, 8)
    torch.manual_seed(1)
    out, lse, weights = fa.flash_attn_func(q, k, v, p, causal=True, return_attn_probs=True)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(fa.flash_attn_func(q, k, v, p, causal=True), out) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(fa.flash_attn_func(q, k, v, p, causal=True), out)
    hidden = torch.ones(size, size, dtype=torch.bool).triu(1)
    scores = (torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5).masked_fill(hidden, -torch.inf)
    near(weights.abs(), scores.softmax(-1))
    near(lse, scores.logsumexp(-1))
    dropped = torch.signbit(weights)
    assert size < 100 or abs(float(dropped[..., ~hidden].double().mean()) - p) < 0.01
    expected = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1).masked_fill(dropped, 0) / (1 - p), v)
    near(out, expected)
    dout = randn(*out.shape)
    near(*(torch.autograd.grad(x, q, dout)[0] for x in (out, expected)))


def test_dropout_of_packed_sequences():
    p, q, k, v = 0.4, randn(10, 4, 8), randn(14, 2, 8), randn(14, 2, 8)
    out, _, weights = fa.flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 6, 5, p, return_attn_probs=True)
    assert weights.shape == (4, 4, 6, 5)
    parts = zip(q.split(LENGTHS_Q), k.split(LENGTHS_K), v.split(LENGTHS_K), weights)
    near(out, torch.cat([attention(*x, keep=(~torch.signbit(w)).double() / (1 - p))[0] for *x, w in parts]))
    used = torch.zeros(4, 6, 5, dtype=torch.bool)
    for s, (tq, tk) in enumerate(zip(LENGTHS_Q, LENGTHS_K)):
        used[s, :tq, :tk] = True
    used = used[:, None].expand_as(weights)
    assert not weights[~used].any() and 0.2 < float(torch.signbit(weights[used]).double().mean()) < 0.6
    torch.testing.assert_close(weights.abs().sum(-1), used.any(-1).double())


def test_dropout_keeps_its_expectation():
    q, k, v = randn(1, 3, 2, 8), randn(1, 6, 2, 8), randn(1, 6, 2, 8)
    mean = torch.stack([fa.flash_attn_func(q, k, v, 0.2) for _ in range(2000)]).mean(0)
    near(mean, fa.flash_attn_func(q, k, v), 0.05)


@pytest.mark.parametrize("options", ({}, {"causal": True, "softcap": 3.0}, {"window_size": (2, 0)}), ids=str)
def test_packed_sequences_over_pages(options):
    q, k, v = randn(10, 4, 8), randn(7, 2, 2, 8), randn(7, 2, 2, 8)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    # What lies behind a sequence's last page is never looked at.
    table = torch.tensor([[5, 0, 99], [1, -7, 99], [2, 6, 99], [3, 0, 4]], dtype=torch.int32)
    parts = []
    for s, x in enumerate(q.split(LENGTHS_Q)):
        rows = [cache[table[s, : -(-LENGTHS_K[s] // 2)].long()].flatten(0, 1)[: LENGTHS_K[s]] for cache in (k, v)]
        parts.append(attention(x, *rows, **expected_of(options))[0])
    out = fa.flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 6, 5, block_table=table, **options)
    near(out, torch.cat(parts))
    dout = randn(*out.shape)
    for a, e in zip(*(torch.autograd.grad(x, (q, k, v), dout) for x in (out, torch.cat(parts)))):
        near(a, e)


def test_a_paged_cache_is_ours():
    q, k, v = torch.randn(2, 1, 4, 8), torch.randn(6, 4, 2, 8), torch.randn(6, 4, 2, 8)
    table, lengths = torch.tensor([[5, 0, 3], [1, 2, 4]], dtype=torch.int32), torch.tensor([9, 4], dtype=torch.int32)
    out = fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, block_table=table)
    whole = (x[table.long()].flatten(1, 2) for x in (k, v))
    expected = fa.flash_attn_with_kvcache(q, *whole, cache_seqlens=lengths)
    torch.testing.assert_close(out, expected)
    assert expected.abs().max() > 0


# ---- What is not served, and mistakes --------------------------------------------------------------------------------

Q = torch.zeros(2, 4, 2, 8)
PACKED, CU = torch.zeros(8, 2, 8), torch.tensor([0, 3, 8], dtype=torch.int32)


def paged(table):
    return fa.flash_attn_varlen_func(PACKED, *[torch.zeros(4, 2, 2, 8)] * 2, CU, CU, 5, 5, block_table=table)


def cached(**options):
    return fa.flash_attn_with_kvcache(Q, torch.zeros(3, 6, 2, 8), torch.zeros(3, 6, 2, 8), **options)


def appended(**options):
    return cached(**{"k": Q[:, :1], "v": Q[:, :1], "cache_seqlens": 2, **options})


@pytest.mark.parametrize(
    ("call", "error", "words"),
    (
        (lambda: fa.flash_attn_func(Q, Q, Q, dropout_p=1.0), ValueError, "dropout_p must be"),
        (lambda: fa.flash_attn_func(Q, Q, Q, alibi_slopes=torch.ones(3)), ValueError, "alibi_slopes must have shape"),
        (
            lambda: fa.flash_attn_varlen_func(PACKED, PACKED, PACKED, CU, CU, 5, 5, -0.1),
            ValueError,
            "dropout_p must be",
        ),
        (
            lambda: fa.flash_attn_varlen_func(PACKED, PACKED, PACKED, CU, CU, 5, 5, block_table=CU),
            ValueError,
            "k must have 4 axes",
        ),
        (lambda: paged(CU), ValueError, r"block_table must be int32 or int64 \[2, pages"),
        (lambda: paged([[0]]), TypeError, "block_table must be a tensor"),
        (lambda: paged(torch.zeros(2, 2, dtype=torch.int32)), ValueError, "block_table must have 3 pages"),
        (
            lambda: paged(torch.tensor([[0, 1, 9], [0, 4, 0]])),
            ValueError,
            r"block_table must hold pages below 4 where tokens are, got \[0, 1, 4\]",
        ),
        (lambda: appended(block_table=CU), ValueError, "block_table must have 2 axes"),
        (lambda: appended(alibi_slopes=torch.ones(3)), ValueError, "alibi_slopes must have shape"),
        (lambda: fa.flash_attn_func(Q, Q, Q, window_size=3), TypeError, "window_size must be"),
        (lambda: fa.flash_attn_func(Q, Q, Q, deterministic=None), TypeError, "deterministic must be"),
        (lambda: fa.flash_attn_func(Q, Q, Q, causal=1), TypeError, "causal must be"),
        (lambda: fa.flash_attn_qkvpacked_func(Q), ValueError, "qkv must have 5 axes with size 3"),
        (lambda: fa.flash_attn_kvpacked_func(Q, 3), TypeError, "kv must be a tensor"),
        (lambda: fa.flash_attn_varlen_func(Q, Q, Q, CU, CU, 5, 5), ValueError, "q must have 3 axes"),
        (
            lambda: fa.flash_attn_varlen_func(PACKED, PACKED, PACKED, CU, CU, 4, 5),
            ValueError,
            "max_seqlen_q must be at least",
        ),
        (lambda: fa.flash_attn_varlen_func(PACKED, PACKED, PACKED, CU, CU, 5, None), TypeError, "max_seqlen_k must be"),
        (lambda: appended(cache_seqlens=None), ValueError, "cache_seqlens must be given with k"),
        (lambda: appended(cache_seqlens=2.0), TypeError, "cache_seqlens must be an integer tensor"),
        (lambda: appended(cache_seqlens=6), ValueError, "cache_seqlens must leave room"),
        (
            lambda: appended(cache_seqlens=6, cache_leftpad=torch.tensor([1, 2])),
            ValueError,
            "cache_seqlens must leave room",
        ),
        (lambda: appended(cache_leftpad=torch.tensor([3, 0])), ValueError, "cache_leftpad must be from 0"),
        (lambda: appended(cache_batch_idx=torch.tensor([3, 0])), ValueError, "cache_batch_idx must name rows"),
        (lambda: appended(cache_batch_idx=torch.tensor([0])), ValueError, "cache_batch_idx must be int32"),
        (lambda: appended(rotary_cos=torch.ones(9, 4)), ValueError, "rotary_sin must be given"),
        (
            lambda: appended(rotary_cos=torch.ones(2, 4), rotary_sin=torch.ones(2, 4)),
            ValueError,
            "rotary_cos must reach position 2",
        ),
        (
            lambda: appended(rotary_cos=torch.ones(9, 5), rotary_sin=torch.ones(9, 5)),
            ValueError,
            "rotary_cos must have shape",
        ),
        (
            lambda: cached(rotary_cos=torch.ones(9, 4), rotary_sin=torch.ones(9, 4), cache_seqlens=2),
            ValueError,
            "k must be given",
        ),
        (lambda: appended(num_splits=None), TypeError, "num_splits must be"),
        (lambda: appended(v=None), ValueError, "v must be given with k"),
    ),
)
def test_raises(call, error, words):
    with pytest.raises(error, match=words):
        call()
