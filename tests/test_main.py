"""python -m pykernels info and verify."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import pykernels
from pykernels import _info, _library
from pykernels.__main__ import main
from pykernels.ops.flash_attention import registration
from pykernels.testing import OPS, Case, targets, verify


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pykernels", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_info():
    done = _run("info")
    assert done.returncode == 0 and not done.stderr
    for word in (
        pykernels.__version__,
        torch.__version__,
        str(_library.path()),
        _library.active_isa(),
        "flash_attention, tensors on cpu",
        "-> cpu",
        "not cuda: the tensors are on cpu",
    ):
        assert word in done.stdout, word


def test_info_as_json():
    done = _run("info", "--json", PYKERNELS_ISA="baseline", PYKERNELS_BACKEND="reference")
    facts = json.loads(done.stdout)
    assert facts["pykernels"] == pykernels.__version__ and facts["torch"] == torch.__version__
    assert facts["library"]["active_isa"] == "baseline" and facts["library"]["error"] is None
    assert facts["default_backend"] == "reference"
    assert set(facts["ops"]) == {op.op.name for op in OPS}
    for op in OPS:
        for dtype in ("float32", "bfloat16", "float16", "float64"):
            chosen = facts["ops"][op.op.name]["cpu"][dtype]
            assert chosen["backend"] == "cpu" and chosen["reason"]
        assert facts["ops"][op.op.name]["cuda"]["float32"]["rejected"]["cpu"] == "the tensors are on cuda"


def test_info_tells_when_the_library_is_missing():
    done = _run("info", PYKERNELS_LIBRARY="/nonexistent.so")
    assert done.returncode == 1
    assert "NOT LOADED: /nonexistent.so does not exist" in done.stdout and "none but reference" in done.stdout
    assert json.loads(_run("info", "--json", PYKERNELS_LIBRARY="/nonexistent.so").stdout)["library"]["error"]


def test_info_tells_when_the_default_is_no_backend():
    assert "default: gpu, which is no backend" in _run("info", PYKERNELS_BACKEND="gpu").stdout


def test_the_probe_notices_a_kernel_that_does_nothing(monkeypatch):
    """The GPU's part of info, with a GPU and kernels that are only pretended."""
    environment = pykernels.backends.Environment(
        cpu=None, cuda=None, triton=None, triton_interpret=False, capability=(9, 0)
    )
    monkeypatch.setattr(_info.backends, "environment", lambda: environment)
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *args, device=None, **kwargs: arange(*args, **kwargs))
    for kernel, words in (
        (lambda x: x + 1, None),
        (lambda x: x, "wrong result"),
        (torch.zeros_like, "wrong result"),
    ):
        monkeypatch.setattr(torch.ops.pykernels, "cuda_probe", kernel, raising=False)
        assert _info._probe() is None if words is None else words in _info._probe()

    def fails(x):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(torch.ops.pykernels, "cuda_probe", fails, raising=False)
    assert "no kernel image" in _info._probe()


@pytest.fixture
def few(monkeypatch):
    """Descriptions with two cases each and short timings, so that verify is quick."""
    import dataclasses

    few = tuple(
        dataclasses.replace(op, cases=op.cases[:2], extremes=op.extremes[:1], timing=op.good) for op in OPS
    )
    monkeypatch.setattr("pykernels.testing.OPS", few)
    monkeypatch.setattr(verify, "_SECONDS_PER_TIMING", 0.01)
    return few


def test_verify_finds_everything_right(few, capsys):
    assert main(["verify"]) == 0
    text = capsys.readouterr().out
    for op in few:
        for target in targets(op.op, every_isa=False):
            assert (f"{op.name} on {target.backend}" in text) == (target.backend != "reference")
    for word in (
        "float32",
        "bfloat16",
        "float16",
        "float64",
        "dq",
        "dk",
        "dv",
        "lse",
        "k_cache",
        "forward and backward: ",
        "PyTorch",
        f"cpu-{_library.active_isa()}",
        "all right",
    ):
        assert word in text, word
    assert "WRONG" not in text and "over" not in text


def test_verify_as_json(few, capsys):
    assert main(["verify", "--json", "--op", "flash_attention", "--backend", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and {result["op"] for result in report["results"]} == {"flash_attention"}
    assert [result["dtype"] for result in report["results"]] == ["float32", "bfloat16", "float16", "float64"]
    for result in report["results"]:
        assert (
            result["calls"] == 3
            and set(result["worst"]) == {"out", "lse", "dq", "dk", "dv"}
            and not result["failures"]
        )
        assert all(0 <= error["error"] <= error["budget"] for error in result["worst"].values())
        assert (
            result["times"]["forward"]["seconds"] > 0
            and result["times"]["forward and backward"]["torch_seconds"] > 0
        )


WRONG = {
    "zeros": lambda part, values: [torch.zeros_like(x) for x in values],
    "one percent off": lambda part, values: [x * 1.01 for x in values],
    "one value unwritten": lambda part, values: [
        x.index_fill(1, torch.tensor([0]), torch.nan) if x.numel() else x for x in values
    ],
    "wrong gradient of k": lambda part, values: (
        [values[0], values[1] * 1.01, values[2]] if part == "bwd" else values
    ),
    "wrong lse": lambda part, values: [values[0], values[1] + 0.01] if part == "fwd" else values,
    "crash": lambda part, values: (_ for _ in ()).throw(RuntimeError("kernel crashed")),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_verify_notices_a_wrong_kernel(few, capsys, monkeypatch, wrong):
    run = registration.run

    def planted(part, backend, *args):
        values = run(part, backend, *args)
        return values if values is None else tuple(WRONG[wrong](part, values))

    monkeypatch.setattr(registration, "run", planted)
    assert main(["verify", "--op", "flash_attention"]) == 1
    text = capsys.readouterr().out
    assert "WRONG" in text and few[0].cases[0].name in text
    assert main(["verify", "--op", "flash_attention", "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["ok"]


def test_verify_exits_with_its_verdict():
    """As a process, for one op in the smallest form there is: a backend that is not there proves nothing."""
    done = (
        _run("verify", "--backend", "cuda")
        if not torch.cuda.is_available()
        else _run("verify", "--backend", "cpu", PYKERNELS_LIBRARY="/nonexistent.so")
    )
    assert done.returncode == 1 and "no backend to verify for flash_attention: " in done.stderr


@pytest.mark.parametrize(
    "arguments, words",
    (
        (
            ("verify", "--op", "nothing"),
            f"--op must be one of {', '.join(op.name for op in OPS)}, got 'nothing'",
        ),
        (("verify", "--backend", "gpu"), "'gpu'"),
        ((), "required: command"),
    ),
)
def test_wrong_arguments(capsys, arguments, words):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2 and words in capsys.readouterr().err


def test_every_op_has_a_timing_case_that_pytorch_can_do_too():
    for op in OPS:
        sample = op.timing.make(torch.float32, "cpu")
        peer = op.peer(sample)
        assert isinstance(op.timing, Case) and peer is not None
        theirs = peer(**sample.tensors())
        ours = op.function(**op.timing.make(torch.float32, "cpu").args, backend="cpu")  # a step overwrites its state
        # As the error budget does, relative to the largest output.
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5 * max(1.0, ours.abs().max().item()))
        assert ours.abs().max() > 0
