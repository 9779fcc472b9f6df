"""Asynchronous score distillation for every teacher (PRD, supplement B, Eq. 1-2; ScaleDreamer, 2407.02040).

`asd_loss` is pure: every random draw is an argument. `prd.distillation.distill` draws for it. Score distillation losses
of other names are settings of the same expression (docs/teachers.md has them all with their papers):

    ASD         reference="shifted", t_plus > t
    CSD         reference="shifted", t_plus=None: (s - 1)(eps(text) - eps(negative)), the direction of guidance alone
    SDS         reference="noise"; with x0_from="noisy" the second estimate is x itself, (x - x0_cfg) / (mean|.| + d)
    SDI         the same, noise="inversion": not drawn, but what the teacher sees in x
    SDS-Bridge  reference="negative_prompt": the prediction for a text that describes what the renderings look like
    VSD, DMD    reference="fake": the argument `reference`, a model of the renderings, or its prediction
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple, Protocol

import pydantic
import torch
from pydantic import Field, model_validator
from torch import Tensor

from prd.distillation.fake_score import FakeScoreConfig
from prd.distillation.timesteps import NO_SIGNAL, last_timestep
from prd.errors import PrdError
from prd.teachers.base import Condition, Teacher
from prd.utils.checked_types import CHECKS, MOVES, Count, Float, Int, Positive, Text

Weighting = Literal["dmd", "uniform", "sds", "sqrt"]
Reference = Literal["shifted", "noise", "negative_prompt", "fake"]
Timestep = Annotated[Float, Field(ge=1, le=999)]


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=CHECKS)
class AsdConfig:
    """Settings of asynchronous score distillation, paper Eq. 1-2."""

    t_min: Annotated[Timestep | tuple[Timestep, Timestep], MOVES] = (500.0, 20.0)  # smallest teacher timestep, of 1000
    t_max: Annotated[Int, Field(ge=1, le=1000)] = 980  # end of the teacher timesteps drawn, excluded
    weighting: Weighting = "dmd"  # w(t); "dmd" is Eq. 2
    delta: Positive = 0.1  # added to the denominator of Eq. 2
    reference: Reference = "shifted"  # ASD (without a shift CSD); "noise": SDS; SDS-Bridge; "fake": VSD, DMD
    reference_prompt: Text | None = None  # of "negative_prompt"; {prompt} is the prompt, null the teacher's own text
    fake: FakeScoreConfig = field(default_factory=FakeScoreConfig)  # of "fake"
    noise: Literal["random", "inversion"] = "random"  # "inversion": what the teacher sees in x (SDI)
    inversion_steps: Count = 10  # of DDIM, from x to t
    inversion_guidance_scale: Float = 1.0  # of these; 1: the text, 0: the negative prompt, each by one pass per step
    x0_from: Literal["noisy", "clean"] = "noisy"  # latent of the x0 estimates: the paper's, or the published code's
    average_over: Literal["prompt", "image"] = "prompt"  # the mean of Eq. 2: the paper's, or the published code's
    mean_over_views: bool = True  # divide a prompt's loss by its number of views, as published; false: the sum
    grad_clip: Positive | None = None  # bound on each element of a teacher's gradient at its input; null: none

    @model_validator(mode="after")
    def _check(self) -> AsdConfig:
        for t_min in self.t_min if isinstance(self.t_min, tuple) else (self.t_min,):
            if t_min >= self.t_max:
                raise ValueError(f"t_min={t_min}: must be below t_max={self.t_max}, which is excluded")
        if self.reference_prompt is not None and self.reference != "negative_prompt":
            raise ValueError(
                f"reference_prompt={self.reference_prompt!r}: must be null with reference={self.reference!r}; set "
                "reference to 'negative_prompt'"
            )
        return self


class NonFinitePrediction(PrdError, FloatingPointError):
    """A teacher predicted NaN or infinity, or was shown it; the step must be skipped and counted.

    teacher, what   name of the teacher, and what was not finite
    prompts, t      indices of the prompts in the batch, and the timesteps of all images
    texts           texts of the prompts, where they are known
    """

    def __init__(self, teacher: str, what: str, prompts: list[int], t: list[int], texts: Sequence[str] = ()) -> None:
        self.teacher, self.what, self.prompts, self.t, self.texts = teacher, what, prompts, t, list(texts)
        named = f" ({', '.join(map(repr, texts))})" if texts else ""
        super().__init__(f"teacher={teacher}: non-finite {what} for prompts {prompts}{named} at t={t}; skip the step")

    def with_texts(self, prompts: Sequence[str]) -> NonFinitePrediction:
        """Return the same error with the texts of the batch's prompts."""
        return NonFinitePrediction(self.teacher, self.what, self.prompts, self.t, [prompts[i] for i in self.prompts])


class NoSignalError(PrdError, ValueError):
    """A timestep at which a schedule of zero terminal signal-to-noise ratio leaves nothing of x in x_t."""


class NoisePredictor(Protocol):
    """A model that predicts noise as a teacher does, for example a fake score trained on the renderings."""

    def predict_noise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor: ...


@dataclass(frozen=True)
class AsdResult:
    """Loss of one teacher for B prompts, n = B * num_views images.

    loss       [B] one value per prompt; its gradient with respect to x is `gradient`. The caller averages over prompts.
    gradient   [n, C, h, w] d loss / d x
    weight     [n] the denominator mean|x - x0_cfg| of Eq. 2 before delta ("dmd"), or the factor of other weightings
    """

    loss: Tensor
    gradient: Tensor
    weight: Tensor

    @property
    def gradient_norm(self) -> Tensor:
        """Euclidean norm of each prompt's gradient, [B]."""
        return self.gradient.reshape(len(self.loss), -1).norm(dim=1)


def asd_loss(
    teacher: Teacher,
    x: Tensor,
    condition: Condition,
    *,
    t: Tensor,
    noise: Tensor,
    t_plus: Tensor | None = None,
    guidance_scale: float,
    config: AsdConfig | None = None,
    reference: Tensor | Condition | NoisePredictor | None = None,
    other: tuple[Condition, Tensor] | None = None,
) -> AsdResult:
    """Score distillation whose gradient at x is w(t) (x0_reference - x0_cfg), Eq. 1-2.

    x          [n, C, h, w] from `teacher.encode`, n = B * teacher.num_views, prompt by prompt
    t          [B] or [n] integer timesteps in [0, T); t_plus the same for the second prediction, None for t itself
    noise      [n, C, h, w] standard normal, shared by x_t and x_{t+}
    config     default AsdConfig(); its t_min and t_max are for whoever draws t
    reference  replaces the second prediction of `config.reference`: a noise prediction [n, C, h, w], a condition for
               the teacher to predict with, or another model; the last two predict at t_plus if it is given, else at t.
               "fake" needs one; "negative_prompt" without one takes the negative prediction of guidance
    other      a second condition and its share [n] in [0, 1]: the predictions for both are interpolated

    The settings select the expression. `weighting` "dmd": the difference of the two estimates of x over
    mean|x - x0_cfg| + delta (Eq. 2); "uniform", "sds", "sqrt": the difference of the two noises times 1, 1 - a_t,
    sqrt(1 - a_t). `x0_from` "noisy": x0 = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t), each term at its own timestep (the
    paper); "clean": x in the place of x_t, and t for both terms (the published code). `average_over`: the dmd mean is
    taken over all views of a prompt (the paper) or over each image (the published code). `grad_clip` clamps every
    element of the gradient before the division of `mean_over_views`.

    The teacher is called once for conditional, unconditional and shifted predictions; without t_plus there is no third.
    Raises ValueError for shapes, timesteps or a guidance scale out of range, NoSignalError for "dmd" at a timestep
    without signal (alpha_bar = 0: x would be 0 / 0), NonFinitePrediction for NaN or infinite x or predictions.
    """
    config = config or AsdConfig()
    t, t_plus = _check_inputs(teacher, x, condition, t, noise, t_plus, guidance_scale, reference, config)
    with torch.no_grad():
        clean, noise = x.detach().float(), noise.to(x.device, torch.float32)
        _check_finite(teacher, "input x", clean, t)
        alphas = teacher.alphas_cumprod.to(x.device)
        own = reference is None and config.reference == "shifted"
        first = second = _Noisy.at(clean, noise, t, alphas)  # `second`: where the reference predicts
        if t_plus is not None and (own or not isinstance(reference, Tensor | None)):
            second = _Noisy.at(clean, noise, t_plus, alphas)
        points = [first, second] if own and second is not first else [first]
        given = [(second, reference)] if isinstance(reference, Condition) else []
        text, negative, more = _predict(teacher, points, condition, other, given)
        guided = negative + guidance_scale * (text[0] - negative)
        if reference is None:
            predicted = {"noise": noise, "negative_prompt": negative}.get(config.reference, text[-1])
        elif isinstance(reference, Condition):
            predicted = more[0]
        elif isinstance(reference, Tensor):
            predicted = reference.to(guided)
        else:
            predicted = reference.predict_noise(second.x_t, second.t, condition).to(guided)
            _check_finite(teacher, "prediction of the reference model", predicted, t)
        gradient, weight = _gradient(teacher, config, first._replace(noise=guided), second._replace(noise=predicted))
    return _surrogate(x, gradient, weight, teacher.num_views, config.mean_over_views)


class _Noisy(NamedTuple):
    """Noisy images [n, C, h, w] of x at timesteps t [n], alpha_bar [n, 1, 1, 1] there, and their noise."""

    x: Tensor
    x_t: Tensor
    t: Tensor
    a: Tensor
    noise: Tensor

    @classmethod
    def at(cls, x: Tensor, noise: Tensor, t: Tensor, alphas: Tensor) -> _Noisy:
        """Noise x [n, C, h, w] to the timesteps t [n] of the schedule `alphas`."""
        a = alphas[t].view(-1, 1, 1, 1)
        return cls(x, a.sqrt() * x + (1 - a).sqrt() * noise, t, a, noise)

    def x0(self, config: AsdConfig, a: Tensor) -> Tensor:
        """Estimate of x from the noisy image; from the clean one with the schedule `a` if the settings say so."""
        image, a = (self.x_t, self.a) if config.x0_from == "noisy" else (self.x, a)
        return (image - (1 - a).sqrt() * self.noise) / a.sqrt()


def _gradient(teacher: Teacher, config: AsdConfig, first: _Noisy, second: _Noisy) -> tuple[Tensor, Tensor]:
    """w(t) (x0_second - x0_first), or the difference of the noises, and w's part [n] that the result tells."""
    a, views = first.a, teacher.num_views
    if config.weighting == "dmd":
        _check_signal(teacher, a, second.a if config.x0_from == "noisy" else a)
        x0_cfg, x0_reference = first.x0(config, a), second.x0(config, a)
        weight = (first.x - x0_cfg).abs().flatten(1).mean(dim=1)  # [n], Eq. 2
        if config.average_over == "prompt":
            weight = weight.view(-1, views).mean(dim=1).repeat_interleave(views)
        gradient = (x0_reference - x0_cfg) / (weight.view(-1, 1, 1, 1) + config.delta)  # Eq. 1
    else:
        weight = _noise_weight(config.weighting, a.flatten())
        gradient = weight.view(-1, 1, 1, 1) * (first.noise - second.noise)
    if config.grad_clip is not None:
        gradient = gradient.clamp(-config.grad_clip, config.grad_clip)
    return gradient, weight


def _surrogate(x: Tensor, gradient: Tensor, weight: Tensor, views: int, mean_over_views: bool) -> AsdResult:
    """A loss [B] of value sum(gradient^2) / 2 and, at x, exactly that gradient, both over num_views if so set."""
    divisor = views if mean_over_views else 1
    value = 0.5 * gradient.square().reshape(len(x) // views, -1).sum(dim=1) / divisor
    gradient = gradient / divisor
    linear = (x.float() * gradient).reshape(len(value), -1).sum(dim=1)
    return AsdResult(linear - linear.detach() + value, gradient, weight)


def _check_inputs(
    teacher: Teacher,
    x: Tensor,
    condition: Condition,
    t: Tensor,
    noise: Tensor,
    t_plus: Tensor | None,
    guidance_scale: float,
    reference: object,
    config: AsdConfig,
) -> tuple[Tensor, Tensor | None]:
    """Return t and t_plus with one value per image; raise ValueError for bad arguments of `asd_loss`."""
    if reference is None and config.reference == "fake":
        raise ValueError("reference=None: config.reference='fake' takes a model of the renderings; give one")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale={guidance_scale}: must be a finite number")
    if isinstance(reference, Tensor) and reference.shape != x.shape:
        raise ValueError(f"reference={tuple(reference.shape)}: must have the shape of x, {tuple(x.shape)}")
    if isinstance(reference, Tensor) and not bool(torch.isfinite(reference).all()):
        raise ValueError("reference: holds NaN or infinity; it is a noise prediction of finite numbers")
    t = _timesteps("t", t, len(x), teacher)
    if t_plus is not None:
        t_plus = _timesteps("t_plus", t_plus, len(x), teacher)
        if bool((t_plus < t).any()):
            raise ValueError(f"t_plus={t_plus.tolist()}: must be no less than t={t.tolist()}, image by image")
    for name, given in (("condition", condition), ("reference", reference)):
        if isinstance(given, Condition) and len(given.prompt_embeds) != len(x):
            raise ValueError(f"{name}: {len(given.prompt_embeds)} rows for {len(x)} images; one for each")
    if noise.shape != x.shape:
        raise ValueError(f"noise={tuple(noise.shape)}: must have the shape of x, {tuple(x.shape)}")
    return t, t_plus


def _timesteps(name: str, t: Tensor, images: int, teacher: Teacher) -> Tensor:
    """Timesteps [n] from [n], or from [B] with one per prompt."""
    views, steps = teacher.num_views, len(teacher.alphas_cumprod)
    if images % views:
        raise ValueError(f"x: {images} images; {teacher.name} takes a multiple of its {views} views")
    if t.shape == (images // views,):
        t = t.repeat_interleave(views)
    if t.shape != (images,) or t.dtype == torch.bool or t.is_floating_point():
        raise ValueError(
            f"{name}={tuple(t.shape)} {t.dtype}: must be integers, one for each of {images // views} prompts or "
            f"{images} images"
        )
    if bool((t < 0).any()) or bool((t >= steps).any()):
        raise ValueError(f"{name}={t.tolist()}: must lie in 0..{steps - 1}")
    return t


def _predict(
    teacher: Teacher,
    points: Sequence[_Noisy],
    condition: Condition,
    other: tuple[Condition, Tensor] | None,
    more: Sequence[tuple[_Noisy, Condition]],
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Noise for the prompt at each point, for the negative prompt at the first, and `more`: one call of the teacher."""
    passes = [(point, condition) for point in points]
    passes[1:1] = [(points[0], condition.negative())]
    if other is not None:
        passes += [(point, other[0]) for point in points]
    passes += more
    x_t, t = torch.cat([p.x_t for p, _ in passes]), torch.cat([p.t for p, _ in passes])
    predicted = teacher.predict_noise(x_t, t, Condition.cat([c for _, c in passes])).chunk(len(passes))
    _check_finite(teacher, "noise prediction", torch.stack(predicted, dim=1), points[0].t)  # [n, passes, C, h, w]
    first, negative, *others = predicted
    count = len(points)
    text = [first, *others[: count - 1]]
    if other is not None:
        share = other[1].view(-1, 1, 1, 1).to(first)
        text = [torch.lerp(a, b, share) for a, b in zip(text, others[count - 1 : 2 * count - 1], strict=True)]
    return text, negative, others[len(others) - len(more) :]


def _check_finite(teacher: Teacher, what: str, values: Tensor, t: Tensor) -> None:
    """Raise NonFinitePrediction if any of `values` [n, ...] is NaN or infinite."""
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        rows = (~finite).flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise NonFinitePrediction(teacher.name, what, sorted({row // teacher.num_views for row in rows}), t.tolist())


def _check_signal(teacher: Teacher, *schedules: Tensor) -> None:
    """Raise NoSignalError if alpha_bar vanishes at one of the timesteps."""
    if any(bool((a <= NO_SIGNAL).any()) for a in schedules):
        raise NoSignalError(
            f"t, t_plus: the schedule of {teacher.name} has no signal (alpha_bar = 0) at one of them; draw up to "
            f"{last_timestep(teacher)}, or use another weighting than 'dmd'"
        )


def _noise_weight(weighting: str, a: Tensor) -> Tensor:
    """Factor [n] on the difference of two noises, from the schedule a [n] at each image's timestep."""
    power = {"uniform": 0.0, "sqrt": 0.5, "sds": 1.0}[weighting]
    return (1 - a) ** power
