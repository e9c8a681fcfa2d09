"""The choice of a backend: a pure function, its settings, its errors, and what happens without the native library."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

import pykernels
from pykernels import BackendUnavailable, _library, backends
from pykernels.backends import Environment, Op, Query, choose
from pykernels.testing import OPS, targets
from pykernels.testing.targets import choice

ALL = Environment(cpu=None, cuda=None, triton=None, triton_interpret=False, capability=(9, 0))
NOTHING = Environment(
    cpu="no library", cuda="no CUDA", triton="no Triton", triton_interpret=False, capability=None
)
CPU_ONLY = dataclasses.replace(NOTHING, cpu=None)
INTERPRETER = dataclasses.replace(CPU_ONLY, triton=None, triton_interpret=True)
TRITON_GPU = dataclasses.replace(CPU_ONLY, triton=None, capability=(8, 0))


def _even(query: Query) -> str | None:
    return None if query.sizes.get("head_dim", 0) % 2 == 0 else "odd head sizes are not served"


OP = Op(
    "toy",
    {
        "cuda": _even,
        "triton": lambda query: "no float64" if query.dtype == torch.float64 else None,
        "cpu": lambda query: None,
        "reference": lambda query: None,
    },
)
CUDA_ON_REQUEST = dataclasses.replace(OP, explicit_only={"cuda": "not measured"})
WITHOUT_CUDA = Op("toy", {name: supports for name, supports in OP.backends.items() if name != "cuda"})


@pytest.mark.parametrize("op", list({op.op.name: op.op for op in OPS}.values()), ids=lambda op: op.name)
def test_plain_calls_are_served_on_a_gpu(op, monkeypatch):
    """`info`, `verify` and the tests ask for a plain call, whichever sizes an op's backends look at."""
    monkeypatch.setattr(backends, "environment", lambda: ALL)
    for requested, backend in (("auto", "triton"), ("triton", "triton"), ("cuda", "cuda")):
        assert choice(op, requested, "cuda", torch.bfloat16).backend == backend


def _query(device="cpu", dtype=torch.float32, head_dim=64) -> Query:
    return Query(device, dtype, {"head_dim": head_dim})


@pytest.mark.parametrize(
    "op, query, requested, environment, backend, words",
    (
        # auto: the first of cuda, triton, cpu that can serve; never the reference.
        (OP, _query(), "auto", ALL, "cpu", {"cuda": "on cpu"}),
        (OP, _query("cuda"), "auto", ALL, "cuda", {}),
        (OP, _query("cuda", head_dim=63), "auto", ALL, "triton", {"cuda": "odd head sizes"}),
        (
            OP,
            _query("cuda", torch.float64, 63),
            "auto",
            ALL,
            None,
            {"cuda": "odd head", "triton": "no float64", "cpu": "on cuda"},
        ),
        (WITHOUT_CUDA, _query("cuda"), "auto", ALL, "triton", {"cuda": "no cuda backend"}),
        (CUDA_ON_REQUEST, _query("cuda"), "auto", ALL, "triton", {"cuda": "not measured"}),
        (CUDA_ON_REQUEST, _query("cuda", head_dim=63), "auto", ALL, "triton", {"cuda": "odd head sizes"}),
        (CUDA_ON_REQUEST, _query("cuda"), "cuda", ALL, "cuda", {}),
        (OP, _query("cuda"), "auto", TRITON_GPU, "triton", {"cuda": "no CUDA"}),
        (OP, _query("xpu"), "auto", TRITON_GPU, "triton", {"cuda": "on xpu"}),
        (OP, _query("mps"), "auto", ALL, None, {"cuda": "on mps", "triton": "no mps target", "cpu": "on mps"}),
        (OP, _query(), "auto", CPU_ONLY, "cpu", {"cuda": "on cpu"}),
        (OP, _query(), "auto", INTERPRETER, "cpu", {"cuda": "on cpu"}),
        (OP, _query(), "auto", NOTHING, None, {"cuda": "on cpu", "cpu": "no library"}),
        (OP, _query(), "auto", dataclasses.replace(INTERPRETER, cpu="no library"), None, {"cpu": "no library"}),
        # By name: that one or none.
        (OP, _query(), "cpu", ALL, "cpu", {}),
        (OP, _query("cuda"), "cpu", ALL, None, {"cpu": "on cuda"}),
        (OP, _query(), "cpu", NOTHING, None, {"cpu": "no library"}),
        (OP, _query(), "cuda", ALL, None, {"cuda": "on cpu"}),
        (OP, _query("cuda", head_dim=63), "cuda", ALL, None, {"cuda": "odd head sizes"}),
        (OP, _query(), "triton", ALL, None, {"triton": "TRITON_INTERPRET"}),
        (OP, _query(), "triton", INTERPRETER, "triton", {}),
        (OP, _query(dtype=torch.float64), "triton", INTERPRETER, None, {"triton": "no float64"}),
        (OP, _query("cuda"), "triton", CPU_ONLY, None, {"triton": "no Triton"}),
        (OP, _query("mps"), "reference", NOTHING, "reference", {}),
        (WITHOUT_CUDA, _query("cuda"), "cuda", ALL, None, {"cuda": "no cuda backend"}),
    ),
)
def test_choice(op, query, requested, environment, backend, words):
    choice = choose(op, query, requested, environment)
    assert choice.backend == backend and choice.reason
    for name, word in words.items():
        assert word in choice.rejected[name]
    assert backend not in choice.rejected and (requested == "auto" or set(choice.rejected) <= {requested})
    assert choose(op, query, requested, environment) == choice


def test_every_backend_name_is_known():
    assert all(set(op.op.backends) <= set(backends.BACKENDS) and "reference" in op.op.backends for op in OPS)


@pytest.fixture
def args():
    return dict(zip("qkv", torch.randn(3, 1, 4, 2, 8)))


def test_unavailable_says_why_and_what_can(args):
    with pytest.raises(
        BackendUnavailable, match=r"flash_attention: backend 'cuda' can't serve.*tensors are on cpu.*'cpu' can"
    ):
        pykernels.flash_attention(**args, backend="cuda")
    if not backends.environment().triton_interpret:
        with pytest.raises(
            BackendUnavailable, match=r"'triton'.*(TRITON_INTERPRET=1|not installed).*'cpu' can"
        ):
            pykernels.flash_attention(**args, backend="triton")
    with pytest.raises(BackendUnavailable, match=r"'cuda'.*the tensors are on meta.*'cpu' can"):
        pykernels.flash_attention(**{name: x.to("meta") for name, x in args.items()}, backend="cuda")
    assert issubclass(BackendUnavailable, RuntimeError)


def test_the_chosen_backend_is_the_one_that_runs(args):
    """By name and by default; the profiler sees the op."""
    for target in targets(OPS[0].op, every_isa=False):
        on_device = {name: x.to(target.device) for name, x in args.items()}

        def ops_of(backend):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                pykernels.flash_attention(**on_device, backend=backend)
            return {event.name for event in profile.events() if event.name.startswith("pykernels::")}

        wanted = (
            set() if target.backend == "reference" else {f"pykernels::flash_attention_fwd_{target.backend}"}
        )
        assert ops_of(target.backend) == wanted
        with pykernels.use_backend(target.backend):
            assert ops_of("auto") == wanted


def test_use_backend(args):
    assert backends._default == "auto"
    with pykernels.use_backend("cuda"):
        with pytest.raises(BackendUnavailable, match="'cuda'"):
            pykernels.flash_attention(**args)
        pykernels.flash_attention(**args, backend="cpu")  # an explicit argument wins
        with pykernels.use_backend("reference"):
            assert backends._default == "reference"
        assert backends._default == "cuda"
    assert backends._default == "auto"
    pykernels.use_backend("reference")  # not as a context manager: until the next call
    assert backends._default == "reference"
    pykernels.use_backend("auto")
    assert backends._default == "auto"
    with pytest.raises(ValueError, match="backend must be one of .*'reference'.*got 'gpu'"):
        pykernels.use_backend("gpu")
    with pytest.raises(ZeroDivisionError), pykernels.use_backend("cpu"):
        1 / 0
    assert backends._default == "auto"


def _python(script: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True
    )


CALL = """
import torch, pykernels
q, k, v = torch.randn(3, 1, 4, 2, 8)
try:
    print("out", pykernels.flash_attention(q, k, v).shape == q.shape)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_environment_sets_the_default_backend():
    assert _python(CALL, PYKERNELS_BACKEND="reference").stdout == "out True\n"
    assert _python(CALL, PYKERNELS_BACKEND="cuda").stdout.startswith(
        "BackendUnavailable flash_attention: backend 'cuda'"
    )
    assert _python(CALL, PYKERNELS_BACKEND="gpu").stdout.startswith(
        "ValueError PYKERNELS_BACKEND must be one of"
    )


def test_environment_sets_the_instruction_set():
    script = "from pykernels import _library; print(_library.active_isa())"
    for isa in {"baseline", _library.machine_isas()[-1]}:
        done = _python(script, PYKERNELS_ISA=isa)
        assert done.stdout.strip() == isa and not done.stderr
    done = _python(script, PYKERNELS_ISA="sse9")
    assert done.stdout.strip() == _library.machine_isas()[-1] and "PYKERNELS_ISA=sse9" in done.stderr


def test_set_isa_rejects_what_is_not_there():
    with pytest.raises(ValueError, match=f"isa must be one of .*{_library.machine_isas()[-1]}.*'sse9'"):
        _library.set_isa("sse9")


def test_instruction_sets_really_differ():
    """Each is code of its own: sums in another order differ in the last bits somewhere."""
    q, k, v = torch.randn(3, 1, 300, 2, 64)
    results = {}
    for target in targets(OPS[0].op):
        if target.isa in ("baseline", _library.machine_isas()[-1]):
            with target.active():
                results[target.isa] = pykernels.flash_attention(q, k, v, backend="cpu")
    if len(results) == 2:
        a, b = results.values()
        assert not torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_without_the_native_library():
    script = """
import torch, pykernels
from pykernels import _library
q, k, v = torch.randn(3, 1, 4, 2, 8)
for backend in ("cpu", "auto"):
    try:
        pykernels.flash_attention(q, k, v, backend=backend)
    except pykernels.BackendUnavailable as error:
        print(error)
pykernels.release_scratch()
x = q.clone().requires_grad_()
pykernels.flash_attention(x, k, v, backend="reference").sum().backward()
print(x.grad.abs().max().item() > 0)
"""
    done = _python(script, PYKERNELS_LIBRARY="/nonexistent/libpykernels.so")
    assert done.returncode == 0, done.stderr
    cpu, auto, works = done.stdout.splitlines()
    for line in (cpu, auto):
        assert "/nonexistent/libpykernels.so does not exist" in line and "backend='reference' can" in line
    assert works == "True"


def test_a_file_that_is_no_library(tmp_path):
    (tmp_path / "libpykernels.so").write_text("not a library")
    done = _python(CALL, PYKERNELS_LIBRARY=str(tmp_path / "libpykernels.so"))
    assert (
        done.stdout.startswith("BackendUnavailable")
        and f"does not load under torch {torch.__version__}" in done.stdout
    ), done.stderr
