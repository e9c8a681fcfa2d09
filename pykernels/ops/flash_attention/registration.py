"""Flash attention as PyTorch ops: fakes, the Triton backend's definitions, and autograd around whichever backend runs.

Each backend has its own ops, `flash_attention_{fwd,bwd,decode,append}_<backend>`, with one schema for all. Autograd is
an `autograd.Function` around them; its backward is differentiable again in eager mode, through the reference.

What is off is None (dropout_p: 0). Inside the ops alibi_slopes [Hq] or [B or sequences, Hq] and sinks [Hq] are in the
accumulator's dtype, bias is [B or 1, Hq or 1, Tq or 1, Tk or 1] in bool, q's dtype or float32, seed is int64 [1] and
block_table int32 [B, pages of an entry].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import _autograd, _dispatch
from . import reference

_OPTIONS = "float scale, float softcap, int window_left, int window_right"
_EXTRAS = "Tensor? alibi_slopes=None, Tensor? bias=None, Tensor? sinks=None, Tensor? seed=None, float dropout_p=0.0"
SCHEMAS = {
    "fwd": "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
           f"{_OPTIONS}, {_EXTRAS}) -> (Tensor out, Tensor lse)",
    # dbias and dsinks are in the accumulator's dtype, and empty where there is none to give.
    "bwd": "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? cu_seqlens_q, "
           f"Tensor? cu_seqlens_k, {_OPTIONS}, bool deterministic, {_EXTRAS}, bool bias_gradient=False) "
           "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
    "decode": f"(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, int new_tokens, {_OPTIONS}, "
              "Tensor? block_table=None, Tensor? alibi_slopes=None, Tensor? sinks=None) -> (Tensor out, Tensor lse)",
    "append": "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor cache_seqlens, "
              "Tensor? block_table=None) -> ()",
}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lse, of slopes and sinks inside the ops, and of the sums that make dbias and dsinks."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, tq, heads, _ = q.shape
    return q.new_empty(batch, tq, heads, v.shape[3]), q.new_empty(batch, heads, tq, dtype=accumulator(q.dtype))


def _fake_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, softcap, window_left, window_right, alibi_slopes=None,
              bias=None, sinks=None, seed=None, dropout_p=0.0):
    return _outputs(q, v)


def _fake_bwd(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, softcap, window_left, window_right,
              deterministic, alibi_slopes=None, bias=None, sinks=None, seed=None, dropout_p=0.0, bias_gradient=False):
    wide = accumulator(q.dtype)
    return (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape),
            q.new_empty(bias.shape if bias_gradient else 0, dtype=wide),
            q.new_empty(0 if sinks is None else sinks.shape, dtype=wide))


def _fake_decode(q, k_cache, v_cache, cache_seqlens, new_tokens, scale, softcap, window_left, window_right,
                 block_table=None, alibi_slopes=None, sinks=None):
    return _outputs(q, v_cache)


def _fake_append(k_cache, v_cache, k, v, cache_seqlens, block_table=None):
    return None


run = _dispatch.register("flash_attention", SCHEMAS,
                         {"fwd": _fake_fwd, "bwd": _fake_bwd, "decode": _fake_decode, "append": _fake_append},
                         mutated={"append": (0, 1)}, triton=f"{__package__}.triton")


def _gradients(backend, tensors, bias, sinks, others, options, deterministic, dropout_p, bias_gradient):
    """The backward op -> gradients of q, k, v, bias, sinks; None where there is no such argument or need."""
    cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed = others
    dq, dk, dv, dbias, dsinks = run("bwd", backend, *tensors, cu_seqlens_q, cu_seqlens_k, *options, deterministic,
                                    alibi_slopes, bias, sinks, seed, dropout_p, bias_gradient)
    return dq, dk, dv, dbias.to(bias.dtype) if bias_gradient else None, None if sinks is None else dsinks


class _Backward(torch.autograd.Function):
    """The backward pass as a function of its own, whose derivative is that of the reference's backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dout, dlse, q, k, v, bias, sinks, out, lse, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed, settings):
        options, dropout_p, deterministic, backend = settings
        return _gradients(backend, (dout, dlse, q, k, v, out, lse), bias, sinks,
                          (cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed), options, deterministic, dropout_p,
                          bias is not None and bias.is_floating_point())

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.settings = inputs
        ctx.save_for_backward(*tensors[:7], *tensors[9:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        dout, dlse, q, k, v, bias, sinks, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed = ctx.saved_tensors
        options, dropout_p, _, _ = ctx.settings
        variable = bias if bias is not None and bias.is_floating_point() else None

        def forward(q, k, v, variable, sinks):
            return reference.flash_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, *options, alibi_slopes,
                                             bias if variable is None else variable, sinks, seed, dropout_p)

        # out and lse are functions of the inputs here, so their own cotangents are already inside those.
        given, inputs = _autograd.second_derivative(forward, (q, k, v, variable, sinks), (dout, dlse), upstream)
        return *given, *inputs, *[None] * 7


@_autograd.signature_kept
class FlashAttention(torch.autograd.Function):
    """flash_attention on a compiled backend -> (out, lse), both differentiable in q, k, v, bias and sinks."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, bias, sinks, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed, options, dropout_p, deterministic,
                backend):
        return run("fwd", backend, q, k, v, cu_seqlens_q, cu_seqlens_k, *options, alibi_slopes, bias, sinks, seed,
                   dropout_p)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, options, dropout_p, deterministic, backend = inputs
        ctx.save_for_backward(*tensors[:5], *output, *tensors[5:])
        ctx.set_materialize_grads(False)
        ctx.settings = options, dropout_p, deterministic, backend

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, bias, sinks, out, lse, *others = ctx.saved_tensors
        options, dropout_p, deterministic, backend = ctx.settings
        if dout is None:
            dout = torch.zeros_like(out)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            gradients = _Backward.apply(dout, dlse, q, k, v, bias, sinks, out, lse, *others, ctx.settings)
        else:
            gradients = _gradients(backend, (dout, dlse, q, k, v, out, lse), bias, sinks, others, options,
                                   deterministic, dropout_p, ctx.needs_input_grad[3])
        return *gradients, *[None] * 8
