"""How tests compare tensors: bit for bit only where the same operands go through the same code, else in the norm.

Two computations of one value may differ in the last digits: libraries choose their code by the layout, the memory
address and the number of the operands, and by whether a weight requires a gradient.
"""

from __future__ import annotations

from torch import Tensor

ROUNDING = 1e-5  # of float32, through a small network; a wrong weight or input differs by 1e-3 and more


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`, in float64; NaN if either is not finite.

    Raises AssertionError for other shapes and for an `expected` that is zero: nothing could be told from it.
    """
    assert found.shape == expected.shape, f"{tuple(found.shape)} is not {tuple(expected.shape)}"
    found, expected = found.detach().double(), expected.detach().double()
    assert expected.any(), "expected is zero"
    return float((found - expected).norm() / expected.norm())
