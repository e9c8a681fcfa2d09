"""What this machine can do, measured in the same run as the benchmarks: the yardstick beside every figure.

    python -m bench.limits

On a CPU: multiply-adds in fp32, bf16 dot instructions, bf16 tile instructions (AMX), and memory bandwidth, each by
native code (limits.cpp, compiled with the system's compiler for this machine) on as many threads as the case uses.
Without a compiler torch's matmul stands in, a lower bound, and is called so. On a GPU: torch's matmul and copy, timed
by events. Each limit is the best of several repeats: what the machine can do when nothing disturbs it.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import glob
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable

import torch

_SOURCE = pathlib.Path(__file__).with_name("limits.cpp")
_REPEATS = 5
MiB = 1 << 20


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text().strip()
    except OSError:
        return ""


@functools.cache
def last_level_cache() -> int:
    """Bytes of the largest cache that the first core sees; 0 when the system does not say."""
    sizes = [_read(path) for path in glob.glob("/sys/devices/system/cpu/cpu0/cache/index*/size")]
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(size[:-1]) * unit[size[-1]] for size in sizes if size), default=0)


@functools.cache
def beyond_cache_bytes() -> int:
    """A size that the caches can't hold: twice the last level, within 256 MiB and a sixteenth of memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(max(2 * last_level_cache(), 256 * MiB), memory // 16) // MiB * MiB


@functools.cache
def _native() -> tuple[ctypes.CDLL | None, str | None]:
    """limits.cpp compiled for this machine, or why not."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None, "no C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        target = pathlib.Path(folder, "limits.so")
        command = [*compiler.split(), "-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC",
                   "-w", str(_SOURCE), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return None, f"{' '.join(command)} failed: {done.stderr.strip()[:500]}"
        library = ctypes.CDLL(str(target))
    for name in ("fp32_fma", "bf16_dot", "bf16_tile"):
        getattr(library, name).restype = ctypes.c_double
        getattr(library, name).argtypes = [ctypes.c_int64]
    library.read_memory.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.copy_memory.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return library, None


def _on_threads(threads: int, work: Callable[[int], float]) -> tuple[float, float]:
    """Runs work(0), ..., work(threads - 1) at once (each releases the GIL) -> (their sum, seconds)."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: time.sleep(0.001), range(threads)))  # so that the threads exist
        start = time.perf_counter()
        total = sum(pool.map(work, range(threads)))
        return total, time.perf_counter() - start


def _arithmetic(function: Callable[[int], float], threads: int) -> float | None:
    """FLOP/s of a function of limits.cpp, None when the machine has no such unit."""
    iterations = 1000
    if function(iterations) == 0:
        return None
    while True:  # until one run takes 50 ms
        start = time.perf_counter()
        function(iterations)
        if (seconds := time.perf_counter() - start) > 0.05:
            break
        iterations = int(iterations * min(100, max(2, 0.08 / max(seconds, 1e-6))))
    runs = [_on_threads(threads, lambda _: function(iterations)) for _ in range(_REPEATS)]
    return max(flops / seconds for flops, seconds in runs)


def _bandwidth(work: Callable[[int], None], threads: int, moved: float) -> float:
    """Bytes/s of `work` on every thread, which together move `moved` bytes."""

    def zero(thread: int) -> float:
        work(thread)
        return 0.0

    return max(moved / _on_threads(threads, zero)[1] for _ in range(_REPEATS))


def _matmul(dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of torch's matmul."""
    a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def _cpu(threads: int) -> dict:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        size = beyond_cache_bytes()
        part = size // threads // 4096 * 4096
        source, target = (torch.ones(size // 4, dtype=torch.float32) for _ in range(2))
        values: dict[str, float | None] = {}
        native, reason = _native()
        if native is not None:
            how = f"multiply-adds of {native.vector_bits()} bits, dot and tile instructions, by native code"
            values["fp32"] = _arithmetic(native.fp32_fma, threads)
            values["bf16 dot"] = _arithmetic(native.bf16_dot, threads)
            values["bf16 tile"] = _arithmetic(native.bf16_tile, threads)
            # torch aligns to 64 bytes, and parts are multiples of the page.
            at, to = source.data_ptr(), target.data_ptr()
            values["read"] = _bandwidth(lambda i: native.read_memory(at + i * part, part), threads, part * threads)
            values["copy"] = _bandwidth(lambda i: native.copy_memory(to + i * part, at + i * part, part), threads,
                                        2 * part * threads)
        else:
            how = f"torch's matmul, a lower bound ({reason})"
            values["fp32"], values["bf16 dot"] = _matmul(torch.float32), _matmul(torch.bfloat16)
            values["read"] = _bandwidth(lambda _: source.sum(), 1, source.nbytes)
            values["copy"] = 0.0
        values["copy"] = max(values["copy"], _bandwidth(lambda _: target.copy_(source), 1, 2 * source.nbytes))
    finally:
        torch.set_num_threads(before)
    notes = (f"{how}; best of {_REPEATS}; bandwidth over {size // MiB} MiB (last-level cache "
             f"{last_level_cache() // MiB} MiB), copy counts bytes read and written")
    return {"values": values, "notes": notes}


def _cuda() -> dict:
    def best(work: Callable[[], object]) -> float:
        """Seconds of the fastest of several calls."""
        work()
        times = []
        for _ in range(20):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return min(times)

    values: dict[str, float | None] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        n = 8192
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        values[name] = 2 * n**3 / best(lambda: a @ b)
    source = torch.ones(1 << 30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    values["copy"] = 2 * source.nbytes / best(lambda: target.copy_(source))
    values["read"] = source.nbytes / best(lambda: source.view(torch.float32).sum())
    notes = ("torch's matmul (8192 x 8192, TF32 as torch is set: "
             f"{torch.backends.cuda.matmul.allow_tf32}) and copies of 1 GiB, timed by events, best of 20")
    return {"values": values, "notes": notes}


@functools.cache
def measure(device: str, threads: int) -> dict:
    """{"values": {limit: FLOP/s or bytes/s, None where there is no such unit}, "notes": how they were measured}.

    Limits: "fp32"; on CPUs "bf16 dot" and "bf16 tile", on GPUs "bf16" and "fp16"; "read" and "copy" bandwidth.
    """
    return _cpu(threads) if device == "cpu" else _cuda()


def units(name: str) -> str:
    return "GB/s" if name in ("read", "copy") else "GFLOP/s"


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for count in sorted({1, torch.get_num_threads()}) if device == "cpu" else [1]:
        result = measure(device, count)
        print(f"{device}, {count} threads: {result['notes']}" if device == "cpu" else f"{device}: {result['notes']}")
        for name, value in result["values"].items():
            print(f"  {name:10}", f"{value / 1e9:9.1f} {units(name)}" if value else "none")
