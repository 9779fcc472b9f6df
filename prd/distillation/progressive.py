"""Progressive Rendering Distillation: Algorithm 1 of the paper, its lines numbered as there.

A model that was a 2D diffusion model learns to denoise and decode 3D without 3D data: K times a step it estimates
z_0, decodes it to a field, and teachers judge the renderings; z_0 is noised again for the next, lower timestep. No
gradient flows from one of the K estimates to another (section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from prd.fields.protocol import Field


class Denoiser(Protocol):
    """Methods of a model that the rollout calls: latents [B, 6, 4, h, w] in, a Field out."""

    def add_noise(self, x0: Tensor, noise: Tensor, timestep: int) -> Tensor: ...

    def denoise(self, latents: Tensor, timestep: int, prompt_embeds: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Field: ...


def rollout(
    model: Denoiser,
    *,
    prompt_embeds: Tensor,
    timesteps: Sequence[int],
    noise: Callable[[int], Tensor],
    batch_size: int = 1,
) -> Iterator[tuple[range, Field]]:
    """Lines 5 to 17: yield the K estimates of a batch of prompts, as (ks, field).

    The field holds the prompts of estimate ks[0], then those of ks[1], ... Between two of them the caller renders and
    judges the field, from cameras of its own every time (lines 11 to 15), and calls backward(loss / K) (line 16), where
    the loss is the sum over the estimates ks of a mean over prompts.

    prompt_embeds  [B, L, Ct]; timesteps T = t_1 > ... > t_K
    noise          k -> standard normal [B, 6, 4, h, w]; 0 is the start, 1 to K the noise of each step
    batch_size     estimates decoded and judged in one batch. As no gradient flows between them it is the same however
                   many; their activations wait for each other, and small batches take less time together.
    """
    z0, estimates = noise(0), []  # line 5
    for k, t in enumerate(timesteps):  # line 6
        z_t = model.add_noise(z0, noise(k + 1), t)  # lines 7-8
        estimates.append(model.denoise(z_t, t, prompt_embeds))  # line 9
        z0 = estimates[-1].detach()  # no gradient across steps (section 3.2)
        if len(estimates) == batch_size or k + 1 == len(timesteps):
            yield range(k + 1 - len(estimates), k + 1), model.decode(torch.cat(estimates))  # lines 10-16
            estimates.clear()
