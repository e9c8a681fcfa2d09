"""Tables and plots from measured results; nothing in them is typed, and what was not measured says so.

    python -m bench.report [RESULT.json ...]                  the terminal table (default: this machine's newest run)
    python -m bench.report --plots FOLDER [RESULT.json ...]   the plots as PNG
    python -m bench.report --docs                             README.md and docs/ from bench/results

A result file holds {"environment", "limits", "results"}, one record of kit.measure per line, with the limit and the
commit of its run: a file may hold several runs, each of a part of the grid, and the environment is that of the newest.
pytest-benchmark's own JSON is read too. Every figure shown is computed here from the samples.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib
import json
import math
import pathlib
import re
import sys
from collections.abc import Iterable, Sequence

from .timer import Ratio, Spread

HERE = pathlib.Path(__file__).resolve().parent
RESULTS, OUTPUT = HERE / "results", HERE / "output"
NOT_MEASURED = "not measured"
_EXPLANATION = """\
Ours and the peers are timed in turn, round by round, in one run. The columns:

- **case**: B batch, H heads (H32/8: 32 of queries, 8 of keys and values), T tokens or L length, D head size or
  channels, N state size, K taps of a long kernel, W taps of a short filter; then the options.
- **pass**: forward, forward and backward, or one decode step.
- **ms**, **10-90%**: the median of our time, and the quantiles around it.
- **rate**: operations or bytes that the case needs, per second of ours.
- **of limit**: the rate as a share of what this machine reached in the same run at the named limit: its fastest
  multiply-adds for the dtype, or, where an op is bound by memory, its copy bandwidth.
- **beside**: our time as a multiple of that of another call of ours, timed in turn with it: the plain one without the
  option, or the parts of the whole.
- **times faster**: the fastest peer's median time over ours, in parentheses the median and the quantiles of the ratios
  round by round. Below 1 we are slower, and the row says so.
- **error/budget**: the largest error of outputs and gradients against the float64 reference, as a part of what is
  allowed."""


# ---- result files --------------------------------------------------------------------------------------------------


def condense(raw: dict) -> dict:
    """pytest-benchmark's JSON -> ours: the records, with the environment and limits once."""
    info = raw["machine_info"]
    results = [_rounded(entry["extra_info"]) for entry in raw["benchmarks"]]
    return {"environment": info["pykernels"], "limits": info["limits"], "results": results}


def _rounded(value):
    """Four digits are more than a timing has, and keep the files readable."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_rounded(x) for x in value]
    return value


def save(data: dict, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(record) for record in data["results"])
    head = ",\n".join(f'"{key}": {json.dumps(data[key], indent=1)}' for key in ("environment", "limits"))
    path.write_text(f'{{{head},\n"results": [\n{lines}\n]}}\n')


def merged(before: dict, data: dict) -> dict:
    """`data` with the results of `before` that it has none for, where both are of one machine and torch."""
    if any(before["environment"][name] != data["environment"][name] for name in ("machine", "torch", "threads")):
        return data
    newer = {_key(record): record for record in data["results"]}
    kept = [newer.pop(_key(record), record) for record in before["results"]]
    return {**data, "limits": {**before["limits"], **data["limits"]}, "results": [*kept, *newer.values()]}


def load(path: pathlib.Path) -> dict:
    data = json.loads(path.read_text())
    return condense(data) if "benchmarks" in data else data


# ---- figures -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """The figures of one of our backends in one case; None where there is nothing to compute them from."""

    record: dict
    backend: str | None
    seconds: Spread | None = None
    rate: float | None = None  # FLOP/s or bytes/s
    share: float | None = None  # of the limit
    limit: str | None = None  # which
    error: float | None = None  # worst error / budget
    problem: str | None = None
    peer: str | None = None  # the fastest
    peer_seconds: Spread | None = None
    ratio: Ratio | None = None
    beside: Ratio | None = None  # how many times as long as the call beside ours takes
    rounds: int = 0


def rows(record: dict) -> list[Row]:
    """One row per backend of ours that was tried, or one without figures."""
    peers = [c for c in record["candidates"] if not c["name"].startswith("pykernels ") and c["seconds"]]
    rounds = max((len(c["seconds"]) for c in peers), default=0)
    peers = [c for c in peers if len(c["seconds"]) == rounds]  # the others were far behind (timer.interleave)
    fastest = min(peers, key=lambda c: Spread.of(c["seconds"]).median, default=None)
    limit, bound = record.get("bound") or (None, None)
    found = []
    for entry in record["candidates"]:
        if not entry["name"].startswith("pykernels "):
            continue
        worst = max((e / b if b else math.inf for e, b in entry["errors"].values() if e or b), default=None)
        figures: dict = {"backend": entry["name"].split()[1], "problem": entry["problem"], "error": worst,
                         "rounds": len(entry["seconds"])}
        if entry["seconds"]:
            seconds = Spread.of(entry["seconds"])
            rate = record["work"] / seconds.median
            figures |= {"seconds": seconds, "rate": rate, "share": rate / bound if bound else None, "limit": limit}
            if entry.get("beside"):
                figures["beside"] = Ratio.of(entry["seconds"], entry["beside"])
            if fastest is not None:
                name = f"{fastest['name']} {fastest['variant'] or ''}".strip()
                figures |= {"peer": name, "peer_seconds": Spread.of(fastest["seconds"]),
                            "ratio": Ratio.of(fastest["seconds"], entry["seconds"])}
        found.append(Row(record, **figures))
    return found or [Row(record, None)]


def _number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without exponents."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def _milliseconds(seconds: Spread) -> str:
    return _number(1e3 * seconds.median)


def _unit(record: dict) -> str:
    return "GB/s" if record["limits"][0] in ("read", "copy") else "GFLOP/s"


def _share(row: Row) -> str:
    return "-" if row.share is None else f"{100 * row.share:.0f}% of {row.limit}"


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return "-"
    per_round = row.ratio.per_round
    return f"{row.ratio.of_medians:.2f} ({per_round.median:.2f} [{per_round.low:.2f}, {per_round.high:.2f}])"


def _beside(row: Row) -> str:
    return "-" if row.beside is None else f"{row.beside.of_medians:.2f} times {row.record['beside']}"


def line(record: dict) -> str:
    """One line for the progress of a run."""
    threads = f" x{record['threads']}" if record["device"] == "cpu" else ""
    head = f"{record['op']} {record['shape']} {record['options']} {record['dtype']} {record['direction']}{threads}:"
    parts = []
    for row in rows(record):
        if row.problem:
            parts.append(f"{row.backend} WRONG: {row.problem}")
        elif row.seconds is None:
            parts.append(NOT_MEASURED)
        else:
            against = f", {_ratio(row)} times {row.peer} {_milliseconds(row.peer_seconds)} ms" if row.ratio else ""
            against += f", takes {_beside(row)}" if row.beside else ""
            parts.append(f"{row.backend} {_milliseconds(row.seconds)} ms, {_number(row.rate / 1e9)} {_unit(record)}, "
                         f"{_share(row)}{against}, {row.rounds} rounds")
    return f"{head} {'; '.join(parts)}"


# ---- the terminal --------------------------------------------------------------------------------------------------

# Each column with its alignment.
_COLUMNS = {"case": "<", "dtype": "<", "pass": "<", "threads": ">", "backend": "<", "ms": ">", "10-90%": ">",
            "rate": ">", "of limit": ">", "beside": "<", "fastest peer": "<", "peer ms": ">",
            "times faster (per round)": "<", "error/budget": ">"}


def _cells(row: Row) -> list[str]:
    record = row.record
    case = [f"{record['shape']} {record['options']}", record["dtype"], record["direction"],
            str(record["threads"]) if record["device"] == "cpu" else "gpu"]
    error = "-" if row.error is None else f"{row.error:.2f}"
    if row.seconds is None:
        return [*case, row.backend or "-", f"WRONG: {row.problem}" if row.problem else NOT_MEASURED, *["-"] * 7, error]
    spread = f"{_number(1e3 * row.seconds.low)}-{_number(1e3 * row.seconds.high)}"
    rate = f"{_number(row.rate / 1e9)} {_unit(record)}"
    slower = "  slower" if row.ratio and row.ratio.of_medians < 1 else ""
    peer = [row.peer, _milliseconds(row.peer_seconds)] if row.ratio else ["-", "-"]
    return [*case, row.backend, _milliseconds(row.seconds), spread, rate, _share(row), _beside(row),
            *peer, _ratio(row) + slower, error]


def _columns(found: Iterable[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines, without the column of what is beside where no row has any."""
    lines = [_cells(row) for row in found]
    at = list(_COLUMNS).index("beside")
    kept = [i for i in range(len(_COLUMNS)) if i != at or any(line[at] != "-" for line in lines)]
    return [list(_COLUMNS)[i] for i in kept], [[line[i] for i in kept] for line in lines]


def _aligned(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *lines)]

    def aligned(cells: Sequence[str]) -> str:
        return "  ".join(f"{cell:{_COLUMNS[name]}{n}}" for cell, name, n in zip(cells, header, widths)).rstrip()

    return "\n".join(aligned(cells) for cells in (header, *lines))


def _by_op(results: Iterable[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = collections.defaultdict(list)
    for record in results:
        groups[record["op"]].append(record)
    return groups


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _commits(data: dict) -> str:
    """The commit, or commits, that the results are of."""
    return ", ".join(sorted({record["commit"] for record in data["results"] if record.get("commit")})) or "unknown"


def _machine(environment: dict) -> str:
    if environment.get("gpu"):
        return f"{environment['gpu']} (compute capability {environment['gpu_capability']})"
    return f"{environment['cpu']}, {environment['cores']} cores, {environment['isa'] or 'native library not built'}"


def _limit_lines(limits: dict) -> list[str]:
    """Each place's limits, then how they were measured."""
    found, notes = [], []
    for place, measured in sorted(limits.items()):
        device, threads = place.split()
        label = f"{threads} thread{'s' * (threads != '1')}" if device == "cpu" else "GPU"
        values = [f"{name} {_number(value / 1e9)} {'GB/s' if name in ('read', 'copy') else 'GFLOP/s'}"
                  for name, value in measured["values"].items() if value]
        found.append(f"{label}: " + ", ".join(values))
        if measured["notes"] not in notes:
            notes.append(measured["notes"])
    return found + notes


def _missing(results: Iterable[dict]) -> dict[str, list[str]]:
    """Who was not measured anywhere, and why."""
    reasons: dict[str, list[str]] = collections.defaultdict(list)
    seen = set()
    for record in results:
        seen |= {entry["name"] for entry in record["candidates"]}
        for name, reason in record["missing"].items():
            if reason not in reasons[name]:
                reasons[name].append(reason)
    return {name: why for name, why in reasons.items() if name not in seen}


def table(data: dict) -> str:
    """The terminal table: every case, won or lost."""
    environment, limits = data["environment"], data["limits"]
    versions = "torch {torch}, pykernels {pykernels}".format_map(environment) + f", commit {_commits(data)}"
    out = [f"{_machine(environment)}; {versions}",
           *(f"limits, {text}" if i < len(limits) else f"  ({text})" for i, text in enumerate(_limit_lines(limits)))]
    for op, records in _by_op(data["results"]).items():
        found = [row for record in records for row in rows(record)]
        out += ["", op, _aligned(*_columns(found))]
        kinds: dict[tuple, list[Row]] = collections.defaultdict(list)
        for row in found:
            kinds[row.backend, row.record["dtype"], row.record["direction"]].append(row)
        for (backend, dtype, direction), members in sorted(kinds.items(), key=lambda item: str(item[0])):
            ratios = [row.ratio.of_medians for row in members if row.ratio]
            if ratios:
                won = sum(ratio > 1 for ratio in ratios)
                out.append(f"{backend} {dtype} {direction}: faster than the fastest peer in {won} of {len(ratios)} "
                           f"cases, {_geometric_mean(ratios):.2f} times in the geometric mean, "
                           f"{min(ratios):.2f} to {max(ratios):.2f}")
    missing = _missing(data["results"])
    if missing:
        out += ["", "not measured here:"] + [f"  {name}: {'; '.join(why)}" for name, why in sorted(missing.items())]
    return "\n".join(out)


# ---- Markdown ------------------------------------------------------------------------------------------------------


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines))


def _key(record: dict) -> tuple:
    return tuple(record[name] for name in ("op", "shape", "options", "dtype", "direction", "device", "threads"))


def _in_order(records: Iterable[dict]) -> list[dict]:
    """Case by case, as they first come, each by pass, dtype and thread count."""
    records = list(records)
    first: dict[tuple, int] = {}
    for record in records:
        first.setdefault((record["op"], record["shape"], record["options"]), len(first))
    return sorted(records, key=lambda record: (first[record["op"], record["shape"], record["options"]],
                                               record["direction"], record["dtype"] != "fp32", record["dtype"],
                                               record["threads"]))


def _unmeasured(records: Iterable[dict]) -> str:
    """Names the cases of one op, those that lack the same dtypes, passes and thread counts together."""
    lacking: dict[str, dict[int, dict[str, list[str]]]] = {}
    for record in records:
        threads = lacking.setdefault(f"{record['shape']} {record['options']}", {})
        directions = threads.setdefault(record["threads"] if record["device"] == "cpu" else 0, {})
        directions.setdefault(record["direction"], []).append(record["dtype"])

    def kinds(directions: dict[str, list[str]]) -> str:
        alike: dict[str, list[str]] = {}
        for direction, dtypes in directions.items():
            alike.setdefault(", ".join(dtypes), []).append(direction)
        return " and ".join(f"{dtypes} {', '.join(found)}" for dtypes, found in alike.items())

    cases: dict[str, list[str]] = {}
    for case, threads in lacking.items():
        alike: dict[str, list[int]] = {}
        for count, directions in threads.items():
            alike.setdefault(kinds(directions), []).append(count)
        places = {kind: " and ".join(map(str, counts)) for kind, counts in alike.items()}
        where = {kind: "" if count == "0" else f" on {count} thread{'s' * (count != '1')}"
                 for kind, count in places.items()}
        cases.setdefault("; ".join(kind + where[kind] for kind in alike), []).append(case)
    return "Not measured: " + "; ".join(f"{', '.join(f'`{case}`' for case in names)} ({lack})"
                                        for lack, names in cases.items()) + "."


def grid(environment: dict) -> list[dict]:
    """Every case that the benchmark files have for a machine, without figures."""
    places = [("cuda", 1)] if environment.get("gpu") else [("cpu", n) for n in sorted({1, environment["threads"]})]
    modules = [importlib.import_module(f"bench.{path.stem}") for path in sorted(HERE.glob("bench_*.py"))]
    return [{**dataclasses.asdict(case), "limits": list(case.limits), "checked": None, "candidates": [], "missing": {}}
            for module in modules for case, _ in module.cases(places)]


def _summarised(record: dict | None) -> str:
    found = [row for row in rows(record) if row.seconds is not None] if record else []
    if ratios := [row.ratio.of_medians for row in found if row.ratio]:
        return f"{max(ratios):.2f}"
    return min((f"{_milliseconds(row.seconds)} ms" for row in found), default=NOT_MEASURED)


def summary(data: dict, expected: Sequence[dict]) -> str:
    """Speed-ups of the best backend, per op: cases down, dtype and pass across, thread counts within a cell."""
    measured = {_key(record): record for record in data["results"]}
    known = {_key(record) for record in expected} | set(measured)
    out = []
    for op, records in _by_op([*expected, *data["results"]]).items():
        threads = sorted({record["threads"] for record in records})
        lines = list(dict.fromkeys((record["shape"], record["options"]) for record in records))
        columns = sorted({(record["dtype"], record["direction"]) for record in records},
                         key=lambda column: (column[0] != "fp32", *column))
        device = records[0]["device"]

        def cell(shape: str, options: str, dtype: str, direction: str) -> str:
            """Per thread count the speed-up, or our time where no peer runs; a dash where the grid has no such case."""
            keys = [(op, shape, options, dtype, direction, device, count) for count in threads]
            texts = [_summarised(measured.get(key)) for key in keys if key in known]
            return " / ".join(dict.fromkeys(texts) if set(texts) == {NOT_MEASURED} else texts) or "–"

        counts = f" ({' / '.join(map(str, threads))} threads)" if device == "cpu" else ""
        header = [f"`{op}`{counts}", *(f"{dtype} {direction}" for dtype, direction in columns)]
        out.append(_markdown(header, [[" ".join(row), *(cell(*row, *column) for column in columns)] for row in lines]))
    return "\n\n".join(out)


def _main(data: dict, expected: Iterable[dict]) -> tuple[dict, list[dict]]:
    """Without the extra cases."""
    return {**data, "results": [r for r in data["results"] if not r["extra"]]}, [r for r in expected if not r["extra"]]


def readme(machines: Sequence[dict], expected=grid) -> str:
    """The README's section: a summary of the main cases for each machine."""
    out = []
    for data in machines:
        environment = data["environment"]
        out += [f"**{_machine(environment)}**; torch {environment['torch']}, commit {_commits(data)}. "
                "Times faster than the fastest peer:", summary(*_main(data, expected(environment)))]
    if not any(data["environment"].get("gpu") for data in machines):
        out.append(f"NVIDIA GPUs: {NOT_MEASURED}.")
    if not any(not data["environment"].get("gpu") for data in machines):
        out.append(f"CPUs: {NOT_MEASURED}.")
    out.append("All figures, with spread and share of the machine's limits: [docs/benchmarks.md](docs/benchmarks.md).")
    return "\n\n".join(out)


def full(machines: Sequence[dict], expected=grid) -> str:
    """docs/benchmarks.md: every figure."""
    out = ["# Benchmarks",
           "Generated by `python -m bench.report --docs` from bench/results; `make bench` measures your machine.",
           _EXPLANATION]
    for data in machines:
        environment, limits = data["environment"], data["limits"]
        named = ("torch", "triton", "cuda", "python")
        versions = [f"{name} {environment[name]}" for name in named if environment[name]]
        out += [f"## {_machine(environment)}",
                f"{', '.join(versions)}; commit {_commits(data)}, {environment['date'][:10]}.",
                "\n".join(f"- {text}" for text in _limit_lines(limits))]
        every = {_key(record): record for record in (*data["results"], *expected(environment), *data["results"])}
        for op, records in _by_op(_in_order(every.values())).items():
            out.append(f"### {op}")
            if tried := [record for record in records if record["candidates"]]:
                out.append(_markdown(*_columns(row for record in tried for row in rows(record))))
            if untried := [record for record in records if not record["candidates"]]:
                out.append(_unmeasured(untried))
            if tried:
                out += [f"![{op}](plots/{name})" for name in _plot_names(environment["machine"], op)]
        missing = _missing(data["results"])
        if missing:
            reasons = [f"{name} ({', '.join(why)})" for name, why in sorted(missing.items())]
            out.append(f"Not measured here: {'; '.join(reasons)}.")
    return "\n\n".join(out) + "\n"


def between(text: str, begin: str, end: str, content: str) -> str:
    """`text` with what stands between two markers replaced."""
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"expected one {begin} and one {end}")
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


# ---- plots ---------------------------------------------------------------------------------------------------------


def _plot_names(machine: str, op: str) -> tuple[str, str]:
    return f"{machine}-{op}-speedup.png", f"{machine}-{op}-rate.png"


def plots(data: dict, folder: pathlib.Path) -> list[pathlib.Path]:
    """Per op: bars of the speed-up with its spread, and of the rate beside the machine's limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    environment = data["environment"]
    written = []
    for op, records in _by_op(data["results"]).items():
        panels: dict[tuple, list[Row]] = collections.defaultdict(list)
        for row in (row for record in records for row in rows(record) if row.seconds is not None):
            panels[row.record["dtype"], row.record["direction"], row.record["threads"]].append(row)
        if not panels:
            continue
        keys = sorted(panels, key=lambda key: (key[2], key[0] != "fp32", key[1] != "fwd"))
        columns = min(4, len(keys))
        lines = -(-len(keys) // columns)
        height = 1.2 + 0.3 * max(len(members) for members in panels.values())
        for kind, name in zip(("speedup", "rate"), _plot_names(environment["machine"], op)):
            figure, axes = pyplot.subplots(lines, columns, squeeze=False, layout="constrained",
                                           figsize=(4.2 * columns, height * lines))
            for axis in axes.flat[len(keys):]:
                axis.set_visible(False)
            for axis, key in zip(axes.flat, keys):
                (_draw_speedup if kind == "speedup" else _draw_rate)(axis, panels[key])
                dtype, direction, threads = key
                place = f", {threads} thread{'s' * (threads > 1)}" if records[0]["device"] == "cpu" else ""
                axis.set_title(f"{dtype} {direction}{place}", fontsize=9)
                axis.tick_params(labelsize=7)
            figure.suptitle(f"{op}: {_machine(environment)}, torch {environment['torch']}", fontsize=10)
            path = folder / name
            figure.savefig(path, dpi=110)
            pyplot.close(figure)
            written.append(path)
    return written


def _draw_speedup(axis, members: Sequence[Row]) -> None:
    members = [row for row in members if row.ratio is not None]
    names = [_bar_name(row) for row in members]
    values = [row.ratio.of_medians for row in members]
    spread = [[max(0.0, value - row.ratio.per_round.low) for value, row in zip(values, members)],
              [max(0.0, row.ratio.per_round.high - value) for value, row in zip(values, members)]]
    axis.barh(names, values, xerr=spread, color=["tab:blue" if value >= 1 else "tab:red" for value in values],
              error_kw={"elinewidth": 0.8})
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_xlabel("times faster than the fastest peer", fontsize=8)


def _draw_rate(axis, members: Sequence[Row]) -> None:
    names = [_bar_name(row) for row in members]
    at = range(len(members))
    ours = [row.rate / 1e9 for row in members]
    peers = [row.record["work"] / row.peer_seconds.median / 1e9 if row.peer_seconds else 0.0 for row in members]
    axis.barh([i - 0.2 for i in at], ours, height=0.4, color="tab:blue", label="pykernels")
    axis.barh([i + 0.2 for i in at], peers, height=0.4, color="tab:gray", label="fastest peer")
    axis.set_yticks(list(at), names)
    limit, bound = members[0].record.get("bound") or (None, None)
    if bound:
        axis.axvline(bound / 1e9, color="black", linewidth=0.8, linestyle="--", label=f"limit ({limit})")
    axis.invert_yaxis()
    axis.set_xlabel(_unit(members[0].record), fontsize=8)
    axis.legend(fontsize=6)


def _bar_name(row: Row) -> str:
    return f"{row.record['shape']} {row.record['options']}" + ("" if row.backend == "cpu" else f" {row.backend}")


# ---- command line --------------------------------------------------------------------------------------------------


def _newest() -> list[pathlib.Path]:
    found = sorted(OUTPUT.glob("*.json"), key=lambda path: path.stat().st_mtime) or sorted(RESULTS.glob("*.json"))
    return found[-1:]


def support() -> str:
    """The README's table of what each op's backends serve, from the ops' own entries in the table of backends."""
    import torch

    from pykernels.backends import BACKENDS, Query
    from pykernels.ops import OPS

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    sizes = collections.defaultdict(lambda: 64)

    def cell(op, backend: str) -> str:
        if backend not in op.backends:
            return "–"
        device = "cpu" if backend in ("cpu", "reference") else "cuda"
        served = [name for name, dtype in dtypes.items() if op.backends[backend](Query(device, dtype, sizes)) is None]
        return " ".join(served) + (" (on request)" if backend in op.explicit_only else "")

    lines = ["| op | " + " | ".join(BACKENDS) + " |", "|---" * (1 + len(BACKENDS)) + "|"]
    lines += [f"| `{op.name}` | " + " | ".join(cell(op, backend) for backend in BACKENDS) + " |" for op in OPS]
    return "\n".join(lines)


def write_docs(root: pathlib.Path) -> None:
    """Regenerates the README's support matrix and results, docs/benchmarks.md and docs/plots, from bench/results."""
    machines = [load(path) for path in sorted(RESULTS.glob("*.json"))]
    path = root / "README.md"
    path.write_text(between(path.read_text(), "<!-- support:begin -->", "<!-- support:end -->", support()))
    path.write_text(between(path.read_text(), "<!-- results:begin -->", "<!-- results:end -->", readme(machines)))
    (root / "docs" / "benchmarks.md").write_text(full(machines))
    for data in machines:
        plots(data, root / "docs" / "plots")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=pathlib.Path)
    parser.add_argument("--plots", type=pathlib.Path, metavar="FOLDER", help="write the plots there")
    parser.add_argument("--docs", action="store_true", help="regenerate README.md, docs/benchmarks.md and docs/plots")
    options = parser.parse_args(arguments)
    if options.docs:
        write_docs(HERE.parent)
        return 0
    paths = options.results or _newest()
    if not paths:
        print(f"no results: {NOT_MEASURED} yet (make bench)", file=sys.stderr)
        return 1
    for path in paths:
        data = load(path)
        print(table(data))
        if options.plots:
            print("\n".join(str(written) for written in plots(data, options.plots)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
