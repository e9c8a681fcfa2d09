"""The selective scan as PyTorch ops: fakes, and autograd around whichever backend runs.

Each backend has its own ops, `selective_scan_{fwd,bwd,step}_<backend>`, with one schema for all. They take complex
tensors as real ones with a last axis of 2. What chunk_states holds is the backend's own affair. A step's x is [B, D],
or in heads [B, H, P], as are state, delta, z, A, D and delta_bias; B and C are [B, N] or [B, G, N]; D and delta_bias
may be in x's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import _dispatch
from ..._autograd import second_derivative, signature_kept
from ..._dispatch import empty_like_layout
from . import reference

_INPUTS = ("Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
           "Tensor? initial_state, Tensor? cu_seqlens, bool delta_softplus")
SCHEMAS = {
    "fwd": f"({_INPUTS}, bool keep_states) -> (Tensor out, Tensor final_state, Tensor chunk_states)",
    "bwd": f"(Tensor dout, Tensor? dfinal_state, {_INPUTS}, Tensor chunk_states) -> (Tensor du, Tensor ddelta, "
           "Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor ddelta_bias, Tensor dinitial_state)",
    "step": "(Tensor x, Tensor(a!) state, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
            "Tensor? delta_bias, Tensor? state_indices, bool delta_softplus) -> Tensor",
}
CHUNK = 64  # tokens between the states that the forward pass keeps


def _states(u: Tensor, A: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return A.new_empty(u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, *A.shape)


def _fake_fwd(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, keep_states):
    chunks = u.shape[2] // CHUNK
    chunks = u.shape[0] * (chunks + 1) if cu_seqlens is None else chunks + cu_seqlens.shape[0]
    rows = A.shape[1] * (2 if A.dim() == 3 else 1)
    return (empty_like_layout(u), _states(u, A, cu_seqlens), A.new_empty(chunks if keep_states else 0, rows,
                                                                         A.shape[0]))


def _fake_bwd(dout, dfinal_state, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus,
              chunk_states):
    states = _states(u, A, cu_seqlens)
    return (empty_like_layout(u), empty_like_layout(delta), A.new_empty(A.shape), A.new_empty(B.shape),
            A.new_empty(C.shape),
            A.new_empty(0 if D is None else A.shape[0]), u.new_empty(0) if z is None else empty_like_layout(z),
            A.new_empty(0 if delta_bias is None else A.shape[0]),
            states.new_empty(0, *A.shape) if initial_state is None else states)


def _fake_step(x, state, delta, A, B, C, D, z, delta_bias, state_indices, delta_softplus):
    return x.new_empty(x.shape)


run = _dispatch.register("selective_scan", SCHEMAS, {"fwd": _fake_fwd, "bwd": _fake_bwd, "step": _fake_step},
                         mutated={"step": (1,)}, triton=f"{__package__}.triton")


def real(x: Tensor | None) -> Tensor | None:
    """Complex as a real view with a last axis of 2."""
    return torch.view_as_real(x.resolve_conj()) if x is not None and x.is_complex() else x


def in_heads(x: Tensor, state: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
             z: Tensor | None, delta_bias: Tensor | None, *settings) -> tuple:
    """A step's arguments in heads, one for each group where they are [B, D], and with groups."""
    grouped = 3 + A.dim() - x.dim()  # axes, of which pairs of real numbers have one more
    B, C = (y[:, None] if y.dim() < grouped else y for y in (B, C))
    if x.dim() == 2:
        def split(y: Tensor | None, axis: int) -> Tensor | None:
            return y if y is None else y.unflatten(axis, (B.shape[1], y.shape[axis] // B.shape[1]))

        x, state, delta, z = (split(y, 1) for y in (x, state, delta, z))
        A, D, delta_bias = (split(y, 0) for y in (A, D, delta_bias))
    return x, state, delta, A, B, C, D, z, delta_bias, *settings


def forward(backend: str, keep_states: bool, *inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs as the schema has them, but for complex ones -> (out, final_state, chunk_states)."""
    *tensors, delta_softplus = inputs
    out, final_state, chunk_states = run("fwd", backend, *map(real, tensors), delta_softplus, keep_states)
    return out, torch.view_as_complex(final_state) if inputs[2].is_complex() else final_state, chunk_states


def _backward(backend: str, dout: Tensor, dfinal_state: Tensor | None, inputs: tuple, delta_softplus: bool,
              chunk_states: Tensor) -> tuple[Tensor, ...]:
    """-> the gradients of the first nine inputs, each in its input's dtype; empty for those that are None."""
    gradients = run("bwd", backend, dout, real(dfinal_state), *map(real, inputs), delta_softplus, chunk_states)
    result = []
    for x, gradient in zip(inputs, gradients):
        if x is not None:
            gradient = torch.view_as_complex(gradient) if x.is_complex() else gradient.to(x.dtype)
        result.append(gradient)
    return tuple(result)


class _Backward(torch.autograd.Function):
    """The backward pass as a function of its own, whose derivative is that of the reference's backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dout, dfinal_state, *inputs_and_settings):
        *inputs, chunk_states, delta_softplus, backend = inputs_and_settings
        return _backward(backend, dout, dfinal_state, inputs, delta_softplus, chunk_states)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, _, delta_softplus, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.delta_softplus = delta_softplus

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        dout, dfinal_state, *primals, cu_seqlens = ctx.saved_tensors
        cotangents, primals = second_derivative(lambda *p: reference.selective_scan(*p, cu_seqlens,
                                                                                    ctx.delta_softplus), primals,
                                                (dout, dfinal_state), upstream)
        return *cotangents, *primals, None, None, None, None


@signature_kept
class SelectiveScan(torch.autograd.Function):
    """selective_scan on a compiled backend -> (out, final_state, chunk_states), the first two differentiable.

    A, D, delta_bias, constant B and C, and the state are in the compute dtype.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs_and_backend):
        *inputs, backend = inputs_and_backend
        return forward(backend, True, *inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, delta_softplus, backend = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*tensors, output[2])
        ctx.set_materialize_grads(False)
        ctx.settings = delta_softplus, backend

    @staticmethod
    def backward(ctx, dout, dfinal_state, _):
        *inputs, chunk_states = ctx.saved_tensors
        delta_softplus, backend = ctx.settings
        if dout is None:
            dout = torch.zeros_like(inputs[0])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            gradients = _Backward.apply(dout, dfinal_state, *inputs, chunk_states, *ctx.settings)
        else:
            gradients = _backward(backend, dout, dfinal_state, inputs, delta_softplus, chunk_states)
        return *(None if x is None else gradient for x, gradient in zip(inputs[:9], gradients)), None, None, None
