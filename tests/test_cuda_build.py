"""What nvcc made of the CUDA kernels: architectures, registers and spills of each kernel in the library.

Needs no GPU: cuobjdump reads the library. The report is printed by `pytest tests/test_cuda_build.py -s`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pykernels import _library

if _library.error() is not None or _library.cuda_build() is None:
    pytest.skip("this build of pykernels has no CUDA kernels (nvcc was absent, or PYKERNELS_CUDA=0)",
                allow_module_level=True)

# Kernels that keep something in local memory, for a named architecture, and why that may be.
LOCAL_MEMORY = {
    ("flash_attention_fwd_sm80_kernel", "128", "sm_90a"):
        "three addresses of the next stage's copies: stored before the loop, loaded once per tile of keys; on sm_90a "
        "this kernel serves only tensors that TMA can't read",
    ("flash_attention_bwd_sm80_kernel", "128", "sm_100"):
        "by query: two values stored before the loop over tiles of keys, one of them loaded once per tile for the next "
        "stage's copies",
    **{("linear_attention_walk_sm80_kernel", "256", arch):
           "the state takes 128 registers: addresses, stored before the loop over chunks or once in it and loaded once "
           "per chunk, so 60 bytes at most for some 400 matrix products"
       for arch in ("sm_80", "sm_90a", "sm_100")},
    **{("linear_attention_walk_sm80_kernel", head, arch):
           "an address or two, stored before the loop over chunks or once in it and loaded once per chunk, for some 70 "
           "to 150 matrix products"
       for head, arch in (("64", "sm_80"), ("128", "sm_80"), ("128", "sm_90a"), ("128", "sm_100"))},
    **{("linear_attention_wide_walk_sm80_kernel", head, arch):
           "addresses and parameters, loaded once or twice per chunk (196 bytes at most), for some 200 to 700 matrix "
           "products, all of the chunk's code being straight"
       for head, arch in (("128", "sm_80"), ("128", "sm_90a"), ("256", "sm_80"), ("256", "sm_90a"), ("256", "sm_100"))},
}


def _tool() -> str | None:
    """cuobjdump of the CUDA toolkit, or the one that Triton brings."""
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    if (triton := importlib.util.find_spec("triton")) is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which("cuobjdump", path=os.pathsep.join([os.environ["PATH"], *map(str, places)]))


def _cuobjdump(*arguments: str) -> str:
    if (tool := _tool()) is None:
        pytest.skip("no cuobjdump (it comes with the CUDA toolkit and with Triton)")
    # Triton's copy needs nvdisasm beside it.
    environment = {**os.environ, "PATH": f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run([tool, *arguments, str(_library.path())], check=True, capture_output=True, text=True,
                          env=environment).stdout


@dataclasses.dataclass(frozen=True)
class Kernel:
    arch: str
    name: str  # mangled
    registers: int
    local_bytes: int  # spills and arrays that did not fit the registers

    @property
    def function(self) -> str:
        # Mangled names hold identifiers behind their lengths; hashes of files hold numbers too, which reach further.
        found = [self.name[number.end():][:int(number.group()[-digits:])] for number in re.finditer(r"\d+", self.name)
                 for digits in range(1, len(number.group()) + 1)]
        if kernels := [identifier for identifier in found if identifier.endswith("_kernel")]:
            return min(kernels, key=len)
        raise ValueError(self.name)

    @property
    def head(self) -> str | None:
        found = re.search(r"(?:Config|Tiles)\w*?I(?:NS_?\d*\w*?)?Li(\d+)E", self.name)
        return found.group(1) if found else None

    def __str__(self) -> str:
        head = self.head or "".join(re.findall(r"Li(\d+)E", self.name)[:1])
        arguments = [head, "bf16" if "BFloat16" in self.name else "fp16" if "Float16" in self.name else ""]
        flags = re.findall(r"Lb([01])E", self.name)
        return f"{self.function}<{', '.join(filter(None, [*arguments, *flags]))}>"


@functools.cache
def _kernels() -> list[Kernel]:
    found, arch = [], ""
    for line in _cuobjdump("--dump-resource-usage").splitlines():
        if match := re.match(r"arch = (\w+)", line.strip()):
            arch = match.group(1)
        elif match := re.match(r"Function (\S+):", line.strip()):
            name = match.group(1)
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, _, local = map(int, match.groups())
            found.append(Kernel(arch, name, registers, max(stack, local)))
    return found


def test_report_lists_every_kernel_for_every_architecture():
    built = re.findall(r"sm_\w+", _library.cuda_build())
    by_arch = collections.defaultdict(list)
    for kernel in _kernels():
        by_arch[kernel.arch].append(kernel)
    assert set(built) <= set(by_arch)
    names = {arch: {kernel.name for kernel in by_arch[arch]} for arch in built}
    shared_by_all = set.intersection(*names.values())
    assert {k.function for k in _kernels() if k.name in shared_by_all} >= {
        "probe_kernel", "flash_attention_fwd_sm80_kernel", "flash_attention_bwd_sm80_kernel",
        "flash_attention_bwd_delta_sm80_kernel", "causal_conv1d_fwd_kernel", "causal_conv1d_bwd_kernel",
        "causal_conv1d_step_kernel", "selective_scan_fwd_kernel", "selective_scan_bwd_kernel",
        "selective_scan_step_kernel", "linear_attention_walk_sm80_kernel", "linear_attention_scan_sm80_kernel",
        "linear_attention_ddecay_sm80_kernel", "linear_attention_extra_sm80_kernel",
        "linear_attention_step_sm80_kernel", "linear_attention_wide_walk_sm80_kernel",
        "linear_attention_wide_scores_sm80_kernel", "linear_attention_wide_gradients_sm80_kernel",
        "linear_attention_dbonus_sm80_kernel", "fft_conv_transform_kernel", "fft_conv_backward_kernel",
        "fft_conv_split_kernel", "fft_conv_merge_kernel", "fft_conv_direct_kernel", "fft_conv_direct_taps_kernel",
        "fft_conv_skip_kernel"}
    for walk in ("linear_attention_walk_sm80_kernel", "linear_attention_wide_walk_sm80_kernel"):
        assert {k.head for k in _kernels() if k.function == walk} == {"64", "128", "256"}
    heads = {k.head for k in _kernels() if k.function == "flash_attention_fwd_sm80_kernel"}
    assert heads == {"32", "64", "96", "128", "192", "256"}
    for kernel in sorted(_kernels(), key=lambda k: (k.arch, str(k))):
        print(f"{kernel.arch:7} {kernel!s:60} {kernel.registers:4} registers, {kernel.local_bytes:4} bytes local")


def _code(arch: str, *words: str) -> dict[str, list[str]]:
    """{kernel: instructions} of the kernels for an architecture whose names contain all the words."""
    if arch not in _library.cuda_build():
        pytest.skip(f"not built for {arch}")
    names = {k.name for k in _kernels() if k.arch == arch and all(word in k.name for word in words)}
    listing = _cuobjdump("--dump-sass", "--gpu-architecture", arch, "--function", ",".join(sorted(names)))
    parts = (part.partition("\n") for part in re.split(r"\n\s*Function : ", listing)[1:])
    instruction = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([^;]*?)\s*;"
    return {name.strip(): re.findall(instruction, code) for name, _, code in parts}


@pytest.mark.parametrize("kernel, instructions", (
    (("causal_conv1d_fwd_kernel", "BFloat16ELi4ELb1E"), ("LDG.E.128", "STG.E.128")),  # lanes along tokens
    (("causal_conv1d_bwd_kernel", "BFloat16ELi4ELb1E"), ("LDG.E.128", "STG.E.128")),
    (("causal_conv1d_fwd_kernel", "fLi4ELb0E"), ("LDG.E.64", "STG.E.64")),  # along channels, in pairs
    (("selective_scan_fwd_kernel", "BFloat16ELb0E"), ("LDG.E.128", "STG.E.128", "MUFU.EX2", "SHFL.UP")),
    (("selective_scan_bwd_kernel", "BFloat16"), ("LDG.E.128", "STG.E.128", "STS.128", "MUFU.EX2", "SHFL.BFLY")),
), ids=lambda x: x[0])
def test_accesses_are_as_wide_as_they_were_meant(kernel, instructions):
    for arch in re.findall(r"sm_\w+", _library.cuda_build()):
        (code,) = _code(arch, *kernel).values()
        for instruction in instructions:
            assert any(line.startswith(instruction) for line in code), (arch, instruction)


@functools.cache
def _sm90a_kernels() -> dict[str, list[str]]:
    """{kernel: instructions} of the kernels that only sm_90a has."""
    return _code("sm_90a", "_sm90_kernel")


def test_sm90a_kernels_use_what_they_are_for():
    """The warp group's matrix instruction, TMA and the reallocation of registers, in every instantiation."""
    kernels = _sm90a_kernels()
    heads = {k.head for k in _kernels() if k.function == "flash_attention_fwd_sm90_kernel"}
    assert heads == {"64", "96", "128", "192", "256"}
    assert {k.head for k in _kernels() if k.function == "flash_attention_bwd_sm90_kernel"} == {"64", "128"}
    assert {k.head for k in _kernels() if k.function == "flash_attention_bwd_wide_sm90_kernel"} == {"192", "256"}
    main = {name: code for name, code in kernels.items() if re.search("fwd_sm90|bwd_sm90|bwd_wide_sm90", name)}
    assert len(main) == 2 * (5 + 4)
    for name, code in main.items():
        for instruction in ("HGMMA", "UTMALDG", "USETMAXREG", "SYNCS"):
            assert any(line.startswith(instruction) for line in code), (name, instruction)
        assert not any(line.startswith("HMMA") for line in code), name


def test_forward_softmax_overlaps_the_matrix_products():
    """The exponentials of a tile stand before the wait for P V (the compiler likes to move the wait to the front)."""
    for name, code in _sm90a_kernels().items():
        if "fwd" not in name:
            continue
        # The loop waits for S (one group may be pending), then for P V (none).
        waits = [(i, line[-3:]) for i, line in enumerate(code) if line.startswith("WARPGROUP.DEPBAR")]
        first = next(i for i, pending in waits if pending == "0x1")
        last = next(i for i, pending in waits if pending == "0x0" and i > first)
        exponentials = sum(line.startswith("MUFU.EX2") for line in code[first:last])
        assert exponentials >= 40, (name, exponentials)


def test_matrix_products_are_not_serialised():
    """Where ptxas can't keep the registers of products under way apart, it makes each a group and waits for it; else
    there are as many groups as the kernel commits."""
    groups = {"flash_attention_fwd_sm90_kernel": 4, "flash_attention_bwd_sm90_kernel": 5,
              "flash_attention_bwd_wide_sm90_kernel": 6}
    for name, code in _sm90a_kernels().items():
        found = sum(line.startswith("HGMMA") and line.endswith("gsb0") for line in code)
        assert found == next((count for kernel, count in groups.items() if kernel in name), 0), name


def test_info_names_the_kernels_of_each_capability():
    beyond = "bias, dropout and head sizes above 256"
    assert _library.cuda_kernels("flash_attention", (8, 0)).startswith(f"sm_80 (mma.sync); {beyond}")
    assert ("sm_90a" in _library.cuda_kernels("flash_attention", (9, 0))) == ("sm_90a" in _library.cuda_build())
    assert "sm_90a" not in _library.cuda_kernels("flash_attention", (10, 0))
    assert "sm_80 (mma.sync)" in _library.cuda_kernels("linear_attention", (9, 0))
    assert _library.cuda_kernels("retention", (9, 0)) is None


def test_no_spills_but_those_with_a_reason():
    spilled = {(k.function, k.head, k.arch): k.local_bytes for k in _kernels() if k.local_bytes}
    assert set(spilled) <= set(LOCAL_MEMORY), spilled
    assert all(size <= 64 for size in spilled.values()), spilled


def test_ptx_for_newer_gpus_is_there():
    listing = _cuobjdump("--list-ptx")
    assert "sm_80" in listing or "compute_80" in listing, listing
