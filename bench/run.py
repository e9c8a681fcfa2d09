"""The whole benchmark of this machine: the grid, the table, the plots.

    python -m bench.run                     all ops, their main sizes, in about --minutes (default 4)
    python -m bench.run --full              every size, one thread and all of them (half an hour on two cores)
    python -m bench.run -k "causal and bf16"
    python -m bench.run --allocator-tuned   the cases whose peers live off freed memory, in a process that keeps it
    python -m bench.run --save-results      also into bench/results/<machine>.json, to be committed

With --save-results a part of the grid replaces its own results and leaves the others there, each with its commit.

Results always go to bench/output/<machine>.json, beside pytest-benchmark's own file.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from . import environment, report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", dest="select", default="", help="pytest's expression that selects cases by name")
    parser.add_argument("--full", action="store_true", help="every case of the grid")
    parser.add_argument("--minutes", type=float, default=4.0, help="time for the grid; rounds adapt")
    parser.add_argument("--min-rounds", type=int, default=5)
    parser.add_argument("--backends", help="ours to measure, such as cpu,reference (default: the compiled ones)")
    parser.add_argument("--slow-peers", action="store_true", help="also peers that compile for every case")
    parser.add_argument("--allocator-tuned", action="store_true",
                        help="the cases for an allocator that keeps freed memory")
    parser.add_argument("--save-results", action="store_true", help="also into bench/results/<machine>.json")
    parser.add_argument("--no-plots", action="store_true")
    options = parser.parse_args(arguments)
    if options.allocator_tuned and not environment.allocator_tuned():  # it reads its settings when a process starts
        given = sys.argv[1:] if arguments is None else arguments
        return subprocess.run([sys.executable, "-m", "bench.run", *given],
                              env={**os.environ, **environment.TUNED_ALLOCATOR}, cwd=environment.ROOT,
                              check=False).returncode

    report.OUTPUT.mkdir(exist_ok=True)
    raw = report.OUTPUT / "pytest-benchmark" / "newest.json"
    raw.parent.mkdir(exist_ok=True)
    raw.unlink(missing_ok=True)
    command = [str(report.HERE), "-c", str(report.HERE / "pytest.ini"), "-q", f"--minutes={options.minutes}",
               f"--min-rounds={options.min_rounds}", f"--benchmark-json={raw}", "-k", options.select]
    if options.full:
        command.append("--full")
    if options.slow_peers:
        command.append("--slow-peers")
    if options.backends:
        command.append(f"--backends={options.backends}")
    code = pytest.main(command)
    if not raw.exists() or raw.stat().st_size == 0:
        print("nothing was measured", file=sys.stderr)
        return int(code) or 1

    data = report.load(raw)
    name = f"{environment.slug()}.json"
    report.save(data, report.OUTPUT / name)
    if options.save_results:
        saved = report.RESULTS / name
        report.save(report.merged(report.load(saved), data) if saved.exists() else data, saved)
    print()
    print(report.table(data))
    if not options.no_plots:
        print("\nplots: " + ", ".join(str(path) for path in report.plots(data, report.OUTPUT / "plots")))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
