"""Flash attention as PyTorch ops: fakes, the Triton backend's definitions, and autograd around whichever backend runs.

Each backend has its own ops, `flash_attention_{fwd,bwd,decode,append}_<backend>`, with one schema for all. Autograd is an
`autograd.Function` around them; its backward is differentiable again in eager mode, through the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import _dispatch
from . import reference

_OPTIONS = "float scale, float softcap, int window_left, int window_right"
SCHEMAS = {
    "fwd": f"(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    "bwd": "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? cu_seqlens_q, "
           f"Tensor? cu_seqlens_k, {_OPTIONS}, bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)",
    "decode": f"(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, int new_tokens, {_OPTIONS}) "
              "-> (Tensor out, Tensor lse)",
    "append": "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor cache_seqlens) -> ()",
}


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, tq, heads, _ = q.shape
    accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(batch, tq, heads, v.shape[3]), q.new_empty(batch, heads, tq, dtype=accumulator)


def _fake_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, softcap, window_left, window_right):
    return _outputs(q, v)


def _fake_bwd(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, softcap, window_left, window_right, deterministic):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _fake_decode(q, k_cache, v_cache, cache_seqlens, new_tokens, scale, softcap, window_left, window_right):
    return _outputs(q, v_cache)


def _fake_append(k_cache, v_cache, k, v, cache_seqlens):
    return None


run = _dispatch.register("flash_attention", SCHEMAS,
                         {"fwd": _fake_fwd, "bwd": _fake_bwd, "decode": _fake_decode, "append": _fake_append},
                         mutated={"append": (0, 1)}, triton=f"{__package__}.triton")


class _Backward(torch.autograd.Function):
    """The backward pass as a function of its own, whose derivative is that of the reference's backward."""

    @staticmethod
    def forward(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, options, deterministic, backend):
        return run("bwd", backend, dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *options, deterministic)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dout, dlse, q, k, v, _, _, cu_seqlens_q, cu_seqlens_k, options, _, _ = inputs
        ctx.save_for_backward(dout, dlse, q, k, v, cu_seqlens_q, cu_seqlens_k)
        ctx.options = options

    @staticmethod
    @once_differentiable
    def backward(ctx, *cotangents):
        dout, dlse, q, k, v, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors

        def gradients(dout, dlse, q, k, v):
            _, vjp = torch.func.vjp(
                lambda *qkv: reference.flash_attention(*qkv, cu_seqlens_q, cu_seqlens_k, *ctx.options), q, k, v)
            return vjp((dout, dlse))

        no_dlse = dlse is None
        if no_dlse:
            batch, tq, heads, _ = q.shape
            dlse = q.new_zeros(batch, heads, tq, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        _, vjp = torch.func.vjp(gradients, dout, dlse, q, k, v)
        ddout, ddlse, dq, dk, dv = vjp(cotangents)
        # out and lse are functions of q, k and v here, so their own cotangents are already inside those.
        return ddout, None if no_dlse else ddlse, dq, dk, dv, *[None] * 7


class FlashAttention(torch.autograd.Function):
    """flash_attention on a compiled backend -> (out, lse), both differentiable."""

    @staticmethod
    def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, options, deterministic, backend):
        return run("fwd", backend, q, k, v, cu_seqlens_q, cu_seqlens_k, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, cu_seqlens_q, cu_seqlens_k, options, deterministic, backend = inputs
        ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)
        ctx.set_materialize_grads(False)
        ctx.settings = options, deterministic, backend

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        options, deterministic, backend = ctx.settings
        if dout is None:
            dout = torch.zeros_like(out)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            gradients = _Backward.apply(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, options, deterministic, backend)
        else:
            gradients = run("bwd", backend, dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *options, deterministic)
        return *gradients, *[None] * 5
