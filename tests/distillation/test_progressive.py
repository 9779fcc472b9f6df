"""The rollout is Algorithm 1."""

from __future__ import annotations

import pytest
import torch

from prd.distillation.progressive import rollout


class Doubling:
    """A student of one trained number: z_0 = 2 z_t, and the field is z_0 itself."""

    def __init__(self) -> None:
        self.weight = torch.tensor(2.0, requires_grad=True)
        self.asked: list[tuple[int, float]] = []

    def add_noise(self, x0, noise, timestep):
        return x0 + noise

    def denoise(self, latents, timestep, prompt_embeds):
        self.asked.append((timestep, float(latents.detach())))
        return self.weight * latents

    def decode(self, latents):
        return latents


@pytest.mark.parametrize("at_once, groups", [(1, [[0], [1], [2]]), (2, [[0, 1], [2]]), (3, [[0, 1, 2]])])
def test_the_rollout_is_algorithm_1(at_once, groups):
    """Every step starts from the one before, noised to a lower timestep, and no gradient flows between them."""
    student, judged = Doubling(), []

    for ks, field in rollout(
        student,
        prompt_embeds=torch.zeros(1, 1, 1),
        timesteps=[999, 499, 249],
        noise=lambda k: torch.tensor([float(k)]),
        batch_size=at_once,
    ):
        judged.append(list(ks))
        assert len(field) == len(ks)
        (field.sum() / 3).backward()
    assert student.asked == [(999, 1.0), (499, 4.0), (249, 11.0)]  # 0 + 1; 2 * 1 + 2; 2 * 4 + 3
    assert judged == groups
    mean = (1.0 + 4.0 + 11.0) / 3  # over the estimates; more if z0 were not cut off
    assert float(student.weight.grad) == pytest.approx(mean)
