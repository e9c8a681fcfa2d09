"""What holds for the states of all layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_inference(layer: nn.Module, x: Tensor) -> None:
    """Before anything is written to a state: in place, so that autograd cannot follow."""
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layer.parameters())):
        raise RuntimeError("x or a parameter requires grad, but a layer that continues a state is for inference (it "
                           "writes the state in place): call it under torch.no_grad() or torch.inference_mode()")
