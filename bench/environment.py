"""Where figures come from: the machine, the versions and the commit that go with every result, and its limits."""

from __future__ import annotations

import datetime
import functools
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Iterable

import torch

import pykernels
from pykernels import _library

from . import limits as _limits

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _cpu_model() -> str:
    try:
        cpuinfo = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return re.sub(r"\((R|TM)\)", "", found.group(1)).strip() if found else platform.machine()


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _isa() -> str | None:
    return _library.active_isa() if _library.error() is None else None


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def commit() -> str | None:
    """The commit, with "+" when the kernels or the package differ from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "csrc", "pykernels", "bench/*.py")
        return head and head + ("+" if changed else "")
    except OSError:  # no git
        return None


def _version(module: str) -> str | None:
    try:
        return __import__(module).__version__
    except ImportError:
        return None


def describe() -> dict:
    """The environment of a result."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "machine": slug(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "pykernels": pykernels.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "isa": _isa(),
        "last_level_cache": _limits.last_level_cache(),
        "gpu": gpu.name if gpu else None,
        "gpu_capability": f"{gpu.major}.{gpu.minor}" if gpu else None,
    }


# glibc gives memory back to the system, and has its pages made anew, unless it is told to keep what is freed. It heeds
# MALLOC_MMAP_THRESHOLD_ up to 32 MiB only, so that no block is mapped by itself with MALLOC_MMAP_MAX_ alone.
TUNED_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def allocator_tuned() -> bool:
    """Whether this process was started with `TUNED_ALLOCATOR` in its environment."""
    return all(os.environ.get(name) == value for name, value in TUNED_ALLOCATOR.items())


def slug() -> str:
    """The name of this machine's result file: its GPU, or its CPU, cores and instruction set."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
    else:
        name = f"{_cpu_model()} {_cores()} cores {_isa() or 'unbuilt'}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def limits(places: Iterable[tuple[str, int]]) -> dict[str, dict]:
    """The limits of (device, threads) pairs, measured once per process: {"cpu 2": limits.measure("cpu", 2)}."""
    return {place(device, threads): _limits.measure(device, threads) for device, threads in sorted(places)}


def place(device: str, threads: int) -> str:
    return f"{device} {threads}"
