"""Runs the benchmark files under pytest-benchmark, which selects, stores and compares; the timing is ours (timer.py).

    python -m pytest bench -k "causal and bf16" --benchmark-json=result.json

`python -m bench.run` does the whole grid, with the table and plots.
"""

from __future__ import annotations

import collections
import time

import pytest

from . import environment, kit, report

# A case has at least this much: the quick ones are many rounds even where the time is up.
LEAST_SECONDS = 0.3


class _Replay:
    """The clock that pytest-benchmark sees: each call of `step` takes one of our samples."""

    def __init__(self) -> None:
        self._now = 0.0
        self._samples: collections.deque[float] = collections.deque()

    def load(self, samples: list[float]) -> None:
        self._samples = collections.deque(samples)

    def now(self) -> float:
        return self._now

    def step(self) -> None:
        self._now += self._samples.popleft()


_replay = _Replay()


class _Budget:
    """Shares the session's time among its cases: each gets an equal part of what is left."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds, self.cases, self.done = time.monotonic(), seconds, 0, 0

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def next(self) -> float:
        share = max(0.0, self.seconds - self.elapsed()) / max(1, self.cases - self.done)
        self.done += 1
        return share


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pykernels")
    group.addoption("--minutes", type=float, default=4.0, help="time for the whole grid; rounds adapt (default 4)")
    group.addoption("--full", action="store_true", help="also the extra cases, which -k selects too")
    group.addoption("--slow-peers", action="store_true", help="also peers that compile for every case")
    group.addoption("--min-rounds", type=int, default=5, help="least rounds of a case (default 5; 3 once time is up)")
    group.addoption("--backends", help="our backends to measure, such as cpu,reference (default: all compiled ones)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_BUDGET] = _Budget(60 * config.getoption("--minutes"))


_BUDGET = pytest.StashKey[_Budget]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tuned, chosen = environment.allocator_tuned(), config.getoption("--full") or config.option.keyword

    def left_out(case: kit.Case) -> bool:
        return case.tuned != tuned or (case.extra and not (chosen or tuned))

    config.hook.pytest_deselected(items=[item for item in items if left_out(item.callspec.params["case"])])
    items[:] = [item for item in items if not left_out(item.callspec.params["case"])]
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=_replay.now))


def pytest_collection_finish(session: pytest.Session) -> None:
    budget = session.config.stash[_BUDGET]
    budget.start, budget.cases = time.monotonic(), len(session.items)


def pytest_report_teststatus(report: pytest.TestReport) -> tuple | None:
    """Passed cases need no dot: each has printed its line."""
    return ("passed", "", "") if report.passed and report.when == "call" else None


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["pykernels"] = environment.describe()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    """Adds the limits, which the session has measured by now, beside the environment."""
    cases = [entry["extra_info"] for entry in output_json["benchmarks"]]
    output_json["machine_info"]["limits"] = environment.limits({(case["device"], case["threads"]) for case in cases})


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark):
    """kit.measure with its share of the session's time; prints a line and hands the samples to pytest-benchmark."""
    config = request.config
    budget = config.stash[_BUDGET]
    capture = config.pluginmanager.getplugin("capturemanager")
    wanted = config.getoption("--backends")

    def run(case: kit.Case, problem: kit.Problem, peers: list[kit.Peer]) -> None:
        limits = environment.limits({(case.device, case.threads)})
        seconds, min_rounds = budget.next(), config.getoption("--min-rounds")
        if seconds == 0.0:  # late: this machine is slower than the time given allows for
            min_rounds = min(min_rounds, 3)
        seconds = max(seconds, LEAST_SECONDS)
        record = kit.measure(case, problem, peers, seconds=seconds, wanted=wanted.split(",") if wanted else None,
                             slow_peers=config.getoption("--slow-peers"), min_rounds=min_rounds)
        values = limits[environment.place(case.device, case.threads)]["values"]
        record["bound"] = next(([name, values[name]] for name in case.limits if values.get(name)), None)
        record["commit"] = environment.commit()
        benchmark.extra_info.update(record)
        benchmark.group = f"{case.op} {case.shape} {case.options}"
        with capture.global_and_fixture_disabled():
            clock = "{:d}:{:02d}".format(*divmod(int(budget.elapsed()), 60))
            print(f"\n[{budget.done}/{budget.cases} {clock}] {report.line(record)}", end="", flush=True)
        ours = [entry for entry in record["candidates"] if entry["name"].startswith("pykernels ")]
        measured = [entry for entry in ours if entry["seconds"]]
        # pytest-benchmark's own row is our first backend; all the candidates are in its extra information.
        samples = measured[0]["seconds"] if measured else [0.0]
        _replay.load(samples)
        benchmark.pedantic(_replay.step, rounds=len(samples))
        wrong = [f"{entry['name']}: {entry['problem']}" for entry in ours if entry["problem"]]
        assert not wrong, "; ".join(wrong)
        assert ours, f"no backend of pykernels runs {case}: {record['missing']}"

    return run
