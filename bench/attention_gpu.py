"""One run on a GPU for flash attention: is it right there, and how fast beside the best alternatives?

    python -m bench.attention_gpu              # everything, about 10 minutes
    python -m bench.attention_gpu --quick      # fewer sizes, about 3 minutes
    python -m bench.attention_gpu --skip-samples --head-dim 128

It runs the op's ordinary samples on the CUDA kernels; checks large sizes, the forward pass against float64 on rows
drawn at random and the gradients of the family in use against those of the bitwise repeatable one; and times forward
and backward beside scaled_dot_product_attention (cuDNN and flash backends) and flash-attn 4 where it is installed, in
turns, with a cold L2 cache. bf16, 16384 tokens in all, heads times head size 2048; TFLOP/s count 4 B H T^2 D forward,
half of it under a causal mask, and 2.5 times that backward. The exit status is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import pykernels
from pykernels.testing import FLASH_ATTENTION, FLASH_ATTENTION_DECODE
from pykernels.testing.verify import verify

from . import timer

Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]  # (q, k, v [B, T, H, D], causal) -> out

TOKENS, WIDTH = 16384, 2048
HEAD_DIMS = (64, 128, 256)
LENGTHS, QUICK_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768), (1024, 4096, 16384)


def _sdpa(backend: SDPBackend | None) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if backend is None:
            return scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    return attention


def _flash_attn_4(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    from flash_attn.cute import flash_attn_func

    result = flash_attn_func(q, k, v, causal=causal)
    return result[0] if isinstance(result, tuple) else result


def ours(backend: str) -> Attention:
    return lambda q, k, v, causal: pykernels.flash_attention(q, k, v, causal=causal, backend=backend)


def peers(device: str) -> dict[str, Attention]:
    """By the name in the table; those that can't run a case drop out there."""
    if device != "cuda":
        return {"sdpa": _sdpa(None)}
    found = {"cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION), "sdpa flash": _sdpa(SDPBackend.FLASH_ATTENTION)}
    if importlib.util.find_spec("flash_attn") is not None and importlib.util.find_spec("flash_attn.cute") is not None:
        found["fa4"] = _flash_attn_4
    return found


def inputs(batch: int, length: int, heads: int, head_dim: int, device: str, seed: int = 0) -> list[Tensor]:
    """q, k, v and dout: normal, bf16."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch, length, heads, head_dim)
    return [torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(4)]


def _gradients(attention: Callable[..., Tensor], qkv: Iterable[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in qkv]
    return torch.autograd.grad(attention(*leaves), leaves, dout)


def check_large(backend: str, device: str, batch: int, length: int, heads: int, head_dim: int,
                causal: bool) -> list[str]:
    """What is wrong with a large size, in words.

    Rows of the output against float64; gradients against deterministic=True, which on compute capability 9.0 other
    kernels serve. A wrong element would be off by its own size, rounding by about a hundredth of the largest.
    """
    q, k, v, dout = inputs(batch, length, heads, head_dim, device)
    call = functools.partial(pykernels.flash_attention, causal=causal, backend=backend)
    out = call(q, k, v)
    wrong = []
    generator = torch.Generator().manual_seed(length)
    for _ in range(16):
        b, h, i = (int(torch.randint(n, (), generator=generator)) for n in (batch, heads, length))
        end = i + 1 if causal else length
        scores = k[b, :end, h].double() @ q[b, i, h].double() * head_dim**-0.5
        row = scores.softmax(0) @ v[b, :end, h].double()
        error = float((out[b, i, h].double() - row).abs().max() / row.abs().max())
        if not error < 2e-2:
            wrong.append(f"out[{b}, {i}, {h}]: relative error {error:.1e}")
    fast = _gradients(call, (q, k, v), dout)
    repeatable = _gradients(functools.partial(call, deterministic=True), (q, k, v), dout)
    for name, x, y in zip(("dq", "dk", "dv"), fast, repeatable):
        error = float((x.float() - y.float()).abs().max() / y.float().abs().max())
        if not error < 2e-2:
            wrong.append(f"{name}: relative distance from deterministic=True {error:.1e}")
    return wrong


def measure(attention: dict[str, Attention], device: str, batch: int, length: int, heads: int, head_dim: int,
            causal: bool, backward: bool, seconds: float) -> dict[str, timer.Spread]:
    """{name: seconds of one call}; backward alone, without the forward pass before it."""
    q, k, v, dout = inputs(batch, length, heads, head_dim, device)
    runs, warm = {}, {}
    for name, call in attention.items():
        try:
            if backward:
                leaves = [x.detach().requires_grad_() for x in (q, k, v)]
                out = call(*leaves, causal)
                run = functools.partial(torch.autograd.grad, out, leaves, dout, retain_graph=True)
            else:
                run = functools.partial(torch.no_grad()(call), q, k, v, causal)
            timer.warm_up(run, device)
            warm[name] = timer.warm_up(run, device)
        except RuntimeError as error:  # this peer has no such kernel here; ours must
            if name.startswith("pykernels"):
                raise
            print(f"  {name} does not run: {str(error).splitlines()[0]:.90}", file=sys.stderr)
            continue
        runs[name] = run
    samples = timer.interleave(runs, timer.clock_for(device), seconds=seconds, warm=warm)
    return {name: timer.Spread.of([kernel for kernel, _ in taken]) for name, taken in samples.items()}


def flops(batch: int, length: int, heads: int, head_dim: int, causal: bool, backward: bool) -> float:
    return 4 * batch * heads * length**2 * head_dim * (0.5 if causal else 1) * (2.5 if backward else 1)


def table(backend: str, device: str, sizes: Iterable[tuple[int, int, int, int]], seconds: float) -> Iterator[str]:
    """The lines of the table of TFLOP/s; sizes are (batch, length, heads, head size)."""
    name = f"pykernels {backend}"
    candidates = {name: ours(backend), **peers(device)}
    yield "".join([f"{'head size, T, mask, pass':<32}", *(f"{c:>17}" for c in candidates), f"{'ours / best peer':>18}"])
    for size in sizes:
        for causal in (True, False):
            for backward in (False, True):
                times = measure(candidates, device, *size, causal, backward, seconds)
                work = flops(*size, causal, backward) / 1e12
                direction = "backward" if backward else "forward"
                label = f"{size[3]:>4} {size[1]:>6} {'causal' if causal else 'full':<7}{direction}"
                cells = [f"{work / times[c].median:>17.1f}" if c in times else f"{'–':>17}" for c in candidates]
                best = min((times[c].median for c in times if c != name), default=None)
                ratio = f"{'–':>18}" if best is None else f"{best / times[name].median:>18.2f}"
                yield f"{label:<32}{''.join(cells)}{ratio}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.attention_gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer lengths")
    parser.add_argument("--skip-samples", action="store_true", help="leave out the op's ordinary samples")
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS, action="append", help="only these (default: all)")
    parser.add_argument("--backend", default="cuda", choices=("cuda", "triton"))
    parser.add_argument("--seconds", type=float, default=0.5, help="for each line of the table")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("torch finds no usable NVIDIA GPU: there is nothing to measure", file=sys.stderr)
        return 1
    wrong = 0
    if not options.skip_samples:
        wrong += verify((FLASH_ATTENTION, FLASH_ATTENTION_DECODE), options.backend, as_json=False)
    lengths, head_dims = QUICK_LENGTHS if options.quick else LENGTHS, options.head_dim or HEAD_DIMS
    for head_dim in head_dims:
        for causal in (True, False):
            problems = check_large(options.backend, "cuda", 1, 8192 + 77, WIDTH // head_dim, head_dim, causal)
            mask = "causal" if causal else "full"
            print(f"head size {head_dim}, T 8269, {mask}: {'; '.join(problems) or 'right'}", flush=True)
            wrong += bool(problems)
    name = torch.cuda.get_device_name()
    print(f"\nTFLOP/s on {name}, bf16, torch {torch.__version__}", flush=True)
    sizes = [(max(1, TOKENS // length), length, WIDTH // head_dim, head_dim)
             for head_dim in head_dims for length in lengths]
    for line in table(options.backend, "cuda", sizes, options.seconds):
        print(line, flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
