"""Linear attention as PyTorch ops: fakes, the Triton backend's definitions, and autograd around whichever backend runs.

Each backend has its own ops, `linear_attention_{fwd,bwd,step}_<backend>`, with one schema for all. Autograd is an
`autograd.Function` around them; its backward is differentiable again in eager mode, through the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import _dispatch
from ..._autograd import second_derivative, signature_kept
from . import reference

SEGMENT = 512  # tokens between the states kept for backward, as in csrc/include/pykernels/linear_attention.h

_OPTIONS = "float scale, bool normalize, bool reverse"
SCHEMAS = {
    "fwd": "(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? bonus, Tensor? initial_state, Tensor? cu_seqlens, "
           f"{_OPTIONS}, bool checkpoint) -> (Tensor out, Tensor final_state, Tensor checkpoints, Tensor denominator)",
    "bwd": "(Tensor dout, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? bonus, "
           f"Tensor? cu_seqlens, Tensor out, Tensor checkpoints, Tensor denominator, {_OPTIONS}, bool decay_gradient) "
           "-> (Tensor dq, Tensor dk, Tensor dv, Tensor ddecay, Tensor dbonus, Tensor dinitial_state)",
    "step": "(Tensor(a!) state, Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? bonus, Tensor? state_indices, "
            "float scale, bool normalize) -> Tensor",
}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states, and of decay and bonus inside the ops."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tiles(v: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many segments the sequences are cut into, at most."""
    if cu_seqlens is not None:
        return v.shape[1] // SEGMENT + cu_seqlens.shape[0] - 1
    return v.shape[0] * ((v.shape[1] + SEGMENT - 1) // SEGMENT)


def _state_shape(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, normalize: bool) -> tuple[int, int, int, int]:
    count = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return count, v.shape[2], q.shape[3], v.shape[3] + normalize


def _fake_fwd(q, k, v, decay, bonus, initial_state, cu_seqlens, scale, normalize, reverse, checkpoint):
    wide = accumulator(q.dtype)
    shape = _state_shape(q, v, cu_seqlens, normalize)
    return (v.new_empty(v.shape), q.new_empty(shape, dtype=wide),
            q.new_empty(tiles(v, cu_seqlens) if checkpoint else 0, *shape[1:], dtype=wide),
            q.new_empty(v.shape[0], v.shape[1] if normalize else 0, v.shape[2], dtype=wide))


def _fake_bwd(dout, dfinal_state, q, k, v, decay, bonus, cu_seqlens, out, checkpoints, denominator, scale, normalize,
              reverse, decay_gradient):
    wide = accumulator(q.dtype)
    per_head = (*v.shape[:3], q.shape[3])
    of_k = q.dtype if q.shape[2] == v.shape[2] else wide
    rows = v.shape[1] if decay_gradient else 0
    channel = (q.shape[3],) if decay is not None and decay.dim() == 4 else ()
    return (q.new_empty(per_head, dtype=of_k), q.new_empty(per_head, dtype=of_k), v.new_empty(v.shape),
            q.new_empty(v.shape[0], rows, v.shape[2], *channel, dtype=wide),
            q.new_empty(0 if bonus is None else tiles(v, cu_seqlens), v.shape[2], q.shape[3], dtype=wide),
            q.new_empty(_state_shape(q, v, cu_seqlens, normalize), dtype=wide))


def _fake_step(state, q, k, v, decay, bonus, state_indices, scale, normalize):
    return v.new_empty(v.shape)


run = _dispatch.register("linear_attention", SCHEMAS, {"fwd": _fake_fwd, "bwd": _fake_bwd, "step": _fake_step},
                         mutated={"step": (0,)}, triton=f"{__package__}.triton")


def _gradients(backend, dout, dfinal, q, k, v, decay, bonus, initial_state, cu_seqlens, out, checkpoints, denominator,
               options, decay_gradient):
    """The backward op, and the sums that it leaves to do -> gradients of q, k, v, decay, bonus, initial_state."""
    dq, dk, dv, ddecay, dbonus, dinitial = run(
        "bwd", backend, dout, dfinal, q, k, v, decay, bonus, cu_seqlens, out, checkpoints, denominator, *options,
        decay_gradient)
    if q.shape[2] != v.shape[2]:
        shape = (*q.shape[:3], v.shape[2] // q.shape[2], q.shape[3])
        dq, dk = (x.view(shape).sum(3).to(q.dtype) for x in (dq, dk))
    if not decay_gradient:
        ddecay = None
    elif decay.dim() == 1:
        ddecay = ddecay.sum((0, 1))
    return dq, dk, dv, ddecay, None if bonus is None else dbonus.sum(0), None if initial_state is None else dinitial


class _Backward(torch.autograd.Function):
    """The backward pass as a function of its own, whose derivative is that of the reference's backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dout, dfinal, q, k, v, decay, bonus, initial_state, cu_seqlens, out, checkpoints, denominator, options,
                backend):
        return _gradients(backend, dout, dfinal, q, k, v, decay, bonus, initial_state, cu_seqlens, out, checkpoints,
                          denominator, options, decay is not None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:9])
        ctx.set_materialize_grads(False)
        ctx.options = inputs[12]

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        dout, dfinal, *primals, cu_seqlens = ctx.saved_tensors
        # out, the checkpoints and the denominator are functions of the inputs, so their own derivatives are already
        # inside.
        cotangents, primals = second_derivative(lambda *p: reference.linear_attention(*p, cu_seqlens, *ctx.options),
                                                primals, (dout, dfinal), upstream)
        return *cotangents, *primals, *[None] * 6


@signature_kept
class LinearAttention(torch.autograd.Function):
    """linear_attention on a compiled backend -> (out, final_state, checkpoints, denominator), the first two
    differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, decay, bonus, initial_state, cu_seqlens, options, backend):
        return run("fwd", backend, q, k, v, decay, bonus, initial_state, cu_seqlens, *options, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, options, backend = inputs
        out, _, checkpoints, denominator = output
        ctx.mark_non_differentiable(checkpoints, denominator)
        # Only the normaliser's backward reads out.
        ctx.save_for_backward(*tensors, out if options[1] else None, checkpoints, denominator)
        ctx.set_materialize_grads(False)
        ctx.settings = options, backend, out.shape

    @staticmethod
    def backward(ctx, dout, dfinal, *_):
        q, k, v, decay, bonus, initial_state, cu_seqlens, out, checkpoints, denominator = ctx.saved_tensors
        options, backend, shape = ctx.settings
        if dout is None:
            dout = v.new_zeros(shape)
        out = v.new_empty(0) if out is None else out
        args = (dout, dfinal, q, k, v, decay, bonus, initial_state, cu_seqlens, out, checkpoints, denominator, options)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            gradients = _Backward.apply(*args, backend)
        else:
            gradients = _gradients(backend, *args, ctx.needs_input_grad[3])
        return *gradients, None, None, None
