"""pykernels.compat.safari against the formulas of safari and H3."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pykernels.compat.safari import HyenaOperator, fftconv_func

B, H, L = 2, 6, 13


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_signatures():
    assert str(inspect.signature(fftconv_func)) == (
        "(u, k, D, dropout_mask=None, gelu=True, force_fp16_output=False, output_hbl_layout=False, v=None, head_dim=1, "
        "q=None, fftfp16=False, k_rev=None)"
    )
    assert str(inspect.signature(HyenaOperator)) == (
        "(d_model, l_max, order=2, filter_order=64, dropout=0.0, filter_dropout=0.0, **filter_args)"
    )
    assert list(inspect.signature(HyenaOperator.forward).parameters) == ["self", "u"]


def convolve(x: Tensor, k: Tensor, k_rev: Tensor | None = None) -> Tensor:
    """x [..., L], k [..., K]: by the spectrum, as the originals."""
    size = 2 * x.shape[-1]
    spectrum = torch.fft.rfft(k, size)
    if k_rev is not None:
        spectrum = spectrum + torch.fft.rfft(k_rev, size).conj()
    return torch.fft.irfft(torch.fft.rfft(x, size) * spectrum, size)[..., : x.shape[-1]]


def check(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn_like(theirs)
    for a, e in zip(*(torch.autograd.grad(x, leaves, weights) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, e)
        assert e.abs().max() > 0


@pytest.mark.parametrize("taps", (1, 5, L))
@pytest.mark.parametrize("gelu", (False, True))
@pytest.mark.parametrize("two_sided", (False, True))
def test_convolution(taps, gelu, two_sided):
    u, k, D, mask = normal(B, H, L), normal(H, taps), normal(H), (torch.rand(B, H) < 0.5).double()
    k_rev = normal(H, taps) if two_sided else None
    for dropout_mask in (None, mask):
        expected = convolve(u, k, k_rev) + u * D[:, None]
        expected = F.gelu(expected) if gelu else expected
        expected = expected if dropout_mask is None else expected * dropout_mask[..., None]
        leaves = [u, k, D] + [k_rev] * two_sided
        check(fftconv_func(u, k, D, dropout_mask, gelu, k_rev=k_rev), expected, leaves)


@pytest.mark.parametrize("head_dim", (1, 2, 3))
def test_gates_of_h3(head_dim):
    heads = H // head_dim
    u, v, q, k, D, k_rev = normal(B, H, L), normal(B, H, L), normal(B, H, L), normal(heads, L), normal(heads), \
        normal(heads, L)
    x = torch.einsum("bhil,bhjl->bhijl", u.unflatten(1, (heads, head_dim)), v.unflatten(1, (heads, head_dim)))
    y = convolve(x, k[:, None, None], k_rev[:, None, None]) + x * D[:, None, None, None]
    expected = torch.einsum("bhijl,bhil->bhjl", y, q.unflatten(1, (heads, head_dim))).flatten(1, 2)
    check(fftconv_func(u, k, D, None, False, False, False, v, head_dim, q, False, k_rev), expected,
          [u, v, q, k, D, k_rev])


def test_layout_and_dtype_of_the_result():
    u, k, D = (x.detach().float() for x in (normal(B, H, L), normal(H, L), normal(H)))
    plain = fftconv_func(u, k, D)
    out = fftconv_func(u, k, D, output_hbl_layout=True, fftfp16=True)
    assert torch.equal(out, plain) and out.stride() == (L, B * L, 1)
    half = fftconv_func(u, k, D, force_fp16_output=True)
    assert half.dtype == torch.float16 and torch.equal(half, plain.half())
    assert fftconv_func(u.bfloat16(), k, D).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "words"),
    (
        ({"u": torch.zeros(2, 3)}, "u must be a tensor"),
        ({"k": torch.zeros(H, L + 1)}, f"k must have at most u's {L} taps, got {L + 1}"),
        ({"k": torch.zeros(H + 1, L)}, "k and D must have 6 rows"),
        ({"v": torch.zeros(B, H, L)}, "q must be given with the other"),
        ({"head_dim": 4}, "head_dim must divide"),
        ({"head_dim": 2}, "head_dim must be 1 without v and q"),
        ({"v": torch.zeros(B, H, L), "q": torch.zeros(B, H, L)}, "gelu must be False with v and q"),
        ({"v": torch.zeros(B, H, L), "q": torch.zeros(B, H, 1), "gelu": False}, "q must be a tensor"),
        ({"dropout_mask": torch.zeros(B, H, L)}, "dropout_mask must be a tensor"),
    ),
)
def test_bad_arguments(options, words):
    arguments = {"u": torch.zeros(B, H, L), "k": torch.zeros(H, L), "D": torch.zeros(H)}
    with pytest.raises(ValueError, match=words):
        fftconv_func(**{**arguments, **options})


def hyena(layer: HyenaOperator, u: Tensor) -> Tensor:
    """The original's forward, out of the layer's parameters by the original's names."""
    weights = dict(layer.named_parameters()) | dict(layer.named_buffers())
    tokens = min(u.shape[1], layer.l_max)
    x = F.linear(u, weights["in_proj.weight"], weights["in_proj.bias"]).mT
    x = F.conv1d(x, weights["short_filter.weight"], weights["short_filter.bias"], padding=2, groups=x.shape[1])
    *gates, v = x[..., :tokens].split(layer.d_model, dim=1)
    h = weights["filter_fn.pos_emb.z"][:, :tokens]
    last = max(int(name.split(".")[2]) for name in weights if "implicit_filter" in name)
    for i in range(0, last, 2):
        name = f"filter_fn.implicit_filter.{i}"
        h = torch.sin(weights["filter_fn.implicit_filter.1.freq"]
                      * F.linear(h, weights[f"{name}.weight"], weights[f"{name}.bias"]))
    h = F.linear(h, weights[f"filter_fn.implicit_filter.{last}.weight"])
    t, deltas = weights["filter_fn.pos_emb.t"][:, :tokens], weights["filter_fn.modulation.deltas"]
    h = h * (torch.exp(-t * deltas.abs()) + 0.1)
    k = h[0].T.unflatten(0, (layer.order - 1, layer.d_model))
    bias = weights["filter_fn.bias"].unflatten(0, (layer.order - 1, layer.d_model))
    for o, gate in enumerate(reversed(gates[1:])):
        v = v * gate
        v = convolve(v, k[o]) + v * bias[o][:, None]
    return F.linear((v * gates[0]).mT, weights["out_proj.weight"], weights["out_proj.bias"])


@pytest.mark.parametrize(("order", "tokens"), ((2, L), (3, 9), (4, L + 4)))
def test_hyena(order, tokens):
    layer = HyenaOperator(5, L, order, filter_order=8, emb_dim=5, shift=0.1, filter_dropout=0.5).double()
    u = normal(B, tokens, 5)
    check(layer(u), hyena(layer, u), [u, *layer.parameters()])
    assert set(layer.state_dict()) == {
        *(f"{x}.{y}" for x in ("in_proj", "out_proj", "short_filter") for y in ("weight", "bias")),
        *(f"filter_fn.implicit_filter.{i}.{y}" for i in (0, 2, 4) for y in ("weight", "bias")),
        *(f"filter_fn.implicit_filter.{i}.freq" for i in (1, 3, 5)),
        "filter_fn.implicit_filter.6.weight", "filter_fn.bias", "filter_fn.pos_emb.z", "filter_fn.pos_emb.t",
        "filter_fn.modulation.deltas",
    }


def test_hyena_dropout_and_arguments():
    layer, u = HyenaOperator(8, 40, dropout=0.5, lr=0.1, wd=0.2), torch.randn(2, 40, 8)
    assert not torch.equal(layer(u), layer(u))
    layer.eval()
    assert torch.equal(layer(u), layer(u))
    assert layer.filter_fn.pos_emb.z._optim == {"weight_decay": 0.0, "lr": 1e-5}
    assert layer.filter_fn.implicit_filter[0].weight._optim == {"weight_decay": 0.2, "lr": 0.1}
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(u)
    assert low.dtype == torch.bfloat16 and float(((low.float() - layer(u)).norm() / layer(u).norm()).detach()) < 3e-2
    with pytest.raises(TypeError, match="num_heads"):
        HyenaOperator(8, 40, num_heads=2)
    with pytest.raises(ValueError, match="order must be at least 2"):
        HyenaOperator(8, 40, 1)
    with pytest.raises(ValueError, match="emb_dim must be odd"):
        HyenaOperator(8, 40, emb_dim=4)
