"""pykernels.compat.fla against the recurrences written out in float64, and fla's own conventions."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from pykernels.compat import fla

B, T, H, K, V = 2, 9, 3, 4, 5
TAIL = ("scale", None), ("initial_state", None), ("output_final_state", False)
CU, CPU, REVERSE, V_FIRST = ("cu_seqlens", None), ("cu_seqlens_cpu", None), ("reverse", False), ("state_v_first", False)
SIMPLE = ("q", "k", "v", ("g", None), ("g_gamma", None), *TAIL)
LINEAR = ("q", "k", "v", *TAIL, ("normalize", True), CU)
SIGNATURES = {
    "chunk_retention": ("q", "k", "v", *TAIL, CU, "**kwargs"),
    "fused_chunk_retention": ("q", "k", "v", *TAIL, CU),
    "fused_recurrent_retention": ("q", "k", "v", *TAIL, REVERSE, V_FIRST, CU, "**kwargs"),
    "parallel_retention": ("q", "k", "v", ("scale", None), ("output_attentions", False), CU),
    "chunk_linear_attn": LINEAR,
    "fused_chunk_linear_attn": LINEAR,
    "fused_recurrent_linear_attn": ("q", "k", "v", *TAIL, REVERSE, ("normalize", False), CU),
    "chunk_simple_gla": (*SIMPLE, V_FIRST, CU, CPU, "**kwargs"),
    "fused_chunk_simple_gla": (*SIMPLE, CU),
    "fused_recurrent_simple_gla": (*SIMPLE, REVERSE, V_FIRST, CU, "**kwargs"),
    "parallel_simple_gla": ("q", "k", "v", ("g", None), ("scale", None), ("output_attentions", False), CU, CPU),
    "chunk_gla": ("q", "k", "v", "g", *TAIL, V_FIRST, CU, CPU),
    "fused_recurrent_gla": ("q", "k", "v", ("gk", None), ("gv", None), *TAIL, REVERSE, V_FIRST, CU, "**kwargs"),
    "chunk_rwkv6": ("r", "k", "v", "w", "u", *TAIL, CU, CPU, "**kwargs"),
    "fused_recurrent_rwkv6": ("r", "k", "v", "w", "u", *TAIL, REVERSE, CU),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    signature = tuple(
        f"**{x.name}" if x.kind == x.VAR_KEYWORD else x.name if x.default is x.empty else (x.name, x.default)
        for x in inspect.signature(getattr(fla, name)).parameters.values()
    )
    assert signature == SIGNATURES[name]


def test_every_function_has_its_signature_tested():
    assert set(SIGNATURES) == set(fla.__all__)


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape and expected.abs().max() > 1e-2
    assert float((actual - expected).abs().max() / expected.abs().max()) < tolerance


def recurrence(q, k, v, state, *, factor=None, columns=None, bonus=None, scale=K**-0.5, reverse=False):
    """Token by token; `factor` [B, T, H, K or 1] decays rows, `columns` [B, T, H, V] columns of the state."""
    outs = [torch.zeros(0)] * q.shape[1]
    for t in reversed(range(q.shape[1])) if reverse else range(q.shape[1]):
        update = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        read = None
        if bonus is not None:
            read = state + bonus[..., None] * update
        if factor is not None:
            state = state * factor[:, t, :, :, None]
        if columns is not None:
            state = state * columns[:, t, :, None, :]
        state = state + update
        outs[t] = scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state if read is None else read)
    return torch.stack(outs, 1), state


def logs(*shape: int) -> Tensor:
    return -2 * torch.rand(shape, dtype=torch.float64)


def inputs(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    shapes = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, H, V), "state": (B, H, K, V), "bonus": (H, K)}
    result = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    result |= {"g": logs(B, T, H), "gamma": logs(H), "gk": logs(B, T, H, K), "gv": logs(B, T, H, V)}
    return {name: x.to(dtype) for name, x in result.items()}


def gammas() -> Tensor:
    return (1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64)))[None, None, :, None].expand(B, T, H, 1)


# name -> (arguments besides q, k, v; what the definition takes)
FORMS = {
    "chunk_retention": (lambda x: {}, lambda x: {"factor": gammas()}),
    "fused_chunk_retention": (lambda x: {}, lambda x: {"factor": gammas()}),
    "fused_recurrent_retention": (lambda x: {}, lambda x: {"factor": gammas()}),
    "chunk_simple_gla": (
        lambda x: {"g": x["g"], "g_gamma": x["gamma"]},
        lambda x: {"factor": (x["g"] + x["gamma"]).exp()[..., None]},
    ),
    "fused_chunk_simple_gla": (lambda x: {"g": x["g"]}, lambda x: {"factor": x["g"].exp()[..., None]}),
    "fused_recurrent_simple_gla": (
        lambda x: {"g_gamma": x["gamma"]},
        lambda x: {"factor": x["gamma"].exp()[:, None].expand(B, T, H, 1)},
    ),
    "chunk_gla": (lambda x: {"g": x["gk"]}, lambda x: {"factor": x["gk"].exp()}),
    "fused_recurrent_gla": (
        lambda x: {"gk": x["gk"], "gv": x["gv"]},
        lambda x: {"factor": x["gk"].exp(), "columns": x["gv"].exp()},
    ),
    "chunk_rwkv6": (
        lambda x: {"w": x["gk"], "u": x["bonus"]},
        lambda x: {"factor": x["gk"].exp(), "bonus": x["bonus"]},
    ),
    "fused_recurrent_rwkv6": (
        lambda x: {"w": x["gk"], "u": x["bonus"]},
        lambda x: {"factor": x["gk"].exp(), "bonus": x["bonus"]},
    ),
    "fused_recurrent_linear_attn": (lambda x: {}, lambda x: {}),
}
REVERSIBLE = [name for name in FORMS if REVERSE in SIGNATURES[name]]
WITH_V_FIRST = [name for name in FORMS if V_FIRST in SIGNATURES[name]]


def call(name: str, x: dict[str, Tensor], **options):
    return getattr(fla, name)(x["q"], x["k"], x["v"], **FORMS[name][0](x), **options)


def define(name: str, x: dict[str, Tensor], **options):
    return recurrence(
        x["q"], x["k"], x["v"], options.pop("state", torch.zeros_like(x["state"])), **FORMS[name][1](x), **options
    )


@pytest.mark.parametrize("name", FORMS)
def test_is_the_recurrence(name):
    x = inputs()
    out, state = define(name, x)
    actual, none = call(name, x)
    near(actual, out)
    assert none is None
    out, state = define(name, x, state=x["state"], scale=0.7)
    actual, final = call(name, x, scale=0.7, initial_state=x["state"], output_final_state=True)
    near(actual, out)
    near(final, state)


@pytest.mark.parametrize("name", REVERSIBLE)
def test_reverse(name):
    x = inputs()
    out, state = define(name, x, state=x["state"], reverse=True)
    actual, final = call(name, x, initial_state=x["state"], output_final_state=True, reverse=True)
    near(actual, out)
    near(final, state)


@pytest.mark.parametrize("name", WITH_V_FIRST)
def test_states_with_values_first(name):
    x = inputs()
    out, state = define(name, x, state=x["state"])
    actual, final = call(name, x, initial_state=x["state"].mT.contiguous(), output_final_state=True, state_v_first=True)
    near(actual, out)
    near(final, state.mT)
    assert final.is_contiguous()


@pytest.mark.parametrize("name", FORMS)
def test_packed(name):
    """Batch entry b's first lengths[b] tokens, packed, give what each gives alone."""
    x, lengths = inputs(), (7, 4)
    packed = {
        key: torch.cat([y[b, :n] for b, n in enumerate(lengths)])[None] if y.dim() > 2 and y.shape[1] == T else y
        for key, y in x.items()
    }
    cu_seqlens = torch.tensor([0, 7, 11])
    out, final = call(name, packed, initial_state=x["state"], output_final_state=True, cu_seqlens=cu_seqlens)
    for b, n in enumerate(lengths):
        alone = {key: y[b : b + 1, :n] if y.dim() > 2 and y.shape[1] == T else y for key, y in x.items()}
        alone["state"] = x["state"][b : b + 1]
        expected, state = call(name, alone, initial_state=alone["state"], output_final_state=True)
        near(out[:, cu_seqlens[b] : cu_seqlens[b + 1]], expected)
        near(final[b : b + 1], state)


@pytest.mark.parametrize("name", FORMS)
def test_gradients(name):
    x = {key: y.requires_grad_() for key, y in inputs().items()}
    dout, dstate = torch.randn(B, T, H, V, dtype=torch.float64), torch.randn(B, H, K, V, dtype=torch.float64)
    results = (call(name, x, initial_state=x["state"], output_final_state=True), define(name, x, state=x["state"]))
    actual, expected = (
        torch.autograd.grad(both, list(x.values()), (dout, dstate), allow_unused=True) for both in results
    )
    assert [y is None for y in actual] == [y is None for y in expected]
    for a, e in zip(actual, expected):
        if e is not None:
            near(a, e)


@pytest.mark.parametrize("name", FORMS)
def test_low_precision_with_float32_states(name):
    x = inputs(dtype=torch.bfloat16)
    x |= {key: x[key].float() for key in ("g", "gamma", "gk", "gv", "bonus", "state")}
    out, state = define(name, {key: y.double() for key, y in x.items()}, state=x["state"].double())
    actual, final = call(name, x, initial_state=x["state"], output_final_state=True)
    assert actual.dtype == torch.bfloat16 and final.dtype == torch.float32
    near(actual, out, 1e-2)
    near(final, state, 1e-2)


@pytest.mark.parametrize("g", ((True, False), (False, True), (False, False)), ids=str)
def test_gla_with_either_decay(g):
    x, (with_k, with_v) = inputs(), g
    out, state = recurrence(
        x["q"],
        x["k"],
        x["v"],
        x["state"],
        factor=x["gk"].exp() if with_k else None,
        columns=x["gv"].exp() if with_v else None,
    )
    actual, final = fla.fused_recurrent_gla(
        x["q"],
        x["k"],
        x["v"],
        x["gk"] if with_k else None,
        x["gv"] if with_v else None,
        initial_state=x["state"],
        output_final_state=True,
    )
    near(actual, out)
    near(final, state)


# ---- The normalised form ---------------------------------------------------------------------------------------------


def normalised(q, k, v, state, keys, scale=K**-0.5, reverse=False):
    """keys [B, H, K] -> out, state, the keys' sum."""
    outs = [torch.zeros(0)] * q.shape[1]
    for t in reversed(range(q.shape[1])) if reverse else range(q.shape[1]):
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        keys = keys + k[:, t]
        weight = scale * torch.einsum("bhk,bhk->bh", q[:, t], keys) + 1e-10
        outs[t] = scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state) / weight[..., None]
    return torch.stack(outs, 1), state, keys


def positive(seed: int = 0) -> dict[str, Tensor]:
    x = inputs(seed)
    x["q"], x["k"] = x["q"].exp(), x["k"].exp()
    x["keys"] = torch.rand(B, 1, H, K, dtype=torch.float64)
    return x


@pytest.mark.parametrize("name", ("chunk_linear_attn", "fused_chunk_linear_attn", "fused_recurrent_linear_attn"))
@pytest.mark.parametrize("scale", (None, 0.3))
def test_normalised_linear_attention(name, scale):
    x = positive()
    q, k, v = (x[key].requires_grad_() for key in "qkv")
    options = {} if scale is None else {"scale": scale}
    zeros = torch.zeros_like(x["state"]), torch.zeros(B, H, K, dtype=torch.float64)
    out, state, keys = normalised(q, k, v, *zeros, **options)
    actual, (none, final_keys) = getattr(fla, name)(q, k, v, scale, normalize=True)
    near(actual, out)
    near(final_keys, keys[:, None])
    assert none is None
    out, state, keys = normalised(q, k, v, x["state"], x["keys"][:, 0], **options)
    before = (x["state"], x["keys"])
    actual, (final, final_keys) = getattr(fla, name)(q, k, v, scale, before, output_final_state=True, normalize=True)
    near(actual, out)
    near(final, state)
    near(final_keys, keys[:, None])
    cotangents = [torch.randn_like(y) for y in (out, state, keys)]
    expected = torch.autograd.grad((out, state, keys), (q, k, v), cotangents)
    cotangents[2] = cotangents[2][:, None]
    for a, e in zip(torch.autograd.grad((actual, final, final_keys), (q, k, v), cotangents), expected):
        near(a, e)


def test_normalised_packed_reverse_and_low_precision():
    x = positive()
    q, k, v = (y.flatten(0, 1)[None, :13] for y in (x["q"], x["k"], x["v"]))
    cu_seqlens = torch.tensor([0, 8, 13])
    out, (final, keys) = fla.fused_recurrent_linear_attn(
        q,
        k,
        v,
        initial_state=(x["state"], x["keys"]),
        output_final_state=True,
        reverse=True,
        normalize=True,
        cu_seqlens=cu_seqlens,
    )
    for b, (first, last) in enumerate(((0, 8), (8, 13))):
        part = slice(first, last)
        expected, state, sums = normalised(
            q[:, part], k[:, part], v[:, part], x["state"][b : b + 1], x["keys"][b : b + 1, 0], reverse=True
        )
        near(out[:, part], expected)
        near(final[b : b + 1], state)
        near(keys[b], sums)
    low = {key: y.bfloat16() for key, y in x.items()}
    out, (_, keys) = fla.chunk_linear_attn(low["q"], low["k"], low["v"])
    assert out.dtype == keys.dtype == torch.bfloat16  # as in the original, the keys' sum has their dtype
    near(
        out,
        normalised(
            *(low[key].double() for key in "qkv"),
            torch.zeros_like(x["state"]),
            torch.zeros(B, H, K, dtype=torch.float64),
        )[0],
        1e-2,
    )
    _, (_, keys) = fla.chunk_linear_attn(low["q"], low["k"], low["v"], None, (x["state"].float(), x["keys"].float()))
    assert keys.dtype == torch.float32
    near(
        fla.chunk_linear_attn(x["q"], x["k"], x["v"], normalize=False)[0],
        recurrence(x["q"], x["k"], x["v"], torch.zeros_like(x["state"]))[0],
    )


@pytest.mark.parametrize("name", ("parallel_retention", "parallel_simple_gla"))
def test_parallel_forms_and_their_attentions(name):
    x = inputs()
    options = {} if name == "parallel_retention" else {"g": x["g"]}
    factor = gammas() if name == "parallel_retention" else x["g"].exp()[..., None]
    out, _ = recurrence(x["q"], x["k"], x["v"], torch.zeros_like(x["state"]), factor=factor, scale=0.3)
    actual, none = getattr(fla, name)(x["q"], x["k"], x["v"], scale=0.3, **options)
    near(actual, out)
    assert none is None
    actual, attentions = getattr(fla, name)(x["q"], x["k"], x["v"], scale=0.3, output_attentions=True, **options)
    near(actual, out)
    assert attentions.shape == (B, H, T, T) and not attentions.triu(1).any()
    near(torch.einsum("bhij,bjhv->bihv", attentions, x["v"]), out)


# ---- What is not served, and mistakes --------------------------------------------------------------------------------

X = inputs()
QKV = X["q"], X["k"], X["v"]


@pytest.mark.parametrize(
    ("function", "error", "words"),
    (
        (lambda: fla.chunk_retention(*QKV, head_first=True), ValueError, "head_first is not served, got True"),
        (lambda: fla.chunk_simple_gla(*QKV, head_first=False), ValueError, "head_first"),
        (
            lambda: fla.chunk_rwkv6(*QKV, X["gk"], X["bonus"], chunk_size=24),
            ValueError,
            "chunk_size must be a power of 2, got 24",
        ),
        (lambda: fla.chunk_retention(*QKV, use_tma=True), TypeError, "use_tma"),
        (
            lambda: fla.fused_recurrent_gla(*QKV, state_v_first=True, transpose_state_layout=True),
            ValueError,
            "state_v_first",
        ),
        (lambda: fla.chunk_gla(*QKV, X["g"]), ValueError, "g must have shape"),
        (lambda: fla.chunk_gla(*QKV, None), TypeError, "g must be a tensor, got NoneType"),
        (lambda: fla.chunk_gla(*QKV, -X["gk"]), ValueError, "decay must be <= 0"),
        (lambda: fla.fused_recurrent_gla(*QKV, gv=X["gk"]), ValueError, "gv must have shape"),
        (lambda: fla.chunk_simple_gla(*QKV, X["gk"]), ValueError, r"g must be a tensor \[B, T, H\]"),
        (lambda: fla.chunk_simple_gla(*QKV, g_gamma=-0.1), ValueError, r"g_gamma must be a tensor \[H\], got -0.1"),
        (lambda: fla.chunk_rwkv6(*QKV, X["gk"], X["bonus"][0]), ValueError, "bonus must have 2 axes"),
        (
            lambda: fla.parallel_retention(
                X["q"][:1], X["k"][:1], X["v"][:1], output_attentions=True, cu_seqlens=torch.tensor([0, T])
            ),
            ValueError,
            "output_attentions must be False",
        ),
        (lambda: fla.chunk_retention(*QKV, cu_seqlens=torch.tensor([0, T])), ValueError, "q must have batch 1"),
        (
            lambda: fla.chunk_retention(
                X["q"][:1], X["k"][:1], X["v"][:1], initial_state=X["state"], cu_seqlens=torch.tensor([0, T])
            ),
            ValueError,
            "initial_state must have one entry",
        ),
    ),
)
def test_raises(function, error, words):
    with pytest.raises(error, match=words):
        function()


def test_compiles_whole():
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = fla.chunk_gla(q, k, v, X["gk"])[0] + fla.chunk_retention(q, k, v)[0]
        return (
            out
            + fla.fused_recurrent_rwkv6(q, k, v, X["gk"], X["bonus"])[0]
            + fla.chunk_linear_attn(q.exp(), k.exp(), v)[0]
        )

    near(torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")(*QKV), function(*QKV))


def test_accepted_without_effect():
    expected = fla.chunk_simple_gla(*QKV, X["g"])[0]
    assert torch.equal(fla.chunk_simple_gla(*QKV, X["g"], chunk_size=32)[0], expected)
    with pytest.warns(DeprecationWarning, match="state_v_first"):
        _, state = fla.chunk_simple_gla(*QKV, X["g"], output_final_state=True, transpose_state_layout=True)
    assert state.shape == (B, H, V, K)
