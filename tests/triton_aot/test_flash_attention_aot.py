"""Flash attention's Triton kernels compile for every target, fit its memory, do not spill, multiply as they should."""

from __future__ import annotations

import re

import pytest
import torch
from isolated import isolated

ahead_of_time = isolated(TRITON_INTERPRET="0")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
# Spills that remain in loops, in instructions per iteration. At (64, 128) rows the boundary loop of dk and dv is a few
# registers short; fewer query rows would cost wgmma a third of its speed, by the shared memory it reads per product.
_SPILLS_IN_LOOPS = {("sm_90", "flash_attention_bwd_dkv_kernel", 128): 9}


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _launches(target: str, part: str, dtype: torch.dtype, head: int, window: int = -1, softcap: float = 0.0,
              packed: bool = False):
    """What a causal call of `part` launches."""
    import aot

    from pykernels.ops.flash_attention import triton as module

    q, k, v = _meta(2, 4096, 16, head, dtype=dtype), *(_meta(2, 4096, 4, head, dtype=dtype) for _ in "kv")
    cu = _meta(9, dtype=torch.int32) if packed else None
    if packed:
        q, k, v = (x[:1] for x in (q, k, v))
    options = head ** -0.5, softcap, window, 0
    if part == "fwd":
        call = lambda: module.fwd(q, k, v, cu, cu, *options)
    elif part == "bwd":
        lse = _meta(q.shape[0], 16, 4096, dtype=FP32)
        call = lambda: module.bwd(q, lse, q, k, v, q, lse, cu, cu, *options, False)
    else:
        lengths = _meta(2, dtype=torch.int32)
        call = lambda: (module.append(k, v, k[:, :1], v[:, :1], lengths),
                        module.decode(q[:, :1], k, v, lengths, 1, *options))
    return aot.launches(module, target, call)


def _check(target: str, part: str, dtype: torch.dtype, head: int, *, precision: str | None = None,
           may_spill: bool = True, **options: object) -> None:
    import aot

    for launch in _launches(target, part, dtype, head, **options):
        kernel = aot.compiled(launch, target)
        assert kernel.metadata.shared <= aot.SHARED_MEMORY[target], launch.name
        assert getattr(kernel.metadata, "tmem_size", None) in (None, *range(513)), f"{launch.name}: tensor memory"
        used = aot.resources(kernel)
        assert used["registers"] > 8, f"{launch.name}: nothing left of the kernel"
        if not may_spill:
            in_loops = aot.spills_in_loops(kernel) if target.startswith("sm_") else used["spilled"]
            assert in_loops <= _SPILLS_IN_LOOPS.get((target, launch.name, head), 0), f"{launch.name} spills: {used}"
        if "append" not in launch.name:
            expected = precision or {BF16: "bf16", FP16: "f16", FP32: "f32"}[dtype]
            assert aot.products(kernel) == {expected}, launch.name


@ahead_of_time
@pytest.mark.parametrize("part", ["fwd", "bwd", "decode"])
@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize("target", TARGETS)
def test_main_configurations(target, head, part):
    _check(target, part, BF16, head, may_spill=False)


# One target per set of configurations, the one with the least memory.
@ahead_of_time
@pytest.mark.parametrize("part, head", [("fwd", 256), ("bwd", 256), ("fwd", 512), ("bwd", 512), ("decode", 512)])
@pytest.mark.parametrize("target", ["sm_86", "sm_90", "sm_100", "gfx942"])
def test_large_heads(target, part, head):
    _check(target, part, BF16, head)


@ahead_of_time
@pytest.mark.parametrize("part, head", [("fwd", 64), ("bwd", 64), ("fwd", 128), ("bwd", 128), ("fwd", 512),
                                        ("bwd", 512), ("decode", 512)])
@pytest.mark.parametrize("target", ["sm_86", "gfx942"])
def test_float32_is_float32(target, part, head):
    _check(target, part, FP32, head)


@ahead_of_time
@pytest.mark.parametrize("part", ["fwd", "bwd"])
@pytest.mark.parametrize("target", ["sm_90", "sm_120", "gfx942"])
def test_options_and_head_sizes_that_are_no_power_of_two(target, part):
    _check(target, part, FP16, 72, window=500, softcap=20.0, packed=True)


@ahead_of_time
def test_float32_may_be_tf32_where_torch_allows_it():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        _check("sm_86", "fwd", FP32, 64, precision="tf32")
    finally:
        torch.set_float32_matmul_precision(before)


@ahead_of_time
def test_lengths_do_not_change_what_is_compiled():
    """Serving calls with ever different lengths must not compile ever new kernels."""
    import aot

    from pykernels.ops.flash_attention import triton as module

    def compiled_by(tq: int, tk: int, sequences: int):
        q, k = _meta(1, tq, 8, 64, dtype=BF16), _meta(1, tk, 8, 64, dtype=BF16)
        cu, lse = _meta(sequences + 1, dtype=torch.int32), _meta(1, 8, tq, dtype=FP32)
        options = 0.125, 0.0, 100, 0
        found = aot.launches(module, "sm_90", lambda: (module.fwd(q, k, k, cu, cu, *options),
                                                       module.bwd(q, lse, q, k, k, q, lse, cu, cu, *options, False),
                                                       module.decode(q, k, k, cu[:1], 1, *options)))
        # Strides over batches are not used with one batch, but are arguments like the others.
        return [aot.specialization(launch, ignore=r"stride_\w+b") for launch in found]

    first = compiled_by(1000, 2000, 3)
    assert len(first) == 5
    for lengths in ((1024, 2048, 16), (1001, 1777, 1), (4096, 333, 2)):
        assert compiled_by(*lengths) == first


def test_every_kernel_is_covered():
    """The cases above launch every kernel that the module defines."""
    from pathlib import Path

    source = Path(__file__).parents[2] / "pykernels" / "ops" / "flash_attention" / "triton.py"
    defined = set(re.findall(r"def (flash_attention_\w+_kernel)", source.read_text()))
    parts = "fwd", "fwd_append", "bwd_delta", "bwd_dkv", "bwd_dq"
    assert defined == {f"flash_attention_{part}_kernel" for part in parts}
