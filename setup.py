"""Builds the native library by CMake and ninja; everything declarative is in pyproject.toml.

PYKERNELS_CUDA        auto (default: CUDA kernels where nvcc is found), 0 or 1 (an error without nvcc)
PYKERNELS_CUDA_ARCHS  real architectures to compile for, default "80;90a;100"
MAX_JOBS              parallel compile jobs, default one per core
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
LIBRARY = "libpykernels.dylib" if sys.platform == "darwin" else "libpykernels.so"


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


def cuda_arguments() -> list[str]:
    wanted = os.environ.get("PYKERNELS_CUDA", "auto").lower()
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"PYKERNELS_CUDA must be auto, 0 or 1, got {wanted!r}")
    nvcc = find_nvcc() if wanted != "0" else None
    if nvcc is None:
        if wanted == "1":
            raise SystemExit("PYKERNELS_CUDA=1, but nvcc was not found: put it on PATH or set CUDA_HOME")
        print(f"pykernels: building the CPU part only "
              f"({'PYKERNELS_CUDA=0' if wanted == '0' else 'nvcc was not found'})", flush=True)
        return ["-DPYKERNELS_CUDA=OFF"]
    print(f"pykernels: building the CUDA kernels with {nvcc}", flush=True)
    arguments = ["-DPYKERNELS_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    if archs := os.environ.get("PYKERNELS_CUDA_ARCHS"):
        arguments.append(f"-DPYKERNELS_CUDA_ARCHS={archs.replace(',', ';').replace(' ', ';')}")
    return arguments


class CMakeBuild(build_ext):
    """The one 'extension' is a plain shared library: no Python symbols, so no Python version in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def build_extension(self, ext: Extension) -> None:
        import torch  # its headers and libtorch.so, of any version from 2.10

        options = [f"-DPYKERNELS_TORCH_ROOT={Path(torch.__file__).parent}", *cuda_arguments()]
        # A folder per configuration: each keeps its objects for the next build, none is reconfigured into another.
        build = ROOT / "build" / hashlib.sha256("\n".join([sys.prefix, *options]).encode()).hexdigest()[:12]
        # cmake and ninja of this environment first, whether or not it is activated.
        environment = {**os.environ, "PATH": f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options], check=True,
                       env=environment)
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run(["cmake", "--build", str(build), *(["--parallel", jobs] if jobs else [])], check=True,
                       env=environment)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a process that has the old file loaded keeps it.
        temporary = target.with_suffix(".new")
        shutil.copyfile(build / LIBRARY, temporary)
        os.replace(temporary, target)


class PlatformWheel(bdist_wheel):
    """One wheel for every Python: py3-none-<platform>."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("pykernels.libpykernels", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
