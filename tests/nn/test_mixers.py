"""What all mixers have in common: the interface, and every way in which PyTorch runs a layer."""

from __future__ import annotations

import pytest
import torch

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


def test_options_and_names():
    assert made("attention", heads=4, window=(7, 0)).head_dim == 8
    assert make_mixer("retention", 256, TOKENS).heads == 4
    assert make_mixer("linear_attention", 48, TOKENS).heads == 1
    with pytest.raises(ValueError, match="name must be one of attention, hyena.*, got 'lstm'"):
        made("lstm")
    with pytest.raises(TypeError, match="heads"):
        made("mamba", heads=2)
