"""Runs every instruction on this machine's GPU and records its output in vectors/<architecture>.npz.

    python tests/cuda_host/record_vectors.py

It compiles instructions.cu with nvcc, prints how far each output is from the PTX manual's definition, and stores it.
From then on test_instructions.py compares the models with what was recorded: that confirms them.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import vectors

HERE = Path(__file__).resolve().parent


def main() -> int:
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    capability = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0].replace(".", "")
    arch = "90a" if capability == "90" else capability
    nvcc = sys.argv[1] if len(sys.argv) > 1 else "/usr/local/cuda/bin/nvcc"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "instructions.so"
        flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-gencode=arch=compute_{arch},code=sm_{arch}",
                 f"-I{HERE.parents[1] / 'csrc'}", *(["-DPYKERNELS_SM90A"] if arch == "90a" else [])]
        subprocess.run([nvcc, *flags, "-Xcompiler", "-fPIC", "-shared", str(HERE / "instructions.cu"), "-o",
                        str(library)], check=True)
        function = ctypes.CDLL(str(library)).pykernels_run_instruction
        function.restype = ctypes.c_char_p

        def call(name: str, given: np.ndarray, output: np.ndarray) -> None:
            error = function(name.encode(), given.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(given.nbytes),
                             output.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(output.nbytes))
            if error is not None:
                raise RuntimeError(f"{name}: {error.decode()}")

        outputs, failed = {}, 0
        for instruction in vectors.INSTRUCTIONS:
            if instruction.sm90a and arch != "90a":
                continue
            outputs[instruction.name] = vectors.run(call, instruction)
            try:
                instruction.check(outputs[instruction.name])
                print(f"{instruction.name}: as defined")
            except AssertionError as error:
                failed += 1
                print(f"{instruction.name}: NOT as defined: {error}")
    vectors.FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(vectors.FOLDER / f"sm_{arch}.npz", **outputs)
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
