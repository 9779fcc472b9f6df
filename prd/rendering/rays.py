"""Rays: where they cross the scene's cube, and where along them samples are placed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RayBundle(NamedTuple):
    """Rays of B samples, flattened over views and pixels.

    origins, directions [B, M, 3]; near, far [B, M, 1]; jitter [passes, B, M, 1] in [0, 1).
    """

    origins: Tensor
    directions: Tensor
    near: Tensor
    far: Tensor
    jitter: Tensor

    def rows(self, start: int, stop: int) -> RayBundle:
        """Some of the M rays of every sample."""
        rays = slice(start, stop)
        origins, directions, near, far = (part[:, rays] for part in self[:4])
        return RayBundle(origins, directions, near, far, self.jitter[:, :, rays])


def cube_near_far(origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Find where rays [..., 3] enter and leave the cube [-1, 1]^3, [..., 1] each, >= 0; equal where they miss it."""
    safe = torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)
    first, second = (-1 - origins) / safe, (1 - origins) / safe
    near = torch.minimum(first, second).amax(dim=-1, keepdim=True).clamp(min=0)
    far = torch.maximum(first, second).amin(dim=-1, keepdim=True)
    return near, torch.maximum(near, far)


def edges_around(middles: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Edges [..., S + 1] halfway between ascending middles [..., S], the outermost within low and high [..., 1]."""
    inner = (middles[..., 1:] + middles[..., :-1]) / 2
    first = torch.maximum(1.5 * middles[..., :1] - 0.5 * middles[..., 1:2], low)
    last = torch.minimum(1.5 * middles[..., -1:] - 0.5 * middles[..., -2:-1], high)
    return torch.cat([first, inner, last], dim=-1)


def jittered_shares(count: int, jitter: Tensor) -> Tensor:
    """(i + jitter) / count for i < count: shares [..., count] of a range, from offsets [..., 1] in [0, 1)."""
    return (torch.arange(count, dtype=jitter.dtype, device=jitter.device) + jitter) / count


def sample_pdf(edges: Tensor, cdf: Tensor, shares: Tensor) -> Tensor:
    """Find where a distribution reaches shares [..., S] in [0, 1) of its mass: [..., S].

    edges, cdf [..., M]: the distribution, piecewise linear between ascending `edges`.
    """
    u = cdf[..., :1] + shares * (cdf[..., -1:] - cdf[..., :1])
    right = torch.searchsorted(cdf.contiguous(), u.contiguous(), right=True).clamp(1, edges.shape[-1] - 1)
    u0, u1 = cdf.gather(-1, right - 1), cdf.gather(-1, right)
    t0, t1 = edges.gather(-1, right - 1), edges.gather(-1, right)
    width = u1 - u0
    share = torch.where(width < 1e-10, 0.5, (u - u0) / width.clamp(min=1e-10))
    return t0 + share * (t1 - t0)
