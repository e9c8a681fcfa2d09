"""Long convolution: a kernel as long as the sequence, causal, two-sided or circular, with gates, in time L log L.

The definition is `reference.py`; `registration.py` makes ops of the backends; `decode.py` is the convolution of a
sequence that comes token by token; README.md derives the transforms and gradients.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ... import _checks
from ..._autograd import apart, followed
from ...backends import Op, Query, asked_for, check_name, resolve
from . import decode, reference, registration
from .decode import FFTConvState

__all__ = [
    "OP",
    "FFTConvSpectrum",
    "FFTConvState",
    "fft_conv",
    "fft_conv_init",
    "fft_conv_spectrum",
    "fft_conv_step",
    "transforms_beforehand",
]


def _any(query: Query) -> str | None:
    return None


_LONGEST = 1 << 28  # samples of a row: offsets within its transform are 32 bits wide


_SPECTRUM = "spectra of kernels are kept between calls on the CPU alone: pass k itself"


def _triton(query: Query) -> str | None:
    if "spectrum" in query.options:
        return _SPECTRUM
    if query.dtype == torch.float64:
        return "the Triton kernels compute in float32"
    if query.sizes["length"] > _LONGEST:
        return f"the Triton kernels take rows of up to {_LONGEST} samples, these have {query.sizes['length']}"
    return None


def _cuda(query: Query) -> str | None:
    if "spectrum" in query.options:
        return _SPECTRUM
    if query.dtype == torch.float64:
        return "the CUDA kernels compute in float32"
    if query.sizes["length"] > _LONGEST:
        return f"the CUDA kernels take rows of up to {_LONGEST} samples, these have {query.sizes['length']}"
    return None


OP = Op(
    "fft_conv",
    {"cuda": _cuda, "triton": _triton, "cpu": _any, "reference": _any},
    explicit_only={"cuda": "not yet measured against Triton on a GPU, so only on request"},
)

_MODES = ("causal", "circular")


def _widened(u: Tensor, *kernels: Tensor | None) -> tuple[Tensor | None, ...]:
    """Kernels and D in the dtype that the ops take them in beside u."""
    wide = registration.accumulator(u.dtype)
    return tuple(None if x is None else x.to(wide) for x in kernels)


def _check_kernel(name: str, k: object, u: Tensor) -> None:
    axis = "K" if name == "k" else "R"
    _checks.tensor(name, k, f"G {axis}")
    if k.shape[1] < 1:
        raise ValueError(f"{name} must have at least one tap, got shape {list(k.shape)}")
    _checks.parameter(name, k, "u", u)


def _check_kernels(k: object, k_rev: object, k_rev_lag: object, D: object, u: Tensor) -> None:
    _check_kernel("k", k, u)
    channels, groups = u.shape[1], k.shape[0]
    if channels % groups if groups else channels:
        raise ValueError(
            f"k must have one row per channel or per group of channels: u has {channels} channels, k {groups} rows"
        )
    if type(k_rev_lag) is not int or k_rev_lag not in (0, 1):
        raise ValueError(f"k_rev_lag must be 0 or 1, got {k_rev_lag!r}")
    if k_rev is not None:
        _check_kernel("k_rev", k_rev, u)
        _checks.shape("k_rev", k_rev, {"G": groups, "R": None})
    _check_skip(D, u)


def _check_skip(D: object, u: Tensor) -> None:
    if D is None:
        return
    _checks.tensor("D", D, "D")
    _checks.shape("D", D, {"D": u.shape[1]})
    _checks.parameter("D", D, "u", u)


def _check_gate(name: str, gate: object, u: Tensor) -> None:
    if gate is None:
        return
    _checks.tensor(name, gate, "B D L")
    _checks.shape(name, gate, dict(zip("BDL", u.shape)))
    _check_gate_type(name, gate, u)


def _check_gate_type(name: str, gate: Tensor, u: Tensor) -> None:
    if gate.dtype not in (u.dtype, torch.float32) or u.dtype == torch.float64 != gate.dtype:
        raise TypeError(f"{name} must have u's dtype {u.dtype} or, for 16-bit u, float32, got {gate.dtype}")
    _checks.same_device(name, gate, "u", u)


def _check_rows(u: object, pre_gate: object, post_gate: object, mode: object) -> bool:
    """-> whether u and the gates have to be widened to float32."""
    _check_gate("pre_gate", pre_gate, u)
    _check_gate("post_gate", post_gate, u)
    if mode not in _MODES:
        raise ValueError(f"mode must be 'causal' or 'circular', got {mode!r}")
    return any(gate is not None and gate.dtype != u.dtype for gate in (pre_gate, post_gate))


@_checks.by_metadata
def _check_call(
    u: object,
    k: object,
    k_rev: object,
    k_rev_lag: object,
    D: object,
    pre_gate: object,
    post_gate: object,
    mode: object,
    backend: object,
) -> tuple[str, bool, bool]:
    """-> the backend that serves a call; whether u and the gates have to be widened to float32; the same of kernels."""
    _checks.tensor("u", u, "B D L")
    _checks.main_dtype("u", u)
    _check_kernels(k, k_rev, k_rev_lag, D, u)
    widen = _check_rows(u, pre_gate, post_gate, mode)
    on = {"k_rev": k_rev, "D": D, "pre_gate": pre_gate, "post_gate": post_gate}
    options = frozenset(name for name, x in on.items() if x is not None) | {mode}
    dtype = torch.float32 if widen else u.dtype
    chosen = resolve(OP, Query(u.device.type, dtype, {"length": u.shape[2], "taps": k.shape[1]}, options), backend)
    wide = registration.accumulator(u.dtype)
    return chosen, widen, any(x is not None and x.dtype != wide for x in (k, k_rev, D))


@dataclasses.dataclass(frozen=True)
class FFTConvSpectrum:
    """Kernels that `fft_conv_spectrum` prepared for many calls of `fft_conv`; later changes of k do not reach them."""

    groups: int  # G
    taps: int
    taps_rev: int
    k_rev_lag: int
    mode: str
    length: int  # of the sequences: up to so many samples; circular: as many
    dtype: torch.dtype  # of the arithmetic: float32, or float64 for float64 kernels
    device: torch.device
    backend: str
    kept: tuple[Tensor | None, ...]  # cpu: the spectra, laid out for this instruction set; reference: k and k_rev


def fft_conv(
    u: Tensor,
    k: Tensor | FFTConvSpectrum,
    *,
    k_rev: Tensor | None = None,
    k_rev_lag: int = 1,
    D: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    mode: str = "causal",
    backend: str = "auto",
) -> Tensor:
    r"""Long depthwise convolution, with gates before and after it and a skip connection.

    .. math::
        x = pre \odot u, \qquad c_n = \sum_{i \ge 0} k_i\, x_{n-i} + \sum_{i \ge 0} k^{rev}_i\, x_{n+i+lag}, \qquad
        out = post \odot (c + D \odot x)

    Args:
        u: [B, D, L], float32, bfloat16, float16, or float64 on the CPU; any strides; L of any size. Arithmetic is in
            float32 (float64 for float64).
        k: kernel [D, K], or [G, K] with D a multiple of G: channel d reads row d // (D // G). K >= 1, shorter or longer
            than L. u's dtype or float32. Or what `fft_conv_spectrum` has made of kernels, for inference: then k_rev is
            None, mode the same as there, and its backend serves.
        k_rev: the anticausal side of the kernel, [G, R] with k's rows, or None. u's dtype or float32.
        k_rev_lag: where k_rev starts. 1: k_rev[0] weighs the sample after (lag -1), as in S4, whose kernel is pad(k) +
            pad(flip(k_rev)). 0: k_rev[0] weighs the sample itself and adds to k[0], as in safari and H3, whose spectrum
            is K + conj(K_rev).
        D: skip connection [D], or None. u's dtype or float32.
        pre_gate: factor on u [B, D, L], or None; u's dtype, or float32 for 16-bit u (u is then widened).
        post_gate: factor on the result [B, D, L], or None; as pre_gate.
        mode: "causal": samples outside [0, L) are zero, and taps that reach beyond the sequence have no effect.
            "circular": positions are modulo L, and longer kernels wrap.
        backend: "auto", "triton", "cpu", "cuda" or "reference" (see pykernels.backends).

    Returns:
        out [B, D, L] in u's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: k is an FFTConvSpectrum, grad mode is on and an input requires grad.
        BackendUnavailable: the backend asked for can't serve this call.

    Derivatives of first and second order exist with respect to u, k, k_rev, D, pre_gate and post_gate; the second in
    eager mode only, computed by the reference. Results do not depend on the thread count, and a batch entry's not on
    the others. A value that is not finite may make every output of its own batch entry and channel NaN (the transform
    mixes them all), and no other.

    Source: Poli et al., Hyena Hierarchy (arXiv:2302.10866); Fu et al., FlashFFTConv (arXiv:2311.05908).
    """
    u, pre_gate, post_gate = _checks.autocast(u, pre_gate, post_gate)  # kernels and D stay as wide as they come
    if isinstance(k, FFTConvSpectrum):
        return _with_spectrum(k, u, k_rev, D, pre_gate, post_gate, mode, backend)
    chosen, widen, widen_kernels = _check_call(u, k, k_rev, k_rev_lag, D, pre_gate, post_gate, mode, backend)
    dtype = u.dtype
    if widen_kernels:
        k, k_rev, D = _widened(u, k, k_rev, D)
    if widen:
        u, pre_gate, post_gate = (None if x is None else x.to(torch.float32) for x in (u, pre_gate, post_gate))
    tensors = (u, k, k_rev, D, pre_gate, post_gate)
    settings = k_rev_lag, mode == "circular"
    if chosen == "reference":
        out = reference.fft_conv(*tensors, *settings)
    elif followed(*tensors):
        out = registration.FFTConv.apply(*apart(*tensors), settings, chosen)
    else:
        out = registration.run("fwd", chosen, *tensors, *settings)
    return out.to(dtype) if widen else out


def _check_no_gradient(function: str, tensors: dict[str, object]) -> None:
    if torch.is_grad_enabled():
        for name, x in tensors.items():
            if isinstance(x, Tensor) and x.requires_grad:
                raise RuntimeError(
                    f"{name} requires grad, but {function} is for inference (states and spectra have no derivatives): "
                    "call it under torch.no_grad(), or use fft_conv of k itself"
                )


def _check_spectrum(spectrum: FFTConvSpectrum, k_rev: object, D: object, mode: object, u: Tensor) -> None:
    """Checks what goes with a spectrum."""
    if k_rev is not None:
        raise ValueError("k_rev must be None where k is an FFTConvSpectrum, which holds both sides")
    if mode != spectrum.mode:
        raise ValueError(f"mode must be {spectrum.mode!r}, that of the FFTConvSpectrum, got {mode!r}")
    if registration.accumulator(u.dtype) != spectrum.dtype:
        raise TypeError(f"k must be a spectrum in {registration.accumulator(u.dtype)} for u in {u.dtype}, got one in "
                        f"{spectrum.dtype}: make it of kernels of another dtype")
    if u.device != spectrum.device:
        raise ValueError(f"k must be on u's device {u.device}, got a spectrum on {spectrum.device}")
    channels, length = u.shape[1:]
    if channels % spectrum.groups if spectrum.groups else channels:
        raise ValueError(
            f"k must have one row per channel or per group of channels: u has {channels} channels, k {spectrum.groups} "
            "rows"
        )
    if length > spectrum.length or (mode == "circular" and length != spectrum.length):
        wanted = "as many" if mode == "circular" else "at most as many"
        raise ValueError(f"u must have {wanted} samples as the FFTConvSpectrum is for, {spectrum.length}, got {length}")
    _check_skip(D, u)


def _with_spectrum(
    spectrum: FFTConvSpectrum,
    u: object,
    k_rev: object,
    D: object,
    pre_gate: object,
    post_gate: object,
    mode: object,
    backend: str,
) -> Tensor:
    """`fft_conv` of a spectrum."""
    _checks.tensor("u", u, "B D L")
    _checks.main_dtype("u", u)
    _check_spectrum(spectrum, k_rev, D, mode, u)
    _check_no_gradient("fft_conv of an FFTConvSpectrum", dict(u=u, D=D, pre_gate=pre_gate, post_gate=post_gate))
    if followed(u):  # in forward mode, where a bare op would give zero tangents, or inside of vmap
        raise RuntimeError("fft_conv of an FFTConvSpectrum has no derivatives: use fft_conv of k itself, or inside "
                           "of torch.func.vmap torch.no_grad()")
    widen = _check_rows(u, pre_gate, post_gate, mode)
    (D,) = _widened(u, D)
    gates, dtype = (pre_gate, post_gate), u.dtype
    if widen:
        u, *gates = (None if x is None else x.to(torch.float32) for x in (u, *gates))
    if check_name(backend) not in ("auto", spectrum.backend):
        raise ValueError(
            f"backend must be 'auto' or that of the FFTConvSpectrum, {spectrum.backend!r}, got {backend!r}"
        )
    settings = spectrum.k_rev_lag, spectrum.mode == "circular"
    if spectrum.backend == "reference":
        return reference.fft_conv(u, *spectrum.kept, D, *gates, *settings).to(dtype)
    sizes = spectrum.groups, spectrum.taps, spectrum.taps_rev
    op = torch.ops.pykernels.fft_conv_fwd_spectrum_cpu.default
    return op(u, *spectrum.kept, D, *gates, *sizes, *settings, spectrum.length).to(dtype)


def transforms_beforehand(device: torch.device, backend: str) -> bool:
    """Whether what serves `backend` on this device is the CPU's kernels, whose spectra `fft_conv_spectrum` keeps."""
    return device.type == "cpu" and asked_for(backend) in ("auto", "cpu")


def fft_conv_spectrum(
    k: Tensor,
    length: int,
    *,
    k_rev: Tensor | None = None,
    k_rev_lag: int = 1,
    mode: str = "causal",
    backend: str = "auto",
) -> FFTConvSpectrum:
    """Kernels prepared once for many calls `fft_conv(u, spectrum)`, which then skip their part of the work: inference.

    Without it fft_conv transforms its kernels in every call, which at batch 1 is a quarter to a third of its work. What
    is made here goes with the values that k and k_rev have now: after they change, make another one.

    Args:
        k: kernel [G, K], as in `fft_conv`, float32, bfloat16 or float16, or float64 for float64 sequences.
        length: of the sequences: up to so many samples (the closer the faster), or with mode "circular" as many.
        k_rev, k_rev_lag, mode: as in `fft_conv`.
        backend: "auto", "cpu" or "reference": Triton and CUDA keep no spectra.

    Returns:
        What `fft_conv` takes as its k. On the CPU it holds 2 to 4 numbers per sample of `length` and kernel (of short
        kernels the taps), laid out for the instruction set in use; under another one fft_conv refuses it.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: grad mode is on and a kernel requires grad.
        BackendUnavailable: the backend asked for keeps no spectra.
    """
    _checks.tensor("k", k, "G K")
    _checks.main_dtype("k", k)
    if type(length) is not int or length < 1:
        raise ValueError(f"length must be an integer >= 1, got {length!r}")
    if mode not in _MODES:
        raise ValueError(f"mode must be 'causal' or 'circular', got {mode!r}")
    of = k.detach()[:, None, :0]  # kernels are checked against rows: here there are none, in k's dtype
    _check_kernels(k, k_rev, k_rev_lag, None, of.transpose(0, 1))
    wide, wide_rev = _widened(of, k, k_rev)
    _check_no_gradient("fft_conv_spectrum", {"k": k, "k_rev": k_rev})
    options = frozenset({mode, "spectrum"})
    chosen = resolve(OP, Query(k.device.type, k.dtype, {"length": length, "taps": k.shape[1]}, options), backend)
    with torch.no_grad():
        if chosen == "reference":
            kept = wide.clone(), None if wide_rev is None else wide_rev.clone()
        else:
            op = torch.ops.pykernels.fft_conv_spectrum_cpu.default
            kept = (op(wide, wide_rev, k_rev_lag, mode == "circular", length, 0),)
    taps_rev = 0 if k_rev is None else k_rev.shape[1]
    return FFTConvSpectrum(
        *k.shape, taps_rev, k_rev_lag, mode, length, wide.dtype, k.device, chosen, kept
    )


def fft_conv_init(
    k: Tensor,
    u_prefix: Tensor | None = None,
    *,
    D: Tensor | None = None,
    pre_gate: Tensor | None = None,
    batch: int | None = None,
    channels: int | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> FFTConvState:
    """The state from which `fft_conv_step` continues a causal `fft_conv` token by token.

    Args:
        k: kernel [D, K] or [G, K], as in `fft_conv`.
        u_prefix: the samples before the first step [B, D, T], or None: there are none.
        D: skip connection [D], or None.
        pre_gate: factor on u_prefix [B, D, T], or None.
        batch: B, where there is no prefix (None: 1).
        channels: D, where there is no prefix (None: k's rows).
        dtype: of the samples to come, where there is no prefix (None: k's).
        backend: "auto", "triton", "cpu", "cuda" or "reference" (see pykernels.backends), here and in the steps.

    Returns:
        The state. It keeps O(B D K) numbers however many tokens follow, copies of k and on the CPU spectra of it among
        them.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: grad mode is on and an input requires grad.
        BackendUnavailable: the backend asked for can't serve this call.

    Source: Oncescu et al., Flash Inference (arXiv:2410.12982).
    """
    _check_no_gradient("fft_conv_init", {"k": k, "u_prefix": u_prefix, "D": D, "pre_gate": pre_gate})
    if u_prefix is None:
        if pre_gate is not None:
            raise ValueError("pre_gate must be None without u_prefix, whose factor it is")
        _checks.tensor("k", k, "G K")
        for name, size in (("batch", batch), ("channels", channels)):
            if size is not None and (type(size) is not int or size < 0):
                raise ValueError(f"{name} must be None or an integer >= 0, got {size!r}")
        shape = 1 if batch is None else batch, k.shape[0] if channels is None else channels, 0
        u = k.new_empty(shape, dtype=k.dtype if dtype is None else dtype)
    else:
        for name, x in (("batch", batch), ("channels", channels), ("dtype", dtype)):
            if x is not None:
                raise ValueError(f"{name} must be None when u_prefix, which has one, is given, got {x!r}")
        u = u_prefix
    _checks.tensor("u_prefix", u, "B D L")
    _checks.main_dtype("u_prefix", u)
    _check_kernels(k, None, 1, D, u)
    _check_gate("pre_gate", pre_gate, u)
    k, D = _widened(u, k, D)
    x = u.to(k.dtype)
    if pre_gate is not None:
        x = x * pre_gate
    chosen = resolve(OP, _step_query(u, k), backend)
    with torch.no_grad():
        return decode.start(_convolution(backend), x, k, D, u.dtype, backend, chosen == "cpu")


def _step_query(u: Tensor, k: Tensor) -> Query:
    return Query(
        u.device.type, k.dtype, {"length": 2 * decode.capacity(k.shape[1]), "taps": k.shape[1]}, frozenset({"causal"})
    )


def _convolution(backend: str):
    """fft_conv of what a state holds, whose dtype autocast leaves alone."""

    def convolve(x: Tensor, k: Tensor) -> Tensor:
        if not torch.amp.is_autocast_available(x.device.type):  # meta
            return fft_conv(x, k, backend=backend)
        with torch.autocast(x.device.type, enabled=False):
            return fft_conv(x, k, backend=backend)

    return convolve


def fft_conv_step(
    u_t: Tensor, state: FFTConvState, *, pre_gate: Tensor | None = None, post_gate: Tensor | None = None
) -> Tensor:
    """One token of a causal `fft_conv`: the output that the whole sequence so far has there.

    O(log^2 K) work per token on average: most steps sum over at most 64 taps, every 64th adds a convolution of 64
    tokens or more, every K-th one of K. What a step does depends on the number of its token, so torch.compile would
    compile every token anew: keep it out of compiled functions (torch.compiler.disable).

    Args:
        u_t: [B, D], the dtype of the prefix.
        state: of `fft_conv_init`. Changed in place.
        pre_gate: factor on u_t [B, D], or None; u_t's dtype, or float32 for 16-bit u_t.
        post_gate: factor on the result [B, D], or None; as pre_gate.

    Returns:
        out [B, D] in u_t's dtype.

    Raises:
        TypeError, ValueError: as in `fft_conv`; nothing is changed then.
        RuntimeError: grad mode is on and an input requires grad.
        BackendUnavailable: the state's backend can't serve it.
    """
    if not isinstance(state, FFTConvState):
        raise TypeError(f"state must be an FFTConvState, which fft_conv_init makes, got {type(state).__name__}")
    one_dtype = _check_step(u_t, state.inputs, state.dtype, pre_gate, post_gate)
    if torch.is_grad_enabled():
        _check_no_gradient("fft_conv_step", {"u_t": u_t, "pre_gate": pre_gate, "post_gate": post_gate})
    with torch.no_grad():
        if state.spectra is not None:
            if not one_dtype:
                u_t, pre_gate, post_gate = (
                    None if x is None else x.to(torch.float32) for x in (u_t, pre_gate, post_gate)
                )
            return decode.native_step(u_t, state, pre_gate, post_gate).to(state.dtype)
        x = u_t.to(state.inputs.dtype)
        if pre_gate is not None:
            x = x * pre_gate
        out = decode.step(_convolution(state.backend), x, state)
        return (out if post_gate is None else out * post_gate).to(u_t.dtype)


@_checks.by_metadata
def _check_step(u_t: object, inputs: Tensor, dtype: torch.dtype, pre_gate: object, post_gate: object) -> bool:
    """-> whether the gates have u_t's dtype. `inputs` and `dtype` are the state's."""
    _checks.tensor("u_t", u_t, "B D")
    _checks.shape("u_t", u_t, dict(zip("BD", inputs.shape[:2])))
    if u_t.dtype != dtype:
        raise TypeError(f"u_t must have the state's dtype {dtype}, got {u_t.dtype}")
    _checks.same_device("u_t", u_t, "state", inputs)
    gates = {name: gate for name, gate in (("pre_gate", pre_gate), ("post_gate", post_gate)) if gate is not None}
    for name, gate in gates.items():
        _checks.tensor(name, gate, "B D")
        _checks.shape(name, gate, dict(zip("BD", u_t.shape)))
        _check_gate_type(name, gate, u_t)
    return all(gate.dtype == u_t.dtype for gate in gates.values())
