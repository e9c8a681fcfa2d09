"""pykernels.compat.torchscale.MultiScaleRetention against torchscale's three forms, written from its formulas."""

from __future__ import annotations

import inspect
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pykernels.compat.torchscale import MultiScaleRetention

DIM, VALUE_DIM, HEADS, CHUNK = 32, 48, 4, 4
KEY, HEAD = DIM // HEADS, VALUE_DIM // HEADS


def near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape and expected.abs().max() > 1e-3
    assert float((actual - expected).abs().max() / expected.abs().max()) < tolerance


def layer(eps: float = 0.0, **options) -> MultiScaleRetention:
    torch.manual_seed(0)
    return MultiScaleRetention(
        types.SimpleNamespace(layernorm_eps=eps, multiway=False), DIM, VALUE_DIM, HEADS, **options
    ).double()


def rotation(positions: Tensor) -> tuple[Tensor, Tensor]:
    angle = (10000 ** -torch.linspace(0, 1, KEY // 2, dtype=torch.float64)).repeat_interleave(2)
    return (positions[..., None] * angle).sin(), (positions[..., None] * angle).cos()


GAMMA = 1 - 2 ** (-5 - torch.arange(HEADS, dtype=torch.float64))


def powers(n: int, gamma: Tensor) -> Tensor:
    """[H, n, n], gamma^(i - j) for j <= i."""
    distance = torch.arange(n)[:, None] - torch.arange(n)
    return torch.where(distance >= 0, gamma[:, None, None] ** distance.clamp(min=0), 0)


def parallel_positions(tokens: int, gamma: Tensor = GAMMA):
    mask = powers(tokens, gamma)
    return rotation(torch.arange(tokens, dtype=torch.float64)), mask / mask.sum(-1, keepdim=True).sqrt()


def chunk_positions(tokens: int, gamma: Tensor = GAMMA):
    mask, i = powers(CHUNK, gamma), torch.arange(CHUNK)
    root, last = mask.sum(-1, keepdim=True).sqrt(), mask[:, -1].sum(-1)[:, None, None]
    of_values = (mask[:, -1] / last[:, 0]).unsqueeze(-1)
    of_queries = (gamma[:, None] ** (i + 1))[..., None] * last / root
    masks = mask / root, (gamma**CHUNK)[:, None, None], of_queries, of_values
    return rotation(torch.arange(tokens, dtype=torch.float64)), masks


def step_positions(tokens: int, gamma: Tensor = GAMMA):
    return rotation(torch.tensor(tokens - 1, dtype=torch.float64)), gamma


class Theirs:
    """torchscale's forward on our layer's parameters; heads before time."""

    def __init__(self, ours: MultiScaleRetention) -> None:
        self.ours = ours

    def project(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        sin, cos = rotation
        q, k, v = (
            p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for p in (self.ours.q_proj, self.ours.k_proj, self.ours.v_proj)
        )
        turn = torch.complex(cos[..., 0::2], sin[..., 0::2])

        def turned(y: Tensor) -> Tensor:
            return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

        return turned(q), turned(k * KEY**-0.5), v

    def finish(self, x: Tensor, out: Tensor) -> Tensor:
        """out [B, T, H, V]."""
        out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + self.ours.args.layernorm_eps)
        return self.ours.out_proj(self.ours.gate_fn(self.ours.g_proj(x)) * out.flatten(2))

    def parallel(self, x: Tensor, rel_pos) -> Tensor:
        q, k, v = self.project(x, rel_pos[0])
        scores = q @ k.mT * rel_pos[1]
        scores = scores / scores.detach().sum(-1, keepdim=True).abs().clamp(min=1)
        return self.finish(x, (scores @ v).transpose(1, 2))

    def chunkwise(self, x: Tensor, rel_pos) -> Tensor:
        mask, cross, of_queries, of_values = rel_pos[1]
        q, k, v = (
            y.unflatten(2, (-1, CHUNK)).transpose(1, 2) for y in self.project(x, rel_pos[0])
        )  # [B, chunks, H, C, .]
        scores = q @ k.mT * mask
        inner = scores.detach().abs().sum(-1, keepdim=True).clamp(min=1)
        added, outs = k.mT @ (v * of_values), []
        state, norm = torch.zeros_like(added[:, 0]), x.new_ones(x.shape[0], HEADS, 1, 1)
        for c in range(added.shape[1]):
            both = torch.maximum(inner[:, c], norm)
            outs.append(
                scores[:, c] / inner[:, c] @ v[:, c] * inner[:, c] / both
                + (q[:, c] * of_queries) @ (state / norm) * norm / both
            )
            state = state * cross + added[:, c]
            norm = state.detach().abs().sum(-2, keepdim=True).amax(-1, keepdim=True).clamp(min=1)
        return self.finish(x, torch.cat(outs, 2).transpose(1, 2))

    def recurrent(self, x: Tensor, rel_pos, incremental_state: dict[str, Tensor]) -> Tensor:
        q, k, v = self.project(x, rel_pos[0])
        gamma, update = rel_pos[1], k * v.mT
        scale = torch.ones_like(gamma)
        if "prev_key_value" in incremental_state:
            before = incremental_state["scale"]
            scale = before * gamma + 1
            update = incremental_state["prev_key_value"] * (before.sqrt() * gamma / scale.sqrt()).view(
                -1, 1, 1
            ) + update / scale.sqrt().view(-1, 1, 1)
        incremental_state.update(prev_key_value=update, scale=scale)
        return self.finish(x, (q * update).sum(3)[:, None])


X = torch.randn(2, 12, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_signature():
    parameters = inspect.signature(MultiScaleRetention.forward).parameters
    assert list(parameters) == ["self", "x", "rel_pos", "chunkwise_recurrent", "incremental_state"]
    assert parameters["chunkwise_recurrent"].default is False and parameters["incremental_state"].default is None
    assert list(inspect.signature(MultiScaleRetention).parameters) == [
        "args",
        "embed_dim",
        "value_dim",
        "num_heads",
        "gate_fn",
    ]
    assert {name: tuple(x.shape) for name, x in layer().named_parameters()} == {
        "q_proj.weight": (DIM, DIM),
        "k_proj.weight": (DIM, DIM),
        "v_proj.weight": (VALUE_DIM, DIM),
        "g_proj.weight": (VALUE_DIM, DIM),
        "out_proj.weight": (DIM, VALUE_DIM),
    }


@pytest.mark.parametrize("gate_fn", ("swish", "gelu"))
@pytest.mark.parametrize(
    "gamma", (GAMMA, torch.tensor([0.5, 0.9, 0.99, 1.0], dtype=torch.float64)), ids=("retnet", "other")
)
@pytest.mark.parametrize(("eps", "size", "tolerance"), ((0.0, 1, 1e-11), (1e-4, 1, 1e-11), (1e-6, 20, 5e-3)))
def test_parallel_and_chunkwise_forms(eps, size, tolerance, gamma, gate_fn):
    """To rounding, but that with a norm's epsilon and large scores the chunkwise form has factors of its own."""
    ours = layer(eps, gate_fn=gate_fn)
    with torch.no_grad():
        ours.k_proj.weight *= size
    theirs, dout = Theirs(ours), torch.randn_like(X)
    for chunkwise, expected, actual in (
        (False, theirs.parallel(X, parallel_positions(12, gamma)), ours(X, parallel_positions(12, gamma))),
        (
            True,
            theirs.chunkwise(X, chunk_positions(12, gamma)),
            ours(X, chunk_positions(12, gamma), chunkwise_recurrent=True),
        ),
    ):
        near(actual, expected, tolerance if chunkwise else 1e-11)
        if not chunkwise or tolerance < 1e-10:
            parameters = list(ours.parameters())
            for a, e in zip(
                torch.autograd.grad(actual, parameters, dout), torch.autograd.grad(expected, parameters, dout)
            ):
                near(a, e, 1e-10)


def test_the_cases_differ():
    """Large scores do make torchscale divide by their sums, and the epsilon does weigh that."""
    ours = layer(1e-4)
    small = Theirs(ours).parallel(X, parallel_positions(12))
    with torch.no_grad():
        ours.k_proj.weight *= 20
    large = Theirs(ours)
    q, k, _ = large.project(X, parallel_positions(12)[0])
    assert bool(((q @ k.mT * parallel_positions(12)[1]).sum(-1).abs() > 2).any())
    assert bool(((large.parallel(X, parallel_positions(12)) - small).abs() > 1e-3).any())


def test_incremental_state_token_by_token():
    """With an epsilon, too: this form is theirs to rounding, and so is the state, which continues in either."""
    ours = layer(1e-2)
    theirs, mine, other = Theirs(ours), {}, {}
    for t in range(8):
        expected = theirs.recurrent(X[:, t : t + 1], step_positions(t + 1), other)
        near(ours(X[:, t : t + 1], step_positions(t + 1), incremental_state=mine), expected, 1e-11)
        assert set(mine) == set(other)
        for name in mine:
            near(mine[name], other[name], 1e-11)
        if t == 4:
            mine, other = dict(other), dict(mine)


def test_steps_equal_the_whole():
    ours, state = layer(), {}
    whole = ours(X, parallel_positions(12))
    near(
        torch.cat([ours(X[:, t : t + 1], step_positions(t + 1), incremental_state=state) for t in range(12)], 1),
        whole,
        1e-11,
    )


def test_low_precision():
    """bfloat16 weights and masks: the decays are RetNet's all the same."""
    ours = layer(1e-6)
    expected = ours(X, parallel_positions(12))
    low = ours.bfloat16()
    (sin, cos), mask = parallel_positions(12)
    actual = low(X.bfloat16(), ((sin.bfloat16(), cos.bfloat16()), mask.bfloat16()))
    assert actual.dtype == torch.bfloat16
    near(actual.double(), expected, 5e-2)
    near(low._gamma(mask.bfloat16()), GAMMA, 1e-15)
    state: dict[str, Tensor] = {}
    (sin, cos), gamma = step_positions(1)
    out = low(X[:, :1].bfloat16(), ((sin.bfloat16(), cos.bfloat16()), gamma.float()), incremental_state=state)
    assert out.dtype == state["prev_key_value"].dtype == torch.bfloat16
    near(out.double(), expected[:, :1], 5e-2)


def documents() -> Tensor:
    mask = parallel_positions(12)[1].clone()
    mask[:, 6:, :6] = 0
    return mask


@pytest.mark.parametrize(
    ("call", "words"),
    (
        (lambda: layer(gate_fn="relu"), "gate_fn must be one of swish, gelu, got 'relu'"),
        (lambda: MultiScaleRetention(types.SimpleNamespace(layernorm_eps=0, multiway=True), 8, 8, 2), "args.multiway"),
        (lambda: MultiScaleRetention(types.SimpleNamespace(layernorm_eps=0), 8, 9, 2), "num_heads must divide"),
        (lambda: layer()(X, step_positions(3)), "rel_pos must hold a decay mask"),
        (lambda: layer()(X, chunk_positions(12)), "rel_pos must hold a decay mask"),
        (
            lambda: layer()(X, (parallel_positions(12)[0], parallel_positions(11)[1])),
            "rel_pos must hold a mask for x's 12 tokens, got one for 11",
        ),
        (lambda: layer()(X, parallel_positions(12), chunkwise_recurrent=True), "four masks"),
        (lambda: layer()(X, (parallel_positions(12)[0], documents())), "one factor per head and token"),
        (lambda: layer()(X, step_positions(3), incremental_state={}), "one token"),
        (lambda: layer()(X[:, :1], parallel_positions(1), incremental_state={}), "rel_pos must hold decays"),
    ),
)
def test_raises(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_swish_is_silu():
    assert layer().gate_fn is F.silu
