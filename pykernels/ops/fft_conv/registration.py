"""Long convolution as PyTorch ops: fakes, and autograd around whichever backend runs.

Each backend has its own ops, `fft_conv_{fwd,bwd}_<backend>`, with one schema for all. Autograd is an
`autograd.Function` around them; its backward is differentiable again in eager mode, through the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import _dispatch
from ..._autograd import signature_kept
from . import reference

_INPUTS = (
    "Tensor u, Tensor k, Tensor? k_rev, Tensor? D, Tensor? pre_gate, Tensor? post_gate, int k_rev_lag, bool circular"
)
SCHEMAS = {
    "fwd": f"({_INPUTS}) -> Tensor",
    "bwd": f"(Tensor dout, {_INPUTS}, bool input_gradient, bool kernel_gradient) "
    "-> (Tensor du, Tensor dk, Tensor dk_rev, Tensor dD, Tensor dpre_gate, Tensor dpost_gate)",
}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of kernels and of D inside the ops, and of all arithmetic."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_fwd(u, k, k_rev, D, pre_gate, post_gate, k_rev_lag, circular):
    return u.new_empty(u.shape)


def _fake_bwd(dout, u, k, k_rev, D, pre_gate, post_gate, k_rev_lag, circular, input_gradient, kernel_gradient):
    def rows(wanted):
        return u.new_empty(u.shape[0] if wanted else 0, *u.shape[1:])

    taps_rev = 0 if k_rev is None else k_rev.shape[1]
    return (
        rows(input_gradient),
        k.new_empty(k.shape[0] if kernel_gradient else 0, k.shape[1]),
        k.new_empty(k.shape[0] if kernel_gradient and k_rev is not None else 0, taps_rev),
        k.new_empty(0 if D is None else u.shape[1]),
        rows(input_gradient and pre_gate is not None),
        rows(post_gate is not None),
    )


run = _dispatch.register("fft_conv", SCHEMAS, {"fwd": _fake_fwd, "bwd": _fake_bwd}, triton=f"{__package__}.triton")


# ---- of the CPU alone: see csrc/include/pykernels/fft_conv.h


def _fake_spectrum(k, k_rev, k_rev_lag, circular, length, points):
    return k.new_empty(torch.library.get_ctx().new_dynamic_size())  # the instruction set decides


def _fake_fwd_spectrum(u, spectrum, *_):
    return u.new_empty(u.shape)


def _fake_step(u_t, inputs, pending, k, spectrum, D, pre_gate, post_gate, tokens):
    return u_t.new_empty(u_t.shape)


if hasattr(torch.ops.pykernels, "fft_conv_step_cpu"):
    _dispatch.register_fake("fft_conv_spectrum_cpu", _fake_spectrum)
    _dispatch.register_fake("fft_conv_fwd_spectrum_cpu", _fake_fwd_spectrum)
    _dispatch.register_fake("fft_conv_step_cpu", _fake_step)
    _dispatch.bump_versions("fft_conv_step_cpu", (1, 2))


def _gradients(backend, dout, tensors, options, input_gradient, kernel_gradient):
    """-> gradients of `tensors` (u, k, k_rev, D, pre_gate, post_gate); None for what is None or not asked for."""
    result = run("bwd", backend, dout, *tensors, *options, input_gradient, kernel_gradient)
    wanted = (input_gradient, kernel_gradient, kernel_gradient, True, input_gradient, True)
    return tuple(g if x is not None and want else None for g, x, want in zip(result, tensors, wanted))


class _Backward(torch.autograd.Function):
    """The backward pass as a function of its own, whose derivative is that of the reference's backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dout, u, k, k_rev, D, pre_gate, post_gate, options, backend):
        return _gradients(backend, dout, (u, k, k_rev, D, pre_gate, post_gate), options, True, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:7])
        ctx.options = inputs[7]

    @staticmethod
    @once_differentiable
    def backward(ctx, *cotangents):
        given = ctx.saved_tensors
        # Arguments that are None have no derivative; the rest are the variables.
        present = [i for i, x in enumerate(given) if x is not None]

        def gradients(dout, *variables):
            def forward(*chosen):
                full: list[Tensor | None] = [None] * 6
                for i, x in zip(present[1:], chosen):
                    full[i - 1] = x
                return reference.fft_conv(*full, *ctx.options)

            _, vjp = torch.func.vjp(forward, *variables)
            return vjp(dout)

        _, vjp = torch.func.vjp(gradients, *(given[i] for i in present))
        second = vjp(tuple(c for c, x in zip(cotangents, given[1:]) if x is not None))
        result: list[Tensor | None] = [None] * 9
        for i, x in zip(present, second):
            result[i] = x
        return tuple(result)


@signature_kept
class FFTConv(torch.autograd.Function):
    """fft_conv on a compiled backend. Nothing but the inputs is kept: backward computes the spectra again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u, k, k_rev, D, pre_gate, post_gate, options, backend):
        return run("fwd", backend, u, k, k_rev, D, pre_gate, post_gate, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.options, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, dout):
        tensors = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            gradients = _Backward.apply(dout, *tensors, ctx.options, ctx.backend)
        else:
            needs = ctx.needs_input_grad
            gradients = _gradients(ctx.backend, dout, tensors, ctx.options, needs[0] or needs[4], needs[1] or needs[2])
        return *gradients, None, None
