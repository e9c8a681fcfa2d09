"""The causal convolution as PyTorch ops: fakes, and autograd around whichever backend runs.

Each backend has its own ops, `causal_conv1d_{fwd,bwd,step}_<backend>`, with one schema for all. weight and bias are in
the compute dtype; those of a step in that or x's, and its x is [B, D] or [B, D, T].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import _dispatch
from ..._autograd import second_derivative, signature_kept
from ..._dispatch import empty_like_layout
from . import reference

SCHEMAS = {
    "fwd": "(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, bool silu) "
           "-> (Tensor out, Tensor final_state)",
    "bwd": "(Tensor dout, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, "
           "Tensor? cu_seqlens, bool silu) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)",
    "step": "(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, Tensor? state_indices, bool silu) -> Tensor",
}


def _states(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(sequences, x.shape[1], weight.shape[1] - 1)


def _fake_fwd(x, weight, bias, initial_state, cu_seqlens, silu):
    return empty_like_layout(x), _states(x, weight, cu_seqlens)


def _fake_bwd(dout, dfinal_state, x, weight, bias, initial_state, cu_seqlens, silu):
    states = _states(x, weight, cu_seqlens)
    return (empty_like_layout(x), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0]),
            states if initial_state is not None else states.new_empty(0, *states.shape[1:]))


def _fake_step(x, state, weight, bias, state_indices, silu):
    return x.new_empty(x.shape) if x.dim() == 2 else empty_like_layout(x)


run = _dispatch.register("causal_conv1d", SCHEMAS, {"fwd": _fake_fwd, "bwd": _fake_bwd, "step": _fake_step},
                         mutated={"step": (1,)}, triton=f"{__package__}.triton")


class _Backward(torch.autograd.Function):
    """The backward pass as a function of its own, whose derivative is that of the reference's backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dout, dfinal_state, x, weight, bias, initial_state, cu_seqlens, silu, backend):
        return run("bwd", backend, dout, dfinal_state, x, weight, bias, initial_state, cu_seqlens, silu)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, silu, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.silu = silu

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        dout, dfinal_state, *primals, cu_seqlens = ctx.saved_tensors
        cotangents, primals = second_derivative(lambda *p: reference.causal_conv1d(*p, cu_seqlens, ctx.silu), primals,
                                                (dout, dfinal_state), upstream)
        return *cotangents, *primals, None, None, None


@signature_kept
class CausalConv1d(torch.autograd.Function):
    """causal_conv1d on a compiled backend -> (out, final_state), both differentiable. weight and bias in the compute
    dtype."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, initial_state, cu_seqlens, silu, backend):
        return run("fwd", backend, x, weight, bias, initial_state, cu_seqlens, silu)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, silu, backend = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.settings = silu, backend

    @staticmethod
    def backward(ctx, dout, dfinal_state):
        tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(tensors[0])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            gradients = _Backward.apply(dout, dfinal_state, *tensors, *ctx.settings)
        else:
            silu, backend = ctx.settings
            gradients = run("bwd", backend, dout, dfinal_state, *tensors, silu)
        present = [x is not None for x in tensors[:4]]
        return *(gradient if there else None for gradient, there in zip(gradients, present)), None, None, None
