"""How an estimate is judged in a stage: cameras, renderers, regularisers, teachers (Algorithm 1, lines 11 to 15)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prd.cameras import Cameras
from prd.data.batches import CAMERAS, JITTER, SHADING, TEACHERS, Batch
from prd.data.shape_library import Shapes
from prd.distillation.draws import draw_uniform
from prd.distillation.multi_teacher import MeanMetrics, WeightedTeacher, multi_teacher_loss
from prd.distillation.regularizers import eikonal_loss, sparsity_loss
from prd.fields.grid import GridField
from prd.fields.protocol import Field, some_samples
from prd.rendering.alpha import AlphaModel
from prd.rendering.background import TextBackground
from prd.rendering.shading import shade_views
from prd.rendering.views import Views
from prd.rendering.volume import GradientSamples
from prd.teachers.base import Teacher
from prd.training.build import build_surface_renderer, build_volume_renderer
from prd.training.config import Stage, TrainConfig
from prd.training.diagnostics import NonFiniteDiagnostics
from prd.utils.checked_types import number

COLLAPSED_OPACITY = 0.02  # mean over the pixels: below, the object has vanished
COLLAPSE_WATCH = 60  # steps at the start in which it happens, if it does


class CollapseError(RuntimeError):
    """The object vanished from the volume renderings; NeuS gives it no gradient to come back by."""


class Objective:
    """The loss of a stage's fields: renders each from fresh cameras and asks the teachers.

    teachers    by name, each asked where the stage enables it
    alpha       how the volume renderer reads the model's fields; called at every render, None: NeuS
    background  made from the text, trained along; None: the stage's grey level
    """

    def __init__(
        self,
        stage: Stage,
        teachers: Mapping[str, Teacher],
        device: torch.device,
        *,
        alpha: Any = None,
        background: TextBackground | None = None,
    ) -> None:
        self.stage, self.teachers, self.device = stage, teachers, device
        self.alpha, self.background = alpha, background

    def __call__(
        self, batch: Batch, ks: range, field: Field, step: int, log: MeanMetrics, diagnostics: NonFiniteDiagnostics
    ) -> Tensor:
        """The loss of the estimates ks at an optimiser step of the run: the sum over them of a mean over prompts.

        field  the prompts of ks[0], then those of ks[1], ...
        """
        size, config = len(batch.prompts), self.stage.at(step)
        with torch.autocast(self.device.type, enabled=False):  # geometry and losses are float32
            loss = torch.zeros((), device=self.device)
            for names, alike in by_renderers(config, step, ks).items():
                rows = [(k - ks.start) * size + i for k in alike for i in range(size)]
                uniforms = draw_uniform((len(rows), config.cameras.num_draws), batch.draws(CAMERAS, *alike))
                cameras = config.cameras.sample(uniforms).to(self.device)
                for k, own in zip(alike, cameras.chunk(len(alike)), strict=True):
                    diagnostics.ask(k, batch.prompts, own)
                part = some_samples(field, rows, len(ks) * size)
                shown = Shown(config, step, batch, alike, cameras, log)
                for name, views, regularizer in self.render(shown, names, part):
                    judged = self.judge(shown, name, views)
                    loss = loss + len(alike) * regularizer + judged
            diagnostics.answer(loss)
            return loss

    def judge(self, shown: Shown, name: str, views: Views) -> Tensor:
        """What teachers and the library say of the views of some estimates, summed over these."""
        config, batch, count = shown.config, shown.batch, len(shown.ks)
        alpha = number(config.library.alpha)
        loss = torch.zeros((), device=self.device)
        judges = self.judges(config)
        if judges:
            mixture = None if batch.mixture is None else batch.mixture.repeat(count)
            draws = batch.draws(TEACHERS, *shown.ks)
            judged = multi_teacher_loss(
                views,
                judges,
                batch.prompts * count,
                config=config.distillation,
                generator=draws,
                metrics=shown.log,
                renderer=name,
                num_estimates=count,
                interpolation=mixture,
            )
            loss = loss + (1 - alpha) * judged
        if batch.shapes is not None:
            weights = alpha * config.library.mask_weight, number(config.library.reconstruction)
            loss = loss + count * follow_shapes(views, batch.shapes.repeat(count), *weights, shown.log)
        return loss

    def judges(self, config: TrainConfig) -> list[WeightedTeacher]:
        """The teachers that are enabled, as they are asked at this step."""
        return [WeightedTeacher(self.teachers[name], settings) for name, settings in config.enabled_teachers.items()]

    def render(self, shown: Shown, names: Sequence[str], field: Field) -> Iterator[tuple[str, Views, Tensor]]:
        """(renderer, its views, the regularisers it carries) of some estimates, by each of `names`."""
        config, cameras, batch, count = shown.config, shown.cameras, shown.batch, shown.cameras.batch
        embeds = batch.embeds.repeat(len(shown.ks), 1, 1)
        resolution = config.renderers["volume"].grid_resolution if "volume" in config.renderers else None
        grid = GridField(field, resolution, count, self.device) if resolution else field
        for name in names:
            size = config.renderers[name]
            background = self.backdrop(config, cameras, size.height, size.width, embeds)
            if name == "volume":
                alpha: AlphaModel | None = None if self.alpha is None else self.alpha()
                renderer = build_volume_renderer(size, alpha)
                shape = (count, renderer.passes, cameras.views, size.height, size.width)
                views, gradient = renderer.render_with_samples(
                    grid,
                    cameras,
                    height=size.height,
                    width=size.width,
                    background=background,
                    jitter=draw_uniform(shape, batch.draws(JITTER, *shown.ks)).transpose(0, 1),
                )
                regularizer = self.regularizer(shown, views, gradient)
            else:
                views, stats = build_surface_renderer(size).render_with_stats(
                    grid if resolution == size.grid_resolution else field,
                    cameras,
                    height=size.height,
                    width=size.width,
                    background=background,
                )
                shown.log.add("surfaces_corrected", stats.corrected.float().mean(), count)  # the rate of empty ones
                regularizer = torch.zeros((), device=self.device)
            yield name, self.shade(config, views, background, batch.draws(SHADING, *shown.ks)), regularizer

    def shade(
        self, config: TrainConfig, views: Views, background: float | Tensor, draws: Sequence[torch.Generator]
    ) -> Views:
        """The views under a random point light near the camera, for the share of prompts that the config says."""
        shading = config.shading
        if not shading.textureless + shading.diffuse:
            return views
        drawn = draw_uniform((len(draws), 6), draws).to(self.device)
        kind, low_high = drawn[:, 0], shading.ambient
        near, far = shading.light_distance
        position = views.cameras.position
        distance = position.norm(dim=-1, keepdim=True) * (near + (far - near) * drawn[:, None, 1:2])
        towards = position / position.norm(dim=-1, keepdim=True) + (drawn[:, None, 2:5] * 2 - 1)
        return shade_views(
            views,
            towards / towards.norm(dim=-1, keepdim=True).clamp(min=1e-6) * distance,
            low_high[0] + (low_high[1] - low_high[0]) * drawn[:, 5],
            background,
            textureless=kind < shading.textureless,
            diffuse=(kind >= shading.textureless) & (kind < shading.textureless + shading.diffuse),
        )

    def backdrop(
        self, config: TrainConfig, cameras: Cameras, height: int, width: int, embeds: Tensor
    ) -> float | Tensor:
        """What training renders are composited over: a grey level, or [B, V, height, width, 3] made from the text.

        embeds [B, L, C]: the mean over its tokens stands for a prompt.
        """
        if self.background is None:
            return config.background
        return self.background.image(cameras, height, width, embeds.float().mean(dim=1))

    def regularizer(self, shown: Shown, views: Views, gradient: GradientSamples) -> Tensor:
        """Eikonal and sparsity losses of a volume render; CollapseError if the object vanishes at the start."""
        weights, step, log = shown.config.regularizers, shown.step, shown.log
        eikonal, sparsity = eikonal_loss(gradient), sparsity_loss(views.opacity)
        opacity = float(views.opacity.detach().mean())
        log.add("opacity", opacity, views.cameras.batch)
        log.add("eikonal", eikonal.detach(), views.cameras.batch)
        if step < COLLAPSE_WATCH and opacity < COLLAPSED_OPACITY:
            raise CollapseError(
                f"step {step}: mean opacity {opacity:.3f}: the object has vanished; lower optimizer.lr or "
                "renderers.volume.rgb_weight_gradient_scale, or raise the weight of the normal teacher"
            )
        return number(weights["eikonal"].weight) * eikonal + number(weights["sparsity"].weight) * sparsity


@dataclass(frozen=True)
class Shown:
    """Some estimates of a batch, with what they are seen by: the config's numbers at a step, cameras [len(ks) * B]."""

    config: TrainConfig
    step: int
    batch: Batch
    ks: Sequence[int]
    cameras: Cameras
    log: MeanMetrics


def follow_shapes(views: Views, shapes: Shapes, mask: float, reconstruction: float, log: MeanMetrics) -> Tensor:
    """The loss against a library's shapes, seen from the same cameras: LATTE3D's mask loss and its pretraining.

    mask            weight of the mean squared difference of the opacity
    reconstruction  weight of that of opacity, normals and disparity
    """
    if not mask + reconstruction:
        return views.opacity.new_zeros(())
    exact = shapes.views(views.cameras, *views.opacity.shape[2:4])
    silhouette = F.mse_loss(views.opacity, exact.opacity)
    log.add("mask_loss", silhouette.detach())
    loss = (mask + reconstruction) * silhouette
    if reconstruction:
        loss = loss + reconstruction * F.mse_loss(views.normal, exact.normal)
        loss = loss + reconstruction * F.mse_loss(views.disparity, exact.disparity)
    return loss


def by_renderers(config: TrainConfig, step: int, ks: Sequence[int]) -> dict[tuple[str, ...], list[int]]:
    """The estimates ks by the renderers they meet, which are drawn and judged together."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for k in ks:
        alike.setdefault(config.renderers_of(step, k), []).append(k)
    return alike
