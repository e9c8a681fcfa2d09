"""What tests, benchmarks and `python -m pykernels verify` share: each op described once, and checks that use it.

`OPS` holds one `Description` per public function: how to make its inputs, what it returns and overwrites, which
ops of torch.ops.pykernels serve it, which inputs it must reject, and what PyTorch itself offers instead. `check`
runs one case of a description on one `Target` (a backend on a device, on the CPU with one instruction set) and
reports the error of every output and gradient beside its budget. A new op adds a module here and an entry to `OPS`.
"""

from __future__ import annotations

from .causal_conv1d import CAUSAL_CONV1D, CAUSAL_CONV1D_STEP
from .fft_conv import FFT_CONV
from .flash_attention import FLASH_ATTENTION, FLASH_ATTENTION_DECODE
from .kit import BadInput, Case, Description, Error, Sample, check, compare, cotangents, expected, run, serves
from .linear_attention import LINEAR_ATTENTION, LINEAR_ATTENTION_STEP
from .retention import RETENTION, RETENTION_STEP
from .selective_scan import SELECTIVE_SCAN, SELECTIVE_SCAN_STEP
from .targets import DTYPES, Target, choice, dtypes, poisoned_memory, targets, use_isa, use_threads

OPS = (
    FLASH_ATTENTION, FLASH_ATTENTION_DECODE, LINEAR_ATTENTION, LINEAR_ATTENTION_STEP, RETENTION, RETENTION_STEP,
    CAUSAL_CONV1D, CAUSAL_CONV1D_STEP, SELECTIVE_SCAN, SELECTIVE_SCAN_STEP, FFT_CONV,
)

__all__ = [
    "CAUSAL_CONV1D",
    "CAUSAL_CONV1D_STEP",
    "DTYPES",
    "FFT_CONV",
    "FLASH_ATTENTION",
    "FLASH_ATTENTION_DECODE",
    "LINEAR_ATTENTION",
    "LINEAR_ATTENTION_STEP",
    "OPS",
    "RETENTION",
    "RETENTION_STEP",
    "SELECTIVE_SCAN",
    "SELECTIVE_SCAN_STEP",
    "BadInput",
    "Case",
    "Description",
    "Error",
    "Sample",
    "Target",
    "check",
    "choice",
    "compare",
    "cotangents",
    "dtypes",
    "expected",
    "poisoned_memory",
    "run",
    "serves",
    "targets",
    "use_isa",
    "use_threads",
]
