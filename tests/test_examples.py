"""The examples run, learn, and notice when decoding is wrong."""

from __future__ import annotations

import importlib.util
import math
import pathlib
import re
from types import ModuleType

import pytest
import torch

from pykernels.nn import Attention

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
SMALL = ["--dim", "64", "--layers", "2", "--context", "64", "--batch", "16", "--device", "cpu"]


@pytest.fixture
def train_lm() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_lm", EXAMPLES / "train_lm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("mixer, dtype", [("attention", "fp32"), ("attention", "bf16"), ("hyena", "fp32"), ("hyena", "bf16")])
def test_language_model_learns_and_decodes(train_lm: ModuleType, mixer: str, dtype: str, capsys: pytest.CaptureFixture) -> None:
    assert train_lm.main([*SMALL, "--mixer", mixer, "--steps", "80", "--dtype", dtype]) == 0
    out = capsys.readouterr().out
    loss, entropy = map(float, re.search(r"held-out loss ([\d.]+) .*unigram entropy ([\d.]+)", out).groups())
    assert 2.5 < entropy < 4.0
    assert 0.5 < loss < entropy - 0.2
    assert "def parse(self, text):" in out


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

