"""From renderings to the loss of one teacher: draw, encode, condition, and call `asd_loss`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from prd.distillation.asd import AsdConfig, AsdResult, NonFinitePrediction, asd_loss
from prd.distillation.draws import draw_normal, draw_uniform
from prd.distillation.fake_score import FakeReference
from prd.distillation.interpolation import PromptInterpolation, interpolated_loss
from prd.distillation.inversion import ddim_inversion
from prd.distillation.timesteps import last_timestep, sample_timesteps, shifted_timesteps
from prd.rendering.views import Views
from prd.teachers.base import Condition, Teacher, TeacherConfig, ViewConditioned
from prd.text.encoders import check_prompts
from prd.utils.checked_types import number

PROMPT = "{prompt}"  # in a reference_prompt: the prompt itself


def distill(
    teacher: Teacher,
    views: Views,
    prompts: Sequence[str],
    *,
    settings: TeacherConfig,
    config: AsdConfig,
    generator: torch.Generator | Sequence[torch.Generator],
    interpolation: PromptInterpolation | None = None,
    fake: FakeReference | None = None,
) -> AsdResult:
    """`asd_loss` of renderings of B prompts, differentiable in the views.

    settings, config  of the teacher and of the loss, every schedule a number (`prd.utils.checked_types.resolved`)
    generator         one for the batch, or one per prompt; then the draws of a prompt do not depend on the others
    interpolation     second prompts, interpolated with the first; over "losses" the last three draws are drawn twice
    fake              the reference of `reference="fake"`, which notes what it is asked about; without it the teacher is
                      asked with reference "shifted"

    A teacher of single images sees one random view per prompt; other teachers need exactly their `num_views`. Draws, in
    this order: view (if there is a choice), the encoder's noise, timestep, shift (if eta > 0), noise (if it is not an
    inversion). Timesteps without signal are not drawn. Raises as `asd_loss` does, NonFinitePrediction with the texts of
    the prompts; ValueError unless there is one prompt per shape and one generator per prompt, and for an interpolation
    that these settings do not have.
    """
    check_prompts(prompts)
    if interpolation is not None:
        check_interpolation(config, interpolation.over)
    if len(prompts) != views.cameras.batch:
        raise ValueError(f"prompts: {len(prompts)} given for renderings of {views.cameras.batch} shapes; one for each")
    draws = _Draws(generator, len(prompts), views.rgb.device)
    if teacher.num_views == 1 and views.cameras.views > 1:
        index = (draws.uniform() * views.cameras.views).long().clamp(max=views.cameras.views - 1)
        views = select_views(views, index[:, None])
    x = teacher.encode(views, noise=draws.normal(len(prompts) * teacher.num_views, *teacher.input_shape))

    if config.reference == "fake" and fake is None:
        config = replace(config, reference="shifted")
    reference: Condition | FakeReference | None = fake if config.reference == "fake" else None

    def loss(condition: Condition, other: tuple[Condition, Tensor] | None = None) -> AsdResult:
        if isinstance(reference, FakeReference):
            reference.observe(x, condition)
        return _drawn_loss(teacher, x, condition, settings, config, draws, other, reference)

    try:
        first = condition_views(teacher, prompts, views, settings.negative_prompt)
        if config.reference == "negative_prompt" and config.reference_prompt is not None:
            texts = [config.reference_prompt.replace(PROMPT, prompt) for prompt in prompts]
            reference = condition_views(teacher, texts, views, settings.negative_prompt)
        if interpolation is None:
            return loss(first)
        second = condition_views(teacher, interpolation.prompts, views, settings.negative_prompt)
        return interpolated_loss(interpolation, teacher.num_views, first, second, loss)
    except NonFinitePrediction as error:
        raise error.with_texts(prompts) from None


def check_interpolation(config: AsdConfig, over: str) -> None:
    """Raise ValueError if a loss with these settings cannot interpolate between prompts as `over` says."""
    if over == "guidance" and (config.reference == "fake" or config.noise == "inversion"):
        which = "reference=fake" if config.reference == "fake" else "noise=inversion"
        raise ValueError(f"over={over!r}: must be 'embeddings' or 'losses' with distillation.{which}")
    if PROMPT in (config.reference_prompt or ""):
        raise ValueError(
            f"reference_prompt={config.reference_prompt!r}: holds {PROMPT}, which of two prompts that are interpolated "
            "is not one; leave it out, or set interpolation.probability to 0"
        )


class _Draws:
    """Random numbers for a batch of `count` prompts on a device, from one generator or one per prompt."""

    def __init__(
        self, generator: torch.Generator | Sequence[torch.Generator], count: int, device: torch.device
    ) -> None:
        if not isinstance(generator, torch.Generator) and len(generator) != count:
            raise ValueError(f"generator: {len(generator)} given for {count} prompts; one for each, or one for all")
        self.generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
        self.count, self.device = count, device

    def uniform(self) -> Tensor:
        """Uniform in [0, 1), one per prompt."""
        return draw_uniform((self.count,), self.generators).to(self.device)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal of a shape whose first axis holds the prompts one after the other."""
        return draw_normal(shape, self.generators).to(self.device)


def _drawn_loss(
    teacher: Teacher,
    x: Tensor,
    condition: Condition,
    settings: TeacherConfig,
    config: AsdConfig,
    draws: _Draws,
    other: tuple[Condition, Tensor] | None,
    reference: Condition | FakeReference | None,
) -> AsdResult:
    """`asd_loss` with timestep, shift (if eta > 0) and noise drawn in this order, or the noise found by inversion."""
    t_min, last, t_plus = int(number(config.t_min)), last_timestep(teacher), None
    t = sample_timesteps(draws.uniform(), t_min, min(config.t_max, last + 1))
    if settings.eta > 0:
        t_plus = shifted_timesteps(t, draws.uniform(), settings.eta, t_min, last=last)
    if config.noise == "inversion":
        steps, scale = config.inversion_steps, config.inversion_guidance_scale
        images = t.repeat_interleave(teacher.num_views)
        noise = ddim_inversion(teacher, x, condition, images, steps=steps, guidance_scale=scale)
    else:
        noise = draws.normal(*x.shape)
    return asd_loss(
        teacher,
        x,
        condition,
        t=t,
        noise=noise,
        t_plus=t_plus,
        guidance_scale=number(settings.guidance_scale),
        config=config,
        reference=reference,
        other=other,
    )


def condition_views(teacher: Teacher, prompts: Sequence[str], views: Views, negative_prompt: str = "") -> Condition:
    """Condition of a teacher for the views of B prompts, with what a `ViewConditioned` teacher takes from them."""
    condition = teacher.condition(prompts, views.cameras, negative_prompt)
    return teacher.condition_on(condition, views) if isinstance(teacher, ViewConditioned) else condition


def view_tensors(views: Views) -> dict[str, Tensor]:
    """Tensors of a rendering by name (rgb, normal, ...), without its cameras."""
    return {field.name: getattr(views, field.name) for field in fields(views) if field.name != "cameras"}


def select_views(views: Views, indices: Tensor) -> Views:
    """Views indices [B, n] of a rendering, with their cameras."""
    rows = torch.arange(len(indices), dtype=torch.long, device=indices.device)[:, None]
    chosen = {name: tensor[rows, indices] for name, tensor in view_tensors(views).items()}
    return Views(**chosen, cameras=views.cameras.select(indices))


class AsdLoss:
    """Asynchronous score distillation as a `DistillationLoss`; it keeps nothing between calls.

    It takes one argument more than others: the `fake` score of the teacher, if the settings ask for one.
    """

    config_class: ClassVar[type[AsdConfig]] = AsdConfig

    @classmethod
    def from_config(cls, config: AsdConfig) -> AsdLoss:
        """Make the loss; its settings are given anew at every call."""
        return cls()

    def __call__(
        self,
        teacher: Teacher,
        views: Views,
        prompts: Sequence[str],
        *,
        settings: TeacherConfig,
        config: AsdConfig,
        generator: torch.Generator | Sequence[torch.Generator],
        interpolation: PromptInterpolation | None = None,
        fake: FakeReference | None = None,
    ) -> AsdResult:
        """See `distill`."""
        return distill(
            teacher,
            views,
            prompts,
            settings=settings,
            config=config,
            generator=generator,
            interpolation=interpolation,
            fake=fake,
        )
