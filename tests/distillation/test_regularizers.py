from __future__ import annotations

import math

import pytest
import torch

from prd.distillation.regularizers import eikonal_loss, opaque_loss, sparsity_loss


def test_eikonal_is_zero_on_unit_gradients_and_finite_on_zero_ones() -> None:
    gradient = torch.tensor([[0.0, 1.0, 0.0], [0.6, 0.0, -0.8]])
    assert eikonal_loss(gradient) == pytest.approx(0, abs=1e-12)
    assert eikonal_loss(3 * gradient) == pytest.approx(4, rel=1e-6)
    flat = torch.zeros(2, 3, requires_grad=True)
    eikonal_loss(flat).backward()
    assert flat.grad is not None and torch.isfinite(flat.grad).all()


def test_sparsity_falls_with_opacity() -> None:
    assert sparsity_loss(torch.zeros(4)) == pytest.approx(0.1)
    assert sparsity_loss(torch.ones(4)) == pytest.approx(math.sqrt(1.01))


def test_opaque_is_the_entropy_of_a_hit() -> None:
    assert opaque_loss(torch.full((3,), 0.5)) == pytest.approx(math.log(2))
    assert opaque_loss(torch.tensor([0.0, 1.0])) < 0.01
    opacity = torch.tensor([0.2, 0.8, 0.0, 1.0], requires_grad=True)
    opaque_loss(opacity).backward()
    assert opacity.grad is not None
    assert opacity.grad[0] > 0 > opacity.grad[1]  # descent pushes a faint pixel to 0, a dense one to 1
    assert torch.isfinite(opacity.grad).all()
