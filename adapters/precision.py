"""Precision of adapted layers under autocast, and frozen bases that are kept in the half precision it computes in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

HALF_PRECISIONS = (torch.float16, torch.bfloat16)
CAST = (torch.float32, *HALF_PRECISIONS)  # what autocast casts


def computed_in(x: Tensor) -> torch.dtype:
    """The precision in which a linear layer or a convolution computes with a tensor: autocast's where that is on."""
    kind = x.device.type
    if x.dtype not in CAST or kind == "meta" or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def added(y: Tensor, change: Tensor, x: Tensor) -> Tensor:
    """A layer's output y with its adapter's, in the precision of its input x.

    Under autocast both are in half precision, in which small changes of large values are rounded away; the input, after
    a norm, is in float32.
    """
    return y + change.to(x.dtype)


def keep_in_half(backbone: Any, dtype: torch.dtype) -> None:
    """Keep the frozen weights of a `SixPlaneBackbone` in half precision; its calls are under autocast from now on.

    Autocast rounds the weights of linear layers and convolutions at every call anyway. What is trained, and norms, stay
    as they are. Raises ValueError for a precision that is no half.
    """
    if dtype not in HALF_PRECISIONS:
        raise ValueError(f"dtype={dtype}: must be torch.bfloat16 or torch.float16")
    for layer in backbone.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            for parameter in layer.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
    backbone.kept_in = dtype


def under_own_autocast(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A method (of a backbone, with a tensor as its first argument) under autocast if its weights are kept in half."""

    @functools.wraps(method)
    def wrapped(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.kept_in is None:
            return method(self, x, *args, **kwargs)
        with torch.autocast(x.device.type, self.kept_in):
            return method(self, x, *args, **kwargs)

    return wrapped
