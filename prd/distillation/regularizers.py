"""Losses on the geometry alone, of the volume rendering (paper, supplement B)."""

from __future__ import annotations

import torch
from torch import Tensor


def eikonal_loss(gradient: Tensor) -> Tensor:
    """Mean of (|grad sdf| - 1)^2: a signed distance changes by one unit a unit (Gropp et al., 2020).

    gradient [..., 3] of the signed distance with respect to the point. Returns a scalar.
    """
    return (gradient.norm(dim=-1) - 1).square().mean()


def sparsity_loss(opacity: Tensor) -> Tensor:
    """Mean of sqrt(opacity^2 + 0.01): empty space where nothing is asked for (DreamFusion's, Poole et al., 2022).

    opacity [...] in [0, 1]. Returns a scalar.
    """
    return (opacity.square() + 0.01).sqrt().mean()


def opaque_loss(opacity: Tensor, eps: float = 1e-3) -> Tensor:
    """Mean binary entropy in nats of the opacity: a pixel is hit or missed, nothing between.

    opacity [...] in [0, 1]; it is clamped to [eps, 1 - eps], beyond which there is no gradient. Returns a scalar.
    """
    p = opacity.clamp(eps, 1 - eps)
    return -(p * torch.log(p) + (1 - p) * torch.log1p(-p)).mean()
