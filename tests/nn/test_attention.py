"""pykernels.nn.Attention: its two ways to compute a sequence agree, and it is what its formula says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pykernels import testing
from pykernels.nn import Attention, apply_rotary

TARGETS = testing.targets(testing.FLASH_ATTENTION.op)
BACKENDS = sorted({target.backend for target in TARGETS if target.device == "cpu"} - {"triton"})
OPTIONS = {
    "plain": {},
    "grouped": {"key_heads": 2},
    "rotary": {"rotary_base": 10000.0},
    "window": {"window": (5, 0), "rotary_base": 500.0},
    "softcap": {"softcap": 3.0, "scale": 0.7, "bias": True, "head_dim": 20},
    "interleaved": {"rotary_base": 10000.0, "rotary_interleaved": True},
    "sinks": {"sinks": True, "key_heads": 2, "window": (6, 0)},
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def layer(option: str = "rotary", backend: str = "reference", dtype: torch.dtype = torch.float32,
          **options) -> Attention:
    attention = Attention(48, 4, backend=backend, dtype=dtype, **{**OPTIONS[option], **options})
    if attention.sinks is not None:
        torch.nn.init.normal_(attention.sinks)
    return attention


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    actual, expected = actual.detach(), expected.detach()
    assert expected.abs().max() > 0.05
    assert float((actual - expected).abs().max() / expected.abs().max()) < tolerance


def by_hand(attention: Attention, x: Tensor) -> Tensor:
    """The layer from its definition: projections, rotation of complex pairs, masked softmax."""
    batch, tokens, _ = x.shape
    h, hk, size = attention.heads, attention.key_heads, attention.head_dim
    q, k, v = attention.qkv(x).split([h * size, hk * size, hk * size], dim=-1)
    q, k, v = q.view(batch, tokens, h, size), k.view(batch, tokens, hk, size), v.view(batch, tokens, hk, size)
    if attention.rotary_base is not None:
        turn = torch.polar(torch.ones(tokens, 1, size // 2, dtype=torch.float64), torch.arange(tokens)[:, None, None]
                           * attention.rotary_base ** (-2 * torch.arange(size // 2, dtype=torch.float64) / size))

        def rotate(y: Tensor) -> Tensor:
            if attention.rotary_interleaved:
                turned = torch.view_as_complex(y.double().reshape(*y.shape[:-1], size // 2, 2)) * turn
                return torch.view_as_real(turned).flatten(-2).to(y.dtype)
            turned = torch.complex(y[..., :size // 2].double(), y[..., size // 2:].double()) * turn
            return torch.cat((turned.real, turned.imag), dim=-1).to(y.dtype)

        q, k = rotate(q), rotate(k)
    k, v = (y.repeat_interleave(h // hk, dim=2) for y in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (size ** -0.5 if attention.scale is None else attention.scale)
    if attention.softcap:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    hidden = distance < 0
    if attention.window is not None:
        hidden |= distance > attention.window[0]
    scores = scores.masked_fill(hidden, -torch.inf)
    if attention.sinks is not None:
        scores = torch.cat((scores, attention.sinks[:, None, None].expand(batch, h, tokens, 1)), dim=-1)
    weights = scores.softmax(-1)[..., :tokens]
    return attention.out(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(batch, tokens, h * size))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_is_what_its_formula_says(option: str, backend: str) -> None:
    attention = layer(option, backend)
    x = torch.randn(2, 19, 48)
    assert_near(attention(x), by_hand(attention, x), 2e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_steps_and_chunks_equal_one_call(option: str, backend: str, dtype: torch.dtype) -> None:
    attention = layer(option, backend, dtype)
    x = torch.randn(2, 19, 48, dtype=dtype)
    with torch.no_grad():
        whole = attention(x)
        state = attention.init_state(2, 23)
        stepwise = torch.stack([attention.step(x[:, t], state) for t in range(19)], dim=1)
        assert_near(stepwise, whole, TOLERANCE[dtype])
        assert state.lengths.tolist() == [19, 19]
        state = attention.init_state(2, 19)
        chunks = [attention(part, state) for part in x.split([7, 1, 11], dim=1)]
        assert_near(torch.cat(chunks, dim=1), whole, TOLERANCE[dtype])
        paged = attention.init_state(2, 19, page_size=4)
        paged.block_table = paged.block_table.flip(0)
        assert paged.k.shape[:2] == (10, 4)
        again = [attention(part, paged) for part in x.split([7, 1, 11], dim=1)]
        assert_near(torch.cat(again, dim=1), whole, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_of_different_lengths_continue(backend: str) -> None:
    """Batch entries at different positions: each continues as if it were alone."""
    attention = layer("window", backend)
    x = torch.randn(2, 12, 48)
    with torch.no_grad():
        state = attention.init_state(2, 12)
        for entry, tokens in enumerate((3, 8)):
            alone = attention.init_state(1, 12)
            attention(x[entry:entry + 1, :tokens], alone)
            state.k[entry], state.v[entry], state.lengths[entry] = alone.k[0], alone.v[0], tokens
        y = attention.step(torch.stack((x[0, 3], x[1, 8])), state)
        whole = attention(x)
    assert_near(y, torch.stack((whole[0, 3], whole[1, 8])), 2e-5)
    assert state.lengths.tolist() == [4, 9]


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_separate(backend: str) -> None:
    attention = layer("rotary", backend)
    lengths = [5, 1, 0, 9]
    x = torch.randn(1, sum(lengths) + 2, 48)  # two tokens belong to no sequence
    cu_seqlens = torch.tensor([0, 5, 6, 6, 15], dtype=torch.int32)
    packed = attention(x, cu_seqlens=cu_seqlens)
    separate = torch.cat([attention(part) for part in x[:, :15].split(lengths, dim=1) if part.shape[1]], dim=1)
    assert_near(packed[:, :15], separate, 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_gradients(option: str, backend: str) -> None:
    attention = layer(option, backend)
    x, dout = torch.randn(2, 19, 48, requires_grad=True), torch.randn(2, 19, 48)
    wanted = [x, *attention.parameters()]
    actual = torch.autograd.grad(attention(x), wanted, dout)
    expected = torch.autograd.grad(by_hand(attention, x), wanted, dout)
    for a, e in zip(actual, expected, strict=True):
        assert_near(a, e, 5e-5)


def test_compiles_whole() -> None:
    attention = layer("rotary", BACKENDS[0])
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for tokens in (19, 24, 31):  # a second length makes it dynamic
        x = torch.randn(2, tokens, 48, requires_grad=True)
        y = compiled(x)
        assert_near(y, attention(x), 2e-5)
        dout = torch.randn_like(y)
        assert_near(*(torch.autograd.grad(f(x), x, dout)[0] for f in (compiled, attention)), 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_under_autocast(backend: str) -> None:
    attention = layer("rotary", backend)
    x = torch.randn(2, 19, 48)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        state = attention.init_state(2, 19)
        assert state.k.dtype == torch.bfloat16
        y = attention(x, state)
    assert y.dtype == torch.bfloat16
    assert_near(y.float(), attention(x).detach(), 3e-2)


def test_rotation_depends_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64)
    products = [(apply_rotary(q, torch.tensor([p])) * apply_rotary(k, torch.tensor([p + 7]))).sum()
                for p in (0, 13, 10 ** 6)]
    torch.testing.assert_close(products[1], products[0])
    torch.testing.assert_close(products[2], products[0], rtol=1e-8, atol=1e-8)
    assert abs(products[0] - (q * k).sum()) > 1e-3


@pytest.mark.parametrize(("options", "message"), [
    ({"key_heads": 3}, "key_heads must divide heads"),
    ({"key_heads": 0}, "key_heads must divide heads"),
    ({"heads": 5}, "heads must divide dim"),
    ({"head_dim": 7, "rotary_base": 1e4}, "head_dim must be even"),
])
def test_rejects_bad_sizes(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(**{"dim": 48, "heads": 4, **options})


def test_rejects_misuse() -> None:
    with pytest.raises(ValueError, match="causal must be True"):
        layer("plain", causal=False).init_state(1, 4)
    attention = layer()
    x = torch.randn(1, 4, 48)
    with pytest.raises(RuntimeError, match="requires grad"):
        attention(x, attention.init_state(1, 8))
    with torch.no_grad():
        with pytest.raises(ValueError, match="cache_seqlens must leave room"):
            attention(x, attention.init_state(1, 3))
        with pytest.raises(ValueError, match="cu_seqlens must be None"):
            attention(x, attention.init_state(1, 8), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="even head size"):
        apply_rotary(torch.randn(1, 2, 1, 3), torch.arange(2))
