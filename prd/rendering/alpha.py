"""Opacity of ray segments from a field's values: NeuS, VolSDF, plain density.

Each is a pure function and a small model that the volume renderer takes as its `alpha`. Parameters may be numbers or
scalar tensors with gradient (`LearnedInvStd`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prd.utils.construction import float32_weights

PUBLISHED_ALPHA_FLOOR = 1e-5  # added to both sides of NeuS's fraction there; empty space absorbs that much a sample


def neus_alpha(sdf: Tensor, cos: Tensor, dt: Tensor, inv_std: float | Tensor, floor: float = 0.0) -> Tensor:
    """Opacity of each ray segment from the signed distance at its middle (NeuS, Eq. 13).

    sdf      [...]   signed distance at the segment's middle, scene units, positive outside
    cos      [...]   direction . normal, <= 0 (a leaving ray does not absorb: clamp before)
    dt       [...]   segment length, scene units
    inv_std  scalar  s of the logistic density; 1/s is the width of the surface
    floor    scalar  0: exactly 1 - Phi_s(after) / Phi_s(before), in a form that is 0 in empty space and divides by no
                     vanishing Phi_s inside; 1e-5: the published (difference + floor) / (before + floor)

    Returns alpha [...] in [0, 1], differentiable in every argument.
    """
    half = 0.5 * cos * dt
    before, after = inv_std * (sdf - half), inv_std * (sdf + half)
    if floor == 0:
        return torch.sigmoid(-after) * -torch.expm1(after - before)
    before, after = torch.sigmoid(before), torch.sigmoid(after)
    return ((before - after + floor) / (before + floor)).clamp(0, 1)


def volsdf_density(sdf: Tensor, beta: float | Tensor) -> Tensor:
    """Density Psi(-sdf) / beta, 1 / scene units, Psi the CDF of the Laplace distribution of scale beta.

    sdf [...] scene units, positive outside; beta scalar > 0, scene units (Yariv et al., "Volume Rendering of Neural
    Implicit Surfaces", 2021, Eq. 2-3, with their alpha = 1 / beta). Half the largest density on the surface.
    """
    distance = torch.where(sdf >= 0, sdf, -sdf)  # abs has no slope at 0, where the density falls fastest
    tail = 0.5 * torch.exp(-distance / beta)
    return torch.where(sdf >= 0, tail, 1 - tail) / beta


def density_alpha(density: Tensor, dt: Tensor) -> Tensor:
    """Opacity 1 - exp(-density dt) of segments of constant density (NeRF, Eq. 3); [...] >= 0 each, [...] in [0, 1]."""
    return -torch.expm1(-density * dt)


class AlphaModel(Protocol):
    """Function of the volume renderer from a field's `sdf` to opacity."""

    @property
    def uses_normal(self) -> bool:
        """True if the opacity depends on `cos`, so that it is not known before the gradient is."""
        ...

    def __call__(self, sdf: Tensor, cos: Tensor, dt: Tensor) -> Tensor:
        """Opacity [...] of segments: value at the middle, direction . normal <= 0, length; [...] each."""
        ...

    def may_reach(self, sdf: Tensor, dt: Tensor, opacity: float) -> Tensor:
        """Mark the segments [...] that may have this opacity in (0, 1), whatever their normal: bool, never too few."""
        ...


@dataclass(frozen=True)
class NeusAlpha:
    """NeuS's logistic density of a signed distance."""

    inv_std: float | Tensor = 100.0  # s, 1 / scene units (published: exp(10 * 0.4605)); a tensor may carry gradient
    floor: float = 0.0  # see neus_alpha
    uses_normal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_positive("inv_std", self.inv_std)

    def __call__(self, sdf: Tensor, cos: Tensor, dt: Tensor) -> Tensor:
        return neus_alpha(sdf, cos, dt, self.inv_std, self.floor)

    def may_reach(self, sdf: Tensor, dt: Tensor, opacity: float) -> Tensor:
        """Apply a bound without exponentials: as |cos| <= 1 the opacity is at most exp(-s (sdf - dt / 2))."""
        return (self.inv_std * (0.5 * dt - sdf) > math.log(opacity)) & (dt > 0)


@dataclass(frozen=True)
class VolSDFAlpha:
    """VolSDF's Laplace density of a signed distance."""

    beta: float | Tensor = 0.01  # scene units: the width of the surface; a tensor may carry gradient
    uses_normal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_positive("beta", self.beta)

    def __call__(self, sdf: Tensor, cos: Tensor, dt: Tensor) -> Tensor:
        return density_alpha(volsdf_density(sdf, self.beta), dt)

    def may_reach(self, sdf: Tensor, dt: Tensor, opacity: float) -> Tensor:
        return self(sdf, sdf, dt) >= opacity


@dataclass(frozen=True)
class DensityAlpha:
    """A density instead of a distance (NeRF; ATT3D): density = max(threshold - sdf, 0), 1 / scene units.

    Such a field answers `sdf` by threshold - density, which is positive outside and whose zero is the isosurface that
    is exported.
    """

    threshold: float  # density of the exported isosurface, 1 / scene units
    uses_normal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_positive("threshold", self.threshold)

    def __call__(self, sdf: Tensor, cos: Tensor, dt: Tensor) -> Tensor:
        return density_alpha((self.threshold - sdf).clamp(min=0), dt)

    def may_reach(self, sdf: Tensor, dt: Tensor, opacity: float) -> Tensor:
        return self(sdf, sdf, dt) >= opacity


class LearnedInvStd(nn.Module):
    """A trained s = exp(10 v) of NeuS's logistic density (NeuS, section 4.1: "variance"); call it for its value.

    init: v at the start; 0.3 in NeuS, 0.4605 (s = 100) in the published TriplaneTurbo, which does not train it.
    """

    @float32_weights()
    def __init__(self, init: float = 0.3) -> None:
        super().__init__()
        self.variance = nn.Parameter(torch.tensor(float(init), dtype=torch.float32))

    @classmethod
    def of(cls, inv_std: float) -> LearnedInvStd:
        """One that starts at s = inv_std, 1 / scene units."""
        return cls(math.log(inv_std) / 10)

    def forward(self) -> Tensor:
        """s, a scalar in [1e-6, 1e6], 1 / scene units, with gradient within that range."""
        return torch.exp(10 * self.variance).clamp(1e-6, 1e6)


def render_weights(alpha: Tensor) -> Tensor:
    """Share of each segment in its ray, alpha_i prod_{j<i} (1 - alpha_j); [..., N] to [..., N] (NeuS, Eq. 11)."""
    return alpha * transmittance(alpha)


def transmittance(alpha: Tensor) -> Tensor:
    """Share of the light that reaches each segment, prod_{j<i} (1 - alpha_j); [..., N] to [..., N]."""
    return F.pad(torch.cumprod(1 - alpha[..., :-1], dim=-1), (1, 0), value=1.0)


def _check_positive(name: str, value: float | Tensor) -> None:
    if isinstance(value, Tensor):
        ok = value.numel() == 1 and bool((value > 0) & torch.isfinite(value))
    else:
        ok = 0 < value < math.inf
    if not ok:
        raise ValueError(f"{name}={value}: must be one positive, finite number")
