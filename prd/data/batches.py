"""Micro-batches of a run: prompts, their embeddings, and random numbers that belong to each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prd.data.prompts import Corpus
from prd.data.shape_library import ShapeLibrary, Shapes
from prd.distillation.draws import sample_generator
from prd.distillation.interpolation import InterpolationConfig, PromptInterpolation
from prd.generators.point_encoder import anneal_cloud
from prd.meshes.read import sample_points
from prd.text.encoders import PromptEncoder
from prd.training.config import Stage
from prd.utils.checked_types import number

# streams of random numbers
PROMPTS, NOISE, CAMERAS, JITTER, TEACHERS, SHADING, INTERPOLATION, CLOUDS, FAKE = range(9)


@dataclass(frozen=True)
class Batch:
    """Prompts of a micro-batch and what belongs to each.

    embeds   [B, L, Ct]
    seed, step, samples  what every random number is keyed by; samples [B] are places in the whole optimiser step
    inputs   what a single-pass model takes besides the embeddings
    mixture  second prompts, if what lies between is trained
    shapes   of a library, if the model takes point clouds
    pooled   [B, Ct], if a background is made from them
    """

    prompts: list[str]
    embeds: Tensor
    seed: int
    step: int
    samples: Sequence[int]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    mixture: PromptInterpolation | None = None
    shapes: Shapes | None = None
    pooled: Tensor | None = None

    def draws(self, stream: int, *ks: int, places: tuple[int, ...] = ()) -> list[torch.Generator]:
        """Return a stream's generators, one per prompt; given ks, those of each of these estimates in turn.

        places  numbers of the renderer, and of the teacher, for a stream of an estimate that each has of its own
        """
        return generators(self.seed, self.step, self.samples, stream, *ks, places=places)


def generators(
    seed: int, step: int, samples: Sequence[int], stream: int, *ks: int, places: tuple[int, ...] = ()
) -> list[torch.Generator]:
    """Return the generators of some samples of an optimiser step; see `Batch.draws`."""
    keys: list[tuple[int, ...]] = [(k, *places) for k in ks] or [()]
    return [sample_generator(seed, step, i, stream, *key) for key in keys for i in samples]


@dataclass(frozen=True)
class Batches:
    """Draws the batches of a run, each number keyed by (seed, step, sample, stream).

    library  of shapes, None without; dummy  the point cloud [N, 3] that shapes are annealed to
    pools    whether batches hold the prompts' pooled embeddings
    """

    seed: int
    corpus: Corpus
    encoder: PromptEncoder
    device: torch.device
    library: ShapeLibrary | None = None
    dummy: Tensor | None = None
    pools: bool = False

    def draw(self, stage: Stage, step: int, samples: Sequence[int], first: int) -> Batch:
        """Draw the batch of some samples of an optimiser step; `first`: prompts drawn before that step."""

        def draws(stream: int) -> list[torch.Generator]:
            return generators(self.seed, step, samples, stream)

        prompts = [self.corpus.prompt(first + i, g) for i, g in zip(samples, draws(PROMPTS), strict=True)]
        embeds = self.encoder(prompts).to(self.device)
        pooled = self.encoder.pooled(prompts, embeds) if self.pools else None
        mixture = draw_mixture(stage.config.interpolation, self.corpus.prompts, draws(INTERPOLATION))
        if mixture is not None:
            others = self.encoder(mixture.prompts).to(embeds)
            share = mixture.share.to(embeds)
            embeds = torch.lerp(embeds, others, share.view(-1, 1, 1))
            if pooled is not None:
                pooled = torch.lerp(pooled, self.encoder.pooled(mixture.prompts, others), share.view(-1, 1))
        shapes, inputs = self.shapes(prompts, draws(CLOUDS)), {}
        if shapes is not None and self.dummy is not None:
            annealed = number(stage.at(step).library.annealing)
            inputs["points"] = anneal_cloud(shapes.clouds, self.dummy, annealed)
        return Batch(prompts, embeds, self.seed, step, samples, inputs, mixture, shapes, pooled)

    def shapes(self, prompts: Sequence[str], draws: Sequence[torch.Generator]) -> Shapes | None:
        """Return the library's shapes for prompts, with points on them; None without a library."""
        if self.library is None or self.dummy is None:
            return None
        meshes = [self.library.mesh(prompt) for prompt in prompts]
        clouds = [sample_points(mesh, len(self.dummy), g) for mesh, g in zip(meshes, draws, strict=True)]
        return Shapes(meshes, torch.stack(clouds).to(self.device))


def draw_mixture(
    config: InterpolationConfig, prompts: Sequence[str], draws: Sequence[torch.Generator]
) -> PromptInterpolation | None:
    """Draw a second prompt for each sample and its share, 0 for those that are not paired; None if none ever is."""
    if not config.probability:
        return None
    others, shares = [], []
    for generator in draws:
        paired = (
            float(torch.rand((), generator=generator, dtype=torch.float32, device=generator.device))
            < config.probability
        )
        others.append(prompts[int(torch.randint(len(prompts), (), generator=generator))])
        seed = int(torch.randint(2**62, (), generator=generator))
        shares.append(float(np.random.default_rng(seed).dirichlet([config.concentration] * 2)[1]) if paired else 0.0)
    return PromptInterpolation(others, torch.tensor(shares, dtype=torch.float32, device="cpu"), config.over)


def dummy_of(generator: Any) -> Tensor | None:
    """Return the dummy cloud of a model that takes point clouds, None of another."""
    return generator.dummy if getattr(generator, "takes_shapes", False) else None
