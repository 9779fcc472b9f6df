"""Checks of a field's answers against what was asked: errors name the field's method."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def expect(name: str, values: Any, points: Tensor, channels: int) -> Tensor:
    """The field's answer to points [B, N, 3]: TypeError if it is no tensor, ValueError if not [B, N, channels]."""
    expected = (*points.shape[:2], channels)
    if not isinstance(values, Tensor):
        raise TypeError(f"field.{name} returned {type(values).__name__}: expected a tensor {expected}")
    if values.shape != expected:
        raise ValueError(
            f"field.{name} returned {tuple(values.shape)} for points {tuple(points.shape)}: expected {expected}; "
            "does the field hold as many samples as there are camera batches?"
        )
    return values


def several(name: str, answer: Any, count: int) -> tuple[Any, ...]:
    """The field's answer, or TypeError if it is not that many values in a tuple."""
    if not isinstance(answer, tuple | list) or len(answer) != count:
        found = f"{len(answer)} values" if isinstance(answer, tuple | list) else type(answer).__name__
        raise TypeError(f"field.{name} returned {found}: expected a tuple of {count}")
    return tuple(answer)


def check_numbers(name: str, *values: Tensor) -> None:
    """ValueError if the field's values hold NaN, or lead to it."""
    if any(bool(x.detach().sum().isnan()) and bool(x.isnan().any()) for x in values):
        raise ValueError(f"field.{name}: holds NaN, or infinity that leads to it; look for a diverged network")
