"""Deterministic DDIM over latents of six planes [B, 6, 4, h, w] (Song et al. 2021), as the published model samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from prd.utils.arguments import integer

Generators = torch.Generator | Sequence[torch.Generator] | None


class Denoiser(Protocol):
    """Model that latents are sampled from."""

    def denoise(self, latents: Tensor, timestep: int, prompt_embeds: Tensor) -> Tensor: ...

    def ddim_step(self, latents: Tensor, x0: Tensor, timestep: int, previous: int) -> Tensor: ...


def even_timesteps(num_inference_steps: int, total: int, trained: int) -> list[int]:
    """Return K timesteps from total - 1 down in equal strides: K = 4 of 1000 -> [999, 749, 499, 249].

    trained: the K to name in the ValueError for one that does not divide the schedule.
    """
    k = integer(num_inference_steps)
    if k is None or k < 1 or total % k:
        raise ValueError(
            f"num_inference_steps={num_inference_steps!r}: must be a positive divisor of {total} "
            f"(this adapter was trained for {trained}); try {trained}"
        )
    return [total - 1 - step * (total // k) for step in range(k)]


def check_generators(generator: object, batch: int) -> None:
    """Raise TypeError or ValueError unless noise for `batch` samples can be drawn from what was given."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, list | tuple) or not all(isinstance(g, torch.Generator) for g in generator):
        raise TypeError(f"generator={generator!r}: must be a torch.Generator or a list of them, one per sample")
    if len(generator) != batch:
        raise ValueError(f"generator: {len(generator)} generators for {batch} samples; give one per sample")


def draw_latents(shape: tuple[int, ...], batch: int, device: torch.device, generator: Generators = None) -> Tensor:
    """Draw Gaussian noise [batch, *shape]; one generator for the batch, or one per sample (then independent of B)."""
    check_generators(generator, batch)
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float32, device=source).to(device)
    drawn = [torch.randn(shape, generator=g, dtype=torch.float32, device=g.device) for g in generator]
    return torch.stack([sample.to(device) for sample in drawn])


@torch.no_grad()
def sample_latents(
    model: Denoiser,
    prompt_embeds: Tensor,
    latents: Tensor,
    timesteps: Sequence[int],
    on_step: Callable[[int, int, Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the last x0 [B, 6, 4, h, w] of DDIM steps from noise `latents`; no classifier-free guidance.

    on_step  called as (step, timestep, latents) after each step; what it returns is used in their place
    """
    if len(latents) != len(prompt_embeds):
        raise ValueError(
            f"latents={tuple(latents.shape)}: expected {len(prompt_embeds)} samples, as many as embeddings"
        )
    x = latents
    for step, (t, previous) in enumerate(zip(timesteps, [*timesteps[1:], None], strict=True)):
        x0 = model.denoise(x, t, prompt_embeds)
        x = x0 if previous is None else model.ddim_step(x, x0, t, previous)
        if on_step is not None:
            x = on_step(step, t, x)
    return x
