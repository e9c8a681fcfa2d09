"""What all mixers have in common: the interface, and every way in which PyTorch runs a layer."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from pykernels import _library
from pykernels.nn import MIXERS, make_mixer

pytestmark = pytest.mark.skipif(_library.error() is not None, reason="needs the native library")
DIM, TOKENS = 32, 48


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def made(name: str, **options):
    return make_mixer(name, DIM, TOKENS, **options)


@pytest.mark.parametrize("name", MIXERS)
def test_one_interface(name):
    """A whole sequence, in pieces, and token by token."""
    mixer, x = made(name, dtype=torch.float64), torch.randn(2, 20, DIM, dtype=torch.float64)
    with torch.no_grad():
        expected = mixer(x)
        state = mixer.init_state(2, TOKENS)
        parts = [mixer(x[:, :7], state), mixer(x[:, 7:12], state), mixer.step(x[:, 12], state)[:, None],
                 mixer(x[:, 13:], state)]
    assert expected.shape == x.shape and expected.abs().max() > 1e-3
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", MIXERS)
def test_on_meta_everything_has_its_shape(name):
    """For counts and plans of models too large to make: a layer made there, in training and token by token."""
    x = torch.randn(2, 9, DIM)
    expected = made(name)(x)
    with torch.device("meta"):
        mixer, x = made(name), torch.empty(2, 9, DIM)
    y = mixer(x)
    y.sum().backward()
    assert y.is_meta and y.shape == expected.shape and y.stride() == expected.stride()
    assert all(p.grad.is_meta for p in mixer.parameters())
    mixer.eval()
    with torch.no_grad():
        state = mixer.init_state(2, TOKENS)
        assert mixer(x).shape == mixer(x, state).shape == x.shape
        assert mixer.step(x[:, 0], state).shape == (2, DIM)


@pytest.mark.parametrize("name", MIXERS)
def test_states_are_for_inference(name):
    """In grad mode none is touched; without tokens there is nothing to do."""
    mixer, x = made(name), torch.randn(2, 9, DIM)
    with torch.no_grad():
        expected, state = mixer(x), mixer.init_state(2, TOKENS)
        assert mixer(x[:, :0]).shape == mixer(x[:, :0], state).shape == (2, 0, DIM)
        parts = [mixer(x[:, :4], state)]
    for call_with in (lambda: mixer(x[:, 4:], state), lambda: mixer.step(x[:, 4], state)):
        with pytest.raises(RuntimeError, match="a layer that continues a state is for inference"):
            call_with()
    mixer.requires_grad_(False)
    parts += [mixer(x[:, 4:8], state), mixer.step(x[:, 8], state)[:, None]]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="x or a parameter requires grad"):
        mixer(x.requires_grad_(), state)


@pytest.mark.parametrize("name", MIXERS)
def test_bad_inputs_are_named(name):
    mixer, x = made(name), torch.randn(2, 9, DIM)
    with torch.no_grad():
        state = mixer.init_state(2, TOKENS)
        expected = mixer(x, state)
        for bad in (x[0], x[None], x[..., 1:]):
            with pytest.raises(ValueError, match=rf"x must have shape \[B, T, dim={DIM}\], got"):
                mixer(bad)
        with pytest.raises(TypeError, match="x must be a tensor .*, got NoneType"):
            mixer(None)
        kind = type(state).__name__
        for call_with in (lambda: mixer(x, [state]), lambda: mixer.step(x[:, 0], [state])):
            wanted = f"state must be the {kind} that the layer's init_state makes, got list"
            with pytest.raises(TypeError, match=wanted):
                call_with()
        with pytest.raises(TypeError, match="state must be .*, got NoneType"):
            mixer.step(x[:, 0], None)
        with pytest.raises(ValueError, match=rf"x must have shape \[B=2, T, dim={DIM}\], got \[1, 9, {DIM}\]"):
            mixer(x[:1], state)
        for bad in (x, x[:1, 0], x[:, 0, 1:]):
            with pytest.raises(ValueError, match=rf"x must have shape \[B=2, dim={DIM}\], got"):
                mixer.step(bad, state)
        torch.testing.assert_close(torch.cat((expected, mixer.step(x[:, 0], state)[:, None]), 1),
                                   mixer(torch.cat((x, x[:, :1]), 1)), rtol=1e-4, atol=1e-5)


def test_options_and_names():
    assert made("attention", heads=4, window=(7, 0)).head_dim == 8
    assert make_mixer("retention", 256, TOKENS).heads == 4
    assert make_mixer("linear_attention", 48, TOKENS).heads == 1
    with pytest.raises(ValueError, match="name must be one of attention, hyena.*, got 'lstm'"):
        made("lstm")
    with pytest.raises(TypeError, match="heads"):
        made("mamba", heads=2)


def call(mixer, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-> y, gradients of a sum of squares with respect to x and every parameter."""
    x = x.clone().requires_grad_()
    y = mixer(x)
    names, parameters = zip(*mixer.named_parameters())
    gradients = torch.autograd.grad(y.float().square().sum(), (x, *parameters))
    assert all(float(g.abs().max()) > 0 for g in gradients)
    return y.detach(), dict(zip(("x", *names), gradients))


def same(actual, expected, tolerance: float = 1e-5) -> None:
    (y, gradients), (wanted, wanted_gradients) = actual, expected
    torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))
    assert gradients.keys() == wanted_gradients.keys()
    for name, g in wanted_gradients.items():
        assert gradients[name].dtype == g.dtype
        torch.testing.assert_close(gradients[name], g, rtol=tolerance, atol=tolerance * float(g.abs().max()), msg=name)


@pytest.mark.parametrize("name", MIXERS)
def test_compiles_whole_with_dynamic_shapes(name):
    mixer, graphs = made(name), []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (20, 33, 41, 47):
        x = torch.randn(2, tokens, DIM)
        y, gradients = call(mixer, x)
        leaf = x.clone().requires_grad_()
        out = compiled(leaf)
        found = torch.autograd.grad(out.square().sum(), (leaf, *mixer.parameters()))
        same((out.detach(), dict(zip(gradients, found))), (y, gradients))
    assert len(graphs) <= 2  # not one for each length


def test_export_and_reload_in_a_fresh_process(tmp_path):
    """All mixers at once; the child knows of pykernels only what it must to run its ops."""
    # A kernel that is cut to the sequence differs in strides where there is nothing to cut, at TOKENS.
    tokens, wanted = torch.export.Dim("tokens", min=4, max=TOKENS - 1), {}
    for name in MIXERS:
        mixer = made(name).eval()
        program = torch.export.export(mixer, (torch.randn(2, 20, DIM),), dynamic_shapes=({1: tokens},))
        torch.export.save(program, tmp_path / f"{name}.pt2")
        x = torch.randn(2, 31, DIM)
        wanted[name] = x, mixer(x).detach()
    torch.save(wanted, tmp_path / "wanted.pt")
    child = """
import pathlib, sys, torch
import pykernels  # registers the ops
folder = pathlib.Path(sys.argv[1])
for name, (x, y) in torch.load(folder / "wanted.pt").items():
    out = torch.export.load(folder / f"{name}.pt2").module()(x)
    assert "pykernels.nn" not in sys.modules
    torch.testing.assert_close(out, y, rtol=1e-5, atol=1e-6)
    print(name)
"""
    done = subprocess.run([sys.executable, "-c", child, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(MIXERS)


@pytest.mark.parametrize("name", MIXERS)
def test_autocast(name):
    mixer, x = made(name), torch.randn(2, 20, DIM)
    y, gradients = call(mixer, x)
    with torch.autocast("cpu", torch.bfloat16):
        low, low_gradients = call(mixer, x)
        with torch.no_grad():
            state = mixer.init_state(2, TOKENS)
            stepped = torch.cat((mixer(x[:, :19], state), mixer.step(x[:, 19], state)[:, None]), 1)
    assert low.dtype == stepped.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in low_gradients.values())
    for a, e in ((low, y), (stepped, y), (low_gradients["x"], gradients["x"])):
        assert float((a.float() - e).norm() / e.norm()) < 3e-2


@pytest.mark.parametrize("name", MIXERS)
def test_inference_mode(name):
    mixer, x = made(name), torch.randn(2, 9, DIM)
    with torch.no_grad():
        expected = mixer(x)
    with torch.inference_mode():
        state = mixer.init_state(2, TOKENS)
        outs = [mixer(x[:, :4], state), *(mixer.step(x[:, t], state)[:, None] for t in range(4, 9))]
        assert torch.equal(mixer(x), expected)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_activation_checkpointing(name):
    mixer, x = made(name), torch.randn(2, 20, DIM)

    class Checkpointed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.named_parameters = mixer.named_parameters

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(mixer, x, use_reentrant=False)

    same(call(Checkpointed(), x), call(mixer, x), 0)


@pytest.mark.parametrize("name", MIXERS)
def test_func_grad(name):
    mixer, x = made(name), torch.randn(2, 20, DIM)
    y, gradients = call(mixer, x)
    del gradients["x"]

    def loss(parameters):
        out = torch.func.functional_call(mixer, parameters, (x,))
        return out.square().sum(), out

    found, out = torch.func.grad(loss, has_aux=True)({key: p.detach() for key, p in mixer.named_parameters()})
    same((out, found), (y, gradients))
