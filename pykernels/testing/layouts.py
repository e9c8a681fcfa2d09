"""The values and the layouts in memory that the descriptions make their inputs of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .kit import seed


def generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed(name))


def normal(name: str, shape: Sequence[int]) -> Tensor:
    return torch.randn(shape, generator=generator(name), dtype=torch.float64)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def contiguous(x: Tensor) -> Tensor:
    return x


def heads_first(x: Tensor) -> Tensor:
    """[B, T, H, K] as the transpose of a contiguous [B, H, T, K]: dense, permuted."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def strided(x: Tensor) -> Tensor:
    """Every other element of a tensor twice as large: no axis is contiguous."""
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]


def padded(x: Tensor) -> Tensor:
    """A slice of a larger tensor of NaN."""
    whole = x.new_full([size + 3 for size in x.shape], torch.nan)
    inner = whole[tuple(slice(1, size + 1) for size in x.shape)]
    inner.copy_(x)
    return inner


def expanded(x: Tensor) -> Tensor:
    """One batch entry for all, with stride 0."""
    return x[:1].expand(x.shape)
