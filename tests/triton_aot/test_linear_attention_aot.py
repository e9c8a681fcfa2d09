"""Linear attention's Triton kernels compile for every target, fit its memory, do not spill, multiply as they should."""

from __future__ import annotations

import re

import pytest
import torch
from isolated import isolated

ahead_of_time = isolated(TRITON_INTERPRET="0")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


def _meta(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _launches(target: str, part: str, dtype: torch.dtype, key_dim: int, value_dim: int | None = None,
              decay: str | None = "head", bonus: bool = False, normalize: bool = False, packed: bool = False,
              reverse: bool = False, tokens: int = 4096):
    """What a call of `part` launches."""
    import aot

    from pykernels.ops.linear_attention import registration
    from pykernels.ops.linear_attention import triton as module

    batch, heads, value_dim = 1 if packed else 2, 16, value_dim or key_dim
    lead = (batch,) if part == "step" else (batch, tokens)
    q, v = _meta(*lead, 8, key_dim, dtype=dtype), _meta(*lead, heads, value_dim, dtype=dtype)
    g = {None: None, "head": (heads,), "token": (*lead, heads), "channel": (*lead, heads, key_dim)}[decay]
    g = None if g is None else _meta(*g)
    u = _meta(heads, key_dim) if bonus else None
    cu = _meta(9, dtype=torch.int32) if packed else None
    options = key_dim ** -0.5, normalize
    state = _meta(8 if packed else batch, heads, key_dim, value_dim + normalize)
    if part == "step":
        slots = _meta(batch, dtype=torch.int32)
        call = lambda: module.step(state, q, q, v, g, u, slots, *options)
    elif part == "fwd":
        call = lambda: module.fwd(q, q, v, g, u, state, cu, *options, reverse, True)
    else:
        checkpoints = _meta(registration.tiles(v, cu), *state.shape[1:])
        denominator = _meta(batch, tokens if normalize else 0, heads)
        call = lambda: module.bwd(v, state, q, q, v, g, u, cu, v, checkpoints, denominator, *options, reverse,
                                  g is not None)
    return aot.launches(module, target, call)


# Kernels without matrix products, and those that add fp32 to them: float16 states keep their range in TF32, and small
# sums with weights 0 and 1 are exact in fp32.
_WITHOUT = ("scan", "extra", "step")


def _products(launch, dtype: torch.dtype, target: str) -> set[str]:
    part = launch.name.removeprefix("linear_attention_").removesuffix("_kernel")
    if part in _WITHOUT or part in ("scores", "channel_gradients") and launch.arguments["C"] == 16:
        return set()  # in chunks of one block no pair of blocks is left to multiply
    found = {{BF16: "bf16", FP16: "f16", FP32: "f32"}[dtype]}
    if part == "walk" and dtype == FP16 and launch.arguments["RESULT"]:
        found.add("xf32" if target == "gfx942" else "tf32")
    if part == "channel_gradients" and target == "gfx942":
        found.add("f32")
    return found


def _check(target: str, part: str, dtype: torch.dtype, key_dim: int, *, precision: str | None = None,
           may_spill: bool = True, **options: object) -> None:
    import aot

    for launch in _launches(target, part, dtype, key_dim, **options):
        kernel = aot.compiled(launch, target)
        assert kernel.metadata.shared <= aot.SHARED_MEMORY[target], launch.name
        assert getattr(kernel.metadata, "tmem_size", None) in (None, *range(513)), f"{launch.name}: tensor memory"
        used = aot.resources(kernel)
        assert used["registers"] > 8, f"{launch.name}: nothing left of the kernel"
        if not may_spill:
            in_loops = aot.spills_in_loops(kernel) if target.startswith("sm_") else used["spilled"]
            assert in_loops == 0, f"{launch.name} spills: {used}"
        expected = _products(launch, dtype, target)
        if precision and expected:
            expected = {precision}
        assert aot.products(kernel) - (set() if expected else {"f32"}) == expected, launch.name


@ahead_of_time
@pytest.mark.parametrize("part", ["fwd", "bwd"])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("target", TARGETS)
def test_main_configurations(target, size, part):
    """Retention and decay per token, its gradient included."""
    _check(target, part, BF16, size, decay="token", may_spill=False)


# From here on one target per set of configurations, the one with the least memory.
@ahead_of_time
@pytest.mark.parametrize("part", ["fwd", "bwd", "step"])
@pytest.mark.parametrize("target", ["sm_86", "sm_90", "sm_100", "gfx942"])
def test_decay_per_channel(target, part):
    _check(target, part, BF16, 128, decay="channel")


@ahead_of_time
@pytest.mark.parametrize("part", ["fwd", "bwd"])
@pytest.mark.parametrize("target, decay, key_dim, value_dim", [
    *((target, "head", 256, 512) for target in ("sm_86", "sm_90", "sm_100", "gfx942")),
    ("sm_86", "channel", 256, 256), ("gfx942", "channel", 256, 512),
])
def test_large_heads(target, decay, key_dim, value_dim, part):
    _check(target, part, BF16, key_dim, value_dim=value_dim, decay=decay)


@ahead_of_time
@pytest.mark.parametrize("target, part, decay, key_dim, value_dim", [
    ("sm_86", "fwd", "token", 64, 64), ("sm_86", "bwd", "token", 128, 128), ("sm_86", "bwd", "channel", 64, 64),
    ("sm_86", "bwd", "head", 256, 512), ("gfx942", "bwd", "channel", 128, 128), ("gfx942", "bwd", "head", 256, 512),
])
def test_float32_is_float32(target, part, decay, key_dim, value_dim):
    _check(target, part, FP32, key_dim, value_dim=value_dim, decay=decay)


@ahead_of_time
@pytest.mark.parametrize("part", ["fwd", "bwd", "step"])
@pytest.mark.parametrize("target, decay", [("sm_90", "token"), ("sm_120", "channel"), ("gfx942", "channel")])
def test_options_and_head_sizes_that_are_no_power_of_two(target, decay, part):
    _check(target, part, FP16, 72, value_dim=40, decay=decay, bonus=True, normalize=True, packed=True, reverse=True)


@ahead_of_time
def test_float32_may_be_tf32_where_torch_allows_it():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        _check("sm_86", "fwd", FP32, 64, precision="tf32", tokens=512)
    finally:
        torch.set_float32_matmul_precision(before)


@ahead_of_time
def test_lengths_do_not_change_what_is_compiled():
    """Serving calls with ever different lengths must not compile ever new kernels."""
    import aot

    def compiled_by(tokens: int):
        found = [launch for part in ("fwd", "bwd")
                 for launch in _launches("sm_90", part, BF16, 64, decay="token", normalize=True, packed=True,
                                           tokens=tokens)]
        # Strides over batches are not used with one batch, but are arguments like the others.
        return [aot.specialization(launch, ignore=r"stride_\w+b") for launch in found]

    first = compiled_by(1000)
    assert len(first) == 10
    for tokens in (1024, 1001, 4096):
        assert compiled_by(tokens) == first


@ahead_of_time
def test_one_segment_takes_no_scan():
    names = [launch.name for launch in _launches("sm_90", "fwd", BF16, 64, tokens=512)]
    assert names == ["linear_attention_walk_kernel"]


def test_every_kernel_is_covered():
    """The cases above launch every kernel that the module defines."""
    from pathlib import Path

    source = Path(__file__).parents[2] / "pykernels" / "ops" / "linear_attention" / "triton.py"
    defined = set(re.findall(r"def (linear_attention_\w+_kernel)", source.read_text()))
    parts = "walk", "scan", "scores", "pairs", "channel_gradients", "extra", "step"
    assert defined == {f"linear_attention_{part}_kernel" for part in parts}
