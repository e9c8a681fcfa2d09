"""Decoding on the CUDA kernels, executed on the host: the op's ordinary cases against the float64 definition."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pykernels.ops.flash_attention import reference
from pykernels.testing import FLASH_ATTENTION_DECODE, Case, compare, expected
from pykernels.testing.flash_attention import _extras, _options, _padded, decode_case
from pykernels.testing.kit import seed
from pykernels.testing.layouts import heads_first

DTYPES = (torch.bfloat16, torch.float16)


CASES = [*FLASH_ATTENTION_DECODE.cases, *FLASH_ATTENTION_DECODE.extremes]
# Every instantiation, with few rows and many, and more splits than some entries have tiles.
SPLIT = [
    decode_case("splits-64", lengths=(700, 20), capacity=1000, new_tokens=1, heads_q=4, heads_k=1),
    decode_case("splits-128", lengths=(511,), capacity=513, new_tokens=1, heads_q=6, heads_k=2, head_dim=128),
    decode_case("splits-256", lengths=(300, 0), capacity=400, heads_q=2, heads_k=1, head_dim=256, value_dim=200),
    decode_case("splits-window", lengths=(700, 130), capacity=900, new_tokens=2, tq=2, window=(150, None)),
    decode_case("splits-blind", lengths=(3,), capacity=900, new_tokens=1, tq=6, heads_q=1, heads_k=1),
    *(decode_case(f"many-{head_dim}", lengths=(200, 90), capacity=300, tq=40, new_tokens=40, head_dim=head_dim)
      for head_dim in (64, 128, 256)),
    decode_case("splits-576", lengths=(300, 130), capacity=320, new_tokens=2, tq=2, heads_q=10, heads_k=1, head_dim=576,
                value_dim=512, page_size=13, sinks=0.0, alibi=(2, 10), softcap=3.0),
    decode_case("splits-padded", lengths=(300,), capacity=400, new_tokens=3, tq=3, head_dim=40, layout=_padded),
    decode_case("splits-heads-first", lengths=(300, 111), capacity=400, new_tokens=1, layout=heads_first),
]


@pytest.fixture(scope="module")
def host_ops(host):
    import host_ops

    return host_ops


def _run(host, host_ops, case: Case, dtype: torch.dtype, seed_: int) -> dict[str, torch.Tensor]:
    sample = case.make(dtype, "cpu")
    args, new_tokens = sample.args, 0
    table, (slopes, _, sinks, _, _) = args.get("block_table"), _extras(sample)
    host.set_seed(seed_)
    if "k" in args:
        new_tokens = args["k"].shape[1]
        host_ops.append(args["k_cache"], args["v_cache"], args["k"], args["v"], args["cache_seqlens"], table)
    out, lse = host_ops.decode(args["q"], args["k_cache"], args["v_cache"], args["cache_seqlens"], new_tokens,
                               *_options(sample, causal=True), table, slopes, sinks)
    return {"out": out, "lse": lse, "k_cache": args["k_cache"], "v_cache": args["v_cache"]}


def _check(host, host_ops, case: Case, dtype: torch.dtype, seed_: int) -> None:
    actual = _run(host, host_ops, case, dtype, seed_)
    reference, yardstick = expected(FLASH_ATTENTION_DECODE, case, dtype)
    assert {"out", "lse"} <= set(reference)
    errors = [compare(name, actual[name], reference[name], yardstick[name]) for name in reference]
    assert all(error.ok for error in errors), [str(error) for error in errors]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", [*CASES, *SPLIT], ids=str)
def test_numbers(host, host_ops, case, dtype):
    _check(host, host_ops, case, dtype, seed(case.name + str(dtype)))


PAGED = decode_case("splits-paged", lengths=(700, 20), capacity=1000, new_tokens=1, heads_k=1, page_size=5, sinks=1.0)


@pytest.mark.parametrize("case", (*SPLIT[:3], PAGED), ids=str)
def test_every_order_of_events(host, host_ops, case):
    """And bitwise the same in each."""
    _check(host, host_ops, case, torch.bfloat16, 0)
    first, *others = (_run(host, host_ops, case, torch.bfloat16, seed_) for seed_ in range(12))
    for other in others:
        assert torch.equal(first["out"], other["out"]) and torch.equal(first["lse"], other["lse"])


def _splits(host, case: Case) -> int:
    import host_ops as ops

    args = case.make(torch.float16, "cpu").args
    q, k, v = args["q"], args["k_cache"], args["v_cache"]
    fields = ops._fields(q, k, v, q, q, None, None, 1.0, 0.0, -1, -1)
    return host.flash_attention_decode_splits(fields | {"cache_seqlens": 0, "new_tokens": 0})[0]


def test_splits_follow_the_shapes(host, host_ops):
    """Three blocks for each of the modelled GPU's three multiprocessors, as long as the cache is long enough."""
    def splits(lengths, capacity, **options):
        return _splits(host, decode_case("splits", lengths=lengths, capacity=capacity, **options))

    assert splits((0,), 4096, heads_k=1) == splits((4000,), 4096, heads_k=1) == 9
    assert splits((0,), 4096, heads_k=2) == 5
    assert splits((0, 0, 0, 0), 4096, heads_k=2) == 2
    assert splits((0,) * 9, 4096, heads_k=1) == 1
    assert splits((0,), 300, heads_k=1) == 3
    assert splits((0,), 0, heads_k=1) == 1


def test_keys_beyond_the_window_are_not_read(host, host_ops):
    """The splits share out the visible keys; NaN before them stays out."""
    case = decode_case("far", lengths=(800,), capacity=900, new_tokens=1, window=(64, None))
    sample = case.make(torch.bfloat16, "cpu")
    clean = _run(host, host_ops, case, torch.bfloat16, 1)

    def make(dtype, device):
        args = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in sample.args.items()}
        args["k_cache"][:, :640] = args["v_cache"][:, :640] = torch.nan
        return dataclasses.replace(sample, args=args)

    dirty = _run(host, host_ops, Case("far-nan", make), torch.bfloat16, 2)
    assert torch.equal(clean["out"], dirty["out"]) and clean["out"].isfinite().all()


@pytest.mark.parametrize("size", (dict(head_dim=256), dict(head_dim=576, value_dim=512)), ids=("256", "576"))
@pytest.mark.parametrize("tq", (1, 20))
def test_fits_the_shared_memory_of_every_gpu(host, host_ops, size, tq):
    """sm_86, sm_89 and sm_120 have 99 KiB for a block."""
    host.set_shared_limit(99 * 1024)
    try:
        case = decode_case("small", lengths=(3,), capacity=8, tq=tq, page_size=4, **size)
        _check(host, host_ops, case, torch.float16, 0)
    finally:
        host.set_shared_limit(227 * 1024)


def test_pages_that_do_not_exist(host, host_ops):
    """Are not written; and read as the nearest that exists, as the reference reads them."""
    q, pages = torch.randn(2, 1, 2, 16).half(), torch.randn(3, 4, 1, 16).half()
    table, lengths = torch.tensor([[0, 7], [2, -5]], dtype=torch.int32), torch.tensor([7, 5], dtype=torch.int32)
    k_cache, v_cache = pages.clone(), pages.flip(0)
    new = torch.ones(2, 1, 1, 16).half()
    host_ops.append(k_cache, v_cache, new, new, lengths, table)
    assert torch.equal(k_cache, pages) and torch.equal(v_cache, pages.flip(0))
    rest = lengths, 0, 0.25, 0.0, -1, 0, table
    out, lse = host_ops.decode(q, k_cache, v_cache, *rest)
    expected = reference.flash_attention_decode(*(x.double() for x in (q, k_cache, v_cache)), *rest)
    assert torch.allclose(out.double(), expected[0], atol=2e-3)
    assert torch.allclose(lse.double(), expected[1], atol=1e-3)


def test_append_drops_what_does_not_fit(host, host_ops):
    cache, new = torch.zeros(3, 4, 1, 8, dtype=torch.float16), torch.ones(3, 2, 1, 8, dtype=torch.float16)
    k_cache, v_cache = cache.clone(), cache.clone()
    host_ops.append(k_cache, v_cache, new, 2 * new, torch.tensor([3, -1, 2**31 - 1], dtype=torch.int32))
    expected_tokens = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float16)
    assert torch.equal(k_cache[:, :, 0, 0], expected_tokens) and torch.equal(v_cache, 2 * k_cache)
    with pytest.raises(RuntimeError, match="2 bytes"):
        host_ops.append(k_cache.float(), v_cache.float(), new.float(), new.float(), torch.zeros(3, dtype=torch.int32))
