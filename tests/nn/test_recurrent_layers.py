"""pykernels.nn.MultiScaleRetention and LinearAttention: torchscale's layer from its formulas, one interface for all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykernels import testing
from pykernels.nn import LinearAttention, MultiScaleRetention

TARGETS = testing.targets(testing.LINEAR_ATTENTION.op, every_isa=False)
BACKENDS = sorted({target.backend for target in TARGETS if target.device == "cpu"} - {"triton"})
on_backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape and expected.abs().max() > 1e-3
    assert float((actual - expected).abs().max() / expected.abs().max()) < tolerance


class Torchscale(nn.Module):
    """torchscale's MultiScaleRetention, written from its formulas: its parameters, its relative positions, its three
    forms."""

    def __init__(self, dim: int, value_dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.q_proj, self.k_proj = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.v_proj, self.g_proj = (nn.Linear(dim, value_dim, bias=False) for _ in range(2))
        self.out_proj = nn.Linear(value_dim, dim, bias=False)
        self.heads, self.key_dim, self.head_dim, self.eps = heads, dim // heads, value_dim // heads, eps
        angle = 1 / 10000 ** torch.linspace(0, 1, self.key_dim // 2, dtype=torch.float64)
        self.angle = angle.repeat_interleave(2)
        self.decay = torch.log(1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float64)))

    def project(self, x: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """-> q, k [B, H, T, K], v [B, H, T, V]."""
        batch, tokens, _ = x.shape
        q, k, v = (p(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
                   for p in (self.q_proj, self.k_proj, self.v_proj))
        index = torch.arange(first, first + tokens, dtype=torch.float64)[:, None] * self.angle
        sin, cos = index.sin(), index.cos()

        def shift(y: Tensor) -> Tensor:
            turned = torch.stack((-y[..., 1::2], y[..., ::2]), dim=-1).flatten(-2)
            return y * cos + turned * sin

        return shift(q), shift(k * self.key_dim ** -0.5), v

    def finish(self, x: Tensor, out: Tensor) -> Tensor:
        """out [B, T, H, V]: the norm of each head without weights, the gate, the projection."""
        out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + self.eps)
        return self.out_proj(F.silu(self.g_proj(x)) * out.flatten(2))

    def parallel(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        distance = (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).double()
        mask = torch.where(distance >= 0, (distance.clamp(min=0) * self.decay[:, None, None]).exp(), 0)
        mask = mask / mask.sum(-1, keepdim=True).sqrt()
        scores = q @ k.transpose(-1, -2) * mask
        scores = scores / scores.detach().abs().sum(-1, keepdim=True).clamp(min=1, max=5e4)
        return self.finish(x, (scores @ v).transpose(1, 2))

    def recurrent(self, x: Tensor, incremental_state: dict[str, Tensor], position: int) -> Tensor:
        """One token, x [B, 1, dim]."""
        q, k, v = self.project(x, position)
        update = k * v.transpose(2, 3)  # [B, H, V, K]
        gamma = self.decay.exp()
        if "prev_key_value" in incremental_state:
            before = incremental_state["scale"]
            scale = before * gamma + 1
            kept = incremental_state["prev_key_value"] * (before.sqrt() * gamma / scale.sqrt()).view(-1, 1, 1)
            update = kept + update / scale.sqrt().view(-1, 1, 1)
        else:
            scale = torch.ones_like(gamma)
        incremental_state.update(prev_key_value=update, scale=scale)
        return self.finish(x, (q * update).sum(3)[:, None])

    def chunkwise(self, x: Tensor, chunk: int) -> Tensor:
        """Each chunk in the parallel form on top of the state before it."""
        q, k, v = self.project(x)
        outs, state = [], torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=x.dtype)
        i = torch.arange(chunk, dtype=torch.float64)
        distance, gamma = i[:, None] - i, self.decay[:, None, None]
        inner = torch.where(distance >= 0, (distance.clamp(min=0) * gamma).exp(), 0)
        for first in range(0, x.shape[1], chunk):
            rows = slice(first, first + chunk)
            scores = q[:, :, rows] @ k[:, :, rows].transpose(-1, -2) * inner
            outs.append(scores @ v[:, :, rows] + ((i + 1)[:, None] * gamma).exp() * (q[:, :, rows] @ state))
            keys = k[:, :, rows] * ((chunk - 1 - i)[:, None] * gamma).exp()
            state = (chunk * gamma).exp() * state + keys.transpose(-1, -2) @ v[:, :, rows]
        return self.finish(x, torch.cat(outs, 2).transpose(1, 2))


@on_backends
@pytest.mark.parametrize(("eps", "tolerance"), ((0.0, 1e-12), (1e-6, 5e-3)), ids=("no-eps", "eps"))
def test_torchscales_three_forms_and_its_incremental_state(backend, eps, tolerance):
    """Their normalisations change nothing but what the norm's eps weighs: without it all agree to rounding."""
    theirs = Torchscale(48, 96, 3, eps).double()
    ours = MultiScaleRetention(48, 3, value_dim=96, eps=eps, backend=backend, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 24, 48, dtype=torch.float64)
    out = ours(x)
    near(out, theirs.parallel(x), tolerance)
    near(out, theirs.chunkwise(x, 8), 1e-12 if eps == 0 else tolerance)
    incremental: dict[str, Tensor] = {}
    steps = [theirs.recurrent(x[:, t:t + 1], incremental, t) for t in range(12)]
    near(out[:, :12], torch.cat(steps, 1), tolerance)
    with torch.no_grad():
        state = ours.state_from_torchscale(incremental, tokens=12)
        near(ours(x[:, 12:], state), out[:, 12:], 1e-12)


def layers(backend: str) -> dict[str, nn.Module]:
    options = {"backend": backend, "dtype": torch.float64}
    return {
        "retention": MultiScaleRetention(32, 2, **options),
        "rotary-learned": MultiScaleRetention(32, 2, positions="rotary", learnable_gamma=True, value_dim=32, **options),
        "no-positions": MultiScaleRetention(32, 4, positions=None, **options),
        **{name: LinearAttention(32, 4, feature_map=name, **options)
           for name in ("elu", "relu", "softmax", "identity")},
        "grouped": LinearAttention(32, 4, key_heads=2, bias=True, **options),
    }


NAMES = list(layers("reference"))


@on_backends
@pytest.mark.parametrize("name", NAMES)
def test_continuing_and_stepping_equal_one_call(backend, name):
    layer, x = layers(backend)[name], torch.randn(2, 20, 32, dtype=torch.float64)
    whole = layer(x)
    with torch.no_grad():
        state = layer.init_state(2, 20)
        parts = [layer(x[:, :9], state), layer(x[:, 9:15], state)]
        parts += [layer.step(x[:, t], state)[:, None] for t in range(15, 20)]
    near(torch.cat(parts, 1), whole, 1e-10)
    assert state.lengths.tolist() == [20, 20]


@on_backends
@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences_and_gradients(backend, name):
    layer, x = layers(backend)[name], torch.randn(1, 20, 32, dtype=torch.float64)
    packed = layer(x, cu_seqlens=torch.tensor([0, 7, 7, 20], dtype=torch.int32))
    near(packed[:, :7], layer(x[:, :7]), 1e-12)
    near(packed[:, 7:], layer(x[:, 7:]), 1e-12)
    packed.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


def test_learned_gamma_starts_at_retnets():
    learned = MultiScaleRetention(64, 8, learnable_gamma=True, dtype=torch.float64)
    fixed = MultiScaleRetention(64, 8, dtype=torch.float64)
    fixed.load_state_dict({name: x for name, x in learned.state_dict().items() if name != "decay_logit"})
    x = torch.randn(1, 30, 64, dtype=torch.float64)
    near(learned(x), fixed(x), 1e-12)


@pytest.mark.parametrize(("make", "words"), (
    (lambda: MultiScaleRetention(30, 4), "heads must divide"),
    (lambda: MultiScaleRetention(32, 4, positions="absolute"), "positions must be"),
    (lambda: MultiScaleRetention(12, 4), "even"),
    (lambda: LinearAttention(30, 4), "heads must divide dim"),
    (lambda: LinearAttention(32, 4, key_heads=3), "key_heads must divide"),
    (lambda: LinearAttention(32, 4, feature_map="cos"), "feature_map must be one of"),
))
def test_bad_options(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_state_holds_no_packed_sequences():
    for layer in (MultiScaleRetention(32, 2), LinearAttention(32, 2)):
        with pytest.raises(ValueError, match="cu_seqlens must be None"):
            layer(torch.randn(1, 4, 32), layer.init_state(1), cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))
