"""Adan against recorded steps, a written-out reference, and its saved state."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from prd.training.optimizers import Adan
from prd.training.run.checkpoints import load_optimizer_state, optimizer_state
from tests.recordings import OFFICIAL


def test_steps_equal_the_recorded_ones():
    recorded = load_file(OFFICIAL / "render" / "io.safetensors")
    parameters = {name: nn.Parameter(recorded[f"adan.{name}0"].clone()) for name in "pq"}
    optimizer = Adan(parameters.values(), lr=2e-4, betas=(0.98, 0.92, 0.99), eps=1e-15)
    steps = sum(key.startswith("adan.step") and key.endswith(".p") for key in recorded)
    assert steps >= 5
    for i in range(steps):
        for name, parameter in parameters.items():
            parameter.grad = recorded[f"adan.step{i}.g{name}"].clone()
        optimizer.step()
        for name, parameter in parameters.items():
            moved = recorded[f"adan.step{i}.{name}"] - recorded[f"adan.{name}0"]
            torch.testing.assert_close(parameter.detach() - recorded[f"adan.{name}0"], moved, rtol=2e-3, atol=3e-7)


def reference(p, gradients, lr, betas, eps, decay):
    """Algorithm 1 of the paper with bias correction, on one number."""
    m = v = n = 0.0
    before = gradients[0]
    for k, g in enumerate(gradients, start=1):
        change = g - before
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * change
        n = betas[2] * n + (1 - betas[2]) * (g + betas[1] * change) ** 2
        step = m / (1 - betas[0] ** k) + betas[1] * v / (1 - betas[1] ** k)
        p = (p - lr * step / ((n / (1 - betas[2] ** k)) ** 0.5 + eps)) / (1 + lr * decay)
        before = g
    return p


def test_weight_decay_and_late_parameters_follow_the_algorithm():
    betas, gradients = (0.9, 0.8, 0.95), [0.5, -1.0, 2.0, 0.25]
    first, late = (nn.Parameter(torch.tensor([1.5], dtype=torch.float64)) for _ in range(2))
    optimizer = Adan([first, late], lr=0.1, betas=betas, eps=1e-3, weight_decay=0.3)
    for i, g in enumerate(gradients):
        first.grad = torch.tensor([g], dtype=torch.float64)
        late.grad = None if i == 0 else torch.tensor([g], dtype=torch.float64)  # has no gradient at first
        optimizer.step()
    assert first.item() == pytest.approx(reference(1.5, gradients, 0.1, betas, 1e-3, 0.3), rel=1e-12)
    assert late.item() == pytest.approx(reference(1.5, gradients[1:], 0.1, betas, 1e-3, 0.3), rel=1e-12)


def test_a_saved_state_continues_bitwise():
    def start():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, Adan(model.parameters(), lr=0.05)

    def steps(model, optimizer, numbers):
        for number in numbers:
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    model, optimizer = start()
    steps(model, optimizer, range(6))
    halted, halted_optimizer = start()
    steps(halted, halted_optimizer, range(3))
    tensors, plain = optimizer_state(halted_optimizer)
    assert not plain["scalars"]  # everything is a tensor
    resumed, resumed_optimizer = start()
    resumed.load_state_dict(halted.state_dict())
    load_optimizer_state(resumed_optimizer, tensors, plain)
    steps(resumed, resumed_optimizer, range(3, 6))
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"eps": -1.0}, {"betas": (0.9, 0.99)}, {"betas": (0.9, 1.0, 0.9)}])
def test_bad_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Adan([nn.Parameter(torch.zeros(1))], **wrong)
