"""The loss of an estimate in a stage: cameras, renderers, regularisers, teachers (Algorithm 1, lines 11 to 15)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prd.cameras import Cameras, CamerasConfig
from prd.data.batches import CAMERAS, FAKE, JITTER, SHADING, TEACHERS, Batch
from prd.data.shape_library import Shapes
from prd.distillation.draws import draw_uniform
from prd.distillation.multi_teacher import MeanMetrics, WeightedTeacher, multi_teacher_loss
from prd.distillation.regularizers import RegularizerConfig, regularize
from prd.errors import ConfigError, PrdError
from prd.fields.fast import some_samples
from prd.fields.protocol import Field
from prd.rendering.background import TextBackground
from prd.rendering.protocol import Rendered, Renderer, SampleDraws, SharedGrids, at_step, image_size
from prd.rendering.shading import shade_at_random
from prd.rendering.views import Views
from prd.teachers.base import TeacherConfig
from prd.teachers.multiview import own_cameras
from prd.training.config import Stage, TrainConfig
from prd.training.diagnostics import NonFiniteDiagnostics
from prd.training.fake_scores import FakeScores, fake_config
from prd.training.parts import Parts
from prd.utils.checked_types import number
from prd.utils.progress import at

COLLAPSED_OPACITY = 0.02  # mean over the pixels: below, the object has vanished
COLLAPSE_WATCH = 60  # steps at the start in which it happens, if it does


class CollapseError(PrdError, RuntimeError):
    """The object vanished from the volume renderings; NeuS gives it no gradient to come back by."""


@dataclass(frozen=True)
class Shot:
    """Cameras and the teachers that are shown what these see.

    place    0 of the run's cameras, then 1, 2, ... of those that teachers have of their own
    cameras  of their own; None: the run's
    """

    place: int
    cameras: CamerasConfig | None
    teachers: tuple[str, ...]


@dataclass(frozen=True)
class Estimates:
    """Some of the K estimates of a batch, seen by the same renderers from the same cameras at one optimiser step.

    config   the stage's, every schedule a number
    ks       the estimates; a field or a rendering holds the prompts of ks[0], then those of ks[1], ...
    cameras  [len(ks) * B, V]
    """

    config: TrainConfig
    step: int
    batch: Batch
    ks: Sequence[int]
    shot: Shot
    cameras: Cameras
    metrics: MeanMetrics

    def draws(self, stream: int, *places: int) -> list[torch.Generator]:
        """The generators of a stream, one per sample; see `Batch.draws`. Other cameras have others."""
        return self.batch.draws(stream, *self.ks, places=(*places, *([self.shot.place] if self.shot.place else ())))


class Objective:
    """The loss of a stage's fields: renders each from fresh cameras and asks the teachers.

    configured  dotted keys of the parts that any stage's config names ("teachers.mvdream"); a part that none names is
                the user's own and takes part in every stage
    background  made from the text, trained along; None: the stage's grey level
    fakes       fake scores of the teachers, for a loss that asks for them
    """

    def __init__(
        self,
        stage: Stage,
        parts: Parts,
        device: torch.device,
        *,
        configured: Iterable[str] = (),
        background: TextBackground | None = None,
        fakes: FakeScores | None = None,
    ) -> None:
        self.fakes = None if fake_config(stage.config) is None else fakes
        self.stage, self.parts, self.device, self.background = stage, parts, device, background
        self.configured = frozenset(configured)
        self.renderer_names = tuple(self._names("renderers", parts.renderers))
        self.shots = self._shots()
        chosen = stage.config.renderer_schedule
        if isinstance(chosen, tuple) and (unknown := [name for name in chosen if name not in parts.renderers]):
            raise ConfigError(f"renderer_schedule={unknown[0]!r}: the renderers are {', '.join(parts.renderers)}")

    def _names(self, section: str, parts: Mapping[str, Any]) -> list[str]:
        """The parts of a section that this stage has: those of its config, and the user's own."""
        named = getattr(self.stage.config, section)
        return [name for name in parts if name in named or f"{section}.{name}" not in self.configured]

    def _shots(self) -> list[Shot]:
        """The cameras of the stage: the run's, unless nothing is shown what they see, and those of teachers' own."""
        shown: dict[CamerasConfig | None, list[str]] = {None: []}
        for name in self._names("teachers", self.parts.teachers):
            if self.stage.config.teachers.get(name, TeacherConfig()).enabled:
                shown.setdefault(own_cameras(self.parts.teachers[name]), []).append(name)
        shots = [Shot(place, cameras, tuple(names)) for place, (cameras, names) in enumerate(shown.items())]
        return shots[1:] if not shots[0].teachers and shots[1:] and self.parts.library is None else shots

    @property
    def views(self) -> int:
        """Views of a prompt that each renderer draws of an estimate."""
        return sum((shot.cameras or self.stage.config.cameras).views for shot in self.shots)

    def renderers_of(self, step: int, k: int) -> tuple[str, ...]:
        """The renderers of estimate k at an optimiser step: all, or in turn, beginning with the next one every step."""
        names, schedule = self.renderer_names, self.stage.config.renderer_schedule
        if isinstance(schedule, tuple):
            return schedule
        return names if schedule == "all" else (names[(step + k) % len(names)],)

    def __call__(
        self,
        batch: Batch,
        ks: range,
        field: Field,
        step: int,
        metrics: MeanMetrics,
        diagnostics: NonFiniteDiagnostics,
    ) -> Tensor:
        """The loss of the estimates ks at an optimiser step of the run: the sum over them of a mean over prompts.

        field  the prompts of ks[0], then those of ks[1], ...
        """
        size, config = len(batch.prompts), self.stage.at(step)
        together: dict[tuple[str, ...], list[int]] = {}  # the estimates by their renderers
        for k in ks:
            together.setdefault(self.renderers_of(step, k), []).append(k)
        with torch.autocast(self.device.type, enabled=False):  # geometry and losses are float32
            loss = torch.zeros((), dtype=torch.float32, device=self.device)
            for names, alike in together.items():
                rows = [(k - ks.start) * size + i for k in alike for i in range(size)]
                shown = []
                for shot in self.shots:  # line 11
                    drawn, place = shot.cameras or config.cameras, (shot.place,) if shot.place else ()
                    generators = batch.draws(CAMERAS, *alike, places=place)
                    cameras = drawn.sample(draw_uniform((len(rows), drawn.num_draws), generators)).to(self.device)
                    shown.append(Estimates(config, step, batch, alike, shot, cameras, metrics))
                for k, own in zip(alike, shown[0].cameras.chunk(len(alike)), strict=True):
                    diagnostics.ask(k, batch.prompts, own)
                loss = loss + self.estimates_loss(shown, names, some_samples(field, rows, len(ks) * size))
            diagnostics.answer(loss)
            return loss

    def estimates_loss(self, shown: Sequence[Estimates], names: Sequence[str], field: Field) -> Tensor:
        """The loss of some estimates as each of the renderers `names` shows them, summed over the estimates.

        shown  the estimates from each of the stage's cameras; regularisers are of the first alone
        """
        first, device = shown[0], self.device
        config, count = first.config, len(first.ks)
        alpha, pooled = self.parts.model.alpha(), first.batch.pooled
        text = None if pooled is None else pooled.repeat(count, 1)
        renderers = {name: self.renderer_at(name, first, alpha) for name in self.renderer_names}
        grids = SharedGrids(field, renderers.values(), first.cameras.batch, device)
        loss = torch.zeros((), dtype=torch.float32, device=device)
        for place, name in enumerate(names):  # lines 12-14
            at(doing=f"renderer {name}")
            renderer = renderers[name]
            size = image_size(renderer)
            for estimates in shown:
                background = self.backdrop(config, estimates.cameras, size, text)
                draws = SampleDraws(estimates.draws(JITTER))
                rendered = renderer.render(grids.field_for(renderer), estimates.cameras, size, background, draws)
                shading = SampleDraws(estimates.draws(SHADING))
                views = shade_at_random(rendered.views, config.shading, background, shading)
                if estimates is first:
                    loss = loss + count * self.regularization(estimates, rendered)
                loss = loss + self.views_loss(estimates, name, views, place)  # line 15
        return loss

    def renderer_at(self, name: str, estimates: Estimates, alpha: Any) -> Renderer:
        """A renderer with the numbers of this step."""
        renderer, settings = self.parts.renderers[name], estimates.config.renderers.get(name)
        if settings is not None:
            return renderer.with_config(settings, alpha)
        return at_step(renderer, estimates.step - self.stage.first, self.stage.config.total_steps, alpha)

    def backdrop(
        self, config: TrainConfig, cameras: Cameras, size: tuple[int, int], pooled: Tensor | None
    ) -> float | Tensor:
        """Return the background of training renders: a grey level, or [B, V, height, width, 3] made from the text.

        pooled [B, C]: the prompts' pooled embeddings.
        """
        if self.background is None or pooled is None:
            return config.background
        return self.background.image(cameras, *size, pooled.float())

    def regularization(self, estimates: Estimates, rendered: Rendered) -> Tensor:
        """The weighted regularisers of a render; CollapseError if the object vanishes at the start."""
        metrics, count = estimates.metrics, estimates.cameras.batch
        for name, value in rendered.stats.items():
            metrics.add(name, value.mean(), count)
        sampled = rendered.samples is not None and "opacity" in rendered.stats  # of a volume, which can vanish
        opacity = float(rendered.stats["opacity"].mean()) if sampled else 1.0
        if estimates.step < COLLAPSE_WATCH and opacity < COLLAPSED_OPACITY:
            raise CollapseError(
                f"step {estimates.step}: mean opacity {opacity:.3f}: the object has vanished; lower optimizer.lr or "
                "renderers.volume.rgb_weight_gradient_scale, or raise the weight of the normal teacher"
            )
        settings = estimates.config.regularizers
        chosen = {
            name: (self.parts.regularizers[name], number(settings.get(name, RegularizerConfig()).weight))
            for name in self._names("regularizers", self.parts.regularizers)
        }
        loss, values = regularize(rendered, chosen)
        for name, value in values.items():
            metrics.add(name, value, count)
        return loss

    def views_loss(self, estimates: Estimates, name: str, views: Views, place: int) -> Tensor:
        """The loss of the teachers and of the library at the views of some estimates, summed over these.

        place  of the renderer among those that the same estimates are seen by: each has the teachers' draws of its own
        """
        config, batch, count = estimates.config, estimates.batch, len(estimates.ks)
        alpha = number(config.library.alpha)
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        teachers = self.teachers(estimates, name)
        if teachers:
            judged = multi_teacher_loss(
                views,
                teachers,
                batch.prompts * count,
                config=config.distillation,
                generator=estimates.draws(TEACHERS, *((place,) if place or estimates.shot.place else ())),
                metrics=estimates.metrics,
                renderer=name,
                num_estimates=count,
                interpolation=None if batch.mixture is None else batch.mixture.repeat(count),
                loss=self.parts.loss,
            )
            loss = loss + (1 - alpha) * judged
        if batch.shapes is not None and estimates.shot.cameras is None:
            weights = alpha * config.library.mask_weight, number(config.library.reconstruction)
            loss = loss + count * shapes_loss(views, batch.shapes.repeat(count), *weights, estimates.metrics)
        return loss

    def teachers(self, estimates: Estimates, renderer: str) -> list[WeightedTeacher]:
        """The teachers that are shown these estimates, with their settings at this step and their fake scores."""
        parts, given = self.parts.teachers, estimates.config.teachers
        found = []
        for name in estimates.shot.teachers:
            fake = None
            if self.fakes is not None:
                places = list(self.parts.renderers).index(renderer), list(parts).index(name)
                fake = self.fakes.reference(name, estimates.draws(FAKE, *places))
            found.append(WeightedTeacher(parts[name], given.get(name, TeacherConfig()), fake))
        return found


def shapes_loss(views: Views, shapes: Shapes, mask: float, reconstruction: float, metrics: MeanMetrics) -> Tensor:
    """The loss against a library's shapes, seen from the same cameras: LATTE3D's mask loss and its pretraining.

    mask            weight of the mean squared difference of the opacity
    reconstruction  weight of that of opacity, normals and disparity
    """
    if not mask + reconstruction:
        return views.opacity.new_zeros(())
    exact = shapes.views(views.cameras, *views.opacity.shape[2:4])
    silhouette = F.mse_loss(views.opacity, exact.opacity)
    metrics.add("mask_loss", silhouette.detach())
    loss = (mask + reconstruction) * silhouette
    if reconstruction:
        loss = loss + reconstruction * F.mse_loss(views.normal, exact.normal)
        loss = loss + reconstruction * F.mse_loss(views.disparity, exact.disparity)
    return loss
