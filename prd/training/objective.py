"""How an estimate is judged in a stage: cameras, renderers, regularisers, teachers (Algorithm 1, lines 11 to 15)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
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
from prd.training.build import (
    at,
    build_surface_renderer,
    build_volume_renderer,
    camera_sampling,
    span,
)
from prd.training.config import Stage, TrainConfig
from prd.training.diagnostics import NonFiniteDiagnostics
from prd.training.sections import TeacherConfig
from prd.utils.checked_types import resolved

COLLAPSED_OPACITY = 0.02  # mean over the pixels: below, the object has vanished
COLLAPSE_WATCH = 60  # steps at the start in which it happens, if it does


class CollapseError(RuntimeError):
    """The object vanished from the volume renderings; NeuS gives it no gradient to come back by."""


class Supervision:
    """Judges the fields of a stage: renders each from fresh cameras and asks the teachers.

    run         the config of the run, which `teachers` were loaded by
    alpha       how the volume renderer reads the generator's fields; called at every render, None: NeuS
    background  made from the text, trained along; None: the stage's grey level
    """

    def __init__(
        self,
        stage: Stage,
        run: TrainConfig,
        teachers: Sequence[tuple[Teacher, TeacherConfig]],
        device: torch.device,
        *,
        alpha: Any = None,
        background: TextBackground | None = None,
    ) -> None:
        self.stage, self.config, self.run, self.teachers, self.device = stage, stage.config, run, teachers, device
        self.alpha, self.background = alpha, background
        self.cameras = camera_sampling(stage.config)

    @torch.no_grad()
    def judges(self, step: int) -> list[WeightedTeacher]:
        """The teachers of this stage, as they are asked at a step of it."""
        found = []
        for teacher, settings in self.teachers:
            own = settings_in(self.config, self.run, settings)
            if own.enabled:
                found.append(WeightedTeacher(teacher, resolved(own, step, span(self.config))))
        return found

    def __call__(
        self, batch: Batch, ks: range, field: Field, step: int, log: MeanMetrics, witness: NonFiniteDiagnostics
    ) -> Tensor:
        """The loss of the estimates ks at an optimiser step of the run: the sum over them of a mean over prompts.

        field  the prompts of ks[0], then those of ks[1], ...
        """
        size, local = len(batch.prompts), step - self.stage.first
        judges = self.judges(local)
        with torch.autocast(self.device.type, enabled=False):  # geometry and losses are float32
            loss = torch.zeros((), device=self.device)
            for names, alike in by_renderers(self.config, step, ks).items():
                count = len(alike)
                rows = [(k - ks.start) * size + i for k in alike for i in range(size)]
                uniforms = draw_uniform((len(rows), self.cameras.num_draws), batch.draws(CAMERAS, *alike))
                cameras = self.cameras.sample(uniforms).to(self.device)
                for k, own in zip(alike, cameras.chunk(count), strict=True):
                    witness.ask(k, batch.prompts, own)
                part = some_samples(field, rows, len(ks) * size)
                for name, views, regularizer in self.render(step, names, part, cameras, batch, alike, log):
                    judged = self.judge(views, judges, batch, alike, local, log, name)
                    loss = loss + count * regularizer + judged
            witness.answer(loss)
            return loss

    def judge(
        self,
        views: Views,
        judges: Sequence[WeightedTeacher],
        batch: Batch,
        alike: Sequence[int],
        local: int,
        log: MeanMetrics,
        name: str,
    ) -> Tensor:
        """What teachers and the library say of the views of some estimates, summed over these."""
        library, count = self.config.library, len(alike)
        alpha = at(library.alpha, self.config, local)
        loss = torch.zeros((), device=self.device)
        if judges:
            mixture = None if batch.mixture is None else batch.mixture.repeat(count)
            draws = batch.draws(TEACHERS, *alike)
            judged = multi_teacher_loss(
                views,
                judges,
                batch.prompts * count,
                config=resolved(self.config.distillation, local, span(self.config)),
                generator=draws,
                metrics=log,
                renderer=name,
                num_estimates=count,
                interpolation=mixture,
            )
            loss = loss + (1 - alpha) * judged
        if batch.shapes is not None:
            weights = alpha * library.mask_weight, at(library.reconstruction, self.config, local)
            loss = loss + count * follow_shapes(views, batch.shapes.repeat(count), *weights, log)
        return loss

    def render(
        self,
        step: int,
        names: Sequence[str],
        field: Field,
        cameras: Cameras,
        batch: Batch,
        alike: Sequence[int],
        log: MeanMetrics,
    ) -> Iterator[tuple[str, Views, Tensor]]:
        """(renderer, its views, the regularisers it carries) of some estimates, by each of `names`."""
        config, local, count = self.config, step - self.stage.first, cameras.batch
        embeds = batch.embeds.repeat(len(alike), 1, 1)
        resolution = config.volume.grid_resolution
        grid = GridField(field, resolution, count, self.device) if resolution else field
        for name in names:
            size = config.volume if name == "volume" else config.surface
            background = self.backdrop(cameras, size.height, size.width, embeds)
            if name == "volume":
                alpha: AlphaModel | None = None if self.alpha is None else self.alpha()
                renderer = build_volume_renderer(config, local, alpha)
                shape = (count, renderer.passes, cameras.views, size.height, size.width)
                views, gradient = renderer.render_with_samples(
                    grid,
                    cameras,
                    height=size.height,
                    width=size.width,
                    background=background,
                    jitter=draw_uniform(shape, batch.draws(JITTER, *alike)).transpose(0, 1),
                )
                regularizer = self.regularizer(step, views, gradient, log)
            else:
                views, stats = build_surface_renderer(config, local).render_with_stats(
                    grid if resolution == config.surface.grid_resolution else field,
                    cameras,
                    height=size.height,
                    width=size.width,
                    background=background,
                )
                log.add("surfaces_corrected", stats.corrected.float().mean(), count)  # the rate of empty ones
                regularizer = torch.zeros((), device=self.device)
            yield name, self.shade(views, background, batch.draws(SHADING, *alike)), regularizer

    def shade(self, views: Views, background: float | Tensor, draws: Sequence[torch.Generator]) -> Views:
        """The views under a random point light near the camera, for the share of prompts that the config says."""
        shading = self.config.shading
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

    def backdrop(self, cameras: Cameras, height: int, width: int, embeds: Tensor) -> float | Tensor:
        """What training renders are composited over: a grey level, or [B, V, height, width, 3] made from the text.

        embeds [B, L, C]: a prompt is told by the mean over its tokens.
        """
        if self.background is None:
            return self.config.background
        return self.background.image(cameras, height, width, embeds.float().mean(dim=1))

    def regularizer(self, step: int, views: Views, gradient: GradientSamples, log: MeanMetrics) -> Tensor:
        """Eikonal and sparsity losses of a volume render; CollapseError if the object vanishes at the start."""
        weights, local = self.config.regularizers, step - self.stage.first
        eikonal, sparsity = eikonal_loss(gradient), sparsity_loss(views.opacity)
        opacity = float(views.opacity.detach().mean())
        log.add("opacity", opacity, views.cameras.batch)
        log.add("eikonal", eikonal.detach(), views.cameras.batch)
        if step < COLLAPSE_WATCH and opacity < COLLAPSED_OPACITY:
            raise CollapseError(
                f"step {step}: mean opacity {opacity:.3f}: the object has vanished; lower optimizer.lr or "
                "volume.rgb_weight_gradient_scale, or raise the weight of the normal teacher"
            )
        return at(weights.eikonal, self.config, local) * eikonal + at(weights.sparsity, self.config, local) * sparsity


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


def settings_in(stage: TrainConfig, run: TrainConfig, settings: TeacherConfig) -> TeacherConfig:
    """A teacher's settings in a stage, of which `settings` are those of the run; one of one's own has no others."""
    for section in fields(run.teachers):
        if getattr(run.teachers, section.name) is settings:
            return getattr(stage.teachers, section.name)
    return settings


def by_renderers(config: TrainConfig, step: int, ks: Sequence[int]) -> dict[tuple[str, ...], list[int]]:
    """The estimates ks by the renderers they meet, which are drawn and judged together."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for k in ks:
        alike.setdefault(renderers_of(config, step, k), []).append(k)
    return alike


def renderers_of(config: TrainConfig, step: int, k: int) -> tuple[str, ...]:
    """The renderers of estimate k: both, or by turns, starting with another one every step."""
    if config.renderers == "both":
        return ("volume", "surface")
    if config.renderers == "alternate":
        return ("volume",) if (step + k) % 2 == 0 else ("surface",)
    return (config.renderers,)
