"""The long convolution's Triton kernels compile for every target, fit its memory and do not spill."""

from __future__ import annotations

import re

import pytest
import torch
from isolated import isolated

ahead_of_time = isolated(TRITON_INTERPRET="0")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")

# Bytes per thread, 40 registers, where gradients of kernels are added up: sums and a spectrum are kept while another
# row is transformed. Smaller tiles would take the matrices' registers just as well, and do less with them.
CORRELATE = 160


def _meta(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _launches(target: str, dtype: torch.dtype, length: int, *, taps: int | None = None, rev: int = 0,
              gates: bool = True, circular: bool = False, channels: int = 64, batch: int = 2):
    """What the forward and the backward pass launch."""
    import aot

    from pykernels.ops.fft_conv import triton as module

    u, k = _meta(batch, channels, length, dtype=dtype), _meta(channels, length if taps is None else taps)
    gate = u if gates else None
    inputs = u, k, _meta(channels, rev) if rev else None, _meta(channels) if gates else None, gate, gate, 1, circular
    return aot.launches(module, target, lambda: (module.fwd(*inputs), module.bwd(u, *inputs, True, True)))


def _check(target: str, *arguments, **options: object) -> None:
    import aot

    for launch in _launches(target, *arguments, **options):
        kernel = aot.compiled(launch, target)
        assert kernel.metadata.shared <= aot.SHARED_MEMORY[target], launch.name
        used = aot.resources(kernel)
        allowed = CORRELATE if "correlate" in launch.name and target.startswith("sm_") else 0
        assert used["registers"] > 4 and used["spilled"] <= allowed, f"{launch.name}: {used}"


@ahead_of_time
@pytest.mark.parametrize("target", TARGETS)
def test_main_configurations(target):
    _check(target, BF16, 4096)


@ahead_of_time
@pytest.mark.parametrize("target", TARGETS)
def test_few_taps(target):
    _check(target, BF16, 8192, taps=128)


@ahead_of_time
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_rows_that_pass_through_memory(target):
    _check(target, BF16, 65536)


@ahead_of_time
@pytest.mark.parametrize("target", ["sm_86", "gfx942"])
def test_options(target):
    _check(target, FP32, 256, rev=100, circular=True)
    _check(target, FP16, 900, gates=False)


@ahead_of_time
@pytest.mark.parametrize("target", TARGETS)
def test_products_are_in_fp32(target):
    """As three products of TF32 numbers each on NVIDIA's matrix units, and plainly on AMD's."""
    import aot

    (launch, *_) = [launch for launch in _launches(target, BF16, 4096) if launch.name == "fft_conv_spectrum_kernel"]
    assert launch.arguments["PRECISION"] == ("ieee" if target == "gfx942" else "tf32x3")
    # tcgen05 takes TF32 operands from tiles of fp32.
    allowed = {"gfx942": {"f32"}, "sm_100": {"f32"}}.get(target, {"tf32"})
    assert aot.products(aot.compiled(launch, target)) == allowed


@ahead_of_time
def test_lengths_do_not_change_what_is_compiled():
    """Calls with ever different lengths must not compile ever new kernels: only powers of two count."""
    import aot

    def compiled_by(length: int, batch: int, **options: object):
        # Strides over batches and channels follow the length; long rows pass through memory in ever more parts.
        return {(launch.name, str(aot.specialization(launch, ignore=r"stride_\w+[bc]")))
                for launch in _launches("sm_90", BF16, length, batch=batch, **options)}

    for first, *others in (((2100, 2), (4001, 3), (4096, 16)), ((33000, 2), (65536, 5))):
        assert all(compiled_by(*other) == compiled_by(*first) for other in others)
    assert compiled_by(2100, 2, taps=40) == compiled_by(4096, 16, taps=48)


def test_every_kernel_is_covered():
    """The cases above launch every kernel that the module defines."""
    from pathlib import Path

    source = Path(__file__).parents[2] / "pykernels" / "ops" / "fft_conv" / "triton.py"
    defined = set(re.findall(r"def (fft_conv_\w+_kernel)", source.read_text()))
    assert defined == {f"fft_conv_{part}_kernel" for part in (
        "tables", "spectrum", "window", "correlate", "taps", "split", "merge", "inner", "correlate_inner", "direct",
        "direct_taps", "skip")}
