"""pykernels.compat.flashfftconv against sums written out in float64, torch's convolution, and its own conventions."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn

from pykernels.compat.flashfftconv import FlashDepthWiseConv1d, FlashFFTConv

B, H = 2, 3


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape and expected.abs().max() > 1e-2
    assert float((actual - expected).abs().max() / expected.abs().max()) < tolerance


def test_signatures():
    assert str(inspect.signature(FlashFFTConv)) == "(seqlen, dtype=torch.float16, use_32_butterfly=True)"
    assert list(inspect.signature(FlashFFTConv(8).forward).parameters) == ["u", "k", "pregate", "postgate"]
    assert (
        str(inspect.signature(FlashDepthWiseConv1d))
        == "(channels, kernel_size, padding, weights, bias, is_bhl=True, device=None, dtype=None)"
    )


def convolved(u: Tensor, k: Tensor, size: int) -> Tensor:
    """Term by term, positions modulo `size`."""
    out = [torch.zeros(u.shape[:2], dtype=u.dtype) for _ in range(size)]
    for t in range(u.shape[2]):
        for i in range(k.shape[1]):
            out[(t + i) % size] = out[(t + i) % size] + u[..., t] * k[:, i]
    return torch.stack(out[: u.shape[2]], 2)


@pytest.mark.parametrize("gates", ("none", "both", "pre", "post"))
@pytest.mark.parametrize(("size", "length", "taps"), ((16, 8, 8), (16, 8, 9), (16, 16, 16), (16, 12, 7), (15, 4, 13)))
def test_fft_convolution(size, length, taps, gates):
    u, k = torch.randn(B, H, length, dtype=torch.float64), torch.randn(H, taps, dtype=torch.float64)
    pre = torch.randn_like(u) if gates in ("both", "pre") else None
    post = torch.randn_like(u) if gates in ("both", "post") else None
    inputs = [x.requires_grad_() for x in (u, k, pre, post) if x is not None]
    module = FlashFFTConv(size, dtype=torch.float64).eval()
    out = module(u, k, pre, post)
    expected = convolved(u if pre is None else u * pre, k, size) * (1 if post is None else post)
    near(out, expected)
    cotangent = torch.randn_like(out)
    for a, e in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (out, expected))):
        near(a, e)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
def test_fft_convolution_in_low_precision(dtype):
    u, k, pre, post = (torch.randn(*s).to(t) for s, t in (((B, H, 20), dtype), ((H, 20), torch.float32),
                                                          ((B, H, 20), dtype), ((B, H, 20), dtype)))
    out = FlashFFTConv(64, dtype=dtype, use_32_butterfly=False)(u, k, pregate=pre, postgate=post)
    assert out.dtype == dtype
    near(out, convolved(u.double() * pre.double(), k.double(), 64) * post.double(), 2 * torch.finfo(dtype).eps)


def test_checkpoints_of_the_original_load():
    """Its buffers are no state."""
    model = nn.ModuleDict({"conv": FlashFFTConv(16, torch.float32), "linear": nn.Linear(2, 2)})
    state = {**nn.Linear(2, 2).state_dict(prefix="linear."), "conv.twiddle_factors_fft": torch.ones(4, 4, 2)}
    model.load_state_dict(state)
    assert list(model.state_dict()) == ["linear.weight", "linear.bias"]
    assert torch.equal(model["linear"].weight, state["linear.weight"])


@pytest.mark.parametrize("is_bhl", (True, False))
@pytest.mark.parametrize(("size", "padding"), ((3, 1), (5, 0), (4, 2), (1, 0)))
def test_depthwise_convolution(size, padding, is_bhl):
    theirs = nn.Conv1d(H, H, size, groups=H, padding=padding, dtype=torch.float64)
    ours = FlashDepthWiseConv1d(H, size, padding, theirs.weight, theirs.bias, is_bhl)
    assert ours.weights.shape == ((H, size) if is_bhl else (size, H))
    x = torch.randn(B, H, 9, dtype=torch.float64)
    expected = theirs(x)
    given = (x if is_bhl else x.mT.contiguous()).requires_grad_()
    out = ours(given)
    near(out if is_bhl else out.mT, expected)
    cotangent = torch.randn_like(expected)
    out.backward(cotangent if is_bhl else cotangent.mT)
    x.requires_grad_()
    theirs(x).backward(cotangent)
    near(given.grad if is_bhl else given.grad.mT, x.grad)
    near(ours.weights.grad if is_bhl else ours.weights.grad.T, theirs.weight.grad[:, 0])
    near(ours.bias.grad, theirs.bias.grad)


def test_depthwise_convolution_in_another_dtype():
    theirs = nn.Conv1d(H, H, 3, groups=H, padding=1)
    ours = FlashDepthWiseConv1d(H, 3, 1, theirs.weight[:, 0], theirs.bias, dtype=torch.bfloat16)
    assert ours.weights.dtype == ours.bias.dtype == torch.bfloat16
    x = torch.randn(B, H, 9).bfloat16()
    near(ours(x), theirs(x.float()), 2e-2)
    near(copy.deepcopy(FlashDepthWiseConv1d(H, 3, 1, theirs.weight, theirs.bias))(x), theirs(x.float()), 1e-2)


U, K = torch.randn(B, H, 8), torch.randn(H, 8)
WEIGHTS, BIAS = torch.randn(H, 1, 3), torch.randn(H)


@pytest.mark.parametrize(
    ("function", "error", "words"),
    (
        (lambda: FlashFFTConv(0), ValueError, "seqlen must be an integer of at least 1, got 0"),
        (lambda: FlashFFTConv(8, torch.int32), ValueError, "dtype must be float16"),
        (lambda: FlashFFTConv(8, use_32_butterfly=1), TypeError, "use_32_butterfly must be True or False"),
        (lambda: FlashFFTConv(8)(U, K), TypeError, "u must have the module's dtype torch.float16, got torch.float32"),
        (lambda: FlashFFTConv(4, torch.float32)(U, K), ValueError, "u must be at most seqlen = 4 long"),
        (lambda: FlashFFTConv(8, torch.float32)(U, K.repeat(1, 2)), ValueError, "k must be at most seqlen = 8 long"),
        (lambda: FlashFFTConv(8, torch.float32)(U, K, U[:1], U), ValueError, "pregate must have u's shape"),
        (lambda: FlashFFTConv(8, torch.float32)(U[0], K), ValueError, r"u must be a tensor \[B, H, L\], got \[3, 8\]"),
        (lambda: FlashDepthWiseConv1d(H, 3, -1, WEIGHTS, BIAS), ValueError, "padding must be an integer of at least 0"),
        (lambda: FlashDepthWiseConv1d(H, 4, 1, WEIGHTS, BIAS), ValueError, r"weights must be a tensor \[3, 1, 4\] or"),
        (lambda: FlashDepthWiseConv1d(H, 3, 1, WEIGHTS, None), ValueError, r"bias must be a tensor \[3\], got None"),
        (lambda: FlashDepthWiseConv1d(H, 3, 1, WEIGHTS, BIAS)(U.mT), ValueError, r"input must be a tensor \[B, D, L\]"),
        (lambda: FlashDepthWiseConv1d(H, 3, 0, WEIGHTS, BIAS)(U[..., :2]), ValueError, "at least 3 tokens, got 2"),
    ),
)
def test_raises(function, error, words):
    with pytest.raises(error, match=words):
        function()


def test_compiles_whole():
    modules = FlashFFTConv(12, torch.float32), FlashDepthWiseConv1d(H, 3, 1, WEIGHTS, BIAS)

    def function(u: Tensor) -> Tensor:
        return modules[1](modules[0](u, K, u, u))

    near(torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")(U), function(U))
