"""python -m pykernels info: what this installation is and which backend each op takes here, and why.
python -m pykernels verify: every op, backend and dtype available here against the float64 definition, and timed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import backends


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pykernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser(
        "info", help="versions, the native library, and which backend each op takes here, and why"
    )
    verify = commands.add_parser(
        "verify", help="check every op that can run here; exits with 1 if anything is wrong"
    )
    for command in (info, verify):
        command.add_argument("--json", action="store_true", help="print one JSON object")
    verify.add_argument("--op", help="only this function, e.g. flash_attention")
    verify.add_argument(
        "--backend", choices=backends.BACKENDS, help="only this backend (reference: only if asked for)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "info":
        from ._info import info

        return info(options.json)
    from .testing import OPS
    from .testing.verify import verify

    names = [op.name for op in OPS]
    if options.op is not None and options.op not in names:
        parser.error(f"--op must be one of {', '.join(names)}, got {options.op!r}")
    return verify([op for op in OPS if options.op in (None, op.name)], options.backend, options.json)


if __name__ == "__main__":
    sys.exit(main())
