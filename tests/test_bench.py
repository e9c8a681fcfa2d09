"""The benchmark kit: its timer, its arithmetic, its checks and its report."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy
import pytest
import torch

from bench import (attention_gpu, bench_fft_conv, bench_flash_attention, environment, kit, limits, peers, report, run,
                   timer)
from pykernels import testing

ROOT = pathlib.Path(__file__).resolve().parent.parent

# ---- timer ---------------------------------------------------------------------------------------------------------


class FakeClock:
    """Each candidate takes the seconds it returns; `drift` slows everything down round by round."""

    def __init__(self, drift: float = 1.0) -> None:
        self.drift, self.order = drift, []

    def calls(self, warm_up_seconds: float) -> int:
        return 1

    def sample(self, run, calls: int) -> tuple[float, float]:
        name, seconds = run()
        round_ = sum(earlier == name for earlier in self.order)
        self.order.append(name)
        return seconds * self.drift ** round_, seconds


def candidates(**seconds: float) -> dict:
    return {name: lambda name=name, value=value: (name, value) for name, value in seconds.items()}


def interleave(clock: FakeClock, given: dict, **options) -> dict[str, list[tuple[float, float]]]:
    return timer.interleave(given, clock, **{"seconds": 0.0, "warm": dict.fromkeys(given, 0.0), **options})


def test_each_round_runs_each_candidate_once_in_changing_order() -> None:
    clock = FakeClock()
    samples = interleave(clock, candidates(a=1.0, b=2.0, c=3.0), min_rounds=12)
    rounds = [tuple(clock.order[i:i + 3]) for i in range(0, len(clock.order), 3)]
    assert len(rounds) == 12
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 3
    assert [len(taken) for taken in samples.values()] == [12, 12, 12]
    assert samples["b"][0] == (2.0, 2.0)


def test_peers_far_behind_the_fastest_are_timed_once() -> None:
    given = candidates(ours=10.0, theirs=1.0, near=2.9, far=3.1)
    samples = interleave(FakeClock(), given, peers=("theirs", "near", "far"), min_rounds=5)
    assert {name: len(taken) for name, taken in samples.items()} == {"ours": 5, "theirs": 5, "near": 5, "far": 1}


def test_rounds_adapt_to_the_time_given() -> None:
    def slow() -> None:
        time.sleep(0.01)

    def rounds(seconds: float, **options) -> int:
        samples = timer.interleave({"slow": slow}, timer.CpuClock(), seconds=seconds, warm={"slow": 0.01}, **options)
        return len(samples["slow"])

    assert rounds(0.0, min_rounds=3) == 3
    assert 3 <= rounds(0.2, min_rounds=2) <= 20
    assert rounds(10.0, max_rounds=4) == 4


def test_a_sample_averages_as_many_calls_as_it_needs() -> None:
    clock, count = timer.CpuClock(), []
    assert clock.calls(1.0) == 1
    assert clock.calls(1e-4) == 20
    seconds, _ = clock.sample(lambda: count.append(time.sleep(0.001)), 5)
    assert len(count) == 5
    assert 0.001 <= seconds < 0.005


def test_garbage_collection_is_restored_after_an_error() -> None:
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        interleave(FakeClock(), {"a": lambda: 1 / 0})
    assert gc.isenabled()


def test_ratio_within_rounds_is_untouched_by_drift() -> None:
    samples = interleave(FakeClock(drift=1.3), candidates(ours=1.0, theirs=2.5), min_rounds=9)
    ratio = timer.Ratio.of([s for s, _ in samples["theirs"]], [s for s, _ in samples["ours"]])
    assert ratio.of_medians == pytest.approx(2.5)
    assert dataclasses.astuple(ratio.per_round) == pytest.approx((2.5, 2.5, 2.5))


def test_ratio_arithmetic() -> None:
    ours, theirs = [1.0, 2.0, 4.0], [3.0, 2.0, 8.0]  # round by round 3, 1, 2
    ratio = timer.Ratio.of(theirs, ours)
    assert ratio.of_medians == 3.0 / 2.0
    assert dataclasses.astuple(ratio.per_round) == pytest.approx((2.0, 1.2, 2.8))
    with pytest.raises(ValueError, match="same rounds"):
        timer.Ratio.of([1.0], [1.0, 2.0])


def test_quantiles() -> None:
    values = numpy.random.default_rng(0).normal(size=17).tolist()
    for p in (0.0, 0.1, 0.5, 0.77, 1.0):
        assert timer.quantile(values, p) == pytest.approx(numpy.quantile(values, p))
    assert timer.quantile([3.0], 0.9) == 3.0


def test_fastest_variant() -> None:
    calls = {"quick": 0, "close": 0, "slow": 0}

    def variant(name: str, seconds: float):
        def run() -> None:
            calls[name] += 1
            time.sleep(seconds)

        return run

    seconds = {"slow": 0.4, "close": 0.08, "quick": 0.05}
    assert timer.fastest({name: variant(name, value) for name, value in seconds.items()}, "cpu") == "quick"
    assert calls == {"quick": 2, "close": 2, "slow": 1}


# ---- limits --------------------------------------------------------------------------------------------------------


def test_native_limits_compile_and_do_what_they_count() -> None:
    native, reason = limits._native()
    assert reason is None
    assert native.fp32_fma(1000) == 1000 * 12 * native.vector_bits() / 32 * 2
    for unit in (native.bf16_dot, native.bf16_tile):
        assert unit(2000) in (0, 2 * unit(1000))
    source = torch.randint(256, (1 << 20,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    native.copy_memory(ctypes.c_void_p(target.data_ptr()), ctypes.c_void_p(source.data_ptr()), source.nbytes)
    assert torch.equal(target, source)


def test_a_limit_is_one() -> None:
    """torch's matmul does not pass it; by the thread's own time, which other work on the machine leaves alone."""
    native, _ = limits._native()
    a, b = torch.randn(2, 512, 512)

    def best(work) -> float:
        seconds = []
        for _ in range(10):
            start = time.thread_time()
            work()
            seconds.append(time.thread_time() - start)
        return min(seconds)

    with testing.use_threads(1):
        limit = native.fp32_fma(100_000) / best(lambda: native.fp32_fma(100_000))
        assert limit > 0.8 * 2 * 512**3 / best(lambda: a @ b)


# ---- flash attention's grid ----------------------------------------------------------------------------------------


def small_case(dtype: str = "fp32", direction: str = "fwd+bwd", options: str = "causal") -> tuple[kit.Case, tuple]:
    return kit.Case("flash_attention", "small", options, dtype, direction, "cpu", 1, 1.0, ("fp32",)), (2, 3, 48, 8)


def test_grid_covers_every_combination_once() -> None:
    cases = [case for case, _ in bench_flash_attention.cases([("cpu", 1), ("cpu", 2)])]
    attention = [case for case in cases if case.op == "flash_attention"]
    # Shapes, masks, dtypes, passes, thread counts; then rows of options and the packed one, dtypes, thread counts.
    assert len(attention) == 4 * 2 * 2 * 2 * 2 + 7 * 2 * 2
    assert len({case.id for case in attention}) == len(attention)
    decode = {case.shape for case in cases if case.op == "flash_attention_decode"}
    assert decode == {f"B{batch} H32/8 T{tokens} D128" for batch in (1, 16) for tokens in (4096, 32768)}
    # Without --full: on all threads alone, and every option of a call once.
    main = [case for case in cases if not case.extra]
    assert {case.threads for case in main} == {2} and len(main) < len(cases) / 3
    assert {case.options for case in main} == {case.options for case in cases}
    work = {(case.options, case.direction): case.work for case in attention if case.shape == "B1 H8 T2048 D64"}
    assert work["full", "fwd"] == 4 * 8 * 2048 * 2048 * 64
    assert work["causal", "fwd"] == work["full", "fwd"] / 2
    assert work["full", "fwd+bwd"] == 3.5 * work["full", "fwd"]


@pytest.mark.parametrize("causal", [False, True])
def test_reference_in_blocks_is_the_reference(causal: bool) -> None:
    shape = (1, 2, 1300, 8)
    expected = bench_flash_attention._expected(shape, "causal" if causal else "full", torch.float32, "cpu")
    q, k, v, dout = (x.double() for x in bench_flash_attention._inputs([(1, 1300, 2, 8)] * 4, torch.float32, "cpu"))
    sample = testing.Sample({"q": q, "k": k, "v": v, "causal": causal}, ("q", "k", "v"))
    whole = testing.run(testing.FLASH_ATTENTION, sample, "reference", grad={"out": dout})
    for name, x in expected.reference.items():
        torch.testing.assert_close(x, expected.part(name, whole[name]), rtol=1e-12, atol=1e-12)
        assert 0 < (expected.yardstick[name].double() - x).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
def test_measure_checks_and_times(direction: str, dtype: str) -> None:
    case, shape = small_case(direction=direction, dtype=dtype)
    problem = bench_flash_attention.Attention(case, shape)
    record = kit.measure(case, problem, peers.for_op(case.op), seconds=0.0, wanted=["reference"], min_rounds=3)
    record = json.loads(json.dumps(record))
    ours, theirs = record["candidates"]
    assert (ours["name"], theirs["name"]) == ("pykernels reference", "torch SDPA")
    assert theirs["variant"] in ("default", "math")
    for entry in (ours, theirs):
        assert entry["problem"] is None
        assert len(entry["seconds"]) == 3
        assert all(0 < seconds < 5 for seconds in entry["seconds"])
        assert set(entry["errors"]) == ({"out"} if direction == "fwd" else {"out", "dq", "dk", "dv"})
        assert all(0 <= error <= 10 * budget < 1 for error, budget in entry["errors"].values())
    assert record["checked"] == "batch 2 of 2, head 2 of 3"
    slow = "has no backward on CPUs" if case.backward else "compiles for every case: measured with --slow-peers"
    assert record["missing"]["FlexAttention"] == slow


@pytest.mark.parametrize("options", ["causal alibi", "causal bias", "causal softcap 20", "causal window 512"])
def test_measure_options(options: str) -> None:
    case, shape = small_case(options=options)
    record = kit.measure(case, bench_flash_attention.Attention(case, shape), peers.for_op(case.op), seconds=0.0,
                         wanted=["reference"], min_rounds=2)
    names = [entry["name"] for entry in record["candidates"]]
    assert names == ["pykernels reference"] + ["torch SDPA"] * ("softcap" not in options)
    assert all(entry["problem"] is None for entry in record["candidates"])
    assert "beside" not in record["candidates"][0]


def test_measure_beside() -> None:
    """A call with an option and the plain one, in turns; what is beside is no peer."""
    case, shape = small_case(options="causal alibi")
    case = dataclasses.replace(case, beside="the plain call")
    record = kit.measure(case, bench_flash_attention.Attention(case, shape), peers.for_op(case.op), seconds=0.0,
                         wanted=["reference"], min_rounds=2)
    ours, theirs = record["candidates"]
    assert len(ours["beside"]) == 2 and "beside" not in theirs
    (row,) = report.rows(record)
    assert row.beside.of_medians == pytest.approx(sum(ours["seconds"]) / sum(ours["beside"]))
    assert row.peer == "torch SDPA default" or row.peer == "torch SDPA math"
    assert "times the plain call" in report.line(record)
    assert "times the plain call" in report.table({"environment": ENVIRONMENT, "limits": {}, "results": [record]})


def test_measure_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_flash_attention, "PACKED", (2, 8, (50, 7, 1, 20)))
    (case, shape), *_ = bench_flash_attention._packed_cases([("cpu", 1)])
    assert case.shape == "H2 D8 4 sequences of 1 to 50"
    problem = bench_flash_attention.Packed(case, shape)
    record = kit.measure(case, problem, peers.for_op(case.op), seconds=0.0, wanted=["reference"], min_rounds=2)
    assert [entry["name"] for entry in record["candidates"]] == ["pykernels reference", "torch SDPA"]
    assert [entry["problem"] for entry in record["candidates"]] == [None, None]
    assert len(record["candidates"][0]["beside"]) == 2


@pytest.mark.parametrize("options", ["full cache", "paged cache"])
def test_measure_decode(options: str) -> None:
    shape = (2, 4, 2, 128, 8)
    case = kit.Case("flash_attention_decode", "small", options, "fp32", "step", "cpu", 1, 1.0, ("copy",))
    problem = bench_flash_attention.Decode(case, shape)
    assert len(problem.caches) == 64
    assert len({k.data_ptr() for k, _ in problem.caches}) == 64
    record = kit.measure(case, problem, peers.for_op(case.op), seconds=0.0, wanted=["reference"], min_rounds=2)
    assert [entry["problem"] for entry in record["candidates"]] == [None, None]
    assert [len(entry["seconds"]) for entry in record["candidates"]] == [2, 2]


def test_what_is_wrong_is_not_timed() -> None:
    case, shape = small_case()

    class Wrong(bench_flash_attention.Attention):
        def ours(self, backend: str) -> kit.Call:
            right = super().ours(backend)
            return kit.Call(right.run, lambda result: {**right.outputs(result), "dk": torch.zeros_like(self.k)})

    def inexact(problem: bench_flash_attention.Attention, case: kit.Case) -> dict[str, kit.Call]:
        right = bench_flash_attention.Attention.ours(problem, "reference")
        return {"all": kit.Call(right.run, lambda result: {n: 0.999 * x for n, x in right.outputs(result).items()})}

    problem = Wrong(case, shape)
    record = kit.measure(case, problem, [kit.Peer("off", "flash_attention", lambda case: None, inexact)], seconds=0.0,
                         wanted=["reference"], min_rounds=2)
    ours, off = record["candidates"]
    assert ours["problem"].startswith("error of dk is 1.0")
    assert "its budget" in off["problem"]
    assert ours["seconds"] == off["seconds"] == []
    assert "WRONG" in report.line(record)
    assert "WRONG" in report.table({"environment": ENVIRONMENT, "limits": {}, "results": [record]})


def test_runs_under_pytest_benchmark(tmp_path: pathlib.Path) -> None:
    """The whole way: the runner, our samples in its statistics, the condensed file, the table."""
    raw = tmp_path / "raw.json"
    command = [sys.executable, "-m", "pytest", "bench", "-c", "bench/pytest.ini", "-q",
               "-k", "B4-H8-T512-D64-causal-fp32-fwd-1", "--backends=reference", "--minutes=0.01", "--min-rounds=3",
               f"--benchmark-json={raw}"]
    # pytest-benchmark takes a child for a worker of pytest-xdist when its parent is one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[1/1 0:" in done.stdout
    assert "flash_attention B4 H8 T512 D64 causal fp32 fwd x1: reference" in done.stdout
    stored = json.loads(raw.read_text())["benchmarks"][0]
    data = report.load(raw)
    samples = data["results"][0]["candidates"][0]["seconds"]
    assert stored["stats"]["median"] == pytest.approx(timer.quantile(samples, 0.5), rel=1e-3)
    assert stored["stats"]["rounds"] == 3
    assert data["environment"]["torch"] == torch.__version__
    assert data["limits"]["cpu 1"]["values"]["fp32"] > 1e9
    assert data["limits"]["cpu 1"]["values"]["copy"] > 1e8
    report.save(data, tmp_path / "results" / "here.json")
    assert report.load(tmp_path / "results" / "here.json") == data
    assert "torch SDPA" in report.table(data)


def test_cases_for_a_tuned_allocator_run_where_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """bench.run starts a process for them, which collects them and no others."""
    started = []
    with monkeypatch.context() as patch:
        patch.delenv("MALLOC_MMAP_MAX_", raising=False)
        patch.setattr(subprocess, "run", lambda command, **options: started.append((command, options["env"])) or
                      subprocess.CompletedProcess(command, 3))
        assert run.main(["--allocator-tuned", "-k", "1024"]) == 3
    (command, env), = started
    assert command[2:] == ["bench.run", "--allocator-tuned", "-k", "1024"]
    assert env.items() >= environment.TUNED_ALLOCATOR.items() and not environment.allocator_tuned()
    collect = [sys.executable, "-m", "pytest", "bench", "-c", "bench/pytest.ini", "-q", "--collect-only", "-k", "L1024"]
    out = subprocess.run(collect, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    found = {line for line in out.splitlines() if "::" in line}
    assert len(found) == len([case for case, _ in bench_fft_conv.CASES if case.tuned and "L1024" in case.shape])
    assert found and all("allocator-tuned" in line for line in found)


def test_results_of_parts_of_the_grid_come_together() -> None:
    first, second, third = DATA["results"]
    newer = {**second, "commit": "def"}
    data = {**DATA, "environment": {**ENVIRONMENT, "commit": "def"}, "results": [newer]}
    both = report.merged(DATA, data)
    assert both["results"] == [first, newer, third] and both["environment"] == data["environment"]
    assert report._commits(both) == "abc, def"
    other = {**data, "environment": {**ENVIRONMENT, "torch": "2.11"}}
    assert report.merged(DATA, other) is other


# ---- report --------------------------------------------------------------------------------------------------------

ENVIRONMENT = {"machine": "box", "date": "2026-01-02T03:04:05+00:00", "commit": "abc", "pykernels": "0.1",
               "torch": "2.10", "triton": None, "cuda": None, "python": "3.12", "cpu": "Some CPU", "cores": 2,
               "threads": 2, "isa": "avx2", "gpu": None, "gpu_capability": None}


def entry(name: str, seconds: list[float], error: float = 0.5) -> dict:
    return {"name": name, "variant": None if name.startswith("pykernels") else "default", "problem": None,
            "seconds": seconds, "errors": {"out": [error * 1e-6, 1e-6]}}


def record(threads: int, found: list[dict], dtype: str = "fp32") -> dict:
    return {"op": "flash_attention", "shape": "B1 H1 T9 D8", "options": "causal", "dtype": dtype, "direction": "fwd",
            "device": "cpu", "threads": threads, "work": 1e9, "limits": ["bf16 tile", "fp32"], "checked": "everything",
            "candidates": found, "missing": {"fla": "fla is not installed"}, "extra": False, "beside": None,
            "bound": ["fp32", 40e9] if threads == 1 else None, "commit": "abc"}


DATA = {
    "environment": ENVIRONMENT,
    "limits": {"cpu 1": {"values": {"fp32": 40e9, "bf16 tile": None, "copy": 10e9}, "notes": "by hand"}},
    "results": [
        record(1, [entry("pykernels cpu", [0.1] * 3), entry("torch SDPA", [0.3, 0.2, 0.2]), entry("other", [0.9] * 3)]),
        record(2, [entry("pykernels cpu", [0.1] * 3, error=0.25), entry("torch SDPA", [0.08] * 3)]),
        record(1, [], dtype="bf16"),
    ],
}


def test_row_figures() -> None:
    (row,) = report.rows(DATA["results"][0])
    assert (row.backend, row.limit, row.error) == ("cpu", "fp32", 0.5)
    assert (row.rate, row.share) == (pytest.approx(1e10), pytest.approx(0.25))
    assert row.peer == "torch SDPA default"  # the fastest of two
    assert row.ratio.of_medians == pytest.approx(2.0)
    assert row.ratio.per_round.high == pytest.approx(2.8)


def test_table_shows_wins_losses_and_what_was_not_measured() -> None:
    text = report.table(DATA)
    won, lost, unmeasured = (line for line in text.splitlines() if line.startswith("B1 H1 T9 D8 causal"))
    assert "25% of fp32" in won
    assert "2.00 (2.00 [2.00, 2.80])" in won
    assert "slower" not in won
    assert "0.80 (0.80 [0.80, 0.80])  slower" in lost
    assert lost.endswith("0.25")
    assert report.NOT_MEASURED in unmeasured
    assert "cpu fp32 fwd: faster than the fastest peer in 1 of 2 cases, 1.26 times in the geometric mean" in text
    assert "fla: fla is not installed" in text
    assert len({len(line) - len(line.lstrip()) for line in (won, lost)}) == 1


def test_markdown_is_generated_between_markers() -> None:
    text = report.readme([DATA], expected=lambda environment: DATA["results"])
    assert "| B1 H1 T9 D8 causal | 2.00 / 0.80 | not measured |" in text
    alone = {**DATA["results"][0], "candidates": [entry("pykernels cpu", [0.1] * 3)], "options": "full"}
    text_alone = report.readme([{**DATA, "results": [*DATA["results"], alone]}], expected=lambda environment: [])
    assert "| B1 H1 T9 D8 full | 100 ms | – |" in text_alone  # no peer; no such case
    assert "NVIDIA GPUs: not measured." in text
    page = "before\n<!-- a -->\nold\n<!-- b -->\nafter\n"
    assert report.between(page, "<!-- a -->", "<!-- b -->", text) == f"before\n<!-- a -->\n{text}\n<!-- b -->\nafter\n"
    assert "old" not in report.between(page, "<!-- a -->", "<!-- b -->", "\\1 new")
    with pytest.raises(ValueError, match="expected one"):
        report.between("no markers", "<!-- a -->", "<!-- b -->", text)


def test_markdown_without_any_result() -> None:
    text = report.readme([])
    assert "CPUs: not measured." in text
    assert "NVIDIA GPUs: not measured." in text


def test_full_markdown_has_every_figure_and_gap() -> None:
    absent = {**record(2, [], dtype="bf16"), "candidates": []}
    text = report.full([DATA], expected=lambda environment: [*DATA["results"], absent])
    won, lost = (line for line in text.splitlines() if line.startswith("| B1 H1 T9 D8 causal"))
    assert won.count("|") == lost.count("|") and "slower" in lost and "slower" not in won
    assert "Not measured: `B1 H1 T9 D8 causal` (bf16 fwd on 1 and 2 threads)." in text
    assert "1 thread: fp32 40.0 GFLOP/s, copy 10.0 GB/s" in text


def test_docs_are_generated_from_the_results(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    report.save(DATA, tmp_path / "results" / "box.json")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    for _ in range(2):  # the second time changes nothing
        report.write_docs(tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert text.count("| B1 H1 T9 D8 causal | 2.00 / 0.80 |") == 1
        assert text.count("| B1 H8 T2048 D64 causal | not measured |") == 1  # of the grid, not among the results
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    for name in re.findall(r"\(plots/(.+)\)", page):
        assert (tmp_path / "docs" / "plots" / name).exists()
    assert page.count("plots/") == 2


def test_grid_of_a_machine_is_every_case() -> None:
    found = report.grid(ENVIRONMENT)
    places = {(case["op"], case["threads"]) for case in found}
    ops = {op for op, _ in places}
    assert {"flash_attention", "flash_attention_decode"} <= ops
    assert places == {(op, threads) for op in ops for threads in (1, 2)} - {("transformers", 1)}  # whole models
    assert {case["device"] for case in report.grid({**ENVIRONMENT, "gpu": "GPU"})} == {"cuda"}


def test_plots(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    written = report.plots(DATA, tmp_path)
    assert [path.name for path in written] == ["box-flash_attention-speedup.png", "box-flash_attention-rate.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in written)


def test_environment_names_the_machine() -> None:
    found = json.loads(json.dumps(environment.describe()))
    assert found["torch"] == torch.__version__
    assert set(ENVIRONMENT) <= set(found)
    assert found["machine"] and set(found["machine"]) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_the_gpu_session_for_attention(monkeypatch, capsys) -> None:
    """On the CPU, with its kernels; it notices outputs and gradients that are wrong."""
    assert attention_gpu.check_large("cpu", "cpu", 1, 150, 2, 32, True) == []
    lines = list(attention_gpu.table("cpu", "cpu", [(1, 128, 2, 32)], 0.01))
    assert len(lines) == 5 and "pykernels cpu" in lines[0] and "sdpa" in lines[0]
    assert all(float(line.split()[-1]) > 0 for line in lines[1:])
    assert attention_gpu.flops(1, 1024, 16, 128, True, True) == 2.5 * 2 * 16 * 1024**2 * 128
    right = attention_gpu.pykernels.flash_attention

    def scaled(q, k, v, *, deterministic=False, **options):
        # Only the gradients are wrong, and only where they need not repeat.
        out = right(q, k, v, **options)
        return out if deterministic else out.detach() + 0.9 * (out - out.detach())

    monkeypatch.setattr(attention_gpu.pykernels, "flash_attention", scaled)
    assert {text[:2] for text in attention_gpu.check_large("cpu", "cpu", 1, 150, 2, 32, True)} == {"dq", "dk", "dv"}
    monkeypatch.setattr(attention_gpu.pykernels, "flash_attention", lambda q, k, v, **options: 0 * (q + k + v))
    assert any(text.startswith("out") for text in attention_gpu.check_large("cpu", "cpu", 1, 150, 2, 32, True))
    if not torch.cuda.is_available():
        assert attention_gpu.main([]) == 1 and "no usable NVIDIA GPU" in capsys.readouterr().err


def test_the_readme_says_what_the_backends_serve() -> None:
    """The support matrix in the README is the one that `python -m bench.report --docs` generates."""
    table = report.support()
    assert "| `flash_attention` |" in table and "fp32 bf16 fp16 fp64" in table
    assert f"<!-- support:begin -->\n{table}\n<!-- support:end -->" in (ROOT / "README.md").read_text()
