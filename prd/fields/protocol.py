"""Fields: what every generator makes and every renderer, exporter and metric takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Field(Protocol):
    """A batch of B shapes with colour, defined in the cube [-1, 1]^3.

    points [B, N, 3] in scene units; the signed distance is positive outside.
    """

    def sdf(self, points: Tensor) -> Tensor:
        """Signed distance [B, N, 1], scene units, positive outside."""
        ...

    def rgb(self, points: Tensor) -> Tensor:
        """Colour [B, N, 3] in [0, 1]."""
        ...

    def sdf_and_deformation(self, points: Tensor) -> tuple[Tensor, Tensor | None]:
        """Signed distance [B, N, 1] and the offset of an isosurface grid's vertices [B, N, 3] in cells (or None)."""
        ...

    def sdf_and_gradient(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Signed distance [B, N, 1] and its gradient d sdf / d point [B, N, 3], differentiable if grad is enabled."""
        ...


class AutogradGradient:
    """The gradient of `sdf` by automatic differentiation, for fields without a cheaper one."""

    def sdf(self, points: Tensor) -> Tensor:
        raise NotImplementedError

    def sdf_and_gradient(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Signed distance [B, N, 1] and its gradient [B, N, 3]; twice differentiable while grad mode is on."""
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            points = points if points.requires_grad else points.detach().requires_grad_(True)
            sdf = self.sdf(points)
            (gradient,) = torch.autograd.grad(sdf.sum(), points, create_graph=create_graph)
        return (sdf, gradient) if create_graph else (sdf.detach(), gradient)

    def sdf_and_deformation(self, points: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.sdf(points), None


class FieldSamples:
    """Some samples of a field of B, as a field of their own; the others are asked at the origin, and left out."""

    def __init__(self, whole: Field, indices: Sequence[int], batch: int) -> None:
        if not indices or not all(0 <= index < batch for index in indices):
            raise ValueError(f"indices={list(indices)}: must be some of 0..{batch - 1}")
        self.whole, self.indices, self.batch = whole, list(indices), batch

    def _every(self, points: Tensor) -> Tensor:
        if points.ndim != 3 or points.shape[0] != len(self.indices) or points.shape[2] != 3:
            raise ValueError(f"points={tuple(points.shape)}: expected [B, N, 3] with B = {len(self.indices)}")
        every = points.new_zeros(self.batch, *points.shape[1:])
        return every.index_copy(0, torch.tensor(self.indices, dtype=torch.long, device=points.device), points)

    def sdf(self, points: Tensor) -> Tensor:
        return self.whole.sdf(self._every(points))[self.indices]

    def rgb(self, points: Tensor) -> Tensor:
        return self.whole.rgb(self._every(points))[self.indices]

    def sdf_and_deformation(self, points: Tensor) -> tuple[Tensor, Tensor | None]:
        sdf, deformation = self.whole.sdf_and_deformation(self._every(points))
        return sdf[self.indices], None if deformation is None else deformation[self.indices]

    def sdf_and_gradient(self, points: Tensor) -> tuple[Tensor, Tensor]:
        sdf, gradient = self.whole.sdf_and_gradient(self._every(points))
        return sdf[self.indices], gradient[self.indices]
