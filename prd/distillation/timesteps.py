"""Timesteps of score distillation: drawn uniformly, then shifted for the second prediction (PRD, supplement B)."""

from __future__ import annotations

from torch import Tensor

from prd.teachers.base import Teacher

NO_SIGNAL = 1e-12  # alpha_bar at and below which x_t is noise alone, and no x0 can be computed from it


def last_timestep(teacher: Teacher) -> int:
    """Last timestep of a teacher's schedule at which x_t still holds something of x: 999 for most, 998 for some."""
    return int((teacher.alphas_cumprod > NO_SIGNAL).nonzero().max())


def sample_timesteps(uniforms: Tensor, t_min: int, t_max: int) -> Tensor:
    """Timesteps uniform in [t_min, t_max), t_max excluded as published, from uniforms in [0, 1) of any shape.

    Raises ValueError unless 0 <= t_min < t_max.
    """
    if not 0 <= t_min < t_max:
        raise ValueError(f"t_min={t_min}, t_max={t_max}: must satisfy 0 <= t_min < t_max")
    return (t_min + (uniforms * (t_max - t_min)).floor().long()).clamp(max=t_max - 1)


def shifted_timesteps(
    t: Tensor, uniforms: Tensor, eta: float, t_min: int, *, sqrt_bias: float | None = None, last: int = 999
) -> Tensor:
    """t + dt with dt uniform in [0, eta (t - t_min)], kept in 1..last (supplement B, under Eq. 1).

    t, uniforms  integers and numbers in [0, 1) of one shape
    sqrt_bias    dt reaches to eta sqrt(t + sqrt_bias) instead, a schedule of the published code that no recipe uses

    Raises ValueError for a negative eta.
    """
    if eta < 0:
        raise ValueError(f"eta={eta}: must not be negative")
    furthest = eta * (t - t_min) if sqrt_bias is None else eta * (t + sqrt_bias).sqrt()
    reach = furthest.clamp(min=0).minimum(last - t)
    return (t + (uniforms * reach).floor().long()).clamp(1, last)
