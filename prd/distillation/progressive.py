"""Progressive Rendering Distillation: Algorithm 1 of the paper, its lines numbered as there.

A model that was a 2D diffusion model learns to denoise and decode 3D without 3D data: K times a step it estimates
z_0, decodes it to a field, and teachers judge the renderings; z_0 is noised again for the next, lower timestep. No
gradient flows from one of the K estimates to another (section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from prd.distillation.asd import (
    AsdResult,
    Guidance,
    Mixture,
    distill,
    distill_drawing,
    gradient_cosine,
    leaf_views,
    rendering_gradient,
    rendering_loss,
)
from prd.distillation.draws import draw_normal, draw_uniform
from prd.fields.protocol import Field
from prd.rendering.views import Views
from prd.teachers.base import Teacher
from prd.teachers.offload import resident


class Denoiser(Protocol):
    """What the rollout asks of a model: latents [B, 6, 4, h, w] in, a Field out."""

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


@dataclass(frozen=True)
class WeightedTeacher:
    """A teacher with its weight in the loss and how it is asked at this step."""

    teacher: Teacher
    weight: float
    guidance: Guidance


@dataclass
class JudgeLog:
    """Sums over the renderings of one optimiser step: what moves, by teacher and renderer."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, value: Tensor | float, count: int = 1) -> None:
        """A value, or the mean over the renderings of `count` estimates."""
        value = float(value)
        if value == value:  # a cosine of teachers that share no pixels is NaN and has no mean
            self.sums[name] = self.sums.get(name, 0.0) + count * value
            self.counts[name] = self.counts.get(name, 0) + count

    def means(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.sums.items()}


def judge_views(
    views: Views,
    judges: Sequence[WeightedTeacher],
    prompts: Sequence[str],
    generator: torch.Generator | Sequence[torch.Generator],
    log: JudgeLog,
    renderer: str,
    estimates: int = 1,
    mixture: Mixture | None = None,
) -> Tensor:
    """Line 15: a scalar whose gradient at the renderings is the teachers' weighted sum, a mean over prompts.

    generator  what the teachers draw from: one for the batch, or one a prompt (then a prompt's draws are its own)
    estimates  that the batch holds one after the other, each of as many prompts: their means are added up
    mixture    second prompts, what lies between which and the first is judged; with generators of each prompt's own

    Each teacher's gradient is taken at the renderings and its graph freed before the next teacher is asked, so that
    the renderer's backward pass runs once and only one teacher's activations exist at a time.
    """
    if not judges:
        raise ValueError("judges: none given; a rendering needs at least one teacher")
    leaves = leaf_views(views)
    total: dict[str, Tensor] = {}
    earlier: dict[str, list[dict[str, Tensor]]] = {}
    for judge in judges:
        with resident(judge.teacher, views.rgb.device):
            if isinstance(generator, torch.Generator):
                result = distill(judge.teacher, leaves, prompts, judge.guidance, generator)
            else:
                result = distill_samples(judge.teacher, leaves, prompts, judge.guidance, generator, mixture)
            gradient = rendering_gradient(judge.weight * result.loss.view(estimates, -1).mean(dim=1).sum(), leaves)
        called = judge.teacher.name
        if called in earlier:  # a second teacher of that name, as with and without a ControlNet
            called = f"{called}_{1 + sum(other.startswith(called) for other in earlier)}"
        name = f"{called}/{renderer}"
        each = _each_estimate(gradient, estimates)
        for own in each:
            log.add(f"gradient_norm/{name}", torch.stack([g.square().sum() for g in own.values()]).sum().sqrt())
        log.add(f"weight/{name}", result.weight.mean(), estimates)
        log.add(f"distillation/{name}", result.loss.detach().mean(), estimates)
        for other, known in earlier.items():
            for first, second in zip(known, each, strict=True):
                log.add(f"cosine/{other}-{name}", gradient_cosine(first, second))
        earlier[called] = each
        for key, value in gradient.items():
            total[key] = total[key] + value if key in total else value
    return rendering_loss(views, total)


def _each_estimate(gradient: dict[str, Tensor], estimates: int) -> list[dict[str, Tensor]]:
    """The part of every estimate in a gradient of tensors [estimates * B, ...]."""
    parts = zip(*(tensor.chunk(estimates) for tensor in gradient.values()), strict=True)
    return [dict(zip(gradient, part, strict=True)) for part in parts]


_encoded: WeakKeyDictionary[Teacher, torch.Size] = WeakKeyDictionary()  # shape [C, h, w] of each teacher's input


def distill_samples(
    teacher: Teacher,
    views: Views,
    prompts: Sequence[str],
    guidance: Guidance,
    generators: Sequence[torch.Generator],
    mixture: Mixture | None = None,
) -> AsdResult:
    """`distill` in which prompt b draws from generators[b] alone, whatever its company in the batch."""
    if not len(generators) == len(prompts) == views.cameras.batch:
        raise ValueError(
            f"generators: {len(generators)} for {len(prompts)} prompts and {views.cameras.batch} shapes; one for each"
        )
    device, count = views.rgb.device, len(prompts)

    return distill_drawing(
        teacher,
        views,
        prompts,
        guidance,
        uniform=lambda: draw_uniform((count,), generators).to(device),
        normal=lambda shape: draw_normal(shape, generators).to(device),
        encode=lambda seen: encode_samples(teacher, seen, generators),
        mixture=mixture,
    )


def encode_samples(teacher: Teacher, views: Views, generators: Sequence[torch.Generator]) -> Tensor:
    """`teacher.encode` of B prompts' views with an encoder noise of each prompt's own, in one call."""
    if teacher not in _encoded:  # what the encoder draws is known by what it gives
        with torch.no_grad():
            _encoded[teacher] = teacher.encode(views).shape[1:]
    shape = (len(generators) * teacher.num_views, *_encoded[teacher])
    return teacher.encode(views, noise=draw_normal(shape, generators).to(views.rgb.device))
