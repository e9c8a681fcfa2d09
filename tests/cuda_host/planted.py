"""Faults planted in the real kernels: each takes one wait, barrier or fence out of a copy of the source.

The statements are found by their text, so a kernel that changes says so here. All faults of a file are compiled at
once: a variable of the module names the statement that is left out, none at first.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import host_build


@dataclasses.dataclass(frozen=True)
class Fault:
    name: str
    file: str  # in csrc/cuda
    statement: str
    before: str = ""  # text around the statement that tells it from others like it
    after: str = ""
    group: str = ""  # which cases show it

    def __str__(self) -> str:
        return self.name

    def plant(self, source: str, index: int) -> str:
        text = self.before + self.statement + self.after
        assert source.count(text) == 1, f"{self.file}: {text!r} occurs {source.count(text)} times"
        return source.replace(text, f"{self.before}if (pykernels_left_out != {index}) {self.statement}{self.after}")


_FORWARD, _BACKWARD = "flash_attention/fwd_sm90.cuh", "flash_attention/bwd_sm90.cuh"
_BACKWARD_LARGE = "flash_attention/bwd_sm90_wide.cuh"
_DECODE, _WALK = "flash_attention/decode_sm80.cuh", "linear_attention/walk_sm80.cuh"
_DECAY, _STEP = "linear_attention/gradients_sm80.cuh", "linear_attention/step_sm80.cuh"
_TRANSFORM = "fft_conv/fft.cuh"
_FFT_BACKWARD = "fft_conv/backward.cu"
_WIDE, _CHUNK = "linear_attention/wide_sm80.cuh", "linear_attention/wide_chunk_sm80.cu"
_BOTH = "ptx::named_barrier_sync(kBoth, 256);"

FAULTS = (
    # Forward for sm_90a.
    Fault("fwd-barriers-initialised-without-a-fence", _FORWARD, "ptx::fence_mbarrier_init();", group="fwd"),
    Fault("fwd-query-refilled-early", _FORWARD, "ptx::mbarrier_wait(q_empty, q_parity ^ 1);", group="fwd"),
    Fault("fwd-query-read-early", _FORWARD, "ptx::mbarrier_wait(q_full, q_parity);", group="fwd"),
    Fault("fwd-first-keys-read-early", _FORWARD, "k_ring.wait(k_state);", after="\n      issue_scores();", group="fwd"),
    Fault("fwd-keys-read-early", _FORWARD, "k_ring.wait(k_state);", after="\n        wait_turn();", group="fwd"),
    Fault("fwd-first-scores-read-early", _FORWARD, "ptx::wgmma_wait<0>();",
          after="\n      ptx::wgmma_hold(s);", group="fwd"),
    Fault("fwd-scores-read-early", _FORWARD, "ptx::wgmma_wait<1>();", group="fwd"),
    Fault("fwd-values-read-early", _FORWARD, "v_ring.wait(v_state);", after="\n        issue_output();", group="fwd"),
    Fault("fwd-last-values-read-early", _FORWARD, "v_ring.wait(v_state);", before="      }\n      ",
          after="\n      issue_output();", group="fwd-short"),
    Fault("fwd-output-read-early", _FORWARD, "ptx::wgmma_wait<0>();",
          after="\n        ptx::wgmma_hold(o);", group="fwd"),
    Fault("fwd-last-output-read-early", _FORWARD, "ptx::wgmma_wait<0>();",
          after="\n      ptx::wgmma_hold(o);", group="fwd"),
    Fault("fwd-scores-issued-without-a-fence", _FORWARD, "ptx::wgmma_fence();",
          before="k_operand = by_rows(k_ring.tile(k_state.stage()));\n      ", group="fwd"),
    Fault("fwd-output-issued-without-a-fence", _FORWARD, "ptx::wgmma_fence();",
          before="v_operand = by_columns(v_ring.tile(v_state.stage()));\n      ", group="fwd"),
    Fault("ring-refilled-early", "flash_attention/sm90.cuh",
          "ptx::mbarrier_wait(empty + state.stage(), state.parity() ^ 1);", group="fwd"),
    # Backward for sm_90a.
    Fault("bwd-barriers-initialised-without-a-fence", _BACKWARD, "ptx::fence_mbarrier_init();", group="bwd"),
    Fault("bwd-keys-read-early", _BACKWARD, "ptx::mbarrier_wait(kv_full, 0);", group="bwd"),
    Fault("bwd-queries-read-early", _BACKWARD, "q_ring.wait(state);", group="bwd"),
    Fault("bwd-dout-read-early", _BACKWARD, "dout_ring.wait(state);", after="\n    ptx::wgmma_fence();", group="bwd"),
    Fault("bwd-scores-read-early", _BACKWARD, "ptx::wgmma_wait<1>();", after="\n    ptx::wgmma_hold(s);", group="bwd"),
    Fault("bwd-dp-read-early", _BACKWARD, "ptx::wgmma_wait<1>();", after="\n    ptx::wgmma_hold(dp);", group="bwd"),
    Fault("bwd-ds-without-a-proxy-fence", _BACKWARD, "ptx::fence_proxy_async();",
          after="\n    // Both consumers' dS", group="bwd"),
    Fault("bwd-ds-without-a-barrier", _BACKWARD, _BOTH, after="\n\n    float dq[32] = {};", group="bwd"),
    Fault("bwd-dq-read-early", _BACKWARD, "ptx::wgmma_wait<1>();", after="  // dV and dQ", group="bwd"),
    Fault("bwd-part-overwritten-early", _BACKWARD, "ptx::bulk_wait_read<0>();", group="bwd"),
    Fault("bwd-part-overwritten-without-a-barrier", _BACKWARD,
          "ptx::named_barrier_sync(kPartFree + static_cast<unsigned>(consumer), kPartThreads);", group="bwd"),
    Fault("bwd-part-without-a-proxy-fence", _BACKWARD, "ptx::fence_proxy_async();",
          after="\n    ptx::named_barrier_arrive(kPartFull", group="bwd"),
    Fault("bwd-part-without-a-barrier", _BACKWARD,
          "ptx::named_barrier_arrive(kPartFull + static_cast<unsigned>(consumer), kPartThreads);", group="bwd"),
    Fault("bwd-dk-read-early", _BACKWARD, "ptx::wgmma_wait<0>();", after="\n    ptx::wgmma_hold(dk);", group="bwd"),
    # Backward for sm_90a, of large heads.
    Fault("bwd-large-keys-read-early", _BACKWARD_LARGE, "ptx::mbarrier_wait(kv_full, 0);", group="bwd-large"),
    Fault("bwd-large-scores-read-early", _BACKWARD_LARGE, "ptx::wgmma_wait<0>();", after="\n      ptx::wgmma_hold(s);",
          group="bwd-large"),
    Fault("bwd-large-weights-read-early", _BACKWARD_LARGE, "ptx::named_barrier_sync(kWeights, 256);",
          group="bwd-large"),
    Fault("bwd-large-dp-read-early", _BACKWARD_LARGE, "ptx::wgmma_wait<0>();", after="\n      ptx::wgmma_hold(dp);",
          group="bwd-large"),
    Fault("bwd-large-ds-without-a-proxy-fence", _BACKWARD_LARGE, "ptx::fence_proxy_async();",
          after="\n      ptx::named_barrier_arrive(kDs, 256);", group="bwd-large"),
    Fault("bwd-large-ds-read-early", _BACKWARD_LARGE, "ptx::named_barrier_sync(kDs, 256);", group="bwd-large"),
    # Decoding.
    Fault("decode-cache-read-early", _DECODE, "ptx::cp_async_wait<0>();", group="decode"),
    Fault("decode-stage-refilled-early", _DECODE, "__syncthreads();",
          after="\n    load_stage(step + 1);", group="decode"),
    Fault("decode-pieces-read-early", _DECODE, "__syncthreads();",
          after="  // and nobody reads K or V any more", group="decode"),
    Fault("decode-outputs-read-early", _DECODE, "__syncthreads();",
          after="\n  // A split without keys", group="decode"),
    Fault("decode-pages-read-early", _DECODE, "__syncthreads();",
          after="\n    }\n    load_stage(steps_begin);", group="paged"),
    # Linear attention.
    Fault("walk-stage-read-early", _WALK, "ptx::cp_async_wait<0>();", group="linear"),
    Fault("walk-stage-refilled-early", _WALK, "__syncthreads();", after="\n    load_stage(step + 1);", group="linear"),
    Fault("walk-scores-read-early", _WALK, "if (kResult) __syncthreads();", group="linear"),
    Fault("ddecay-panel-read-early", _DECAY, "ptx::cp_async_wait<0>();", group="linear"),
    Fault("ddecay-panel-refilled-early", _DECAY, "__syncthreads();",
          after="\n    load_stage(panel + 1);", group="linear"),
    Fault("ddecay-next-products-loaded-early", _DECAY, "__syncthreads();",
          after="\n}\n\n// A block owns the tokens", group="linear"),
    Fault("ddecay-pairs-read-early", _DECAY, "__syncthreads();", after="\n  if (warp > 0) return;", group="linear"),
    Fault("ddecay-sums-read-early", _DECAY, "__syncwarp();", group="linear"),
    # Linear attention of a decay per channel, and of fp32.
    Fault("wide-stage-refilled-early", _WIDE, "__syncthreads();",
          after="\n    if (with_result && load_wide", group="wide"),
    Fault("wide-stage-read-early", _WIDE, "__syncthreads();", after="\n    if (!active) continue;", group="wide"),
    Fault("wide-panel-refilled-early", _CHUNK, "__syncthreads();",
          after="  // nobody reads the last panel", group="wide"),
    Fault("wide-panel-read-early", _CHUNK, "__syncthreads();", before="large.y = 1;\n  ", group="wide"),
    Fault("wide-factors-read-early", _CHUNK, "__syncthreads();",
          after="\n      if (channel.index < c.channels) {", group="wide"),
    Fault("wide-pairs-read-early", _CHUNK, "__syncthreads();",
          after="\n  for (int i = static_cast<int>(threadIdx.x); i < kChunk *", group="wide"),
    Fault("wide-keys-read-early", _CHUNK, "__syncthreads();",
          after="\n    {\n      const float raised_pairs", group="wide"),
    Fault("wide-products-read-early", _CHUNK, "__syncthreads();",
          after="\n\n    const int d = channel.in_panel", group="wide"),
    Fault("wide-halves-read-early", _CHUNK, "__syncthreads();", after="\n\n    if (bonus && !later", group="wide"),
    Fault("wide-channels-read-early", _CHUNK, "__syncthreads();",
          after="\n      for (int column = t; column < kPanel", group="wide"),
    Fault("step-operands-read-early", _STEP, "__syncthreads();",
          before="[head * key_dim + i] : 1.0f;\n  }\n  ", group="step"),
    Fault("step-sums-read-early", _STEP, "__syncthreads();",
          after="\n    for (int c = static_cast<int>(threadIdx.x); c <", group="step"),
    Fault("step-outputs-read-early", _STEP, "__syncthreads();", after="\n  }\n\n  const float inverse", group="step"),
    # Long convolution.
    Fault("transform-points-read-early", _TRANSFORM, "sync();", after="\n      forward<", group="fft"),
    Fault("inverse-points-read-early", _TRANSFORM, "sync();", after="\n    } else {\n      inverse<", group="fft"),
    Fault("backward-points-refilled-early", _FFT_BACKWARD, "Block::sync();", after="  // everyone has read",
          group="fft"),
    Fault("backward-sums-cleared-late", _FFT_BACKWARD, "__syncthreads();", after="\n\n  const int64_t rows_batch",
          group="fft-parts"),
    Fault("backward-sums-read-early", _FFT_BACKWARD, "__syncthreads();", after="\n  float2* const sums",
          group="fft-parts"),
)

# The units that the cases of the tests run.
_UNITS = ("flash_attention/fwd_sm90_64.cu", "flash_attention/bwd_sm90_64.cu", "flash_attention/bwd_sm90_192.cu",
          "flash_attention/decode_sm80_64.cu", "linear_attention/walk_sm80_64.cu", "linear_attention/wide_sm80_64.cu",
          "linear_attention/wide_chunk_sm80.cu", "linear_attention/linear_attention.cu", "fft_conv/transform.cu",
          "fft_conv/backward.cu")
_VARIABLE = 'extern "C" __attribute__((visibility("default"))) int pykernels_left_out'


def _write_sources(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(host_build.CSRC / "cuda", folder / "cuda")
    for name in ("include", "common"):
        (folder / name).symlink_to(host_build.CSRC / name)
    for index, fault in enumerate(FAULTS):
        path = folder / "cuda" / fault.file
        path.write_text(fault.plant(path.read_text(), index))
    for file in {fault.file for fault in FAULTS}:
        path = folder / "cuda" / file
        path.write_text(path.read_text().replace("#pragma once\n", f"#pragma once\n{_VARIABLE};\n", 1))
    (folder / "left_out.cpp").write_text(f"{_VARIABLE};\nint pykernels_left_out = -1;\n")


def _build() -> Path:
    """The module with all faults; builds it if the sources changed."""
    plain = host_build.build("plain")
    folder = plain.parent / "planted"
    flags = [x.replace(str(host_build.CSRC), str(folder / "csrc")) for x in host_build._flags("plain")]
    made_from = "\0".join([*flags, *map(repr, FAULTS), (plain / "linked").read_text()])
    digest = hashlib.sha256(made_from.encode()).hexdigest()
    module, stamp = folder / (host_build.NAME + sysconfig.get_config_var("EXT_SUFFIX")), folder / "built"
    if module.exists() and stamp.exists() and stamp.read_text() == digest:
        return module
    _write_sources(folder / "csrc")
    objects = []
    for source in (*(folder / "csrc" / "cuda" / unit for unit in _UNITS), folder / "csrc" / "left_out.cpp"):
        objects.append(obj := source.with_suffix(".o"))
        subprocess.run([host_build.COMPILER, *flags, "-x", "c++", "-c", str(source), "-o", str(obj)], check=True)
    replaced = tuple(f"{Path(unit).parent}-{Path(unit).name}-" for unit in _UNITS)
    kept = [plain / name for name in (plain / "linked").read_text().split("\n") if not name.startswith(replaced)]
    partial = module.with_suffix(f".{os.getpid()}")
    subprocess.run([host_build.COMPILER, "-shared", *map(str, [*objects, *kept]), "-o", str(partial)], check=True)
    partial.replace(module)
    stamp.write_text(digest)
    return module


def load() -> tuple[ModuleType, ctypes.c_int]:
    """-> (the module, the index in FAULTS of what is left out)."""
    path = str(_build())
    # A name of its own: of the plain module's, pybind11 would give that module again.
    spec = importlib.util.spec_from_file_location(f"planted.{host_build.NAME}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, ctypes.c_int.in_dll(ctypes.CDLL(path), "pykernels_left_out")
