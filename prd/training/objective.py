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
from prd.distillation.progressive import JudgeLog, WeightedTeacher, judge_views
from prd.distillation.regularizers import REGULARIZERS, regularize
from prd.fields.fast import some_samples
from prd.fields.protocol import Field
from prd.rendering.alpha import AlphaModel
from prd.rendering.background import TextBackground
from prd.rendering.protocol import Rendered, SampleDraws, SharedGrids, at_step, image_size
from prd.rendering.shading import shade_at_random
from prd.rendering.views import Views
from prd.teachers.base import Teacher
from prd.training.build import at, build_renderers, camera_sampling, guidance_at
from prd.training.config import Stage, TrainConfig
from prd.training.diagnostics import NonFiniteDiagnostics
from prd.training.sections import TeacherConfig
from prd.utils.checked_types import number, resolved

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
        self.renderers = build_renderers(stage.config)

    @torch.no_grad()
    def judges(self, step: int) -> list[WeightedTeacher]:
        """The teachers of this stage, as they are asked at a step of it."""
        found = []
        for teacher, settings in self.teachers:
            own = settings_in(self.config, self.run, settings)
            if own.enabled:
                found.append(WeightedTeacher(teacher, own.weight, guidance_at(self.config, own, step)))
        return found

    def __call__(
        self, batch: Batch, ks: range, field: Field, step: int, log: JudgeLog, witness: NonFiniteDiagnostics
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
        log: JudgeLog,
        name: str,
    ) -> Tensor:
        """What teachers and the library say of the views of some estimates, summed over these."""
        library, count = self.config.library, len(alike)
        alpha = at(library.alpha, self.config, local)
        loss = torch.zeros((), device=self.device)
        if judges:
            mixture = None if batch.mixture is None else batch.mixture.repeat(count)
            draws = batch.draws(TEACHERS, *alike)
            judged = judge_views(views, judges, batch.prompts * count, draws, log, name, count, mixture=mixture)
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
        log: JudgeLog,
    ) -> Iterator[tuple[str, Views, Tensor]]:
        """(renderer, its views, the regularisers it carries) of some estimates, by each of `names`."""
        config, local, count = self.config, step - self.stage.first, cameras.batch
        embeds, total = batch.embeds.repeat(len(alike), 1, 1), config.schedule_steps or config.max_train_steps
        grids = SharedGrids(field, self.renderers.values(), count, self.device)
        alpha: AlphaModel | None = None if self.alpha is None else self.alpha()
        for name in names:
            renderer = at_step(self.renderers[name], local, total, alpha)
            size = image_size(renderer)
            background = self.backdrop(cameras, *size, embeds)
            draws = SampleDraws(batch.draws(JITTER, *alike))
            rendered = renderer.render(grids.field_for(renderer), cameras, size, background, draws)
            for called, value in rendered.stats.items():
                log.add(called, value.mean(), count)
            shaded = shade_at_random(
                rendered.views, config.shading, background, SampleDraws(batch.draws(SHADING, *alike))
            )
            yield name, shaded, self.regularizer(step, rendered, log)

    def backdrop(self, cameras: Cameras, height: int, width: int, embeds: Tensor) -> float | Tensor:
        """What training renders are composited over: a grey level, or [B, V, height, width, 3] made from the text.

        embeds [B, L, C]: a prompt is told by the mean over its tokens.
        """
        if self.background is None:
            return self.config.background
        return self.background.image(cameras, height, width, embeds.float().mean(dim=1))

    def regularizer(self, step: int, rendered: Rendered, log: JudgeLog) -> Tensor:
        """The weighted regularisers of a render; CollapseError if the object vanishes at the start."""
        if "opacity" in rendered.stats and step < COLLAPSE_WATCH:
            opacity = float(rendered.stats["opacity"])
            if opacity < COLLAPSED_OPACITY:
                raise CollapseError(
                    f"step {step}: mean opacity {opacity:.3f}: the object has vanished; lower optimizer.lr or "
                    "volume.rgb_weight_gradient_scale, or raise the weight of the normal teacher"
                )
        weights, local = self.config.regularizers, step - self.stage.first
        total = self.config.schedule_steps or self.config.max_train_steps
        now = resolved(weights, local, total)
        chosen = {name: (REGULARIZERS[name], number(getattr(now, name))) for name in ("eikonal", "sparsity")}
        loss, values = regularize(rendered, chosen)
        for name, value in values.items():
            log.add(name, value, rendered.views.cameras.batch)
        return loss


def follow_shapes(views: Views, shapes: Shapes, mask: float, reconstruction: float, log: JudgeLog) -> Tensor:
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
