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
              packed: bool = False, alibi: bool = False, sinks: bool = False, bias: tuple[int, ...] | None = None,
              bias_dtype: torch.dtype | None = None, dropout_p: float = 0.0, page: int = 0, value: int | None = None):
    """What a causal call of `part` launches; `page`: the size of a paged cache's pages, `value`: another head size."""
    import aot

    from pykernels.ops.flash_attention import triton as module

    q, k, v = (_meta(2, 4096, heads, size, dtype=dtype) for heads, size in ((16, head), (4, head), (4, value or head)))
    cu = _meta(9, dtype=torch.int32) if packed else None
    if packed:
        q, k, v = (x[:1] for x in (q, k, v))
    options = head ** -0.5, softcap, window, 0
    slopes, sunk = (_meta(16, dtype=FP32) if on else None for on in (alibi, sinks))
    extras = (slopes, None if bias is None else _meta(*bias, dtype=bias_dtype or dtype), sunk,
              _meta(1, dtype=torch.int64) if dropout_p else None, dropout_p)
    if part == "fwd":
        call = lambda: module.fwd(q, k, v, cu, cu, *options, *extras)
    elif part == "bwd":
        lse = _meta(q.shape[0], 16, 4096, dtype=FP32)
        call = lambda: module.bwd(q, lse, q, k, v, q, lse, cu, cu, *options, False, *extras,
                                  bias is not None and bias_dtype != torch.bool)
    else:
        lengths, new = _meta(2, dtype=torch.int32), (k[:, :1], v[:, :1])
        if page:
            k, v = (x.reshape(-1, page, *x.shape[2:]) for x in (k, v))
        table = _meta(2, 4096 // page, dtype=torch.int32) if page else None
        call = lambda: (module.append(k, v, *new, lengths, table),
                        module.decode(q[:, :1], k, v, lengths, 1, *options, table, slopes, sunk))
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
        if "append" not in launch.name and "combine" not in launch.name:
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


# Every option, alone where it is common and all together; one target per set of configurations in the latter.
@ahead_of_time
@pytest.mark.parametrize("part", ["fwd", "bwd"])
@pytest.mark.parametrize("options", [
    dict(alibi=True), dict(bias=(1, 16, 4096, 4096)), dict(bias=(2, 1, 1, 4096), bias_dtype=torch.bool),
    dict(sinks=True), dict(dropout_p=0.1)], ids=lambda options: "-".join(options))
@pytest.mark.parametrize("target", ["sm_90"])
def test_options_one_by_one(target, options, part):
    _check(target, part, BF16, 128, **options)


@ahead_of_time
@pytest.mark.parametrize("part, head, dtype", [("fwd", 64, BF16), ("bwd", 64, BF16), ("bwd", 256, FP16),
                                               ("fwd", 128, FP32)])
@pytest.mark.parametrize("target", ["sm_86", "sm_100", "gfx942"])
def test_all_options_together(target, part, head, dtype):
    _check(target, part, dtype, head, softcap=20.0, alibi=True, sinks=True, bias=(2, 16, 4096, 4096), bias_dtype=FP32,
           dropout_p=0.1)


@ahead_of_time
@pytest.mark.parametrize("head, value, page", [(128, None, 16), (128, None, 256), (576, 512, 0), (576, 512, 64)])
@pytest.mark.parametrize("target", ["sm_86", "sm_90", "sm_100", "gfx942"])
def test_paged_and_latent_caches(target, head, value, page):
    _check(target, "decode", BF16, head, value=value, page=page, alibi=True, sinks=True)


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
    parts = "fwd", "fwd_combine", "fwd_append", "bwd_delta", "bwd_dkv", "bwd_dq", "bwd_dbias"
    assert defined == {f"flash_attention_{part}_kernel" for part in parts}
