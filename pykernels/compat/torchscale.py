"""torchscale's retention layer on `retention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.retention import retention

__all__ = ["MultiScaleRetention"]
VERSION = "0.3.0"  # whose signature and formulas these are
MODULES = {"torchscale": (), "torchscale.component": (), "torchscale.component.multiscale_retention": tuple(__all__)}

_GATES = {"swish": F.silu, "gelu": F.gelu}


def _theta_shift(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Turns pairs (2i, 2i + 1) of x [B, T, H, K]; sin and cos [T, K] or [K] hold each angle twice."""
    turned = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    if sin.dim() == 2:
        sin, cos = sin[:, None], cos[:, None]
    return x * cos + turned * sin


class MultiScaleRetention(nn.Module):
    """torchscale's MultiScaleRetention: its parameters by their names, its forward, its incremental state.

    All forms are the one `retention` op, in time linear in T. torchscale divides the outputs of each by factors of its
    own, which the norm of each head takes out again but for its epsilon. The parallel and the recurrent form have the
    same factors here; the chunkwise form has those that depend on the decay, but not those that depend on the sizes of
    its scores and states.

    Args:
        args: needs `layernorm_eps`; `multiway` must be false (or absent).
        embed_dim: size of the tokens; num_heads divides it.
        value_dim: size of the values of all heads; num_heads divides it.
        num_heads: number of heads. Their decays are RetNet's, 1 - 2 ** (-5 - h).
        gate_fn: "swish" or "gelu".
    """

    def __init__(self, args, embed_dim, value_dim, num_heads, gate_fn="swish"):
        super().__init__()
        if getattr(args, "multiway", False):
            raise ValueError("args.multiway must be False: two sets of weights in a layer are not served, got True")
        if str(gate_fn) not in _GATES:
            raise ValueError(f"gate_fn must be one of {', '.join(_GATES)}, got {gate_fn!r}")
        if num_heads < 1 or embed_dim % num_heads or value_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim and value_dim, got {num_heads} for {embed_dim} "
                             f"and {value_dim}")
        self.args, self.embed_dim, self.value_dim, self.num_heads = args, embed_dim, value_dim, num_heads
        self.head_dim, self.key_dim = value_dim // num_heads, embed_dim // num_heads
        self.scaling = self.key_dim ** -0.5
        self.gate_fn = _GATES[str(gate_fn)]
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.k_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.v_proj = nn.Linear(embed_dim, value_dim, bias=False)
        self.g_proj = nn.Linear(embed_dim, value_dim, bias=False)
        self.out_proj = nn.Linear(value_dim, embed_dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self):
        """torchscale's initialisation."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            nn.init.xavier_uniform_(projection.weight, gain=2 ** -2.5)
        nn.init.xavier_uniform_(self.out_proj.weight)

    def _norm(self, out: Tensor) -> Tensor:
        wide = torch.promote_types(out.dtype, torch.float32)
        return F.rms_norm(out.to(wide), (self.head_dim,), eps=self.args.layernorm_eps).to(out.dtype)

    def _gamma(self, mask: Tensor) -> Tensor:
        """The decay per head behind a mask [H, T, T] whose rows are powers of it, each row times some factor."""
        if not isinstance(mask, Tensor) or mask.dim() != 3 or mask.shape != (self.num_heads, *mask.shape[-1:] * 2):
            raise ValueError(f"rel_pos must hold a decay mask [{self.num_heads}, T, T], got "
                             f"{list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}")
        usual = 1 - torch.exp2(-5 - torch.arange(self.num_heads, device=mask.device, dtype=torch.float64))
        row = mask[:, -1].to(torch.float64)
        span = min(row.shape[1] - 1, 128)  # far enough to tell decays close to 1 apart, near enough not to underflow
        if span < 1:
            return usual
        gamma = (row[:, -1 - span] / row[:, -1]) ** (1 / span)
        # RetNet's own decays are taken exactly: through the rounded mask they would be off by rounding / span.
        rounding = 4 * torch.finfo(mask.dtype).eps
        gamma = torch.where((gamma - usual).abs() <= rounding / span, usual, gamma)
        if mask.device.type == "cpu" and not torch.compiler.is_compiling():
            distance = torch.arange(row.shape[1] - 1, -1, -1, dtype=torch.float64)
            powers = gamma[:, None] ** distance
            if bool(((row / row[:, -1:] - powers).abs() > rounding + 1e-3 * powers).any()):
                raise ValueError("rel_pos must hold a causal mask whose entries decay by one factor per head and token")
        return gamma

    def forward(self, x, rel_pos, chunkwise_recurrent=False, incremental_state=None):
        """x [B, T, embed_dim] -> [B, T, embed_dim].

        Args:
            x: the tokens; with incremental_state the next one, T = 1.
            rel_pos: what torchscale's RetNetRelPos returns: ((sin, cos), mask [H, T, T]) or, with chunkwise_recurrent,
                its four masks, the first [H, chunk, chunk]; with incremental_state ((sin, cos), gamma [H]). Of a mask,
                the decay per head is taken (and, on CPUs, checked to be all there is in it).
            chunkwise_recurrent: whether rel_pos is that of the chunkwise form; the result is the same, and T is any.
            incremental_state: a dict, {} before the first token. After each, it holds "prev_key_value" [B, H, V, K] and
                "scale" [H], torchscale's state, which may go back and forth between the two.
        """
        (sin, cos), decay = rel_pos
        shape = self.num_heads, -1
        q = self.q_proj(x).unflatten(-1, shape)
        k = (self.k_proj(x) * self.scaling).unflatten(-1, shape)
        v = self.v_proj(x).unflatten(-1, shape)
        q, k = (_theta_shift(y, sin, cos).to(v.dtype) for y in (q, k))
        if incremental_state is None:
            if chunkwise_recurrent:
                if not isinstance(decay, (tuple, list)) or len(decay) != 4:
                    raise ValueError("rel_pos must hold four masks with chunkwise_recurrent, got "
                                     f"{len(decay) if isinstance(decay, (tuple, list)) else type(decay).__name__}")
                decay = decay[0]
            out = self._whole(q, k, v, decay, chunkwise_recurrent)
        else:
            out = self._step(q, k, v, decay, incremental_state)
        out = self._norm(out).flatten(-2)
        return self.out_proj(self.gate_fn(self.g_proj(x)) * out)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, chunkwise: bool) -> Tensor:
        """All tokens. Row t of the mask is a factor times powers of gamma; the diagonal holds the factors."""
        wide = torch.promote_types(v.dtype, torch.float32)
        gamma, tokens = self._gamma(mask).to(wide), q.shape[1]
        if not chunkwise and mask.shape[1] != tokens:
            raise ValueError(f"rel_pos must hold a mask for x's {tokens} tokens, got one for {mask.shape[1]}")
        factors = mask.diagonal(dim1=1, dim2=2).T[:, :, None].to(wide)  # [T or chunk, H, 1]
        if chunkwise:
            factors = factors[torch.arange(tokens, device=mask.device) % mask.shape[1]]
        out = retention(q, k, v, gamma=gamma, scale=1.0) * factors
        if not chunkwise:  # torchscale divides a row of scores by its sum, where that is large
            with torch.no_grad():
                sums = retention(q, k, torch.ones_like(v[..., :1]), gamma=gamma, scale=1.0) * factors
            out = out / sums.abs().clamp(min=1)
        return out.to(v.dtype)

    def _step(self, q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, incremental_state: dict) -> Tensor:
        """The next token. torchscale keeps the transposed state over the root of "scale", a sum of decays."""
        if q.shape[1] != 1:
            raise ValueError(f"x must hold one token with incremental_state, got {q.shape[1]}")
        if not isinstance(gamma, Tensor) or gamma.shape != (self.num_heads,):
            raise ValueError(f"rel_pos must hold decays [{self.num_heads}] with incremental_state, got "
                             f"{list(gamma.shape) if isinstance(gamma, Tensor) else type(gamma).__name__}")
        wide = torch.promote_types(v.dtype, torch.float32)
        state, scale = None, torch.ones_like(gamma)
        if "prev_key_value" in incremental_state:
            kept, before = incremental_state["prev_key_value"], incremental_state["scale"]
            state = (kept.to(wide) * before.to(wide).view(-1, 1, 1).sqrt()).transpose(2, 3)
            scale = before * gamma + 1
        out, state = retention(q, k, v, gamma=gamma.to(wide), scale=1.0, initial_state=state, return_final_state=True)
        root = scale.to(wide).sqrt()
        incremental_state["prev_key_value"] = (state.transpose(2, 3) / root.view(-1, 1, 1)).to(v.dtype)
        incremental_state["scale"] = scale
        return (out / root[:, None]).to(v.dtype)
