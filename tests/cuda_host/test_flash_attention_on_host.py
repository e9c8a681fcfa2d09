"""The CUDA kernels of flash attention, executed on the host: the op's ordinary cases against the float64 definition."""

from __future__ import annotations

import host_build
import pytest
import torch

from pykernels.ops.flash_attention import registration
from pykernels.testing import FLASH_ATTENTION, Case, compare, cotangents, expected
from pykernels.testing.flash_attention import _extras, _options, attention_case
from pykernels.testing.kit import seed
from pykernels.testing.layouts import heads_first

DTYPES = (torch.bfloat16, torch.float16)
OPTIONS = {"alibi_slopes", "sinks"}  # that the kernels have


def _fits(case: Case) -> bool:
    """Within the kernels' head sizes, and small enough for an executor that is 10^5 times slower than a GPU."""
    args = case.make(torch.float16, "cpu").args
    q, v = args["q"], args["v"]
    work = q.shape[0] * q.shape[1] * q.shape[2] * v.shape[1] * (q.shape[3] + v.shape[3])
    return max(q.shape[3], v.shape[3]) <= 256 and work < 6e7 and case.needs <= OPTIONS


CASES = [case for case in (*FLASH_ATTENTION.cases, *FLASH_ATTENTION.extremes) if _fits(case)]
# Every instantiation, with rows and keys across its tiles.
SIZES = [attention_case(f"size-{head_dim}", tq=140, tk=150, heads_q=1, head_dim=head_dim, causal=True)
         for head_dim in (32, 64, 96, 128, 192, 256)]

# What the persistent, pipelined kernels add: several tiles for each block, keys that go round their rings more than
# once, every way in which TMA reads the tensors.
PIPELINED = [
    attention_case("rounds-64", tq=400, tk=650, heads_q=2, heads_k=1, head_dim=64, causal=True),
    attention_case("rounds-96", tq=300, tk=280, heads_q=3, head_dim=80, value_dim=96, window=(90, 20)),
    attention_case("rounds-128", tq=200, tk=700, heads_q=2, heads_k=1, head_dim=128),
    attention_case("rounds-192", tq=140, tk=300, heads_q=4, head_dim=192, value_dim=128, causal=True),
    attention_case("rounds-256", tq=150, tk=330, heads_q=3, head_dim=256, causal=True),
    attention_case("packed-rounds", tq=500, heads_q=2, heads_k=1, head_dim=128, lengths_q=(200, 0, 130, 1, 140),
                   causal=True),
    attention_case("heads-first", batch=2, tq=150, tk=170, heads_q=4, heads_k=2, head_dim=64, layout=heads_first),
    attention_case("softcap-128", tq=200, head_dim=128, softcap=5.0, causal=True),
    attention_case("alibi-sinks-128", batch=2, tq=150, tk=280, heads_q=4, heads_k=2, head_dim=128, alibi=(2, 4),
                   sinks=0.5, causal=True),
    attention_case("softcap-192", tq=100, tk=150, heads_q=2, heads_k=1, head_dim=176, softcap=3.0, window=(60, 30)),
    attention_case("scale-negative-64", tq=150, head_dim=64, scale=-0.2, causal=True),
    attention_case("packed-256", tq=260, heads_q=2, heads_k=1, head_dim=256, lengths_q=(100, 0, 90, 1, 60),
                   causal=True),
]


def _run(host, case: Case, dtype: torch.dtype, seed_: int, deterministic: bool = False) -> dict[str, torch.Tensor]:
    """Outputs and gradients, as pykernels.testing.run gives them."""
    sample = case.make(dtype, "cpu")
    args = sample.args
    cu_q = args.get("cu_seqlens_q")
    host.set_seed(seed_)
    inputs = {name: args[name].detach().requires_grad_() for name in sample.differentiable}
    slopes = _extras(sample)[0]
    sinks = inputs["sinks"].float() if "sinks" in inputs else None
    out, lse = registration.FlashAttention.apply(*(inputs[name] for name in "qkv"), None, sinks, cu_q,
                                                 args.get("cu_seqlens_k", cu_q), slopes, None,
                                                 _options(sample, causal=False), 0.0, deterministic, "cuda_host")
    given = cotangents({"out": out, "lse": lse})
    gradients = torch.autograd.grad((out, lse), tuple(inputs.values()), (given["out"], given["lse"]))
    return {"out": out.detach(), "lse": lse.detach()} | dict(zip(("d" + name for name in inputs), gradients))


def _check(host, case: Case, dtype: torch.dtype, seed_: int) -> None:
    actual = _run(host, case, dtype, seed_)
    reference, yardstick = expected(FLASH_ATTENTION, case, dtype)
    errors = [compare(name, actual[name], reference[name], yardstick[name]) for name in reference]
    assert all(error.ok for error in errors), [str(error) for error in errors]


def _check_fwd(host, host_ops, case: Case, dtype: torch.dtype, seed_: int) -> None:
    sample = case.make(dtype, "cpu")
    host.set_seed(seed_)
    cu_q = sample.args.get("cu_seqlens_q")
    out, lse = host_ops.fwd(*(sample.args[name] for name in "qkv"), cu_q, sample.args.get("cu_seqlens_k", cu_q),
                            *_options(sample, causal=False), *_extras(sample))
    reference, yardstick = expected(FLASH_ATTENTION, case, dtype)
    errors = [compare(name, x, reference[name], yardstick[name]) for name, x in (("out", out), ("lse", lse))]
    assert all(error.ok for error in errors), [str(error) for error in errors]


@pytest.fixture(scope="module")
def host_ops(host):
    import host_ops

    return host_ops


@pytest.fixture(params=(80, 90), ids=("sm_80", "sm_90a"))
def gpu(host, request):
    """The modelled GPU: its compute capability chooses the family of kernels."""
    host.set_capability(request.param)
    yield request.param
    host.set_capability(80)


@pytest.mark.parametrize("case, dtype", [
    pytest.param(case, dtype, id=f"{case}-{str(dtype).removeprefix('torch.')}")
    for case in (*CASES, *SIZES, *PIPELINED) for dtype in DTYPES if dtype in case.dtypes])
def test_numbers(host, host_ops, gpu, case, dtype):
    _check(host, case, dtype, seed(case.name + str(dtype)))  # another order of events for each


ORDERS = [attention_case("orders", tq=70, tk=200, heads_q=2, heads_k=1, head_dim=40, causal=True),
          attention_case("orders-128", tq=200, tk=140, heads_q=2, heads_k=1, head_dim=128, causal=True),
          attention_case("orders-192", tq=140, tk=100, heads_q=2, heads_k=1, head_dim=192, causal=True),
          attention_case("orders-packed-192", tq=140, heads_q=1, head_dim=192, lengths_q=(80, 60))]


@pytest.mark.parametrize("seed_", range(12))
@pytest.mark.parametrize("case", ORDERS, ids=str)
def test_every_order_of_events(host, host_ops, gpu, case, seed_):
    _check(host, case, torch.bfloat16, seed_)


@pytest.mark.parametrize("seed_", range(12))
@pytest.mark.parametrize("case", PIPELINED[:3:2], ids=str)
def test_every_order_of_events_in_a_pipeline(host, host_ops, case, seed_):
    host.set_capability(90)
    try:
        _check_fwd(host, host_ops, case, torch.bfloat16, seed_)
    finally:
        host.set_capability(80)


@pytest.mark.parametrize("head_dim", (64, 128, 192))
def test_a_packed_sequence_sees_nothing_of_its_neighbours(host, host_ops, gpu, head_dim):
    """Not even values that are not finite, in the same tile of keys; nor does it lose any of its own."""
    lengths = (70, 150, 100)
    q, k, v = (torch.randn(1, sum(lengths), 2, head_dim, generator=torch.Generator().manual_seed(i)).bfloat16()
               for i in range(3))
    for x in (q, k, v):
        x[:, 70:100], x[:, 219] = torch.nan, torch.inf
    cu = torch.tensor([0, 70, 220, 320], dtype=torch.int32)
    out, lse = host_ops.fwd(q, k, v, cu, cu, 0.125, 0.0, -1, -1)
    for first, last in ((0, 70), (220, 320)):
        alone, lse_alone = host_ops.fwd(*(x[:, first:last].clone() for x in (q, k, v)), None, None, 0.125, 0.0, -1, -1)
        assert torch.equal(out[:, first:last], alone) and torch.equal(lse[:, :, first:last], lse_alone)
        assert alone.isfinite().all()

    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    dout[:, 70:100] = torch.nan
    gradients = host_ops.bwd(dout, None, q, k, v, out, lse, cu, cu, 0.125, 0.0, -1, -1, False)[:3]
    for first, last in ((0, 70), (220, 320)):
        part = slice(first, last)
        alone = host_ops.bwd(dout[:, part].clone(), None, *(x[:, part].clone() for x in (q, k, v, out)),
                             lse[:, :, part].clone(), None, None, 0.125, 0.0, -1, -1, False)[:3]
        for packed, expected_ in zip(gradients, alone):
            assert expected_.isfinite().all() and torch.allclose(packed[:, part], expected_, rtol=2e-2, atol=1e-3)


def test_the_backward_pass_for_sm_90a_serves_what_tma_can_read(host, host_ops):
    """Told from sm_80's by its scratch memory."""
    q = torch.randn(1, 100, 2, 64).half()
    fields = host_ops._fields(q, q, q, q, q[..., 0].float(), None, None, 0.125, 0.0, -1, -1)
    fields |= host_ops._tensors(dout=q, dq=q, dk=q, dv=q) | {"dlse": 0, "scratch": 0}
    small = q.shape[1] * q.shape[2]

    def scratch(deterministic=False, **changed):
        return host.flash_attention_bwd_scratch(fields | {"deterministic": deterministic} | changed)

    assert scratch() == small
    host.set_capability(90)
    try:
        assert scratch() > small
        served = {"deterministic": True}, {"softcap": 1.0}, {"scale": -1.0}, {"head_dim": 192}, {"head_dim": 256}
        assert min(scratch(**call) for call in served) > small
        assert scratch(dout=q.data_ptr() + 2) == scratch(value_dim=32, head_dim=32) == small
    finally:
        host.set_capability(80)


def test_what_tma_cannot_read_goes_to_the_kernels_for_sm_80(host, host_ops):
    """Told apart by their shared memory."""
    host.set_capability(90)
    host.set_shared_limit(99 * 1024)
    try:
        aligned = torch.randn(2, 40, 2, 128).bfloat16()
        options = (None, None, 0.1, 0.0, -1, -1)
        with pytest.raises(RuntimeError, match="invalid argument"):
            host_ops.fwd(aligned, aligned, aligned, *options)
        odd = torch.randn(2 * 40 * 2 * 128 + 1).bfloat16()[1:].view(2, 40, 2, 128)
        narrow, expanded = torch.randn(2, 40, 2, 59).bfloat16(), aligned[:1].expand(2, -1, -1, -1)
        for x in (odd, narrow, expanded, aligned[..., :32].contiguous()):
            out, _ = host_ops.fwd(x, x, x, *options)
            assert out.isfinite().all()
    finally:
        host.set_capability(80)
        host.set_shared_limit(227 * 1024)


@pytest.mark.parametrize("head_dim", (32, 64, 96, 128, 192, 256))
def test_fits_the_shared_memory_of_every_gpu(host, host_ops, head_dim):
    """sm_86, sm_89 and sm_120 have 99 KiB for a block."""
    host.set_shared_limit(99 * 1024)
    try:
        _check(host, attention_case("small", tq=3, heads_q=1, head_dim=head_dim), torch.float16, 0)
    finally:
        host.set_shared_limit(227 * 1024)


def test_errors_surface_as_exceptions(host, host_ops):
    q = torch.zeros(1, 4, 1, 8)
    with pytest.raises(RuntimeError, match="bfloat16 and float16"):
        host_ops.fwd(q, q, q, None, None, 1.0, 0.0, -1, -1)
    q = torch.zeros(1, 4, 1, 257, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="head sizes up to 256"):
        host_ops.fwd(q, q, q, None, None, 1.0, 0.0, -1, -1)
    host.set_shared_limit(16 * 1024)
    try:
        with pytest.raises(RuntimeError, match="invalid argument"):
            host_ops.fwd(*[q[..., :64].contiguous()] * 3, None, None, 1.0, 0.0, -1, -1)
    finally:
        host.set_shared_limit(227 * 1024)


@pytest.mark.parametrize("head_dim", (40, 128, 192))
def test_bitwise_repeatable(host, host_ops, gpu, head_dim):
    """Whatever the order of the blocks and threads."""
    case = attention_case("repeat", batch=2, tq=70, tk=390, heads_q=2, heads_k=1, head_dim=head_dim, window=(260, 0))
    first, *others = (_run(host, case, torch.float16, seed_, deterministic=True) for seed_ in (0, 7, 11))
    for other in others:
        for name, x in first.items():
            assert torch.equal(x, other[name]), name


# Ragged shapes, every way of loading and storing rows, packed and empty sequences, small and large heads.
SANITIZED = ("tiny-causal-bfloat16", "head-31-value-1-float16", "head-111-bfloat16", "size-256-float16", "gqa-float16",
             "blind-window-bfloat16", "no-keys-float16", "packed-different-bfloat16", "packed-window-float16",
             "layout-padded-float16", "layout-expanded-bfloat16", "packed-rounds-bfloat16", "rounds-64-float16")


def test_under_the_sanitizers(compiler):
    tests = [f"test_numbers[{gpu}-{name}]" for gpu in ("sm_80", "sm_90a") for name in SANITIZED]
    host_build.check_sanitized(__file__, tests)
