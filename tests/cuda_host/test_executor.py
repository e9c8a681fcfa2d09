"""The executor catches what goes wrong on a GPU: the planted faults of faults.cu show, kernels without them pass."""

from __future__ import annotations

import json
import re

import host_build
import numpy as np
import pytest

SEEDS = range(12)  # every combination of the executor's policies

# The kernel without the fault, with it, and how the fault shows: a message, or None for a wrong or missing output.
FAULTS = [
    ("barrier_good", "barrier_missing", None),
    ("cp_async_good", "cp_async_wait_missing", None),
    ("cp_async_pipeline_good", "cp_async_pipeline_refilled_early", None),
    ("pipeline_good", "pipeline_refilled_early", "more arrivals than the 1 of a phase|wrong output|deadlock"),
    ("pipeline_good", "pipeline_released_early", None),
    ("proxy_good", "proxy_fence_missing", None),
    ("store_reuse_good", "store_reused_early", None),
    ("shared_bounds_good", "shared_bounds", 
     r"write outside of shared memory regions, after the region at offset 0 of 512 bytes"),
    ("shared_bounds_good", "shared_too_small", r"shared memory up to 1024 bytes, but the launch gave 1000"),
    ("unwritten_good", "unwritten", None),
    ("divergent_good", "divergent",
     r"divergent barrier: __syncthreads at faults.cu:\d+ while other threads are in the one at faults.cu"),
    ("exited_good", "exited",
     r"divergent barrier: __syncthreads after some threads have exited, faults.cu|"
     r"deadlock: .*threads 0-95 wait at barrier 0 \(96 of 128 threads came\), faults.cu:\d+; threads 96-127 exited"),
    ("divergent_warp_good", "divergent_warp", r"divergent warp: __shfl_xor_sync at faults.cu:\d+"),
    ("deadlock_good", "deadlock",
     r"deadlock: block \(0, 0, 0\): threads 0-31 exited; "
     r"threads 32-127 wait at barrier 3 \(96 of 128 threads came\), faults.cu:\d+"),
    ("mbarrier_deadlock_good", "mbarrier_deadlock",
     r"deadlock: .* threads 0-127 wait at the mbarrier at shared address \d+ "
     r"\(phase 0, 0 of 1 arrivals and 16 bytes missing\)"),
    ("init_fence_good", "init_fence_missing", "missing fence between mbarrier.init and its use by the async proxy"),
    ("wgmma_good", "wgmma_proxy_fence_missing", None),
    ("wgmma_good", "wgmma_wait_missing", None),
    ("wgmma_good", "wgmma_fence_missing", "wgmma without wgmma.fence since the last wait"),
]


def _run(host, name: str, seed: int) -> str:
    """'' when the output is right, else the message, or 'wrong output'."""
    host.set_seed(seed)
    x = (np.arange(1536) % 120 + 1).astype(np.float32)
    out = np.full_like(x, np.nan)
    try:
        host.run_fault(name, x, out)
    except RuntimeError as error:
        return str(error)
    return "" if np.array_equal(out, 2 * x) else "wrong output"


@pytest.mark.parametrize("name", sorted({good for good, _, _ in FAULTS} | {"global_bounds_good"}))
def test_good_kernels_pass(host, name):
    assert [_run(host, name, seed) for seed in SEEDS] == [""] * len(SEEDS)


@pytest.mark.parametrize("name, message", [fault[1:] for fault in FAULTS], ids=[fault[1] for fault in FAULTS])
def test_planted_faults_are_caught(host, name, message):
    results = [_run(host, name, seed) for seed in SEEDS]
    caught = [result for result in results if result]
    # A fault that depends on time does not show in every order, but in a good part of them.
    assert len(caught) >= len(SEEDS) // 4, results
    if message is None:
        assert set(caught) == {"wrong output"}
    else:
        assert all(re.search(message, result) for result in caught), caught


def test_a_seed_repeats_its_run(host):
    outs = []
    for seed in (5, 7, 5):
        host.set_seed(seed)
        out = np.full(1536, np.nan, np.float32)
        host.run_fault("barrier_missing", (np.arange(1536) % 120 + 1).astype(np.float32), out)
        outs.append(out)
    np.testing.assert_array_equal(outs[0], outs[2])
    assert not np.array_equal(outs[0], outs[1], equal_nan=True)


def test_launch_limits(host):
    host.set_shared_limit(32 * 1024)
    try:
        with pytest.raises(RuntimeError, match="invalid argument"):
            host.run_instruction("wgmma_ss_trans_b", np.zeros(192 * 32, np.uint16), np.zeros((64, 128), np.float32))
    finally:
        host.set_shared_limit(227 * 1024)


@pytest.mark.parametrize("name, report", [
    ("global_bounds", r"heap-buffer-overflow(.|\n)*(READ|WRITE) of size 4(.|\n)*global_bounds_kernel"),
    ("shared_bounds", r"use-after-poison(.|\n)*WRITE of size 4(.|\n)*shared_bounds_kernel"),
])
def test_sanitizer_reports(compiler, name, report):
    result = host_build.run_sanitized("-c", f"""
import host_build, numpy as np
host_build.load().run_fault({name!r}, np.ones(1024, np.float32), np.ones(1024, np.float32))
""")
    assert result.returncode != 0 and re.search(report, result.stderr), result.stderr[-3000:]


def test_sanitizer_passes_good_kernels_and_instructions(compiler):
    """And keeps working after launches that failed, whose fibers were abandoned."""
    names = sorted({good for good, _, _ in FAULTS} | {"global_bounds_good", "divergent", "deadlock"})
    result = host_build.run_sanitized("-c", f"""
import json, host_build, vectors
from test_executor import _run
host = host_build.load()
print(json.dumps([_run(host, name, seed) for name in {names!r} for seed in (0, 1, 5, 10)]))
for instruction in vectors.INSTRUCTIONS:
    instruction.check(vectors.run(host.run_instruction, instruction))
""")
    assert result.returncode == 0, result.stderr[-3000:]
    failed = [message for message in json.loads(result.stdout) if message]
    assert len(failed) == 8 and all("divergent barrier" in m or "deadlock" in m for m in failed), failed
