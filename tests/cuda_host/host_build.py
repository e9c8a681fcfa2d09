"""Compiles the CUDA sources for the host, into a Python module that runs them on the executor.

The plain module is what most tests use; the sanitized one (address and undefined behaviour) needs the sanitizer's
runtime loaded before Python, see `sanitized_environment`. Objects are kept in build/cuda_host, named by what they were
made from.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
NAME = "pykernels_cuda_host"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wall", "-Wextra",
         "-Wno-unknown-pragmas", "-Wno-psabi", "-DPYKERNELS_SM90A"]
OPTIMIZE = {"plain": ["-O2"],
            "sanitized": ["-O1", "-fsanitize=address", "-fsanitize=alignment,bounds,shift,signed-integer-overflow",
                          "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]}


def unavailable() -> str | None:
    """Why the module can't be built here, or None."""
    if shutil.which(COMPILER) is None:
        return f"no host C++ compiler ({COMPILER})"
    if platform.machine() not in ("x86_64", "aarch64", "arm64"):
        return f"the executor's stack switch is not written for {platform.machine()}"
    return None


# Instantiations that no case under the sanitizers runs; those of other sizes stand for them. The module binds its
# functions when they are called, so that one of these that is called after all is a symbol that isn't found.
UNSANITIZED = re.compile(r"decode_sm80_\d+|(fwd|bwd)_sm(80|90)_(96|192)")


def _sources(variant: str) -> list[Path]:
    kernels = [path for path in sorted((CSRC / "cuda").rglob("*.cu"))
               if variant != "sanitized" or not UNSANITIZED.fullmatch(path.stem)]
    return [*sorted(HERE.glob("*.cpp")), *sorted(HERE.glob("*.cu")), *kernels]


def _flags(variant: str) -> list[str]:
    import pybind11

    # The shims come first: they take the place of CUDA's own headers.
    includes = [HERE / "shim", HERE, CSRC, pybind11.get_include(), sysconfig.get_path("include")]
    return [*FLAGS, *OPTIMIZE[variant], *(f"-I{path}" for path in includes)]


@functools.cache
def _headers_hash(folder: Path) -> str:
    """Of the headers that sources in `folder` may include: an op's are its own."""
    digest = hashlib.sha256()
    for file in sorted([*HERE.rglob("*"), *CSRC.rglob("*")]):
        foreign = file.is_relative_to(CSRC / "cuda") and file.parent not in (CSRC / "cuda" / "common", folder)
        if file.suffix in (".h", ".cuh") and "cpu" not in file.parts and not foreign:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def build(variant: str = "plain") -> Path:
    """The folder that holds the module; builds what has changed, once for all processes that ask."""
    folder = HERE.parents[1] / "build" / "cuda_host" / variant
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _build_in(folder, variant)
    return folder


def _build_in(folder: Path, variant: str) -> None:
    flags = _flags(variant)

    def compile_one(source: Path) -> Path:
        made_from = "\0".join([COMPILER, *flags, _headers_hash(source.parent), source.read_text()])
        key = hashlib.sha256(made_from.encode()).hexdigest()[:16]
        obj = folder / f"{source.parent.name}-{source.name}-{key}.o"
        if not obj.exists():
            for old in folder.glob(f"{source.parent.name}-{source.name}-*.o"):
                old.unlink()
            partial = obj.with_suffix(f".{os.getpid()}")
            subprocess.run([COMPILER, *flags, "-x", "c++", "-c", str(source), "-o", str(partial)], check=True)
            partial.replace(obj)
        return obj

    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compile_one, _sources(variant)))
    module = folder / (NAME + sysconfig.get_config_var("EXT_SUFFIX"))
    stamp = folder / "linked"
    linked = "\n".join(obj.name for obj in objects)
    if not module.exists() or not stamp.exists() or stamp.read_text() != linked:
        partial = module.with_suffix(f".{os.getpid()}")
        linker = ["-shared", "-Wl,-z,lazy"] if variant == "sanitized" else ["-shared"]
        subprocess.run([COMPILER, *OPTIMIZE[variant], *linker, *map(str, objects), "-o", str(partial)], check=True)
        partial.replace(module)
        stamp.write_text(linked)


def sanitized_environment() -> dict[str, str]:
    """The variables with which a Python process can import the sanitized module."""
    def library(name: str) -> str:
        found = subprocess.run([COMPILER, f"-print-file-name={name}"], check=True, capture_output=True, text=True)
        return found.stdout.strip()

    libraries = map(library, ("libasan.so", "libubsan.so", "libstdc++.so"))
    return {**os.environ, "LD_PRELOAD": " ".join(libraries), "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}",
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYKERNELS_CUDA_HOST": "sanitized"}


def run_sanitized(*arguments: str) -> subprocess.CompletedProcess:
    """Python with these arguments, in a process where `load` gives the sanitized module."""
    build("sanitized")
    return subprocess.run([sys.executable, *arguments], cwd=HERE, env=sanitized_environment(), capture_output=True,
                          text=True)


def check_sanitized(file: str, tests: list[str]) -> None:
    """That tests of a file pass with address and undefined-behaviour sanitizer seeing every access of the kernels."""
    names = [f"{Path(file).name}::{test}" for test in tests]
    result = run_sanitized("-m", "pytest", "-q", "-p", "no:cacheprovider", *names)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert f"{len(tests)} passed" in result.stdout, result.stdout[-4000:]


def load():
    """The module; the variant that PYKERNELS_CUDA_HOST names, the plain one by default."""
    variant = os.environ.get("PYKERNELS_CUDA_HOST", "plain")
    if variant == "sanitized":
        sys.setdlopenflags(os.RTLD_LAZY)
    folder = str(build(variant))
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return __import__(NAME)


if __name__ == "__main__":
    for argument in sys.argv[1:] or ["plain"]:
        print(build(argument))
