"""Flash attention's Triton kernels under the interpreter, on the CPU: numbers, limits, and what the helpers compute."""

from __future__ import annotations

import functools

import pytest
import torch
from isolated import isolated

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from pykernels import testing  # noqa: E402
from pykernels._triton import dot_precision, load, store, tanh  # noqa: E402
from pykernels.testing import FLASH_ATTENTION, FLASH_ATTENTION_DECODE, Target  # noqa: E402
from pykernels.testing.flash_attention import attention_case, decode_case  # noqa: E402

interpreted = isolated(TRITON_INTERPRET="1")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Between them these use every option, loop and branch at the interpreter's tiles: 32 rows, 32 keys, slices of 64.
ATTENTION = (
    attention_case("full", batch=2, tq=70, tk=101, heads_q=3, head_dim=33, value_dim=20),
    attention_case("causal-gqa", tq=97, tk=130, heads_q=4, heads_k=2, head_dim=64, causal=True),
    attention_case("blind-rows", batch=2, tq=100, tk=40, heads_q=1, head_dim=16, causal=True),
    attention_case("window", tq=150, tk=140, heads_q=1, head_dim=32, window=(37, 20)),
    attention_case("window-causal-softcap-mqa", tq=100, heads_q=3, heads_k=1, head_dim=40, window=(33, None),
                   softcap=3.0, causal=True),
    attention_case("packed", tq=175, heads_q=2, heads_k=1, head_dim=24, lengths_q=(33, 0, 1, 70, 64), causal=True),
    attention_case("packed-different-window", tq=120, tk=150, heads_q=1, head_dim=16, value_dim=40,
                   lengths_q=(64, 3, 0, 40), lengths_k=(32, 80, 12, 0), window=(40, 8)),
    attention_case("packed-many", tq=130, heads_q=1, head_dim=8,
                   lengths_q=(5, 0, 3, 1, 9, 31, 0, 0, 2, 32, 1, 33, 0, 7)),
    attention_case("slices", tq=40, tk=70, heads_q=2, heads_k=1, head_dim=150, value_dim=64, causal=True),
    attention_case("value-slices", tq=40, tk=70, heads_q=1, head_dim=64, value_dim=256, window=(20, None)),
    attention_case("scale-negative", tq=50, heads_q=1, head_dim=32, scale=-0.3, causal=True),
    attention_case("softcap-scale-negative", tq=50, heads_q=1, head_dim=32, scale=-0.5, softcap=2.0),
    attention_case("scale-zero", tq=50, heads_q=1, head_dim=32, scale=0.0, causal=True),
    attention_case("one-key", tq=70, tk=1, heads_q=2, head_dim=40),
    attention_case("no-keys", batch=2, tq=33, tk=0, head_dim=16),
    attention_case("no-queries", batch=2, tq=0, tk=33, head_dim=16),
    attention_case("no-heads", tq=5, heads_q=0, heads_k=2, head_dim=16),
    attention_case("expanded", batch=3, tq=40, heads_q=1, head_dim=16, causal=True,
                   layout=lambda x: x[:1].expand(x.shape)),
    attention_case("alibi-gqa", batch=2, tq=40, tk=70, heads_q=2, heads_k=1, head_dim=16, alibi=(2, 2), causal=True,
                   softcap=3.0),
    attention_case("alibi-packed", tq=70, heads_q=2, heads_k=1, head_dim=16, alibi=(3, 2), lengths_q=(33, 0, 30)),
    attention_case("alibi-scale-negative", tq=20, tk=40, heads_q=1, head_dim=16, alibi=(1,), scale=-0.3, window=(9, 5)),
    # Biases, by what they are broadcast over.
    attention_case("bias", batch=2, tq=40, tk=37, heads_q=2, heads_k=1, head_dim=16, bias=(2, 2, 40, 37), causal=True),
    attention_case("bias-over-batch-and-heads", batch=2, tq=40, tk=70, heads_q=4, heads_k=2, head_dim=16,
                   bias=(40, 70)),
    attention_case("bias-over-heads-packed", tq=75, heads_q=2, head_dim=16, bias=(1, 1, 75, 75),
                   lengths_q=(33, 0, 30), causal=True),
    attention_case("bias-over-queries", batch=2, tq=40, tk=70, heads_q=2, heads_k=1, head_dim=16, bias=(2, 1, 1, 70),
                   window=(20, 9), bias_dtype=FP32),
    attention_case("bias-over-queries-packed", tq=75, heads_q=2, head_dim=16, bias=(75,), lengths_q=(33, 0, 30)),
    attention_case("bias-over-keys", batch=2, tq=40, tk=20, heads_q=2, head_dim=16, bias=(1, 2, 40, 1), causal=True),
    attention_case("bias-over-keys-sinks-dropout", batch=2, tq=20, tk=37, heads_q=2, head_dim=16, bias=(2, 1, 20, 1),
                   sinks=0.0, dropout_p=0.3),
    attention_case("bias-over-everything", tq=20, heads_q=2, head_dim=16, bias=(1, 1, 1, 1), sinks=1.0),
    attention_case("bias-hides", batch=2, tq=40, tk=70, heads_q=1, head_dim=16, bias=(2, 1, 40, 70), softcap=2.0,
                   bias_values=lambda x: x.masked_fill((x > 1) | (torch.arange(40) % 7 == 0)[:, None], -torch.inf)),
    attention_case("bias-slices", tq=20, tk=40, heads_q=1, head_dim=72, value_dim=130, bias=(20, 40)),
    attention_case("bias-large", tq=40, tk=70, heads_q=1, head_dim=16, bias=(40, 70), bias_values=lambda x: 1e4 * x),
    attention_case("bias-boolean", batch=2, tq=40, tk=70, heads_q=2, head_dim=16, bias=(2, 1, 40, 70),
                   bias_dtype=torch.bool, bias_values=lambda x: x & (torch.arange(40) % 7 > 0)[:, None]),
    attention_case("bias-boolean-padding", batch=2, tq=40, heads_q=1, head_dim=16, bias=(2, 1, 1, 40),
                   bias_dtype=torch.bool, causal=True, sinks=0.0),
    # Sinks and dropout.
    attention_case("sinks-gqa", batch=2, tq=40, tk=20, heads_q=2, heads_k=1, head_dim=16, sinks=1.0, causal=True),
    attention_case("sinks-packed", tq=70, heads_q=2, head_dim=16, sinks=0.0, lengths_q=(33, 0, 30)),
    attention_case("sinks-no-keys", tq=20, tk=0, heads_q=2, head_dim=16, sinks=0.0),
    attention_case("sinks-split", tq=2, tk=256, heads_q=4, heads_k=1, head_dim=16, sinks=0.0, alibi=(4,), causal=True),
    attention_case("dropout-gqa", batch=2, tq=40, tk=70, heads_q=2, heads_k=1, head_dim=16, dropout_p=0.6),
    attention_case("dropout-packed", tq=75, heads_q=2, head_dim=16, lengths_q=(33, 0, 30), dropout_p=0.2, causal=True),
    attention_case("dropout-split-bias", tq=33, tk=256, heads_q=1, head_dim=16, dropout_p=0.2, bias=(256,)),
    attention_case("everything", batch=2, tq=40, tk=50, heads_q=2, heads_k=1, head_dim=20, value_dim=24, softcap=4.0,
                   window=(30, 9), alibi=(2, 2), bias=(1, 2, 40, 50), sinks=0.0, dropout_p=0.1, scale=-0.2),
    # The gradient of a float32 bias beside float16 tensors holds the rounding of out (through dout . out), for which a
    # budget counted in float32 may have no room, on any backend: float32 alone.
    attention_case("everything-packed", tq=75, heads_q=2, heads_k=1, head_dim=16, alibi=(3, 2), bias=(75, 75),
                   bias_dtype=FP32, sinks=0.0, dropout_p=0.1, causal=True, lengths_q=(33, 3, 30), dtypes=(FP32,)),
    attention_case("strided", batch=2, tq=40, heads_q=2, head_dim=20, causal=True,
                   layout=lambda x: torch.stack([x.mT, x.mT * torch.nan], -1)[..., 0].mT),
)
DECODE = (
    decode_case("step", lengths=(0, 17, 63, 99), capacity=100, new_tokens=1, head_dim=32),
    decode_case("draft", lengths=(5, 60), capacity=64, tq=4, new_tokens=4, head_dim=16),
    decode_case("prompt", lengths=(40, 3), capacity=110, tq=65, new_tokens=65, head_dim=24, value_dim=40),
    decode_case("window-softcap", lengths=(50, 80), capacity=90, tq=3, new_tokens=3, head_dim=16, window=(30, None),
                softcap=2.0),
    decode_case("wide", lengths=(40, 7), capacity=50, new_tokens=1, head_dim=130, value_dim=70),
    decode_case("empty-cache", lengths=(0, 5), capacity=6, head_dim=16),
    decode_case("split", lengths=(0, 300, 511), capacity=512, new_tokens=1, heads_q=2, heads_k=1, head_dim=16,
                sinks=0.0),
    decode_case("split-window-draft", lengths=(40, 500), capacity=512, tq=3, new_tokens=3, heads_q=2, heads_k=1,
                head_dim=16, window=(200, None), alibi=(2,)),
    decode_case("key-576", lengths=(40, 7), capacity=50, new_tokens=1, heads_q=4, heads_k=1, head_dim=576,
                value_dim=512),
    decode_case("alibi-sinks", lengths=(5, 60), capacity=64, tq=2, new_tokens=2, head_dim=16, alibi=(2, 4), sinks=0.0),
    decode_case("paged", lengths=(50, 0, 90), capacity=96, new_tokens=1, heads_q=2, heads_k=1, head_dim=16,
                page_size=16, shared_pages=0),
    decode_case("paged-odd", lengths=(20, 63), capacity=70, tq=3, new_tokens=3, page_size=7, head_dim=20, value_dim=24),
    decode_case("paged-one-token", lengths=(5, 13), capacity=16, tq=2, new_tokens=3, page_size=1, head_dim=16),
    decode_case("paged-split", lengths=(500, 413), capacity=512, heads_q=2, heads_k=1, head_dim=16, page_size=64),
    decode_case("paged-shared", lengths=(37, 50), capacity=64, new_tokens=1, page_size=8, shared_pages=3, head_dim=16,
                sinks=0.0, window=(33, None)),
    decode_case("paged-prompt", lengths=(0, 33), capacity=100, tq=40, new_tokens=40, heads_q=2, heads_k=1, page_size=32,
                head_dim=16),
)


@interpreted
@pytest.mark.parametrize("op, case, dtype", [
    pytest.param(op, case, dtype, id=f"{op.name}-{case}-{dtype}") for op, cases in
    ((FLASH_ATTENTION, ATTENTION), (FLASH_ATTENTION_DECODE, DECODE))
    for case in cases for dtype in (FP32, FP16, BF16) if dtype in case.dtypes])
def test_matches_the_float64_reference(op, case, dtype):
    errors = testing.check(op, case, dtype, Target("triton", "cpu"))
    assert {error.tensor for error in errors} >= {*op.outputs, *op.mutates}
    assert all(error.ok for error in errors), "\n".join(map(str, errors))


def _surrounded(x: torch.Tensor) -> torch.Tensor:
    """x inside memory that is NaN on all sides, along time."""
    nothing = torch.full_like(x, torch.nan)
    return torch.cat([nothing, x, nothing], dim=1)[:, x.shape[1]:2 * x.shape[1]]


@interpreted
@pytest.mark.parametrize("offsets", [(0, 80, 20, 50), (-5, 20, 300, 50), (0, 2**31 - 1, -2**31, 50), (70, 30, 45, 60)])
def test_offsets_that_lie_do_not_reach_outside(offsets, monkeypatch):
    """Kernels clamp cu_seqlens: whatever these hold, nothing outside the tensors is read or written."""
    # The sequences overlap or leave gaps, so that some rows have no owner: they keep what is in memory, here zeros.
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    q, k, v, dout = (_surrounded(torch.randn(1, 50, 2, 16)) for _ in range(4))
    cu = torch.tensor(offsets, dtype=torch.int32)
    options = 0.25, 0.0, -1, 0
    out, lse = torch.ops.pykernels.flash_attention_fwd_triton(q, k, v, cu, cu, *options)
    lse = lse.clamp(min=-100.0)
    bwd = torch.ops.pykernels.flash_attention_bwd_triton
    gradients = bwd(dout, None, q, k, v, out, lse, cu, cu, *options, False)[:3]
    for x in (out, *gradients):
        assert x.isfinite().all()
    assert out.count_nonzero() and all(x.count_nonzero() for x in gradients)


@interpreted
def test_cache_lengths_that_lie_are_clamped_as_in_the_definition():
    from pykernels.ops.flash_attention import reference

    lengths = torch.tensor([-3, -1, 6, 7, 100, 2**31 - 1, -2**31], dtype=torch.int32)
    q, k, v = torch.randn(7, 2, 4, 16), torch.randn(7, 2, 2, 16), torch.randn(7, 2, 2, 16)
    caches = [_surrounded(torch.randn(7, 8, 2, 16)) for _ in "kv"]
    expected = [cache.clone() for cache in caches]
    torch.ops.pykernels.flash_attention_append_triton(*caches, k, v, lengths)
    reference.flash_attention_append(*expected, k, v, lengths)
    for cache, wanted in zip(caches, expected):
        assert torch.equal(cache, wanted)
        around = cache.as_strided((7, 24, 2, 16), cache.stride(), cache.storage_offset() - 8 * cache.stride(1))
        assert around[:, :8].isnan().all() and around[:, 16:].isnan().all(), "written outside the cache"
    out, lse = torch.ops.pykernels.flash_attention_decode_triton(q, *caches, lengths, 2, 0.25, 0.0, -1, 0)
    wanted, wanted_lse = reference.flash_attention_decode(q, *expected, lengths, 2, 0.25, 0.0, -1, 0)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-5)
    assert wanted_lse.isinf().any() and wanted_lse.isfinite().any()


@interpreted
@pytest.mark.parametrize("page_size", [3, 32])
def test_block_tables_that_lie_do_not_reach_outside(page_size):
    """Numbers of pages are clamped where keys are read; new tokens of a page that does not exist are dropped."""
    table = torch.tensor([[1, -7, 2**31 - 1], [-2**31, 2, 99]], dtype=torch.int32)
    lengths = torch.tensor([page_size, 2 * page_size - 2], dtype=torch.int32)
    caches = [_surrounded(torch.randn(1, 4 * page_size, 2, 16))[0].unflatten(0, (4, page_size)) for _ in "kv"]
    before = [cache.clone() for cache in caches]
    new, q = torch.randn(2, 4, 2, 16), torch.randn(2, 4, 2, 16)
    torch.ops.pykernels.flash_attention_append_triton(*caches, new, new, lengths, table)
    for cache, wanted in zip(caches, before):
        wanted[2, page_size - 2:] = new[1, :2]
        assert torch.equal(cache, wanted)
        size = 4 * page_size
        around = cache.as_strided((3 * size, 2, 16), cache.stride()[1:], cache.storage_offset() - cache.numel())
        assert around[:size].isnan().all() and around[2 * size:].isnan().all(), "written outside the cache"
    out, lse = torch.ops.pykernels.flash_attention_decode_triton(q, *caches, lengths, 4, 0.25, 0.0, -1, 0, table)
    from pykernels.ops.flash_attention import reference

    wanted, wanted_lse = reference.flash_attention_decode(q, *caches, lengths, 4, 0.25, 0.0, -1, 0, table)
    torch.testing.assert_close((out, lse), (wanted, wanted_lse), rtol=1e-5, atol=1e-5)
    assert wanted.count_nonzero()


@interpreted
@pytest.mark.parametrize("p", [0.25, 0.75])
def test_dropout_is_the_definitions_bit_for_bit(p):
    """The weights of equal scores, seen through values that tell keys apart; thresholds on both sides of 2**31."""
    from pykernels.ops.flash_attention import reference

    seed = torch.tensor([-(2**62) + 2**33 + 5])
    q, k, v = torch.zeros(2, 37, 2, 16), torch.zeros(2, 48, 2, 16), torch.eye(48).expand(2, 2, 48, 48).transpose(1, 2)
    fwd = torch.ops.pykernels.flash_attention_fwd_triton
    out, _ = fwd(q, k, v, None, None, 1.0, 0.0, -1, -1, None, None, None, seed, p)
    kept = reference.dropout(seed, p, *(torch.arange(n) for n in (4, 37, 48))).unflatten(0, (2, 2)).transpose(1, 2)
    assert torch.equal(out != 0, kept != 0) and 0.9 * (1 - p) < kept.count_nonzero() / kept.numel() < 1.1 * (1 - p)


@interpreted
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("boolean", [True, False])
def test_a_bias_keeps_what_is_not_finite_from_rows_that_do_not_see_it(boolean, dtype):
    """Keys hidden from some rows, in K and in V; other rows of the same tiles see them. Tiles have 32 rows, 32 keys."""
    from pykernels import flash_attention

    q, k, v = (torch.randn(1, 70, 2, 40, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3))
    mask = torch.ones(70, 70, dtype=torch.bool)
    mask[:45, 50:60] = False
    bias = mask if boolean else torch.where(mask, 0.5, -torch.inf)
    call = functools.partial(flash_attention, bias=bias, causal=True, return_lse=True, backend="triton")
    clean, clean_lse = call(q, k, v)

    def same(x: torch.Tensor, y: torch.Tensor) -> None:  # blocks may come in another order
        torch.testing.assert_close(x, y, rtol=1e-5 if dtype == FP32 else 2**-7, atol=1e-6)

    for poisoned in (k, v):
        kept = poisoned.clone()
        for value in (torch.nan, torch.inf, -torch.inf):
            poisoned[:, 50:60] = value
            out, lse = call(q, k, v)
            same(out[:, :50], clean[:, :50])
            same(lse[..., :50], clean_lse[..., :50])
            if poisoned is v:
                assert (out[:, 50:].isnan() if value != value else out[:, 50:] == value).all()
                same(lse, clean_lse)
            poisoned.copy_(kept)
    v[:, 50], v[:, 51] = torch.inf, -torch.inf
    out, _ = call(q, k, v)
    same(out[:, :50], clean[:, :50])
    assert (out[:, 50] == torch.inf).all() and out[:, 51:].isnan().all()


@interpreted
@pytest.mark.parametrize("options", [{}, {"sinks": torch.zeros(2)}, {"alibi_slopes": torch.tensor([0.1, 0.2])}],
                         ids=lambda options: "-".join(options) or "plain")
def test_a_score_of_minus_infinity_is_of_a_key_that_is_not_seen(options):
    """Also one that products overflowed to, in whole blocks of keys that no mask cuts, in both passes."""
    from pykernels import flash_attention

    q, k, v = (torch.rand(1, 100, 2, 16) for _ in range(3))
    for hidden in (64, 100):
        k[:, :hidden] = -3e38
        found = {}
        for backend in ("triton", "reference"):
            args = [x.clone().requires_grad_() for x in (1 + q, k, v)]
            out, lse = flash_attention(*args, return_lse=True, backend=backend, **options)
            found[backend] = out, lse, *torch.autograd.grad(out.square().sum(), args)
        for x, y in zip(found["triton"], found["reference"]):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
        assert not found["triton"][3][:, :hidden].any() and (hidden < 100 or not found["triton"][0].any())


@interpreted
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "time", "heads"])
def test_offsets_pass_32_bits(axis):
    """Elements lie further apart than 2**31 elements, along each axis; the memory between is never touched."""
    shape = [1, 1, 1, 16]
    shape[axis] = 3
    stride = [16, 16, 16, 1]
    stride[axis] = 2**30 + 2**20

    def far(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(shape, stride, dtype=FP16).copy_(x)

    q, k, v, dout = (torch.randn(shape, dtype=FP16) for _ in range(4))
    dlse = torch.randn(shape[0], shape[2], shape[1])  # without it, a row that sees one key has no gradient
    options = 0.25, 0.0, -1, -1
    fwd, bwd = torch.ops.pykernels.flash_attention_fwd_triton, torch.ops.pykernels.flash_attention_bwd_triton
    out, lse = fwd(q, k, v, None, None, *options)
    near = out, lse, *bwd(dout, dlse, q, k, v, out, lse, None, None, *options, False)[:3]
    q, k, v, dout = map(far, (q, k, v, dout))
    out, lse = fwd(q, k, v, None, None, *options)
    for x, y in zip((out, lse, *bwd(dout, dlse, q, k, v, out, lse, None, None, *options, False)[:3]), near):
        assert torch.equal(x, y) and x.count_nonzero()


@triton.jit
def _rounding_kernel(x, y, z, N: tl.constexpr):
    o_n = tl.arange(0, N)
    store(y + o_n, tl.load(x + o_n), o_n < N - 1)
    tl.store(z + o_n, load(y + o_n, o_n < N - 1))


@interpreted
def test_bfloat16_is_rounded_to_nearest_even():
    x = torch.randn(1024)
    x[:8] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38])
    x[8:200] = x[8:200].bfloat16().float() * (1 + 2**-8)  # many ties
    y, z = torch.full((1024,), 7.0, dtype=BF16), torch.full((1024,), 7.0)
    _rounding_kernel[1,](x, y, z, N=1024)
    expected = x.bfloat16()
    expected[-1] = 7.0
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    expected[-1] = 0.0
    torch.testing.assert_close(z, expected.float(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _tanh_kernel(x, y, N: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(y + o_n, tanh(tl.load(x + o_n), True))


@interpreted
def test_exact_tanh_has_a_small_relative_error():
    x = torch.cat([torch.logspace(-30, 2, 2047), torch.tensor([torch.inf])])
    x = torch.cat([x, -x])
    y = torch.empty_like(x)
    _tanh_kernel[1,](x, y, N=4096)
    exact = x.double().tanh()
    assert ((y - exact) / exact).abs().max() < 4 * torch.finfo(FP32).eps


def test_the_precision_of_float32_follows_torchs_setting():
    before = torch.get_float32_matmul_precision()
    try:
        for setting, precision in (("highest", "ieee"), ("high", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert dot_precision(FP32) == precision
            assert dot_precision(BF16) == dot_precision(FP16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
