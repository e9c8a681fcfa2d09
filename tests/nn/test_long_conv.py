"""pykernels.nn.LongConv and HyenaOperator: from their formulas; the same in one call, in pieces and token by token."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pykernels
from pykernels import _library, testing
from pykernels.nn import HyenaFilter, HyenaOperator, LongConv

BACKENDS = sorted({t.backend for t in testing.targets(testing.FFT_CONV.op, every_isa=False) if t.device == "cpu"})
on_backends = pytest.mark.parametrize("backend", BACKENDS)
F64 = torch.float64
LAYERS = {
    "long-conv": lambda **options: LongConv(6, 300, threshold=0.01, **options),
    "hyena": lambda **options: HyenaOperator(6, 300, embedding=5, **options),
    "hyena-3": lambda **options: HyenaOperator(6, 300, order=3, short_taps=5, **options),
}
on_layers = pytest.mark.parametrize("layer", LAYERS)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape and expected.norm() > 0
    assert float((actual - expected).norm() / expected.norm()) < tolerance


def causal(u: Tensor, k: Tensor) -> Tensor:
    """u [B, D, T] with taps [D, K], by torch's convolution."""
    return F.conv1d(F.pad(u, (k.shape[1] - 1, 0)), k.flip(-1)[:, None], groups=u.shape[1])


@on_backends
def test_long_conv(backend):
    layer = LongConv(4, 90, backend=backend, dtype=F64)
    x = torch.randn(2, 70, 4, dtype=F64)
    near(layer(x), (causal(x.mT, layer.kernel[:, :70]) + layer.skip[:, None] * x.mT).mT)
    layer.threshold = 0.05
    squashed = layer.kernel.sign() * (layer.kernel.abs() - 0.05).clamp(min=0)
    assert 0 < squashed.count_nonzero() < squashed.numel()
    near(layer(x), (causal(x.mT, squashed[:, :70]) + layer.skip[:, None] * x.mT).mT)


def test_hyena_filter():
    """The formula, with complex exponentials."""
    layer = HyenaFilter(5, 80, embedding=7, width=16, layers=2, frequency=1.5, dtype=F64)
    t, n = torch.linspace(0, 1, 80, dtype=F64)[:, None], torch.arange(80, dtype=F64)[:, None]
    turn = torch.exp(-1j * torch.linspace(1e-4, 2, 3, dtype=F64) * 2 * math.pi * n / 80)
    h = torch.cat((t, turn.real, turn.imag), 1)
    for linear in layer.hidden:
        h = torch.sin(1.5 * linear(h))
    delta = torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, 5, dtype=F64)
    expected = (layer.out(h) * torch.exp(-t * delta.abs())).T
    near(layer(80), expected)
    near(layer(33), expected[:, :33])


@on_backends
@pytest.mark.parametrize("order", (2, 3))
def test_hyena_operator(backend, order):
    layer = HyenaOperator(4, 100, order=order, backend=backend, dtype=F64)
    x = torch.randn(2, 90, 4, dtype=F64)
    streams = causal(layer.in_proj(x).mT, layer.short_kernel) + layer.short_bias
    *gates, v = streams.chunk(order + 1, dim=1)
    filters = layer.filter(90).chunk(order - 1)
    for gate, k, skip in reversed(list(zip(gates[1:], filters, layer.skip))):
        v = causal(gate * v, k) + skip[:, None] * gate * v
    near(layer(x), layer.out_proj((gates[0] * v).mT))


@on_backends
@on_layers
@pytest.mark.parametrize("first", (1, 50))
def test_pieces_and_steps_equal_one_call(backend, layer, first):
    layer = LAYERS[layer](backend=backend, dtype=F64)
    x = torch.randn(2, 200, 6, dtype=F64)
    with torch.no_grad():
        whole = layer(x)
        state = layer.init_state(2, 250)
        parts = [layer(x[:, :first], state)]
        parts += [layer.step(x[:, t], state)[:, None] for t in range(first, 170)]
        parts.append(layer(x[:, 170:], state))
    near(torch.cat(parts, 1), whole)
    assert state.tokens == 200


@on_layers
def test_stepping_from_the_first_token(layer):
    layer = LAYERS[layer](dtype=F64)
    x = torch.randn(3, 80, 6, dtype=F64)
    with torch.no_grad():
        state = layer.init_state(3)
        near(torch.stack([layer.step(token, state) for token in x.unbind(1)], 1), layer(x))


@on_layers
def test_under_autocast(layer):
    layer = LAYERS[layer]()
    x = torch.randn(2, 100, 6)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        whole, state = layer(x), layer.init_state(2)
        near(torch.cat((layer(x[:, :90], state), layer(x[:, 90:], state)), 1).float(), whole.float(), 2e-2)
    near(whole.float(), layer(x), 3e-2)


@on_layers
def test_every_parameter_gets_a_gradient(layer):
    layer = LAYERS[layer](dtype=F64)
    x = torch.randn(2, 100, 6, dtype=F64, requires_grad=True)
    layer(x).sin().sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in (x, *layer.parameters())
    )


# ---- the kernels that Hyena keeps for inference


def _changes(layer: HyenaOperator):
    """(name, a change of the filter that leaves no trace but its values)."""
    weight, bias = layer.filter.out.weight, layer.filter.hidden[0].bias
    with torch.inference_mode():
        yield "in inference mode", weight.mul_(1.1)
    yield "through .data", bias.data.add_(0.1)
    yield "through a view of .data", weight.data[1].neg_()
    yield "through NumPy", weight.detach().numpy().__imul__(0.9)
    yield "of a buffer", layer.filter.rates.mul_(0.9)
    yield "of max_tokens", setattr(layer.filter, "max_tokens", 290)
    layer.filter.out.weight = torch.nn.Parameter(weight.detach() * 2)
    yield "of the parameter", None
    yield "of the state", layer.load_state_dict({name: 0.7 * x for name, x in layer.state_dict().items()})


@pytest.mark.parametrize("order", (2, 3))
def test_hyena_keeps_its_kernels_in_inference_and_they_are_never_old(order, monkeypatch):
    layer = HyenaOperator(6, 300, order=order, embedding=5).eval()
    x, made = torch.randn(2, 200, 6), []
    original = HyenaFilter.forward
    monkeypatch.setattr(HyenaFilter, "forward", lambda self, tokens: made.append(tokens) or original(self, tokens))

    def filters(call) -> int:
        made.clear()
        call()
        return len(made)

    with torch.no_grad():
        assert filters(lambda: layer(x)) == 1
        assert filters(lambda: layer(torch.randn(5, 200, 6))) == 0  # any batch
        assert filters(lambda: layer(x[:, :90])) == 1  # another length
        before = layer(x)
        for name, _ in _changes(layer):
            again = layer(x)
            assert not torch.equal(again, before), name
            assert filters(lambda: layer(x)) == 0, name
            before, expected = again, copy.deepcopy(layer).train()(x)
            near(again, expected, 1e-6)
        layer.train().eval()
        assert filters(lambda: layer(x)) == 1
    assert filters(lambda: layer(x)) == order - 1  # with grad
    layer.train()
    with torch.no_grad():
        assert filters(lambda: layer(x)) == order - 1


def test_a_saved_hyena_has_no_spectra():
    """They are laid out for the machine's instruction set."""
    layer, stream = HyenaOperator(6, 300).eval(), io.BytesIO()
    x = torch.randn(1, 300, 6)
    with torch.no_grad():
        expected = layer(x)
        torch.save(layer, stream)
        stream.seek(0)
        loaded = torch.load(stream, weights_only=False)
        with testing.use_isa(_library.machine_isas()[0]):
            near(loaded(x), expected, 1e-6)


def test_backends_without_spectra_serve_hyena_in_inference():
    layer, x = HyenaOperator(6, 300, dtype=F64).eval(), torch.randn(1, 300, 6, dtype=F64)
    with torch.no_grad():
        expected = layer(x)
        for backend in BACKENDS:
            with pykernels.use_backend(backend):
                near(layer(x), expected)


@pytest.mark.parametrize(
    "make, match",
    (
        (lambda: LongConv(0, 5), "dim"),
        (lambda: LongConv(4, 0), "max_tokens"),
        (lambda: HyenaOperator(4, 0), "max_tokens"),
        (lambda: HyenaOperator(4, 8, order=1), "order"),
        (lambda: HyenaOperator(4, 8, short_taps=0), "short_taps"),
        (lambda: HyenaOperator(4, 8, embedding=4), "embedding.*4"),
        (lambda: HyenaFilter(4, 8, layers=0), "layers.*0"),
        (lambda: LongConv(4, 8).init_state(1, 9), "max_tokens.*8.*9"),
        (lambda: LongConv(4, 8)(torch.zeros(1, 9, 4)), "max_tokens = 8.*9"),
    ),
)
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_state_that_is_full():
    layer = LongConv(4, 8)
    with torch.no_grad():
        state = layer.init_state(1, 6)
        layer(torch.randn(1, 6, 4), state)
        with pytest.raises(ValueError, match="max_tokens of 6.*1 more after 6"):
            layer.step(torch.randn(1, 4), state)
