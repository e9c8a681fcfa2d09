"""The wheel: one for every Python, installed into a fresh environment outside the checkout, running an op."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

PROGRAM = """
import pathlib, sys, torch, pykernels
assert pathlib.Path(pykernels.__file__).is_relative_to(sys.prefix), pykernels.__file__
torch.manual_seed(0)
q, k, v = (torch.randn(2, 37, 4, 24, requires_grad=True) for _ in range(3))
out, lse = pykernels.flash_attention(q, k, v, causal=True, return_lse=True, backend="cpu")
expected, expected_lse = pykernels.flash_attention(q, k, v, causal=True, return_lse=True, backend="reference")
torch.testing.assert_close(out, expected)
torch.testing.assert_close(lse, expected_lse)
loss = lambda out, lse: (out * out).sum() + lse.sum()
for got, want in zip(torch.autograd.grad(loss(out, lse), (q, k, v)),
                     torch.autograd.grad(loss(expected, expected_lse), (q, k, v))):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
print("ran", pykernels.__version__, "under torch", torch.__version__)
"""


def outside() -> dict[str, str]:
    """The variables of a process that is to find no package but its environment's."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYKERNELS"))}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
                    str(folder), str(ROOT)], check=True)
    (file,) = folder.glob("*.whl")
    return file


def test_tag_fits_every_python(wheel):
    _, _, python, abi, platform = wheel.stem.split("-")
    assert (python, abi) == ("py3", "none")
    assert platform not in ("any", "")


def test_holds_the_package_and_nothing_of_the_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "pykernels/libpykernels.so" in names or "pykernels/libpykernels.dylib" in names
    packages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pykernels").rglob("*.py")}
    assert packages <= set(names)
    assert "pykernels/ops/flash_attention/README.md" in names
    assert {name.split("/")[0] for name in names} == {"pykernels",
                                                      next(n for n in names if n.endswith("WHEEL")).split("/")[0]}


def test_runs_in_a_fresh_environment(wheel, tmp_path):
    """Everything but pykernels comes from this test's own environment by a .pth file, so nothing is downloaded."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "torch_from_the_test_environment.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site),
                    str(wheel)],
                   check=True)
    python = environment / "bin" / "python"
    variables = outside()
    result = subprocess.run([python, "-c", PROGRAM], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "ran" in result.stdout
    info = subprocess.run([python, "-m", "pykernels", "info"], cwd=tmp_path, env=variables, capture_output=True,
                          text=True)
    assert info.returncode == 0 and str(environment) in info.stdout, info.stdout + info.stderr


@pytest.mark.parametrize("value, expected", [("2", "PYKERNELS_CUDA must be auto, 0 or 1")])
def test_build_rejects_bad_settings(value, expected, tmp_path):
    result = subprocess.run([sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)], cwd=ROOT,
                            env={**os.environ, "PYKERNELS_CUDA": value}, capture_output=True, text=True)
    assert result.returncode != 0 and expected in result.stderr
