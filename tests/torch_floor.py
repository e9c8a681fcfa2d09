"""Runs the wheel under the oldest torch it promises to serve. Not part of the test run: it installs about 7 GB.

    .venv/bin/python tests/torch_floor.py [--torch 2.10.0] [--environment FOLDER]

Builds the wheel with this environment's torch, installs it beside the other torch, and runs what tests/test_wheel.py
runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from test_wheel import PROGRAM, ROOT, outside


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default="2.10.0", help="version to install (default %(default)s)")
    parser.add_argument("--environment", type=Path,
                        help="virtual environment to create or reuse (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        environment = arguments.environment or Path(temporary) / "environment"
        python = environment / "bin" / "python"
        if not python.exists():
            venv.create(environment, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"torch=={arguments.torch}", "numpy"], check=True)
        subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
                        "--wheel-dir", temporary, str(ROOT)], check=True)
        (wheel,) = Path(temporary).glob("pykernels-*.whl")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", str(wheel)],
                       check=True)
        subprocess.run([python, "-c", PROGRAM], cwd=temporary, env=outside(), check=True)
        subprocess.run([python, "-m", "pykernels", "verify"], cwd=temporary, env=outside(), check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
