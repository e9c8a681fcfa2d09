"""pykernels.compat.mamba_ssm against the recurrences written out in float64, and the original's conventions."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pykernels.compat import mamba_ssm as compat

SIGNATURES = {
    "selective_scan_fn": "(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, "
    "return_last_state=False)",
    "mamba_inner_fn": "(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, "
    "out_proj_bias, A, B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, "
    "delta_softplus=True, checkpoint_lvl=1, b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, "
    "b_c_dt_rms_eps=1e-06)",
    "selective_state_update": "(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, "
    "state_batch_indices=None)",
    "mamba_chunk_scan_combined": "(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, "
    "seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, inf), return_final_states=False, "
    "return_varlen_states=False, state_dtype=None)",
    "mamba_split_conv1d_scan_combined": "(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, "
    "initial_states=None, seq_idx=None, dt_limit=(0.0, inf), return_final_states=False, activation='silu', "
    "rmsnorm_weight=None, rmsnorm_eps=1e-06, outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1, "
    "norm_before_gate=True)",
}


def test_signatures():
    assert {name: str(inspect.signature(getattr(compat, name))) for name in compat.__all__} == SIGNATURES


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    actual, expected = (x.detach().to(torch.complex128) if x.is_complex() else x.detach().double()
                        for x in (actual, expected))
    assert actual.shape == expected.shape and expected.abs().max() > 1e-3
    assert float((actual - expected).abs().max() / expected.abs().max()) < tolerance


def normal(*shape: int, complex: bool = False) -> Tensor:
    return torch.randn(shape, dtype=torch.complex128 if complex else torch.float64)


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def same_gradients(results, inputs) -> None:
    """Of two tuples of outputs with respect to all inputs."""
    cotangents = [torch.randn_like(y) for y in results[0]]
    for a, e in zip(*(torch.autograd.grad(y, inputs, cotangents) for y in results)):
        near(a, e)


# ---- Mamba -----------------------------------------------------------------------------------------------------------

B, D, L, N, G = 2, 6, 7, 4, 3


def scanned(u, delta, A, Bs, Cs, D=None, z=None, bias=None, softplus=False, state=None):
    """Token by token; Bs and Cs [B, D, N, L]."""
    if bias is not None:
        delta = delta + bias[:, None]
    if softplus:
        delta = torch.log1p(torch.exp(delta))
    h = torch.zeros(u.shape[0], *A.shape, dtype=A.dtype) if state is None else state
    outs = []
    for t in range(u.shape[2]):
        dt = delta[:, :, t, None]
        h = torch.exp(dt * A) * h + dt * Bs[..., t] * u[:, :, t, None]
        y = (Cs[..., t] * h).sum(-1)
        outs.append(2 * y.real if y.is_complex() else y)
    out = torch.stack(outs, 2)
    out = out if D is None else out + D[:, None] * u
    return out if z is None else out * silu(z), h


def per_channel(x: Tensor) -> Tensor:
    """[D, N], [B, N, L] or [B, G, N, L] -> [B, D, N, L]"""
    if x.dim() == 2:
        return x[None, ..., None].expand(B, D, N, L)
    return x[:, None].expand(B, D, N, L) if x.dim() == 3 else x.repeat_interleave(D // x.shape[1], 1)


SHAPES = {"constant": (D, N), "token": (B, N, L), "grouped": (B, G, N, L)}


@pytest.mark.parametrize("complex", (False, True))
@pytest.mark.parametrize(("b", "c"), [(b, c) for b in SHAPES for c in SHAPES if {b, c} != {"token", "grouped"}])
def test_selective_scan(b, c, complex):
    A = torch.complex(-normal(D, N).exp(), normal(D, N)) if complex else -normal(D, N).exp()
    u, delta, z = normal(B, D, L), normal(B, D, L), normal(B, D, L)
    skip, bias, Bs, Cs = normal(D), normal(D), *(normal(*SHAPES[x], complex=complex) for x in (b, c))
    inputs = [x.requires_grad_() for x in (u, delta, A, Bs, Cs, skip, z, bias)]

    def given(x: Tensor) -> Tensor:  # per token the original takes (real, imaginary) side by side
        return torch.view_as_real(x).flatten(-2) if complex and x.dim() > 2 else x

    actual = compat.selective_scan_fn(u, delta, A, given(Bs), given(Cs), skip, z, bias, True, True)
    expected = scanned(u, delta, A, per_channel(Bs), per_channel(Cs), skip, z, bias, True)
    for a, e in zip(actual, expected):
        near(a, e)
    assert actual[1].dtype == A.dtype
    same_gradients((actual, expected), inputs)
    near(compat.selective_scan_fn(u, delta.exp(), A, given(Bs), given(Cs)),
         scanned(u, delta.exp(), A, per_channel(Bs), per_channel(Cs))[0])


def test_selective_scan_in_low_precision():
    u, delta, z, Bs, Cs = (normal(*s).bfloat16() for s in ((B, D, L), (B, D, L), (B, D, L), (B, N, L), (B, N, L)))
    A, skip, bias = -normal(D, N).exp().float(), normal(D).float(), normal(D).float()
    out, state = compat.selective_scan_fn(u, delta, A, Bs, Cs, skip, z, bias, True, True)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    u, delta, A, Bs, Cs, skip, z, bias = (x.double() for x in (u, delta, A, Bs, Cs, skip, z, bias))
    expected = scanned(u, delta, A, per_channel(Bs), per_channel(Cs), skip, z, bias, True)
    near(out, expected[0], 1e-2)
    near(state, expected[1], 1e-5)


R, W, M = 3, 4, 5


def rms_normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    seen = F.pad(x, (weight.shape[1] - 1, 0))
    out = torch.stack([(seen[..., t : t + weight.shape[1]] * weight).sum(-1) for t in range(x.shape[-1])], -1)
    return out + (0 if bias is None else bias[:, None])


@pytest.mark.parametrize(
    ("form", "complex"), [(form, complex) for form in ("plain", "biases", "constant") for complex in (False, True)]
    + [("norms", False)])
def test_mamba_inner(form, complex):
    A = torch.complex(-normal(D, N).exp(), normal(D, N)) if complex else -normal(D, N).exp()
    states = N * (2 if complex else 1)
    columns = R if form == "constant" else R + 2 * states
    xz, conv, conv_bias = normal(B, 2 * D, L), normal(D, 1, W), normal(D)
    x_proj, dt_proj, out_proj, out_bias = normal(columns, D) / 4, normal(D, R) / 4, normal(M, D), normal(M)
    skip, bias, eps = normal(D), normal(D), 0.1
    options = {
        "plain": {},
        "biases": {"B_proj_bias": normal(states), "C_proj_bias": normal(states)},
        "norms": {"b_rms_weight": normal(N), "c_rms_weight": normal(N), "dt_rms_weight": normal(D)},
        "constant": {"B": normal(D, N, complex=complex), "C": normal(D, N, complex=complex)},
    }[form]
    inputs = [xz, conv, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, skip, bias, *options.values()]
    inputs = [x.requires_grad_() for x in inputs]

    u = silu(convolved(xz[:, :D], conv[:, 0], conv_bias))
    projected = torch.einsum("bdl,rd->blr", u, x_proj)
    delta = rms_normed(projected[..., :R] @ dt_proj.T, options.get("dt_rms_weight"), eps).mT

    def of_tokens(name: str, y: Tensor) -> Tensor:
        if name in options:
            return per_channel(options[name])
        y = y + options.get(f"{name}_proj_bias", 0)
        y = rms_normed(y, options.get(f"{name.lower()}_rms_weight"), eps)
        y = torch.view_as_complex(y.unflatten(-1, (N, 2)).contiguous()) if complex else y
        return per_channel(y.mT)

    Bs, Cs = of_tokens("B", projected[..., R : R + states]), of_tokens("C", projected[..., -states:])
    y, _ = scanned(u, delta, A, Bs, Cs, skip, xz[:, D:], bias, True)
    expected = torch.einsum("bdl,md->blm", y, out_proj) + out_bias
    actual = compat.mamba_inner_fn(xz, conv, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, D=skip, delta_bias=bias,
                                   b_c_dt_rms_eps=eps, checkpoint_lvl=0, **options)
    near(actual, expected)
    same_gradients(((actual,), (expected,)), inputs)


# ---- One token -------------------------------------------------------------------------------------------------------

H, P = 6, 3


@pytest.mark.parametrize("grad", (False, True))
@pytest.mark.parametrize("indices", (None, (3, -1)), ids=str)
@pytest.mark.parametrize("kept", (torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("heads", (False, True))
def test_state_update(heads, kept, indices, grad):
    if kept == torch.bfloat16:
        compute, tolerance = torch.float32, 2e-2
    else:
        compute, tolerance = torch.float64, 1e-11
    of_channels = (H, P) if heads else (P,)
    x, dt, z = (normal(B, *of_channels).to(compute) for _ in range(3))
    # As Transformers gives them: one number per head, expanded.
    A = -normal(H).exp()[:, None, None].expand(H, P, N).to(compute) if heads else -normal(P, N).exp().to(compute)
    skip, bias = normal(*of_channels).to(compute), normal(*of_channels).to(compute)
    Bs, Cs = (normal(*((B, G, N) if heads else (B, N))).to(compute) for _ in range(2))
    state = normal(B if indices is None else 5, *of_channels, N).to(kept)
    before = state.clone()
    index = None if indices is None else torch.tensor(indices)
    x.requires_grad_(grad)
    out = compat.selective_state_update(state, x, dt, A, Bs, Cs, skip, z, bias, True, index)
    assert out.shape == x.shape and out.dtype == compute and out.requires_grad == grad and state.dtype == kept
    expected_states = before.clone()
    channels = x[0].numel()
    for b, slot in enumerate(range(B) if indices is None else indices):
        if slot < 0:
            assert not out[b].any()
            continue
        row = slice(b, b + 1)
        group_of = [c // P // (H // G) if heads else 0 for c in range(channels)]
        wide = [y[row].double().view(1, channels, 1) for y in (x, dt, z)]
        groups = [y.double().view(B, -1, N)[b, group_of].view(1, channels, N, 1) for y in (Bs, Cs)]
        expected, h = scanned(wide[0], wide[1], A.double().reshape(channels, N), *groups, skip.double().flatten(),
                              wide[2], bias.double().flatten(), True, before[slot].double().view(1, channels, N))
        near(out[row].flatten(), expected.flatten(), tolerance)
        expected_states[slot] = h.view(before[slot].shape).to(kept)
    near(state, expected_states, tolerance)
    if indices is not None:
        others = [slot for slot in range(5) if slot not in indices]
        assert torch.equal(state[others], before[others])


def test_state_update_takes_gradients():
    x, dt, z, A, skip, bias = (normal(B, H, P), normal(B, H, P), normal(B, H, P), -normal(H, P, N).exp(),
                               normal(H, P), normal(H, P))
    Bs, Cs, first = normal(B, G, N), normal(B, G, N), normal(B, H, P, N)
    inputs = [y.requires_grad_() for y in (x, dt, z, A, skip, bias, Bs, Cs, first)]
    state = first * 1
    out = compat.selective_state_update(state, x, dt, A, Bs, Cs, skip, z, bias, True)
    groups = [y.repeat_interleave(H // G, 1).repeat_interleave(P, 1)[..., None] for y in (Bs, Cs)]
    expected, h = scanned(*(y.flatten(1)[..., None] for y in (x, dt)), A.flatten(0, 1), *groups, skip.flatten(),
                          z.flatten(1)[..., None], bias.flatten(), True, first.flatten(1, 2))
    same_gradients(((out, state), (expected.view(B, H, P), h.view(state.shape))), inputs)


# ---- Mamba-2 ---------------------------------------------------------------------------------------------------------

T = 9
SEQ_IDX = torch.tensor([[0] * 4 + [1] * 5, [2] * 9])


def states_passed(x, dt, A, Bs, Cs, D=None, z=None, bias=None, softplus=False, limit=(0.0, torch.inf), state=None,
                  seq_idx=None):
    """Token by token -> out [B, T, H, P], the states after each token [B, T, H, P, N]."""
    dt = dt if bias is None else dt + bias
    dt = (torch.log1p(dt.exp()) if softplus else dt).clamp(*limit)
    groups = A.shape[0] // Bs.shape[2]
    Bs, Cs = Bs.repeat_interleave(groups, 2), Cs.repeat_interleave(groups, 2)
    h = torch.zeros(x.shape[0], *x.shape[2:], Bs.shape[3], dtype=torch.float64) if state is None else state
    outs, states = [], []
    for t in range(x.shape[1]):
        if seq_idx is not None:
            kept = seq_idx[:, t] == (seq_idx[:, t - 1] if t else 0)
            h = h * kept[:, None, None, None]
        step = dt[:, t, :, None, None]
        h = torch.exp(step * A[:, None, None]) * h + step * x[:, t, ..., None] * Bs[:, t, :, None]
        states.append(h)
        outs.append(torch.einsum("bhpn,bhn->bhp", h, Cs[:, t]))
    out = torch.stack(outs, 1)
    if D is not None:
        out = out + (D[:, None] if D.dim() == 1 else D) * x
    return out if z is None else out * silu(z), torch.stack(states, 1)


def ssd_inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(0)
    x = {"x": normal(B, T, H, P), "dt": normal(B, T, H), "A": -normal(H).exp(), "B": normal(B, T, G, N),
         "C": normal(B, T, G, N), "z": normal(B, T, H, P), "D": normal(H), "D2": normal(H, P), "bias": normal(H),
         "state": normal(B, H, P, N)}
    return {name: y.to(dtype) for name, y in x.items()}


def ssd(x: dict[str, Tensor], *, defined: bool, skip: str | None = None, gate: bool = False, softplus: bool = True,
        limit=(0.0, torch.inf), initial: bool = True, seq_idx: Tensor | None = None, chunk_size: int = 4):
    options = {"D": x[skip] if skip else None, "z": x["z"] if gate else None}
    tensors = [x[name] for name in ("x", "dt", "A", "B", "C")]
    state = x["state"] if initial else None
    if defined:
        out, states = states_passed(*tensors, **options, bias=x["bias"], softplus=softplus, limit=limit, state=state,
                                    seq_idx=seq_idx)
        return out, states[:, -1]
    return compat.mamba_chunk_scan_combined(*tensors, chunk_size, **options, dt_bias=x["bias"], initial_states=state,
                                            seq_idx=seq_idx, dt_softplus=softplus, dt_limit=limit,
                                            return_final_states=True)


@pytest.mark.parametrize(
    "options",
    (
        {"initial": False},
        {"skip": "D", "gate": True},
        {"skip": "D2", "limit": (0.3, 0.9)},
        {"softplus": False, "limit": (0.01, 0.5)},
        {"softplus": False},
        {"seq_idx": SEQ_IDX, "skip": "D"},
        {"seq_idx": SEQ_IDX.int(), "initial": False, "gate": True},
    ),
    ids=lambda options: "-".join(options),
)
def test_chunk_scan(options):
    x = ssd_inputs()
    names = ["x", "dt", "A", "B", "C", "bias", *(["state"] if options.get("initial", True) else []),
             *([options["skip"]] if "skip" in options else []), *(["z"] if options.get("gate") else [])]
    for name in names:
        x[name].requires_grad_()
    actual, expected = (ssd(x, defined=defined, **options) for defined in (False, True))
    for a, e in zip(actual, expected):
        near(a, e)
    same_gradients((actual, expected), [x[name] for name in names])


def test_chunk_scan_returns_what_is_asked_for():
    x = ssd_inputs()
    arguments = [x[name] for name in ("x", "dt", "A", "B", "C")]
    out, states = states_passed(*arguments, softplus=True)
    near(compat.mamba_chunk_scan_combined(*arguments, 16, dt_softplus=True), out)
    one = [y[:1] if y.dim() > 1 else y for y in arguments]
    seq_idx, cu_seqlens = torch.tensor([[0] * 4 + [1] * 5]), torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    out, states = states_passed(*one, softplus=True, seq_idx=seq_idx)
    options = {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens, "dt_softplus": True, "return_varlen_states": True}
    expected = torch.stack((states[0, 3], torch.zeros_like(states[0, 3]), states[0, 8]))
    actual, varlen = compat.mamba_chunk_scan_combined(*one, 4, **options)
    near(actual, out)
    near(varlen, expected)
    actual, final, varlen = compat.mamba_chunk_scan_combined(*one, 4, **options, return_final_states=True)
    near(actual, out)
    near(final, states[:, -1])
    near(varlen, expected)


def test_chunk_scan_in_low_precision():
    x = ssd_inputs(torch.bfloat16)
    x |= {name: x[name].float() for name in ("A", "D", "bias", "state")}
    actual = ssd(x, defined=False, skip="D", gate=True)
    assert actual[0].dtype == torch.bfloat16 and actual[1].dtype == torch.float32
    for a, e in zip(actual, ssd({name: y.double() for name, y in x.items()}, defined=True, skip="D", gate=True)):
        near(a, e, 1.5e-2)
    one = {name: y[:1] if y.dim() > 2 else y for name, y in x.items()}
    arguments = [one[name] for name in ("x", "dt", "A", "B", "C")]
    for state_dtype in (None, torch.float32):
        _, varlen = compat.mamba_chunk_scan_combined(
            *arguments, 4, dt_softplus=True, seq_idx=SEQ_IDX[:1], cu_seqlens=torch.tensor([0, 4, 9]),
            return_varlen_states=True, state_dtype=state_dtype)
        assert varlen.dtype == (state_dtype or torch.bfloat16)


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("beside", (0, 3))
@pytest.mark.parametrize("norm", (None, "before", "after"))
def test_split_conv1d_scan(norm, beside, packed):
    inner, of_both, eps = H * P, 2 * G * N, 0.1
    zxbcdt = normal(B, T, 2 * beside + 2 * inner + of_both + H)
    conv, conv_bias, bias, A, skip = normal(inner + of_both, W), normal(inner + of_both), normal(H), -normal(H).exp(), \
        normal(H)
    out_proj, out_bias, weight, state = normal(M, beside + inner), normal(M), normal(inner), normal(B, H, P, N)
    seq_idx = SEQ_IDX if packed else None
    inputs = [zxbcdt, conv, conv_bias, bias, A, skip, out_proj, out_bias, state, *([] if norm is None else [weight])]
    inputs = [x.requires_grad_() for x in inputs]

    mlp, z, xBC, dt = zxbcdt.split((2 * beside, inner, inner + of_both, H), 2)
    if packed:
        xBC = torch.stack([torch.cat([convolved(xBC[b, row == i].mT, conv, conv_bias).mT for i in row.unique()])
                           for b, row in enumerate(SEQ_IDX)])
    else:
        xBC = convolved(xBC.mT, conv, conv_bias).mT
    x, Bs, Cs = silu(xBC).split((inner, of_both // 2, of_both // 2), 2)
    y, states = states_passed(x.unflatten(2, (H, P)), dt, A, Bs.unflatten(2, (G, N)), Cs.unflatten(2, (G, N)), skip,
                              None, bias, True, (0.1, 2.0), state, seq_idx)
    y = y.flatten(2)

    def normed(y: Tensor) -> Tensor:
        return rms_normed(y.unflatten(2, (G, -1)), weight.view(G, -1), eps).flatten(2)

    y = {"before": lambda: normed(y) * silu(z), "after": lambda: normed(y * silu(z)), None: lambda: y * silu(z)}[norm]()
    if beside:
        y = torch.cat((silu(mlp[..., :beside]) * mlp[..., beside:], y), 2)
    expected = y @ out_proj.T + out_bias, states[:, -1]
    actual = compat.mamba_split_conv1d_scan_combined(
        zxbcdt, conv, conv_bias, bias, A, skip, 4, state, seq_idx, (0.1, 2.0), True,
        rmsnorm_weight=None if norm is None else weight, rmsnorm_eps=eps, outproj_weight=out_proj,
        outproj_bias=out_bias, headdim=P, ngroups=G, norm_before_gate=norm == "before")
    for a, e in zip(actual, expected):
        near(a, e)
    same_gradients((actual, expected), inputs)


def test_split_without_projection_and_activation():
    inner, of_both = H * P, 2 * N
    zxbcdt, conv, A, skip = normal(B, T, 2 * inner + of_both + H), normal(inner + of_both, W), -normal(H).exp(), \
        normal(H, P)
    z, xBC, dt = zxbcdt.split((inner, inner + of_both, H), 2)
    x, Bs, Cs = convolved(xBC.mT, conv, None).mT.split((inner, N, N), 2)
    bias = normal(H)
    expected, _ = states_passed(x.unflatten(2, (H, P)), dt, A, Bs[:, :, None], Cs[:, :, None], skip,
                                z.unflatten(2, (H, P)), bias, True)
    near(compat.mamba_split_conv1d_scan_combined(zxbcdt, conv, None, bias, A, skip, 4, activation=None),
         expected.flatten(2))


# ---- What is not served, and mistakes --------------------------------------------------------------------------------

X = ssd_inputs()
SSD = [X[name] for name in ("x", "dt", "A", "B", "C")]
scan = compat.mamba_chunk_scan_combined


@pytest.mark.parametrize(
    ("function", "error", "words"),
    (
        (lambda: scan(*SSD, 0), ValueError, "chunk_size must be a positive integer, got 0"),
        (lambda: scan(*SSD[:1], SSD[1][:, 1:], *SSD[2:], 4), ValueError, r"dt must have shape \[B=2, L=9, H=6\]"),
        (lambda: scan(*SSD[:2], X["D2"], *SSD[3:], 4), ValueError, r"A must have shape \[H\]"),
        (lambda: scan(*SSD[:2], X["A"].abs(), *SSD[3:], 4, dt_softplus=True), ValueError, "decay must be <= 0"),
        (lambda: scan(*SSD[:4], X["C"][:, :, :1], 4), ValueError, "C must have shape"),
        (lambda: scan(*SSD[:3], *[X["B"][:, :, :1].expand(-1, -1, 4, -1)] * 2, 4), ValueError, "groups that divide"),
        (lambda: scan(*SSD, 4, dt_limit=0.1), TypeError, "dt_limit must be"),
        (lambda: scan(*SSD, 4, return_varlen_states=True), ValueError, "cu_seqlens must be given"),
        (lambda: scan(*SSD, 4, cu_seqlens=torch.tensor([0, 9])), ValueError, "seq_idx must be given with cu_seqlens"),
        (
            lambda: scan(*SSD, 4, seq_idx=SEQ_IDX, cu_seqlens=torch.tensor([0, 9])),
            ValueError,
            "x must have batch 1 with cu_seqlens, got 2",
        ),
        (
            lambda: scan(*(y[:1] if y.dim() > 1 else y for y in SSD), 4, seq_idx=SEQ_IDX[:1],
                         cu_seqlens=torch.tensor([0, 5, 9])),
            ValueError,
            "cu_seqlens must have the offsets of seq_idx's",
        ),
        (lambda: scan(*SSD, 4, state_dtype="float32"), TypeError, "state_dtype must be None or a floating dtype"),
        (lambda: scan(*SSD, 4, initial_states=X["state"].mT), ValueError, "initial_states must have shape"),
        (
            lambda: compat.selective_state_update(X["state"], X["x"][:, 0], X["dt"], *[X["A"]] * 3),
            ValueError,
            "dt must have shape|A must have shape",
        ),
        (
            lambda: compat.selective_state_update(X["state"][:1], X["x"][:, 0], X["x"][:, 0], X["state"][0],
                                                  X["B"][:, 0], X["C"][:, 0]),
            ValueError,
            "state must have x's heads and channels",
        ),
        (
            lambda: compat.selective_state_update(X["state"], X["x"][:, 0], X["x"][:, 0], X["state"][0], X["B"][:, 0],
                                                  X["C"][:, 0], state_batch_indices=torch.tensor([0, 2])),
            ValueError,
            "state_batch_indices must name each of 2 slots",
        ),
        (
            lambda: compat.mamba_split_conv1d_scan_combined(X["z"].flatten(2), X["D2"], None, X["D"], X["A"], X["D"],
                                                            4),
            ValueError,
            "headdim must be given",
        ),
        (
            lambda: compat.mamba_split_conv1d_scan_combined(X["z"].flatten(2), normal(26, 4), None, X["D"], X["A"],
                                                            X["D2"], 4),
            ValueError,
            "zxbcdt must have 50 channels or an even number more, got 18",
        ),
        (
            lambda: compat.mamba_inner_fn(normal(B, 2 * D, L), normal(D, 1, W), *[None] * 6, checkpoint_lvl=2),
            ValueError,
            "checkpoint_lvl must be 0 or 1",
        ),
        (
            lambda: compat.mamba_inner_fn(normal(B, 2 * D, L), normal(D, 1, W), *[None] * 6, B=normal(D, N),
                                          b_rms_weight=normal(N)),
            ValueError,
            "B must be None with B_proj_bias or b_rms_weight",
        ),
    ),
)
def test_raises(function, error, words):
    before = X["state"].clone()
    with pytest.raises(error, match=words):
        function()
    assert torch.equal(X["state"], before)


def test_compiles_whole():
    def function(x: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        out, final = scan(x, *SSD[1:], 4, dt_softplus=True, return_final_states=True)
        u = x.flatten(2).mT
        scan_of = compat.selective_scan_fn(u, u, -normal_A, X["B"][:, :, 0].mT, X["C"][:, :, 0].mT, None, u, None, True)
        token = compat.selective_state_update(state, x[:, 0], x[:, 0], -normal_A.view(H, P, N), X["B"][:, 0],
                                              X["C"][:, 0], dt_softplus=True)
        return out, final, scan_of, token

    normal_A = normal(H * P, N).exp()
    states = X["state"].clone(), X["state"].clone()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for a, e in zip(compiled(X["x"], states[0]), function(X["x"], states[1])):
        near(a, e)
    near(*states)
