"""Compiling an op's Triton kernels for GPUs that are not there.

`launches` calls an op's own host code on meta tensors and records what it would launch on a target; `compiled` compiles
such a launch as Triton would at its first call: the same signature, divisibility hints and constants.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

# Shared memory that one block may use, in bytes (CUDA programming guide, compute capabilities; CDNA 3 ISA guide).
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10,
                 "sm_120": 99 << 10, "gfx942": 64 << 10}
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}


@dataclasses.dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__


def launches(module: Any, target: str, call: Callable[[], object]) -> list[Launch]:
    """What `call`, on meta tensors, launches through `module`'s kernels on `target`."""
    recorded: list[Launch] = []
    saved = module.launch, module.target
    module.launch = lambda kernel, grid, device, **arguments: recorded.append(Launch(kernel, grid, arguments))
    module.target = lambda device: target
    try:
        call()
    finally:
        module.launch, module.target = saved
    return recorded


def specialization(launch: Launch, ignore: str = "$^") -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
    """-> (types, constants, hints): what a compiled kernel depends on. `ignore`: parameters to leave out."""
    types, constants, hints = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        specialized = isinstance(value, int) and not parameter.do_not_specialize
        if re.fullmatch(ignore, parameter.name):
            continue
        if parameter.is_constexpr or value is None or specialized and value == 1:
            types[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[parameter.name] = "*" + _TYPES[value.dtype]
            hints[index,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[parameter.name] = "fp32"
        else:
            types[parameter.name] = "i32" if -2**31 <= value < 2**31 else "i64"
            if specialized and value % 16 == 0:
                hints[index,] = [["tt.divisibility", 16]]
    return types, constants, hints


def compiled(launch: Launch, target: str) -> CompiledKernel:
    options = {name: launch.arguments[name] for name in ("num_warps", "num_stages")} | {"enable_fp_fusion": True}
    types, constants, hints = specialization(launch)
    unknown = launch.arguments.keys() - types.keys() - options.keys()
    assert not unknown, f"{launch.name} has no parameters {unknown}"
    gpu = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    return triton.compile(ASTSource(launch.kernel, types, constants, hints), target=gpu, options=options)


def _cuobjdump(kernel: CompiledKernel, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, what, file.name], check=True, capture_output=True, text=True).stdout


def resources(kernel: CompiledKernel) -> dict[str, int]:
    """Registers and bytes of spilled registers per thread."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        return {"registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),
                "spilled": 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])}
    text = _cuobjdump(kernel, "--dump-resource-usage")
    # These kernels have no local arrays of their own, so what is on the stack was spilled.
    return {"registers": int(re.search(r"REG:(\d+)", text)[1]), "spilled": int(re.search(r"STACK:(\d+)", text)[1])}


def check_fit(found: list[Launch], target: str) -> None:
    """Every launch compiles, fits the target's shared memory, and spills no register."""
    for launch in found:
        kernel = compiled(launch, target)
        assert kernel.metadata.shared <= SHARED_MEMORY[target], launch.name
        used = resources(kernel)
        assert used["registers"] > 4 and used["spilled"] == 0, f"{launch.name}: {used}"


def spills_in_loops(kernel: CompiledKernel) -> int:
    """The most loads and stores of spilled registers in any loop with matrix instructions (NVIDIA)."""
    code = [(int(address, 16), text) for address, text in
            re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", _cuobjdump(kernel, "--dump-sass"))]
    worst = 0
    for end, text in code:
        branch = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if branch and (start := int(branch[1], 16)) < end:
            body = [text for address, text in code if start <= address <= end]
            if any(re.search(r"\w+MMA\b", text) for text in body):
                worst = max(worst, sum(bool(re.search(r"\b(LDL|STL)\b", text)) for text in body))
    return worst


def products(kernel: CompiledKernel) -> set[str]:
    """The types that the kernel's dots multiply, all accumulated in fp32; "f32" also for plain multiply-adds."""
    if "amdgcn" in kernel.asm:
        # v_mfma_f32_32x32x8_bf16_1k, v_mfma_f32_32x32x2_f32; older spelling v_mfma_f32_32x32x8bf16_1k
        found = re.findall(r"v_mfma_([a-z]+\d+)_\d+x\d+x\d+_?(bf16|f16|f32|xf32)", kernel.asm["amdgcn"])
        assert all(accumulator == "f32" for accumulator, _ in found), found
        return {operands for _, operands in found}
    # mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32, wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16
    found = re.findall(r"(?:mma\.sync|wgmma\.mma_async)\.\S*?\.(f32|f16|s32)\.(\w+)\.(\w+)", kernel.asm["ptx"])
    assert all(accumulator == "f32" and a == b for accumulator, a, b in found), found
    kinds = {a for _, a, _ in found}
    if "tcgen05.mma" in kernel.asm["ptx"]:  # its types are in a descriptor; the compiler's own IR names them
        for line in re.findall(r"ttng\.tc_gen5_mma .*", kernel.asm["ttgir"]):
            a, b, accumulator = re.findall(r"!ttg\.memdesc<[\dx]+x(\w+),", line)[:3]
            assert accumulator == "f32" and a == b, line
            kinds.add(a)
    if not kinds and "fma.rn.f32" in kernel.asm["ptx"]:
        kinds.add("f32")
    return kinds
