"""retention and retention_step: the three forms agree, and gamma's gradient is that of the formula.

Errors against the float64 reference, determinism and bad input are in tests/test_ops.py, from the op's description.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pykernels import linear_attention, retention, retention_step, testing

TARGETS = [t for t in testing.targets(testing.RETENTION.op, every_isa=False)
           if t.device == "cpu" and t.backend != "triton"]
on_targets = pytest.mark.parametrize("target", TARGETS, ids=str)
F64 = torch.float64


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape and expected.abs().max() > 0
    assert float((actual - expected).abs().max() / expected.abs().max()) < tolerance


def parallel(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
    """scale (Q K^T * D) V with D_ij = gamma^(i - j) for i >= j."""
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    weights = torch.where(distance >= 0, gamma[:, None, None] ** distance.clamp(min=0), 0)
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[3] ** -0.5 * weights
    return torch.einsum("bhij,bjhv->bihv", scores, v)


def tensors(tokens: int = 100, heads: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, tokens, heads, size, dtype=F64, generator=generator) for size in (8, 8, 12)]


@on_targets
@pytest.mark.parametrize("learned", (False, True), ids=("default", "gamma"))
def test_chunked_parallel_and_recurrent_form_agree(target, learned):
    q, k, v = tensors()
    gamma = torch.tensor([0.5, 0.97, 1.0], dtype=F64) if learned else None
    formula = gamma if learned else 1 - 2.0 ** (-5 - torch.arange(3, dtype=F64))
    out, final = retention(q, k, v, gamma=gamma, return_final_state=True, backend=target.backend)
    near(out, parallel(q, k, v, formula))
    state = torch.zeros(2, 3, 8, 12, dtype=F64)
    steps = [retention_step(q[:, t], k[:, t], v[:, t], state, gamma=gamma, backend=target.backend) for t in range(100)]
    near(torch.stack(steps, 1), out)
    near(state, final)


@on_targets
def test_gradients_of_the_parallel_form_gamma_included(target):
    leaves = [x.requires_grad_() for x in (*tensors(), torch.tensor([0.3, 0.9, 0.999], dtype=F64))]
    q, k, v, gamma = leaves
    ours, formula = retention(q, k, v, gamma=gamma, backend=target.backend), parallel(*leaves)
    cotangent = torch.randn_like(ours)
    for x, y in zip(torch.autograd.grad(ours, leaves, cotangent), torch.autograd.grad(formula, leaves, cotangent)):
        near(x, y)


@on_targets
def test_it_is_linear_attention_with_the_log_of_gamma(target):
    q, k, v = tensors(70)
    gamma = torch.tensor([0.2, 0.8, 0.99], dtype=F64)
    state = torch.randn(2, 3, 8, 12, dtype=F64)
    options = {"scale": 0.7, "initial_state": state, "reverse": True, "return_final_state": True,
               "backend": target.backend}
    wanted = linear_attention(q, k, v, decay=gamma.log(), **options)
    for x, y in zip(retention(q, k, v, gamma=gamma, **options), wanted):
        assert torch.equal(x, y) and x.abs().max() > 0


def test_gradcheck():
    def function(q, k, v, gamma):
        return retention(q, k, v, gamma=gamma, backend="cpu")

    q, k, v = (x[:1, :20, :, :3].clone().requires_grad_() for x in tensors())
    gamma = torch.tensor([0.3, 0.9, 0.99], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (q, k, v, gamma), fast_mode=True)
    q, k, v = (x[:, :5].detach().requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradgradcheck(function, (q, k, v, gamma), fast_mode=True)


def test_a_missing_or_malformed_v_is_named():
    q, k, _ = tensors(5)
    with pytest.raises(TypeError, match="v must be a tensor"):
        retention(q, k, None)
    with pytest.raises(ValueError, match="v must have 4 axes"):
        retention(q, k, k[0])
