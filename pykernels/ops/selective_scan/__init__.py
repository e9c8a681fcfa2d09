"""Selective scan: the input-dependent linear recurrence of Mamba, in memory linear in the sequence length.

The definition is `reference.py`; `registration.py` makes ops of the backends; README.md derives the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks
from ..._autograd import apart, followed
from ...backends import Op, Query, resolve
from . import reference, registration

__all__ = ["OP", "selective_scan", "selective_scan_step"]

_MAX_STATE = 256


def _any(query: Query) -> str | None:
    return None


def _triton(query: Query) -> str | None:
    if query.dtype == torch.float64:
        return "the Triton kernels compute in float32"
    if "complex" in query.options:
        return "the Triton kernels take a real A"
    return None


def _cuda(query: Query) -> str | None:
    if query.dtype == torch.float64:
        return "the CUDA kernels compute in float32"
    if "complex" in query.options:
        return "the CUDA kernels take a real A"
    return None


OP = Op("selective_scan", {"cuda": _cuda, "triton": _triton, "cpu": _any, "reference": _any},
        explicit_only={"cuda": "not yet measured against Triton on a GPU, so only on request"})


def _compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_A(A: Tensor, u_name: str, u: Tensor) -> torch.dtype:
    """-> the dtype of the states"""
    if A.dtype in (torch.complex64, torch.complex128):
        expected = torch.complex128 if u.dtype == torch.float64 else torch.complex64
        if A.dtype != expected:
            raise TypeError(f"A must be {expected} (or real) beside {u_name}'s {u.dtype}, got {A.dtype}")
        _checks.same_device("A", A, u_name, u)
        state = expected
    else:
        _checks.parameter("A", A, u_name, u)
        state = _compute(u.dtype)
    if not 1 <= A.shape[-1] <= _MAX_STATE:
        raise ValueError(f"A must have 1 to {_MAX_STATE} states N, got shape {list(A.shape)}")
    return state


def _check_projection(name: str, x: Tensor, u_name: str, u: Tensor, state: torch.dtype) -> None:
    """The dtype and device of B or C; with a complex A they may be complex too."""
    if x.dtype == state and state.is_complex:
        _checks.same_device(name, x, u_name, u)
    else:
        _checks.parameter(name, x, u_name, u)


def _to_compute(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _projection(x: Tensor, u: Tensor, state: torch.dtype) -> Tensor:
    """B or C as the backends take it: float32 or u's dtype (float64 beside float64) per token, else the states'
    dtype."""
    if state.is_complex or x.dim() == 2 or u.dtype == torch.float64:
        x = x.to(state)
    return x[:, None] if x.dim() == 3 else x


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None,
                   z: Tensor | None = None,
                   delta_bias: Tensor | None = None, delta_softplus: bool = False, initial_state: Tensor | None = None,
                   return_final_state: bool = False, cu_seqlens: Tensor | None = None,
                   backend: str = "auto") -> Tensor | tuple[Tensor, Tensor]:
    r"""The selective state-space recurrence of Mamba, per channel over N states.

    .. math::
        dt_t &= \mathrm{softplus}(delta_t + delta\_bias) \\
        h_t &= e^{dt_t A} h_{t-1} + dt_t\, u_t\, B_t \\
        out_t &= (C_t \cdot h_t + D\, u_t)\, \mathrm{silu}(z_t)

    Args:
        u: [B, D, L], float32, bfloat16, float16, or float64 on the CPU; any strides, the output is laid out as u is.
        delta: time steps [B, D, L], u's dtype or float32.
        A: [D, N] with N from 1 to 256, u's dtype or float32; or complex64 (complex128 beside float64), on the reference
            and cpu backends. Then C . h above reads 2 Re(C . h).
        B: constant [D, N], per token [B, N, L], or per token in groups [B, G, N, L], where channel d reads group d //
            (D // G); u's dtype or float32, or A's if complex.
        C: the same choices, independently; the numbers of groups must agree.
        D: skip weights [D], u's dtype or float32.
        z: gate [B, D, L], u's dtype; None for no gate.
        delta_bias: [D], u's dtype or float32.
        delta_softplus: apply softplus to delta + delta_bias (the identity above 20).
        initial_state: [B, D, N], [sequences, D, N] when packed; float32, float64 beside float64, complex if A is. None
            is zeros.
        return_final_state: also return the state after the last token, to go on from.
        cu_seqlens: int32 or int64 [sequences + 1], token offsets of the sequences packed along L (then the batch is 1),
            starting at 0; each starts from its own state. Tokens after the last offset belong to none and give zeros.
        backend: "auto", "cpu", "triton", "cuda" or "reference" (see pykernels.backends).

    Returns:
        out [B, D, L] in u's dtype, or (out, final_state), final_state in the shape and dtype of initial_state.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value; the message names it.
        BackendUnavailable: the backend asked for can't serve this call.

    Derivatives of first and second order exist with respect to every tensor but cu_seqlens (through out and
    final_state); the second in eager mode only, computed by the reference.

    Source: Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces (arXiv:2312.00752).
    """
    _checks.tensor("u", u, "B D L")
    device = u.device.type
    # Under autocast, u and z are narrowed; delta, A and the states keep their precision.
    u, z = _checks.autocast(u, z)
    _checks.main_dtype("u", u)
    batch, channels, length = u.shape
    for name, x in (("delta", delta), ("z", z)):
        if name == "z" and x is None:
            continue
        _checks.tensor(name, x, "B D L")
        _checks.shape(name, x, {"B": batch, "D": channels, "L": length})
        if name == "z":
            _checks.same_dtype(name, x, "u", u)
            _checks.same_device(name, x, "u", u)
        else:
            _checks.parameter(name, x, "u", u)
    _checks.tensor("A", A, "D N")
    _checks.shape("A", A, {"D": channels, "N": None})
    state = _check_A(A, "u", u)
    n = A.shape[1]
    groups = {}
    for name, x in (("B", B), ("C", C)):
        if not isinstance(x, Tensor) or not 2 <= x.dim() <= 4:
            _checks.tensor(name, x, "B G N L")
        if x.dim() == 2:
            _checks.shape(name, x, {"D": channels, "N": n})
        elif x.dim() == 3:
            _checks.shape(name, x, {"B": batch, "N": n, "L": length})
        else:
            _checks.shape(name, x, {"B": batch, "G": None, "N": n, "L": length})
            if x.shape[1] == 0 or channels % x.shape[1] != 0:
                raise ValueError(f"{name} must have a number of groups G that divides u's {channels} channels, "
                                 f"got {x.shape[1]}")
        if x.dim() > 2:
            groups[name] = x.shape[1] if x.dim() == 4 else 1
        _check_projection(name, x, "u", u, state)
    if len(set(groups.values())) > 1:
        raise ValueError(f"C must have B's {groups['B']} groups, got {groups['C']}")
    for name, x in (("D", D), ("delta_bias", delta_bias)):
        if x is not None:
            _checks.tensor(name, x, "D")
            _checks.shape(name, x, {"D": channels})
            _checks.parameter(name, x, "u", u)
    _checks.flag("delta_softplus", delta_softplus)
    _checks.flag("return_final_state", return_final_state)
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"u must have batch 1 when cu_seqlens packs sequences, got shape {list(u.shape)}")
        cu_seqlens = _checks.cu_seqlens("cu_seqlens", cu_seqlens, length, u.device)
    if initial_state is not None:
        _checks.tensor("initial_state", initial_state, "B D N")
        sequences = {"B": batch} if cu_seqlens is None else {"sequences": cu_seqlens.shape[0] - 1}
        _checks.shape("initial_state", initial_state, {**sequences, "D": channels, "N": n})
        if initial_state.dtype != state:
            raise TypeError(f"initial_state must be {state} beside u's {u.dtype} and A's {A.dtype}, "
                            f"got {initial_state.dtype}")
        _checks.same_device("initial_state", initial_state, "u", u)
    grad = followed(u, delta, A, B, C, D, z, delta_bias, initial_state)
    options = {"complex": state.is_complex, "varlen": cu_seqlens is not None}
    query = Query(device, u.dtype, {"state": n}, frozenset(name for name, on in options.items() if on), grad)
    chosen = resolve(OP, query, backend)
    compute = _compute(u.dtype)
    delta = delta.to(compute) if u.dtype == torch.float64 else delta
    arguments = (u, delta, A.to(state), _projection(B, u, state), _projection(C, u, state), _to_compute(D, compute), z,
                 _to_compute(delta_bias, compute), initial_state, cu_seqlens, delta_softplus)
    if chosen == "reference":
        out, final_state = reference.selective_scan(*arguments)
    elif grad:
        out, final_state, _ = registration.SelectiveScan.apply(*apart(*arguments), chosen)
    else:
        out, final_state, _ = registration.forward(chosen, False, *arguments)
    return (out, final_state) if return_final_state else out


def selective_scan_step(x: Tensor, state: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *,
                        D: Tensor | None = None,
                        z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
                        state_indices: Tensor | None = None, backend: str = "auto") -> Tensor:
    """One token of generation: advances the state of `selective_scan` in place and returns the token's output.

    Args:
        x: [B, D], or in heads [B, H, P] as Mamba-2 has them; float32, bfloat16, float16, or float64 on the CPU.
        state: [B, D, N] or [B, H, P, N], [slots, ...] with state_indices; float32 (float64 beside float64), complex if
            A is; any strides. Overwritten.
        delta: as x, x's dtype or float32.
        A: [D, N] or [H, P, N], which may be expanded from one number per head. Dtypes as in `selective_scan`, here and
            below.
        B, C: [B, N] or [B, G, N]; channel d reads group d // (D // G), head h group h // (H // G).
        D, delta_bias: [D] or [H, P].
        z: as x.
        delta_softplus: as in `selective_scan`.
        state_indices: int32 or int64 [B], the slot of each batch entry, no slot twice; -1 marks padding, whose output
            is zero and which touches no state.
        backend: as in `selective_scan`.

    Returns:
        out in x's shape and dtype.

    Raises:
        TypeError, ValueError: as in `selective_scan`; nothing is written.
        RuntimeError: grad mode is on and an input requires grad: this function is for inference, its state is
            overwritten.
        BackendUnavailable: the backend asked for can't serve this call.
    """
    chosen, ready = _check_step(x, state, delta, A, B, C, D, z, delta_bias, delta_softplus, state_indices is not None,
                                backend)
    if state_indices is not None:
        state_indices = _checks.state_indices("state_indices", state_indices, x.shape[0], state.shape[0], x.device)
    if torch.is_grad_enabled():
        _checks.inference("selective_scan_step", "selective_scan", x=x, state=state, delta=delta, A=A, B=B, C=C, D=D,
                          z=z, delta_bias=delta_bias)
    arguments = x, state, delta, A, B, C, D, z, delta_bias, state_indices, delta_softplus
    if not ready:
        arguments = _step_arguments(chosen, *arguments)
    if chosen == "reference":
        return reference.selective_scan_step(*registration.in_heads(*arguments)).view(x.shape)
    return registration.run("step", chosen, *arguments)


@_checks.by_metadata
def _check_step(x: object, state: object, delta: object, A: object, B: object, C: object, D: object, z: object,
                delta_bias: object, delta_softplus: object, indexed: bool, backend: object) -> tuple[str, bool]:
    """-> the backend that serves a step, and whether it takes the arguments as they are."""
    if not isinstance(x, Tensor) or x.dim() not in (2, 3):
        _checks.tensor("x", x, "B D" if isinstance(x, Tensor) and x.dim() < 2 else "B H P")
    _checks.main_dtype("x", x)
    batch = x.shape[0]
    axes = {"D": x.shape[1]} if x.dim() == 2 else {"H": x.shape[1], "P": x.shape[2]}
    names = " ".join(axes)
    _checks.tensor("delta", delta, "B " + names)
    _checks.shape("delta", delta, {"B": batch, **axes})
    _checks.parameter("delta", delta, "x", x)
    if z is not None:
        _checks.tensor("z", z, "B " + names)
        _checks.shape("z", z, {"B": batch, **axes})
        _checks.same_dtype("z", z, "x", x)
        _checks.same_device("z", z, "x", x)
    _checks.tensor("A", A, names + " N")
    _checks.shape("A", A, {**axes, "N": None})
    dtype = _check_A(A, "x", x)
    n = A.shape[-1]
    groups = []
    for name, y in (("B", B), ("C", C)):
        if not isinstance(y, Tensor) or y.dim() not in (2, 3):
            _checks.tensor(name, y, "B G N")
        groups.append(y.shape[1] if y.dim() == 3 else 1)
        if groups[-1] == 0 or x.shape[1] % groups[-1] != 0:
            raise ValueError(f"{name} must have a number of groups G that divides x's {x.shape[1]} "
                             f"{'channels' if x.dim() == 2 else 'heads'}, got {groups[-1]}")
        _checks.shape(name, y, {"B": batch, "N": n} if y.dim() == 2 else {"B": batch, "G": None, "N": n})
        _check_projection(name, y, "x", x, dtype)
    if groups[0] != groups[1]:
        raise ValueError(f"C must have B's {groups[0]} groups, got {groups[1]}")
    for name, y in (("D", D), ("delta_bias", delta_bias)):
        if y is not None:
            _checks.tensor(name, y, names)
            _checks.shape(name, y, axes)
            _checks.parameter(name, y, "x", x)
    _checks.flag("delta_softplus", delta_softplus)
    _checks.tensor("state", state, f"slots {names} N")
    _checks.shape("state", state, {"slots": None if indexed else batch, **axes, "N": n})
    if state.dtype != dtype:
        raise TypeError(f"state must be {dtype} beside x's {x.dtype} and A's {A.dtype}, got {state.dtype}")
    _checks.same_device("state", state, "x", x)
    _checks.writable("state", state)
    options = frozenset(["complex"]) if dtype.is_complex else frozenset()
    chosen = resolve(OP, Query(x.device.type, x.dtype, {"state": n}, options), backend)
    return chosen, chosen != "reference" and x.dtype != torch.float64 and A.dtype == torch.float32


def _step_arguments(chosen: str, x: Tensor, state: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
                    D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, state_indices: Tensor | None,
                    delta_softplus: bool) -> tuple:
    """The arguments in the dtypes that the backends take them in, complex ones as real ones."""
    compute = _compute(x.dtype)
    A = A.to(state.dtype)
    if state.is_complex() or x.dtype == torch.float64:
        B, C = B.to(state.dtype), C.to(state.dtype)
    if x.dtype == torch.float64:
        delta = delta.to(compute)
    tensors = x, state, delta, A, B, C, _to_compute(D, compute), z, _to_compute(delta_bias, compute), state_indices
    return *(tensors if chosen == "reference" else map(registration.real, tensors)), delta_softplus
