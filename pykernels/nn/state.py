"""What holds for the inputs and states of all layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_input(x: object, dim: int, tokens: bool, batch: int | None = None) -> None:
    """x [B, T, dim], or without `tokens` [B, dim]; `batch` is that of the state that x continues."""
    axes = {"B": batch, "T": None, "dim": dim} if tokens else {"B": batch, "dim": dim}
    wanted = ", ".join(label if size is None else f"{label}={size}" for label, size in axes.items())
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor [{wanted}], got {type(x).__name__}")
    if x.dim() != len(axes) or any(size is not None and size != n for size, n in zip(axes.values(), x.shape)):
        raise ValueError(f"x must have shape [{wanted}], got {list(x.shape)}")


def check_state(state: object, kind: type, optional: bool = False) -> None:
    """The state of a layer, whose states are of a kind; `optional`: None is none."""
    if not isinstance(state, kind) and not (optional and state is None):
        raise TypeError(f"state must be the {kind.__name__} that the layer's init_state makes, "
                        f"got {type(state).__name__}")


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast computes in on devices of a type; None where it is off, or there is none (meta)."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def check_inference(layer: nn.Module, x: Tensor) -> None:
    """Before anything is written to a state: in place, so that autograd cannot follow."""
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layer.parameters())):
        raise RuntimeError("x or a parameter requires grad, but a layer that continues a state is for inference (it "
                           "writes the state in place): call it under torch.no_grad() or torch.inference_mode()")
