"""pykernels.nn.Mamba: mamba_ssm's layer from its formulas, one interface for all forms, what its backward pass
keeps."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykernels import testing
from pykernels.nn import Mamba
from pykernels.nn import mamba as module

TARGETS = testing.targets(testing.SELECTIVE_SCAN.op, every_isa=False)
BACKENDS = sorted({target.backend for target in TARGETS if target.device == "cpu"} - {"triton"})
on_backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape and expected.abs().max() > 1e-5
    assert float((actual - expected).abs().max() / expected.abs().max()) < tolerance


class MambaSSM(nn.Module):
    """mamba_ssm's Mamba, written from its formulas: its parameters, its one token after another."""

    def __init__(self, dim: int, state: int, width: int, expand: int, rank: int, bias: bool, conv_bias: bool) -> None:
        super().__init__()
        inner = expand * dim
        self.sizes = rank, state, state
        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias)
        self.conv1d = nn.Conv1d(inner, inner, width, groups=inner, padding=width - 1, bias=conv_bias)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.randn(inner, state))
        self.D = nn.Parameter(torch.randn(inner))
        self.out_proj = nn.Linear(inner, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        u, z = self.in_proj(x).chunk(2, -1)
        u = F.silu(self.conv1d(u.mT)[..., :tokens].mT)
        dt, B, C = self.x_proj(u).split(self.sizes, -1)
        dt = F.softplus(self.dt_proj(dt))
        h, outs = 0, []
        for t in range(tokens):
            h = torch.exp(dt[:, t, :, None] * -self.A_log.exp()) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
            outs.append((h * C[:, t, None]).sum(-1) + self.D * u[:, t])
        return self.out_proj(torch.stack(outs, 1) * F.silu(z))


OPTIONS = {
    "default": {},
    "no-biases": {"conv_bias": False},
    "all-biases": {"bias": True, "state_dim": 7, "conv_width": 3, "expand": 3, "dt_rank": 5},
}


def layer(name: str, backend: str = "auto", **options) -> Mamba:
    ours = Mamba(24, backend=backend, dtype=torch.float64, **{**OPTIONS[name], **options})
    with torch.no_grad():  # away from the initial values, which are alike in all channels
        ours.A_log += 0.3 * torch.randn_like(ours.A_log)
        ours.D += torch.randn_like(ours.D)
        ours.dt_proj.bias += 3
    return ours


@on_backends
@pytest.mark.parametrize("name", OPTIONS)
def test_mamba_ssms_formulas_and_parameters(backend, name):
    options = {"state_dim": 16, "conv_width": 4, "expand": 2, "dt_rank": 2, "bias": False, "conv_bias": True,
               **OPTIONS[name]}
    theirs = MambaSSM(24, *(options[key] for key in ("state_dim", "conv_width", "expand", "dt_rank", "bias",
                                                     "conv_bias"))).double()
    ours = layer(name, backend)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 20, 24, dtype=torch.float64)
    near(ours(x), theirs(x), 1e-12)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    for (parameter, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        near(p.grad, q.grad, 1e-11)


@on_backends
@pytest.mark.parametrize("name", OPTIONS)
def test_continuing_and_stepping_equal_one_call(backend, name):
    ours, x = layer(name, backend), torch.randn(2, 20, 24, dtype=torch.float64)
    whole = ours(x)
    with torch.no_grad():
        state = ours.init_state(2, 20)
        parts = [ours(x[:, :1], state), ours(x[:, 1:9], state), ours(x[:, 9:15], state)]
        parts += [ours.step(x[:, t], state)[:, None] for t in range(15, 20)]
    near(torch.cat(parts, 1), whole, 1e-11)
    assert state.lengths.tolist() == [20, 20]


@on_backends
def test_packed_sequences_and_gradients(backend):
    ours, x = layer("all-biases", backend), torch.randn(1, 20, 24, dtype=torch.float64)
    packed = ours(x, cu_seqlens=torch.tensor([0, 7, 7, 20], dtype=torch.int32))
    near(packed[:, :7], ours(x[:, :7]), 1e-11)
    near(packed[:, 7:], ours(x[:, 7:]), 1e-11)
    packed.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in ours.parameters())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("recompute", (False, True))
def test_what_is_cheap_is_computed_again_and_not_kept(recompute, dtype, monkeypatch):
    """The convolution's result is gone after the forward pass, and the gradients are those of keeping it, to the
    bit."""
    outputs = []

    def convolve(*args, **options):
        out = causal_conv1d(*args, **options)
        outputs.append(weakref.ref(out))
        return out

    causal_conv1d = module.causal_conv1d
    monkeypatch.setattr(module, "causal_conv1d", convolve)
    ours, x = Mamba(24, recompute=recompute), torch.randn(2, 50, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = ours(x)
    assert (outputs[0]() is None) == recompute
    gradients = torch.autograd.grad(y.float().square().sum(), [x, *ours.parameters()])
    assert len(outputs) == 1 + recompute
    kept = Mamba(24, recompute=False)
    kept.load_state_dict(ours.state_dict())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = torch.autograd.grad(kept(x).float().square().sum(), [x, *kept.parameters()])
    for gradient, other in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, other) and gradient.abs().max() > 0


def test_second_derivatives_and_torch_func():
    ours, x = layer("default"), torch.randn(1, 4, 24, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: ours(x).sin(), x.clone().requires_grad_(), fast_mode=True)
    gradient = torch.func.grad(lambda x: ours(x).sin().sum())(x)
    leaf = x.clone().requires_grad_()
    near(gradient, torch.autograd.grad(ours(leaf).sin().sum(), leaf)[0], 1e-12)


def test_autocast_and_half_precision_continue_their_states():
    ours, x = Mamba(24), torch.randn(2, 12, 24)
    for model, precision, inputs in ((ours, True, x), (Mamba(24, dtype=torch.bfloat16), False, x.bfloat16())):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision):
            whole, state = model(inputs), model.init_state(2)
            parts = [model(inputs[:, :8], state)] + [model.step(inputs[:, t], state)[:, None] for t in range(8, 12)]
        assert whole.dtype == torch.bfloat16 and state.memory.dtype == torch.float32
        near(torch.cat(parts, 1).float(), whole.float(), 2e-2)


def test_initial_time_steps_are_in_their_range():
    ours = Mamba(64, dt_min=0.01, dt_max=0.02)
    dt = F.softplus(ours.dt_proj.bias)
    assert 0.0099 < dt.min() < 0.0105 and 0.0195 < dt.max() < 0.0201
    assert torch.allclose(-ours.A_log.exp(), -torch.arange(1.0, 17.0).expand(128, 16)) and (ours.D == 1).all()


@pytest.mark.parametrize(("options", "words"), (
    ({"state_dim": 0}, "state_dim must be at least 1"),
    ({"conv_width": 0}, "conv_width must be at least 1"),
    ({"dt_rank": 0}, "dt_rank must be at least 1"),
    ({"dt_min": 0.2}, "dt_min and dt_max"),
))
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        Mamba(16, **options)


def test_a_state_holds_no_packed_sequences():
    ours = Mamba(16)
    with pytest.raises(ValueError, match="cu_seqlens must be None"):
        ours(torch.randn(1, 4, 16), ours.init_state(1), cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))
