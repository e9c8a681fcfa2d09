"""linear_attention and linear_attention_step: forms agree, states chain, peers' definitions, derivatives, cost.

Errors against the float64 reference, determinism and bad input are in tests/test_ops.py, from the op's description.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pykernels import _checks, backends, linear_attention, linear_attention_step, testing
from pykernels.ops.linear_attention.registration import SEGMENT
from pykernels.testing.linear_attention import chunkwise, linear_case

TARGETS = [t for t in testing.targets(testing.LINEAR_ATTENTION.op, every_isa=False)
           if t.device == "cpu" and t.backend != "triton"]
on_targets = pytest.mark.parametrize("target", TARGETS, ids=str)
DECAYS = (None, "head", "token", "channel")
F64 = torch.float64


def inputs(name: str, **options) -> dict:
    return dict(linear_case(name, **options).make(F64, "cpu").args)


def of_tokens(leaves: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    """What has tokens is cut; a decay per head and the state are not."""
    return {name: x[:, part] if name in "qkv" or name == "decay" and x.dim() > 1 else x for name, x in leaves.items()}


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape and expected.abs().max() > 0
    assert float((actual - expected).abs().max() / expected.abs().max()) < tolerance


# ---- the definition, from peers' formulas ---------------------------------------------------------------------


def parallel(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float) -> Tensor:
    """O = scale (Q K^T * M) V with M_ij = exp(b_i - b_j); log_decay [B, T, H, K], one head of q per head of v."""
    b = log_decay.cumsum(1)
    weights = (b[:, :, None] - b[:, None]).exp()  # [B, i, j, H, K]
    scores = torch.einsum("bihk,bijhk,bjhk->bhij", q, weights, k).tril()
    return scale * torch.einsum("bhij,bjhv->bihv", scores, v)


@on_targets
@pytest.mark.parametrize("decay", DECAYS)
def test_parallel_form(target, decay):
    args = inputs(f"parallel-{decay}", batch=2, tokens=70, heads=3, key_dim=12, value_dim=9, decay=decay)
    g = args.get("decay", torch.zeros(3, dtype=F64))
    g = {1: lambda: g[None, None, :, None], 3: lambda: g[..., None], 4: lambda: g}[g.dim()]().expand(2, 70, 3, 12)
    near(linear_attention(**args, backend=target.backend), parallel(args["q"], args["k"], args["v"], g, 12 ** -0.5))


@on_targets
def test_rwkv6(target):
    """o_t = s q_t^T (S_{t-1} + Diag(u) k_t v_t^T), then S_t = Diag(e^{w_t}) S_{t-1} + k_t v_t^T, by explicit sums."""
    args = inputs("rwkv6", tokens=20, heads=1, key_dim=5, value_dim=4, decay="channel", bonus=True)
    q, k, v, w = (args[name][0, :, 0] for name in ("q", "k", "v", "decay"))
    u = args["bonus"][0]
    expected = torch.zeros(20, 4, dtype=F64)
    for i in range(20):
        expected[i] = (q[i] * u * k[i]).sum() * v[i]
        for j in range(i):
            expected[i] += (q[i] * w[j + 1:i].sum(0).exp() * k[j]).sum() * v[j]
    near(linear_attention(**args, scale=1.0, backend=target.backend)[0, :, 0], expected)


@on_targets
def test_fast_transformers_normalised(target):
    """elu + 1 features, o = phi(q) (sum phi(k) v^T) / (phi(q) . sum phi(k) + 1e-6), no scale."""
    q, k, v = (torch.randn(2, 40, 2, 8, dtype=F64) for _ in range(3))
    q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    weights = torch.einsum("bihk,bjhk->bhij", q, k).tril()
    expected = torch.einsum("bhij,bjhv->bihv", weights, v) / (weights.sum(-1) + 1e-6).transpose(1, 2)[..., None]
    out, state = linear_attention(q, k, v, normalize=True, return_final_state=True, backend=target.backend)
    near(out, expected)
    near(state[..., :-1], torch.einsum("bthk,bthv->bhkv", k, v))
    near(state[..., -1], k.sum(1))


@on_targets
def test_mamba2_ssd(target):
    """y_t = C_t^T h_t, h_t = exp(dt_t A) h_{t-1} + B_t (dt_t x_t)^T, with B and C shared by all heads."""
    batch, tokens, heads, state, width = 2, 50, 4, 6, 5
    x, dt = torch.randn(batch, tokens, heads, width, dtype=F64), torch.rand(batch, tokens, heads, dtype=F64)
    a, b, c = -torch.rand(heads, dtype=F64), *torch.randn(2, batch, tokens, 1, state, dtype=F64)
    h, expected = torch.zeros(batch, heads, state, width, dtype=F64), []
    for t in range(tokens):
        h = (dt[:, t] * a).exp()[..., None, None] * h + b[:, t, :, :, None] * (dt[:, t, :, None] * x[:, t])[:, :, None]
        expected.append((c[:, t, :, :, None] * h).sum(2))
    y = linear_attention(c, b, dt[..., None] * x, decay=dt * a, scale=1.0, backend=target.backend)
    near(y, torch.stack(expected, 1))


@on_targets
@pytest.mark.parametrize("decay", DECAYS)
def test_the_chunkwise_peer_is_right(target, decay):
    args = inputs(f"peer-{decay}", batch=2, tokens=128, heads=2, key_dim=16, value_dim=12, decay=decay)
    near(chunkwise(**args, chunk=32), linear_attention(**args, backend=target.backend))


# ---- states ---------------------------------------------------------------------------------------------------


@on_targets
@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
@pytest.mark.parametrize("options", (
    {"decay": "head"}, {"decay": "channel", "bonus": True}, {"normalize": True},
), ids=str)
def test_halves_chain_to_the_whole_with_gradients(target, options, reverse):
    args = inputs("chain", batch=2, tokens=90, heads=2, key_dim=8, value_dim=6, state=True, **options)
    names = [name for name in ("q", "k", "v", "decay", "bonus", "initial_state") if name in args]
    leaves = {name: args[name].requires_grad_() for name in names}
    options = {"reverse": reverse, "normalize": options.get("normalize", False), "return_final_state": True,
               "backend": target.backend}
    whole = linear_attention(**leaves, **options)
    parts, state = {}, leaves["initial_state"]
    for first, last in ((37, 90), (0, 37)) if reverse else ((0, 37), (37, 90)):
        part = of_tokens(leaves, slice(first, last))
        parts[first], state = linear_attention(**{**part, "initial_state": state}, **options)
    chained = torch.cat((parts[0], parts[37]), 1), state
    cotangents = [torch.randn_like(x) for x in whole]
    for x, y in zip(chained, whole):
        near(x, y)
    for x, y in zip(torch.autograd.grad(chained, list(leaves.values()), cotangents),
                    torch.autograd.grad(whole, list(leaves.values()), cotangents)):
        near(x, y)


@on_targets
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("options", ({}, {"bonus": True}, {"normalize": True}, {"heads": 4, "heads_k": 2}), ids=str)
def test_steps_equal_prefill_and_continue_it(target, decay, options):
    args = inputs(f"steps-{decay}", batch=2, tokens=20, key_dim=8, value_dim=6, decay=decay, **options)
    normalize = args.pop("normalize", False)
    whole, final = linear_attention(**args, normalize=normalize, return_final_state=True, backend=target.backend)
    by_time = {name for name in ("q", "k", "v", "decay") if name in args and args[name].dim() > 1}

    def at(t):
        return {name: x[:, t] if name in by_time else x for name, x in args.items()}

    prompt = {name: x[:, :7] if name in by_time else x for name, x in args.items()}
    _, state = linear_attention(**prompt, normalize=normalize, return_final_state=True, backend=target.backend)
    for t in range(7, 20):
        near(linear_attention_step(**at(t), state=state, normalize=normalize, backend=target.backend), whole[:, t])
    near(state, final)


@on_targets
def test_a_step_leaves_other_slots_alone(target):
    q, k, v = torch.randn(3, 2, 3, 8)
    state = torch.randn(5, 3, 8, 8)
    before = state.clone()
    linear_attention_step(q, k, v, state, state_indices=torch.tensor([3, 1]), backend=target.backend)
    for slot in (0, 2, 4):
        assert torch.equal(state[slot], before[slot])
    assert not torch.equal(state[3], before[3]) and not torch.equal(state[1], before[1])


@on_targets
@pytest.mark.parametrize("decay", DECAYS)
def test_packed_equals_separate(target, decay):
    lengths = (33, 0, 1, 70)
    args = inputs(f"packed-{decay}", tokens=110, key_dim=8, decay=decay, lengths=lengths, state=True)
    out, final = linear_attention(**args, return_final_state=True, backend=target.backend)
    assert not out[:, 104:].any()
    first = 0
    for s, length in enumerate(lengths):
        part = {name: x[:, first:first + length] if name in "qkv" or name == "decay" and x.dim() > 1 else x
                for name, x in args.items() if name != "cu_seqlens"}
        part["initial_state"] = args["initial_state"][s:s + 1]
        alone, state = linear_attention(**part, return_final_state=True, backend=target.backend)
        assert torch.equal(alone, out[:, first:first + length]) and torch.equal(state, final[s:s + 1])
        first += length


@on_targets
def test_reverse_is_the_flip(target):
    args = inputs("flip", tokens=80, key_dim=8, decay="token", state=True)
    out, final = linear_attention(**args, reverse=True, return_final_state=True, backend=target.backend)
    flipped = {name: x.flip(1) if name != "initial_state" else x for name, x in args.items()}
    other, state = linear_attention(**flipped, return_final_state=True, backend=target.backend)
    near(out, other.flip(1))
    near(final, state)


# ---- segments: long sequences ---------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ("head", "token", "channel"))
def test_sequences_of_several_segments(decay):
    """Against the same op on pieces, whose gradients autograd chains; and the same bits on one thread as on three."""
    tokens = 2 * SEGMENT + 100
    args = inputs(f"segments-{decay}", tokens=tokens, heads=1, key_dim=8, value_dim=6, decay=decay, strength=0.01,
                  state=True)
    leaves = {name: x.requires_grad_() for name, x in args.items()}
    results = []
    for threads in (1, 3):
        with testing.use_threads(threads):
            whole = linear_attention(**leaves, return_final_state=True, backend="cpu")
            cotangents = [torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=F64) for x in whole]
            results.append((*whole, *torch.autograd.grad(whole, list(leaves.values()), cotangents)))
    for one, three in zip(*results):
        assert torch.equal(one, three)
    outs, state = [], leaves["initial_state"]
    for first in range(0, tokens, 700):
        part = of_tokens(leaves, slice(first, first + 700))
        out, state = linear_attention(**{**part, "initial_state": state}, return_final_state=True, backend="cpu")
        outs.append(out)
    pieces = torch.cat(outs, 1), state
    for x, y in zip((*pieces, *torch.autograd.grad(pieces, list(leaves.values()), cotangents)), results[0]):
        near(x, y, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_results_are_those_of_their_heads(dtype):
    """Results too long for the caches are written past them, with the same bits as those of one head, which are not."""
    width = 64 if dtype == torch.float32 else 128
    q, k, v, dout = (torch.randn(1, 2048, 8, width).to(dtype) for _ in range(4))
    decay = torch.linspace(-0.5, -0.01, 8)

    def run(heads: slice) -> tuple[Tensor, ...]:
        leaves = [x[:, :, heads].detach().requires_grad_() for x in (q, k, v)]
        out = linear_attention(*leaves, decay=decay[heads], backend="cpu")
        return out, *torch.autograd.grad(out, leaves, dout[:, :, heads])

    whole, last = run(slice(None)), run(slice(7, 8))
    assert whole[0].numel() * whole[0].element_size() >= 4 << 20
    for actual, expected in zip(whole, last):
        assert expected.abs().max() > 0 and torch.equal(actual[:, :, 7:], expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_long_memory_stays_accurate(dtype):
    """gamma = 1 - 2^-12 over thousands of tokens, beside the parallel form in float64."""
    q, k, v = (torch.randn(1, 3000, 1, 16).to(dtype) for _ in range(3))
    g = torch.log1p(torch.tensor([-2.0 ** -12]))
    out = linear_attention(q, k, v, decay=g, backend="cpu").double()
    distance = torch.arange(3000)[:, None] - torch.arange(3000)
    weights = torch.where(distance >= 0, (distance.clamp(min=0) * g.double()).exp(), 0.0)
    expected = ((q[0, :, 0].double() @ k[0, :, 0].double().T) * weights @ v[0, :, 0].double() / 4)[None, :, None]
    near(out, expected, 2e-6 if dtype == torch.float32 else 1e-2)


# ---- derivatives ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", (
    {"decay": "head", "state": True}, {"decay": "token", "state": True, "reverse": True},
    {"decay": "channel", "state": True, "bonus": True},
    {"decay": "token", "bonus": True}, {"normalize": True, "decay": "token", "state": True},
    {"decay": "channel", "heads": 4, "heads_k": 2}, {"decay": "channel", "lengths": (5, 0, 18), "state": True},
), ids=str)
def test_gradcheck(options):
    small = {"tokens": 24, "key_dim": 3, "value_dim": 2, "strength": lambda x: -0.1 - x}
    args = inputs(f"gradcheck-{options}", **small, **options)
    names = [name for name, x in args.items() if isinstance(x, Tensor) and x.is_floating_point()]
    leaves = [args[name].requires_grad_() for name in names]

    def function(*tensors):
        return linear_attention(**{**args, **dict(zip(names, tensors))}, return_final_state=True, backend="cpu")

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("options", (
    {"decay": "channel", "state": True, "bonus": True}, {"normalize": True, "decay": "head"},
), ids=str)
def test_gradgradcheck(options):
    args = inputs(f"gradgradcheck-{options}", tokens=6, key_dim=3, value_dim=2, strength=lambda x: -0.1 - x, **options)
    names = [name for name, x in args.items() if isinstance(x, Tensor)]
    leaves = [args[name].requires_grad_() for name in names]

    def function(*tensors):
        return linear_attention(**{**args, **dict(zip(names, tensors))}, return_final_state=True, backend="cpu")

    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@on_targets
def test_only_the_needed_outputs_get_a_gradient(target):
    """Through out alone and through the final state alone, the sum is that through both."""
    args = inputs("partial", tokens=40, key_dim=8, decay="token", state=True)
    leaves = {name: x.requires_grad_() for name, x in args.items()}
    out, final = linear_attention(**leaves, return_final_state=True, backend=target.backend)
    a, b = torch.randn_like(out), torch.randn_like(final)
    both = torch.autograd.grad((out, final), list(leaves.values()), (a, b), retain_graph=True)
    parts = [torch.autograd.grad(x, list(leaves.values()), y, retain_graph=True, materialize_grads=True)
             for x, y in ((out, a), (final, b))]
    for whole, *halves in zip(both, *parts):
        near(sum(halves), whole)


def test_func_grad():
    q, k, v = (torch.randn(1, 12, 2, 4, dtype=F64) for _ in range(3))
    g = -torch.rand(2, dtype=F64)

    def loss(q, k, v, g):
        return linear_attention(q, k, v, decay=g, backend="cpu").sin().sum()

    ours = torch.func.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, g)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, g)]
    for x, y in zip(ours, torch.autograd.grad(loss(*leaves), leaves)):
        near(x, y)


# ---- properties -----------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(1, 150), st.integers(1, 40), st.integers(1, 40), st.integers(1, 2), st.integers(1, 3),
       st.sampled_from(DECAYS), st.booleans(), st.booleans(), st.sampled_from((0.01, 1.0, 60.0)))
def test_any_shape(tokens, key_dim, value_dim, heads_k, groups, decay, bonus, reverse, strength):
    case = linear_case(f"any-{tokens}-{key_dim}", tokens=tokens, heads=heads_k * groups, heads_k=heads_k,
                       key_dim=key_dim, value_dim=value_dim, decay=decay, strength=strength, bonus=bonus, state=True,
                       reverse=reverse)
    sample = case.make(F64, "cpu")
    ours, reference = (testing.run(testing.LINEAR_ATTENTION, sample, backend) for backend in ("cpu", "reference"))
    for name, x in reference.items():
        # Gradients of strong decays are far below the state's, and only as exact as their terms.
        assert float((ours[name] - x).abs().max()) <= 1e-11 * max(float(x.abs().max()), 1e-12), name


# ---- torch.compile --------------------------------------------------------------------------------------------


def test_compile_forward_and_backward_with_dynamic_shapes():
    def step(q, k, v, g):
        out, state = linear_attention(q, k, v, decay=g, return_final_state=True, backend="cpu")
        return out.sin().sum() + state.square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    for tokens in (33, 70):
        args = inputs(f"compile-{tokens}", batch=2, tokens=tokens, heads=2, key_dim=8, decay="token")
        leaves = [x.requires_grad_() for x in args.values()]
        eager, fast = step(*leaves), compiled(*leaves)
        torch.testing.assert_close(fast, eager)
        for x, y in zip(torch.autograd.grad(fast, leaves), torch.autograd.grad(eager, leaves)):
            torch.testing.assert_close(x, y)


def test_a_step_bumps_the_version_of_the_state_alone():
    q, k, v = torch.randn(3, 2, 3, 8)
    state = torch.zeros(2, 3, 8, 8)
    versions = [x._version for x in (q, k, v, state)]
    linear_attention_step(q, k, v, state, backend="cpu")
    assert [x._version for x in (q, k, v)] == versions[:3] and state._version > versions[3]


def test_a_steps_checks_are_remembered_for_calls_that_look_alike():
    q, k, v = torch.randn(3, 2, 3, 8)
    state, decay = torch.zeros(2, 3, 8, 8), -torch.rand(3)

    def step(**changes):
        return linear_attention_step(
            **{"q": q, "k": k, "v": v, "state": state, "decay": decay, "scale": 1.0, **changes})

    _checks.forget()
    step(), step()
    assert len(_checks._remembered) == 1
    step(state=torch.zeros(2, 6, 8, 8)[:, ::2], state_indices=torch.tensor([1, 0]))
    assert len(_checks._remembered) == 2
    # Equal to what was remembered, but not alike; alike, but with values that are wrong.
    with pytest.raises(TypeError, match="scale"):
        step(scale=True)
    with pytest.raises(ValueError, match="decay.*<= 0"):
        step(decay=-decay)
    with pytest.raises(ValueError, match="state_indices.*2 slots"):
        step(state=torch.zeros(2, 6, 8, 8)[:, ::2], state_indices=torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="requires grad"):
        step(decay=decay.clone().requires_grad_())
    before = state.clone()
    with backends.use_backend("reference"):
        step()
    assert len(_checks._remembered) == 3 and not torch.equal(state, before)


def test_what_the_cuda_kernels_serve():
    """A pure function of the call; what they leave to the CPU says why."""
    gpu = backends.Environment(cpu=None, cuda=None, triton=None, triton_interpret=False, capability=(9, 0))

    def choose(requested: str, dtype: torch.dtype, *options: str) -> backends.Choice:
        query = backends.Query("cuda", dtype, {"key_dim": 128, "value_dim": 512}, frozenset(options), grad=True)
        return backends.choose(testing.LINEAR_ATTENTION.op, query, requested, gpu)

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert choose("cuda", dtype, "varlen", "bonus", "normalize", "reverse").backend == "cuda"
        assert choose("auto", dtype).backend == "triton"  # not measured yet
    for options in ((), ("step",)):
        assert "no float64" in choose("cuda", torch.float64, *options).reason
