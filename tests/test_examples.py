"""The examples run, learn, and notice when decoding is wrong."""

from __future__ import annotations

import importlib.util
import math
import pathlib
import re
from types import ModuleType

import pytest
import torch

from pykernels.nn import Attention, LinearAttention, MultiScaleRetention

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
SMALL = ["--dim", "64", "--layers", "2", "--context", "64", "--batch", "16", "--device", "cpu"]


@pytest.fixture
def train_lm() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_lm", EXAMPLES / "train_lm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("dtype", "mixer"), [
    ("fp32", "attention"), ("bf16", "attention"), ("bf16", "hyena"), ("bf16", "mamba"),
])
def test_language_model_learns_and_decodes(train_lm: ModuleType, dtype: str, mixer: str,
                                           capsys: pytest.CaptureFixture) -> None:
    assert train_lm.main([*SMALL, "--steps", "80", "--dtype", dtype, "--mixer", mixer]) == 0
    out = capsys.readouterr().out
    loss, entropy = map(float, re.search(r"held-out loss ([\d.]+) .*unigram entropy ([\d.]+)", out).groups())
    assert 2.5 < entropy < 4.0
    assert 0.5 < loss < entropy - 0.2
    assert "def parse(self, text):" in out


@pytest.mark.parametrize("mixer", ["linear_attention", "retention"])
def test_recurrent_mixers_learn_and_decode(train_lm: ModuleType, mixer: str, capsys: pytest.CaptureFixture) -> None:
    assert train_lm.main([*SMALL, "--steps", "100", "--mixer", mixer]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{mixer} model")
    losses = [float(loss) for loss in re.findall(r"^step .* loss ([\d.]+)", out, re.MULTILINE)]
    loss, entropy = map(float, re.search(r"held-out loss ([\d.]+) .*unigram entropy ([\d.]+)", out).groups())
    assert losses[-1] < losses[0] - 0.5
    assert 0.5 < loss < entropy - 0.1
    # The sample comes from steps through the states, and agrees with one call on all of it.
    assert float(re.search(r"token by token \(([\d.e+-]+) from one call", out)[1]) < 1e-4


@pytest.mark.parametrize(("mixers", "layers"), [
    ("hyena,attention", ["HyenaOperator", "Attention", "HyenaOperator"]),
    ("mamba,local_attention", ["Mamba", "Attention", "Mamba"]),
])
def test_layers_in_turn_learn_and_decode(train_lm: ModuleType, mixers: str, layers: list[str],
                                         monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    made = []
    block = train_lm.Block
    monkeypatch.setattr(train_lm, "Block", lambda mixer, dim: made.append(mixer) or block(mixer, dim))
    assert train_lm.main([*SMALL, "--layers", "3", "--steps", "60", "--mixer", mixers]) == 0
    assert [type(mixer).__name__ for mixer in made] == layers
    out = capsys.readouterr().out
    assert out.startswith(f"{mixers} model")
    loss, entropy = map(float, re.search(r"held-out loss ([\d.]+) .*unigram entropy ([\d.]+)", out).groups())
    assert 0.5 < loss < entropy - 0.1


def test_an_unknown_mixer(train_lm: ModuleType, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        train_lm.main([*SMALL, "--mixer", "attention,lstm"])
    assert "must be of attention, hyena" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    (["--dim", "100"], "--dim must be a multiple of 64, got 100"),
    (["--steps", "0"], "argument --steps: must be a number of at least 1, got '0'"),
    (["--layers", "-2"], "argument --layers: must be a number of at least 1, got '-2'"),
    (["--backend", "gpu"], "argument --backend: invalid choice: 'gpu'"),
])
def test_bad_arguments_are_named_before_anything_is_read(train_lm: ModuleType, arguments: list[str], message: str,
                                                         capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        train_lm.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("mixer", ["linear_attention", "retention"])
def test_a_recurrent_state_that_is_not_carried_on_is_a_failure(train_lm: ModuleType, mixer: str,
                                                              monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture) -> None:
    layer = {"linear_attention": LinearAttention, "retention": MultiScaleRetention}[mixer]
    forward = layer.forward

    def forgetful(self, x, state=None, **options):
        return forward(self, x, None if state is None else self.init_state(x.shape[0], x.shape[1]), **options)

    monkeypatch.setattr(layer, "forward", forgetful)
    assert train_lm.main([*SMALL, "--steps", "2", "--mixer", mixer]) == 1
    assert "FAILED: decoding token by token differs" in capsys.readouterr().err


def test_wrong_decoding_is_a_failure(train_lm: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture) -> None:
    """A cache that loses count of its tokens by one."""
    forward = Attention.forward

    def forgetful(self, x, state=None, **options):
        y = forward(self, x, state, **options)
        if state is not None and x.shape[1] > 1:
            state.lengths -= 1
        return y

    monkeypatch.setattr(Attention, "forward", forgetful)
    assert train_lm.main([*SMALL, "--steps", "2"]) == 1
    assert "FAILED: decoding token by token differs" in capsys.readouterr().err


def test_learning_nothing_is_a_failure(train_lm: ModuleType, capsys: pytest.CaptureFixture) -> None:
    assert train_lm.main([*SMALL, "--steps", "1", "--lr", "0"]) == 1
    assert "FAILED: the held-out loss is not below" in capsys.readouterr().err


def test_text_is_real_and_held_out_files_are_apart(train_lm: ModuleType) -> None:
    text, held_out = train_lm.load_text()
    assert text.numel() > 1_000_000
    assert held_out.numel() > 100_000
    assert bytes(held_out[:2000].tolist()) not in bytes(text.numpy())
    assert train_lm.unigram_entropy(torch.arange(256, dtype=torch.uint8).repeat(3)) == pytest.approx(math.log(256))

