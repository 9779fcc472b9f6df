"""The noise that a teacher sees in a rendering: DDIM run backwards (SDI, Lukoianov et al. 2024, arXiv:2405.15891)."""

from __future__ import annotations

import torch
from torch import Tensor

from prd.teachers.base import Condition, Teacher


@torch.no_grad()
def ddim_inversion(
    teacher: Teacher, x: Tensor, condition: Condition, t: Tensor, *, steps: int, guidance_scale: float = 1.0
) -> Tensor:
    """The noise [n, C, h, w], float32, with which x_t = sqrt(a_t) x + sqrt(1 - a_t) noise is x inverted up to t.

    x               [n, C, h, w] as the teacher encodes it
    t               [n] integer timesteps
    steps           of the inversion, of equal length in t; from one to the next the prediction is held (DDIM, eta = 0)
    guidance_scale  of its predictions; at 1 and 0 they follow the text, or the negative prompt, by one pass per step,
                    else by two. The paper's is -7.5
    """
    start = x.detach().float()
    schedule = teacher.alphas_cumprod.to(x.device)
    now, a = start, torch.ones(len(x), 1, 1, 1, dtype=torch.float32, device=x.device)
    for step in range(steps):
        noise = _guided(teacher, now, t * step // steps, condition, guidance_scale)
        clean = (now - (1 - a).sqrt() * noise) / a.sqrt()
        a = schedule[t * (step + 1) // steps].view(-1, 1, 1, 1)
        now = a.sqrt() * clean + (1 - a).sqrt() * noise
    return (now - a.sqrt() * start) / (1 - a).sqrt()


def _guided(teacher: Teacher, x_t: Tensor, t: Tensor, condition: Condition, scale: float) -> Tensor:
    """Noise prediction [n, C, h, w] with classifier-free guidance."""
    if scale in (0, 1):
        return teacher.predict_noise(x_t, t, condition if scale else condition.negative())
    both = Condition.cat([condition, condition.negative()])
    text, negative = teacher.predict_noise(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return negative + scale * (text - negative)
