"""The shared library: what it needs, what it exports, and that it holds no instruction its loader may lack."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
import torch

from pykernels import _library, flash_attention

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files with binutils")


def _binutil(tool: str, *arguments: str) -> str:
    if shutil.which(tool) is None:
        pytest.fail(f"{tool} is needed (binutils)")
    return subprocess.run([tool, *arguments, str(_library.path())], check=True, capture_output=True, text=True).stdout


def test_takes_only_the_stable_c_symbols_of_torch():
    undefined = {line.split()[-1].split("@")[0] for line in _binutil("nm", "-D", "--undefined-only").splitlines()}
    of_torch = {s for s in undefined if re.search(r"torch|c10|at::|_ZN2at|_ZNK2at", s)}
    assert {"aoti_torch_library_impl", "torch_library_impl"} & of_torch, "the library registers nothing"
    assert all(re.match(r"(aoti_torch|torch)_", s) for s in of_torch), sorted(of_torch)
    assert not {s for s in undefined if s.startswith(("Py", "_Py"))}, "Python symbols tie the library to one Python"
    # Whatever else is undefined comes from the C and C++ runtimes, by versioned names.
    undefined = _binutil("nm", "-D", "--undefined-only").splitlines()
    unversioned = {line.split()[-1] for line in undefined if "@" not in line}
    assert unversioned - of_torch <= {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}


def test_needs_libtorch_so_that_the_stream_accessor_resolves_and_no_cuda():
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", _binutil("readelf", "-d"))
    assert "libtorch.so" in needed  # brings libtorch_cuda.so into scope where there is one
    assert not [name for name in needed if "cuda" in name or "nvrtc" in name], needed
    dynamic = _binutil("readelf", "-d")
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic), "a path of the build machine would travel along"


def test_symbols_that_a_torch_may_lack_are_weak():
    symbols = _binutil("nm", "-D", "--undefined-only")
    assert re.search(r"^\s+w torch_exception_get_what_without_backtrace$", symbols, re.MULTILINE)  # from 2.13 on
    if _library.cuda_build() is None:
        assert "aoti_torch_get_current_cuda_stream" not in symbols
    else:
        assert re.search(r"^\s+w aoti_torch_get_current_cuda_stream$", symbols, re.MULTILINE)


def test_a_failed_allocation_says_what_was_asked_for_and_what_torch_said():
    """Which it tells a library from 2.13 on."""
    q, kv = torch.zeros(1, 1, 1, 64).expand(1, 2**40, 128, 64), torch.zeros(1, 1, 128, 64)
    with pytest.raises(RuntimeError, match=r"could not allocate .* sizes \[1, 1099511627776, 128, 64\]") as raised:
        flash_attention(q, kv, kv, backend="cpu")
    assert torch.__version__ < (2, 13) or f"{2**55} bytes" in str(raised.value)


def test_exports_only_its_plain_c_functions():
    exported = {line.split()[-1] for line in _binutil("nm", "-D", "--defined-only").splitlines()}
    ops = ("flash_attention", "linear_attention", "fft_conv") if _library.cuda_build() is not None else ()
    of_cuda = {f"pykernels_{op}_kernels" for op in ops}
    assert exported == {"pykernels_active_isa", "pykernels_built_isas", "pykernels_machine_has_isa",
                        "pykernels_set_isa", "pykernels_release_scratch", "pykernels_cuda_build",
                        "pykernels_allocate_by_dispatch"} | of_cuda


def _kernel_objects() -> list[tuple[str, str]]:
    """(ISA, `nm` output) of each kernel object of the newest build folder, if this checkout built the library."""
    root = _library.path().resolve().parents[1]
    builds = sorted((root / "build").glob("*/libpykernels.so"), key=lambda file: file.stat().st_mtime)
    if not builds:
        pytest.skip("the library was not built from a checkout: its object files are not at hand")
    objects = builds[-1].parent.glob("CMakeFiles/kernels_cpu_*.dir/**/*.o")
    return [(re.search(r"kernels_cpu_(\w+)\.dir", str(file)).group(1),
             subprocess.run(["nm", "-C", str(file)], check=True, capture_output=True, text=True).stdout)
            for file in objects]


def test_kernel_code_sits_in_its_isa_namespace():
    """The linker keeps one copy of each weak symbol: from an AVX-512 object it would crash an older machine."""
    objects = _kernel_objects()
    assert {isa for isa, _ in objects} == set(_library.built_isas())
    for isa, symbols in objects:
        for line in symbols.splitlines():
            kind, name = re.match(r"[0-9a-f ]{16} (\w) (.*)", line).groups()
            if kind in "WVuTDBG":  # weak, unique or global: visible to the linker across objects
                assert f"pykernels::cpu::{isa}::" in name, f"{isa}: {line}"


def test_kernel_objects_run_nothing_at_load():
    """A constructor compiled for AVX-512 would run, and fault, before any ISA was chosen."""
    for isa, symbols in _kernel_objects():
        assert "_GLOBAL__sub_I" not in symbols, f"{isa} has static initialisers"


def test_isas_are_ordered_and_the_best_one_is_active():
    built, usable = _library.built_isas(), _library.machine_isas()
    assert built[0] == "baseline" and usable[0] == "baseline"
    assert [isa for isa in built if isa in usable] == usable
    assert _library.active_isa() in usable


def test_set_isa_rejects_what_the_machine_lacks():
    before = _library.active_isa()
    with pytest.raises(ValueError, match="isa must be one of .*'sse9'"):
        _library.set_isa("sse9")
    assert _library.active_isa() == before
