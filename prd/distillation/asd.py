"""Asynchronous score distillation, once, for every teacher (PRD, supplement B, Eq. 1-2; ScaleDreamer, 2407.02040).

`asd_loss` is the loss: pure, every draw an argument. `distill` draws for it and selects the views a teacher sees. Score
distillation of other names is a setting of the same expression:

    ASD   reference="shifted", t_plus > t
    CSD   reference="shifted", t_plus=None: (s - 1)(eps(text) - eps(negative)), the direction of guidance alone
    SDS   reference="noise"; with x0_from="noisy" the second estimate is then x itself, (x - x0_cfg) / (mean|.| + delta)
    VSD   reference=a noise prediction [n, C, h, w] of a model of the renderings themselves
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

import pydantic
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from prd.rendering.views import Views
from prd.teachers.base import Condition, Teacher, ViewConditioned
from prd.text.encoders import check_prompts
from prd.utils.checked_types import CHECKS, MOVES, Positive

Weighting = Literal["dmd", "uniform", "sds", "sqrt"]
Timestep = Annotated[float, Field(ge=1, le=999)]


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=CHECKS)
class AsdConfig:
    """Settings of asynchronous score distillation, paper Eq. 1-2."""

    t_min: Annotated[Timestep | tuple[Timestep, Timestep], MOVES] = (500.0, 20.0)  # smallest teacher timestep, of 1000
    t_max: Annotated[int, Field(ge=1, le=999)] = 980  # end of the teacher timesteps drawn, excluded
    weighting: Weighting = "dmd"  # w(t); "dmd" is Eq. 2
    delta: Positive = 0.1  # added to the denominator of Eq. 2
    reference: Literal["shifted", "noise"] = "shifted"  # ASD (without a shift CSD), or SDS
    x0_from: Literal["noisy", "clean"] = "noisy"  # latent of the x0 estimates: the paper's, or the published code's
    average_over: Literal["prompt", "image"] = "prompt"  # the mean of Eq. 2: the paper's, or the published code's
    grad_clip: Positive | None = None  # bound on each element of a teacher's gradient at its input; null: none

    @model_validator(mode="after")
    def _check(self) -> AsdConfig:
        for t_min in self.t_min if isinstance(self.t_min, tuple) else (self.t_min,):
            if t_min >= self.t_max:
                raise ValueError(f"t_min={t_min}: must be below t_max={self.t_max}, which is excluded")
        return self


NO_SIGNAL = 1e-12  # alpha_bar at and below which x_t is noise alone, and no x0 can be computed from it


class NonFinitePrediction(FloatingPointError):
    """A teacher predicted NaN or infinity, or was shown it; the step must be skipped and counted.

    teacher, what   its name, and what was not finite
    prompts, t      the indices of the prompts in the batch, and the timesteps of all images
    texts           the prompts themselves, where they are known
    """

    def __init__(self, teacher: str, what: str, prompts: list[int], t: list[int], texts: Sequence[str] = ()) -> None:
        self.teacher, self.what, self.prompts, self.t, self.texts = teacher, what, prompts, t, list(texts)
        named = f" ({', '.join(map(repr, texts))})" if texts else ""
        super().__init__(f"teacher={teacher}: non-finite {what} for prompts {prompts}{named} at t={t}; skip the step")

    def of(self, prompts: Sequence[str]) -> NonFinitePrediction:
        """The same, naming the texts of a batch's prompts."""
        return NonFinitePrediction(self.teacher, self.what, self.prompts, self.t, [prompts[i] for i in self.prompts])


class NoSignalError(ValueError):
    """A timestep at which a schedule of zero terminal signal-to-noise ratio leaves nothing of x in x_t."""


@dataclass(frozen=True)
class AsdResult:
    """What one teacher says about B prompts, n = B * num_views images.

    loss       [B] one value a prompt; its gradient with respect to x is `gradient`. Prompts are averaged by the caller.
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
    weighting: Weighting = "dmd",
    delta: float = 0.1,
    x0_from: Literal["noisy", "clean"] = "noisy",
    average_over: Literal["prompt", "image"] = "prompt",
    reference: Literal["shifted", "noise"] | Tensor = "shifted",
    mean_over_views: bool = True,
    grad_clip: float | None = None,
    other: tuple[Condition, Tensor] | None = None,
) -> AsdResult:
    """Score distillation whose gradient at x is w(t) (x0_reference - x0_cfg), Eq. 1-2.

    x         [n, C, h, w] from `teacher.encode`, n = B * teacher.num_views, prompt by prompt
    t         [B] or [n] integer timesteps in [0, T); t_plus the same for the second prediction, None for t itself
    noise     [n, C, h, w] standard normal, shared by x_t and x_{t+}
    weighting "dmd": the difference of the two estimates of x over mean|x - x0_cfg| + delta (Eq. 2);
              "uniform", "sds", "sqrt": the difference of the two noises times 1, 1 - a_t, sqrt(1 - a_t)
    x0_from   "noisy": x0 = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t), each term at its own timestep (the paper);
              "clean": x in the place of x_t, and t for both terms (the published code)
    average_over     the dmd mean over all views of a prompt (the paper) or over each image (the published code)
    mean_over_views  divide a prompt's sum over elements by num_views (as published), or leave the sum
    grad_clip        clamp every element of the gradient to [-grad_clip, grad_clip], before that division
    other            a second condition and its share [n] in [0, 1]: the predictions for both are interpolated

    Conditional, unconditional and shifted predictions are one call of the teacher; there is no third without t_plus.
    Raises ValueError for shapes, timesteps or strengths out of range, NoSignalError for "dmd" at a timestep without
    signal (alpha_bar = 0, where the estimate of x is 0 / 0), NonFinitePrediction for NaN or infinite x or predictions.
    """
    _check_strengths(guidance_scale, delta, grad_clip)
    _check_choice("weighting", weighting, ("dmd", "uniform", "sds", "sqrt"))
    _check_choice("x0_from", x0_from, ("noisy", "clean"))
    _check_choice("average_over", average_over, ("prompt", "image"))
    if not isinstance(reference, Tensor):
        _check_choice("reference", reference, ("shifted", "noise"))
    elif reference.shape != x.shape:
        raise ValueError(f"reference={tuple(reference.shape)}: must have the shape of x, {tuple(x.shape)}")
    elif not bool(torch.isfinite(reference).all()):
        raise ValueError("reference: holds NaN or infinity; it is a noise prediction of finite numbers")
    views = teacher.num_views
    t = _timesteps("t", t, len(x), teacher)
    if t_plus is not None:
        t_plus = _timesteps("t_plus", t_plus, len(x), teacher)
        if bool((t_plus < t).any()):
            raise ValueError(f"t_plus={t_plus.tolist()}: must be no less than t={t.tolist()}, image by image")
    if len(condition.prompt_embeds) != len(x):
        raise ValueError(f"condition: {len(condition.prompt_embeds)} rows for {len(x)} images; one for each")
    if noise.shape != x.shape:
        raise ValueError(f"noise={tuple(noise.shape)}: must have the shape of x, {tuple(x.shape)}")
    with torch.no_grad():
        clean, noise = x.detach().float(), noise.to(x.device, torch.float32)
        _check_finite(teacher, "input x", clean, t)
        schedule = teacher.alphas_cumprod.to(x.device)
        a = a_plus = schedule[t].view(-1, 1, 1, 1)
        x_t = x_plus = a.sqrt() * clean + (1 - a).sqrt() * noise
        asked = [(x_t, t)]
        passes = [(x_t, t, condition), (x_t, t, condition.negative())]
        if t_plus is not None and not isinstance(reference, Tensor) and reference == "shifted":
            a_plus = schedule[t_plus].view(-1, 1, 1, 1)
            x_plus = a_plus.sqrt() * clean + (1 - a_plus).sqrt() * noise
            passes.append((x_plus, t_plus, condition))
            asked.append((x_plus, t_plus))
        if other is not None:
            passes += [(noisy, time, other[0]) for noisy, time in asked]
        text, negative, *more = _predict(teacher, passes)
        text, *shifted = _interpolate([text, *more[: len(asked) - 1]], more[len(asked) - 1 :], other)
        guided = negative + guidance_scale * (text - negative)
        if isinstance(reference, Tensor):
            second = reference.to(guided)
        else:
            second = noise if reference == "noise" else (shifted or [text])[0]

        if weighting == "dmd":
            if x0_from == "clean":
                x_t, x_plus, a_plus = clean, clean, a
            _check_signal(teacher, a, a_plus)
            x0_cfg = (x_t - (1 - a).sqrt() * guided) / a.sqrt()
            x0_reference = (x_plus - (1 - a_plus).sqrt() * second) / a_plus.sqrt()
            weight = (clean - x0_cfg).abs().flatten(1).mean(dim=1)  # [n], Eq. 2
            if average_over == "prompt":
                weight = weight.view(-1, views).mean(dim=1).repeat_interleave(views)
            gradient = (x0_reference - x0_cfg) / (weight.view(-1, 1, 1, 1) + delta)  # Eq. 1
        else:
            weight = _noise_weight(weighting, a.flatten())
            gradient = weight.view(-1, 1, 1, 1) * (guided - second)
        if grad_clip is not None:
            gradient = gradient.clamp(-grad_clip, grad_clip)
    return _surrogate(x, gradient, weight, views, mean_over_views)


def _surrogate(x: Tensor, gradient: Tensor, weight: Tensor, views: int, mean_over_views: bool) -> AsdResult:
    """A loss [B] of value sum(gradient^2) / 2 and, at x, exactly that gradient, both over num_views if asked."""
    divisor = views if mean_over_views else 1
    value = 0.5 * gradient.square().reshape(len(x) // views, -1).sum(dim=1) / divisor
    gradient = gradient / divisor
    linear = (x.float() * gradient).reshape(len(value), -1).sum(dim=1)
    return AsdResult(linear - linear.detach() + value, gradient, weight)


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}")


def _check_strengths(guidance_scale: float, delta: float, grad_clip: float | None) -> None:
    """Raises ValueError for numbers that no gradient can be made with."""
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale={guidance_scale}: must be a finite number")
    if not (math.isfinite(delta) and delta >= 0):
        raise ValueError(f"delta={delta}: must be a finite number, 0 or more")
    if grad_clip is not None and not (math.isfinite(grad_clip) and grad_clip > 0):
        raise ValueError(f"grad_clip={grad_clip}: must be a positive number, or None for no bound")


def _timesteps(name: str, t: Tensor, images: int, teacher: Teacher) -> Tensor:
    """Timesteps [n] from [n] or one a prompt [B]."""
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


def _interpolate(
    first: Sequence[Tensor], second: Sequence[Tensor], other: tuple[Condition, Tensor] | None
) -> list[Tensor]:
    """The predictions for two conditions [n, C, h, w], by the share [n] of the second; the first ones without it."""
    if other is None:
        return list(first)
    share = other[1].view(-1, 1, 1, 1).to(first[0])
    return [torch.lerp(a, b, share) for a, b in zip(first, second, strict=True)]


def _predict(teacher: Teacher, passes: Sequence[tuple[Tensor, Tensor, Condition]]) -> list[Tensor]:
    """The noise predictions of several passes from one call of the teacher."""
    x_t, t, condition = zip(*passes, strict=True)
    predicted = teacher.predict_noise(torch.cat(x_t), torch.cat(t), Condition.cat(condition))
    folded = torch.stack(predicted.chunk(len(passes)), dim=1)  # [n, passes, C, h, w]
    _check_finite(teacher, "noise prediction", folded, t[0])
    return list(predicted.chunk(len(passes)))


def _check_finite(teacher: Teacher, what: str, values: Tensor, t: Tensor) -> None:
    """Raises NonFinitePrediction if any of `values` [n, ...] is NaN or infinite."""
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        rows = (~finite).flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise NonFinitePrediction(teacher.name, what, sorted({row // teacher.num_views for row in rows}), t.tolist())


def _check_signal(teacher: Teacher, *schedules: Tensor) -> None:
    """Raises NoSignalError if alpha_bar vanishes at a timestep asked for."""
    if any(bool((a <= NO_SIGNAL).any()) for a in schedules):
        raise NoSignalError(
            f"t, t_plus: the schedule of {teacher.name} has no signal (alpha_bar = 0) at one of them; draw up to "
            f"{last_timestep(teacher)}, or use another weighting than 'dmd'"
        )


def last_timestep(teacher: Teacher) -> int:
    """The last timestep of a teacher's schedule at which x_t still holds something of x: 999 for most, 998 for some."""
    return int((teacher.alphas_cumprod > NO_SIGNAL).nonzero().max())


def _noise_weight(weighting: str, a: Tensor) -> Tensor:
    """Factor [n] on the difference of two noises, from the schedule a [n] at each image's timestep."""
    power = {"uniform": 0.0, "sqrt": 0.5, "sds": 1.0}[weighting]
    return (1 - a) ** power


def sample_timesteps(uniforms: Tensor, t_min: int, t_max: int) -> Tensor:
    """Timesteps uniform in [t_min, t_max), t_max excluded as published, from uniforms in [0, 1) of any shape."""
    if not 0 <= t_min < t_max:
        raise ValueError(f"t_min={t_min}, t_max={t_max}: must satisfy 0 <= t_min < t_max")
    return (t_min + (uniforms * (t_max - t_min)).floor().long()).clamp(max=t_max - 1)


def shifted_timesteps(
    t: Tensor, uniforms: Tensor, eta: float, t_min: int, *, sqrt_bias: float | None = None, last: int = 999
) -> Tensor:
    """t + dt with dt uniform in [0, eta (t - t_min)], kept in 1..last (supplement B, under Eq. 1).

    sqrt_bias  dt reaches to eta sqrt(t + sqrt_bias) instead, a schedule the published code offers and no recipe uses
    """
    if eta < 0:
        raise ValueError(f"eta={eta}: must not be negative")
    furthest = eta * (t - t_min) if sqrt_bias is None else eta * (t + sqrt_bias).sqrt()
    reach = furthest.clamp(min=0).minimum(last - t)
    return (t + (uniforms * reach).floor().long()).clamp(1, last)


@dataclass(frozen=True)
class Mixture:
    """A second prompt for each of B, and its share: the teachers judge what lies between (ATT3D, section 3.2.2).

    prompts  [B] the second ones
    share    [B] in [0, 1], of the second; at 0 and 1 one of the two is asked for alone
    over     what is interpolated: text "embeddings", "guidance" (the noise predictions), or "losses" (two judgements,
             each with a timestep and a noise of its own)
    """

    prompts: Sequence[str]
    share: Tensor
    over: Literal["embeddings", "guidance", "losses"] = "embeddings"

    def repeat(self, count: int) -> Mixture:
        """The same for `count` estimates of the prompts, one after the other."""
        return Mixture(list(self.prompts) * count, self.share.repeat(count), self.over)

    def __post_init__(self) -> None:
        _check_choice("over", self.over, ("embeddings", "guidance", "losses"))
        if self.share.shape != (len(self.prompts),) or not bool(((self.share >= 0) & (self.share <= 1)).all()):
            raise ValueError(
                f"share={self.share.tolist()}: must lie in 0..1, one for each of {len(self.prompts)} prompts"
            )


@dataclass(frozen=True)
class Guidance:
    """How one teacher is asked; schedules replace t_min and guidance_scale as training goes on."""

    guidance_scale: float  # classifier-free guidance
    t_min: int = 20  # first timestep drawn; the recipe anneals it from 500 to 20
    t_max: int = 980  # end of the timesteps drawn, excluded
    eta: float = 0.0  # timestep shift of the second prediction, as a fraction of t - t_min; 0 saves its pass
    weighting: Weighting = "dmd"  # Eq. 2, or a factor on the difference of two noises
    delta: float = 0.1  # added to the dmd denominator
    x0_from: Literal["noisy", "clean"] = "noisy"  # the paper's Eq. 1, or the published code's
    average_over: Literal["prompt", "image"] = "prompt"  # the paper's Eq. 2, or the published code's
    reference: Literal["shifted", "noise"] = "shifted"  # ASD (and CSD at eta 0), or SDS
    grad_clip: float | None = None  # bound on each element of the gradient
    negative_prompt: str = ""  # what guidance moves away from

    def __post_init__(self) -> None:
        _check_strengths(self.guidance_scale, self.delta, self.grad_clip)
        if not (math.isfinite(self.eta) and self.eta >= 0):
            raise ValueError(f"eta={self.eta}: must be a finite number, 0 (no shift) or more")
        if not 0 <= self.t_min < self.t_max:
            raise ValueError(f"t_min={self.t_min}, t_max={self.t_max}: must satisfy 0 <= t_min < t_max")


def distill(
    teacher: Teacher, views: Views, prompts: Sequence[str], guidance: Guidance, generator: torch.Generator
) -> AsdResult:
    """`asd_loss` of renderings of B prompts, differentiable in the views.

    A teacher of single images sees one random view a prompt; other teachers need exactly their `num_views`. Everything
    random comes from `generator`, on its device, in this order: view, encoder noise, timestep, shift, noise. Timesteps
    without signal are not drawn. Raises as `asd_loss` does, a non-finite prediction with its prompts' texts.
    """
    check_prompts(prompts)
    if len(prompts) != views.cameras.batch:
        raise ValueError(f"prompts: {len(prompts)} given for renderings of {views.cameras.batch} shapes; one for each")
    device = views.rgb.device

    def uniform() -> Tensor:
        return torch.rand(len(prompts), generator=generator, device=generator.device).to(device)

    def normal(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device).to(device)

    def encode(seen: Views) -> Tensor:
        return teacher.encode(seen, generator=generator)

    return distill_drawing(teacher, views, prompts, guidance, uniform=uniform, normal=normal, encode=encode)


def distill_drawing(
    teacher: Teacher,
    views: Views,
    prompts: Sequence[str],
    guidance: Guidance,
    *,
    uniform: Callable[[], Tensor],
    normal: Callable[[torch.Size], Tensor],
    encode: Callable[[Views], Tensor],
    mixture: Mixture | None = None,
) -> AsdResult:
    """`distill` with its draws as functions, called in this order: the view, the encoder's noise, t, its shift, noise.

    uniform  [B] in [0, 1); normal  a standard normal of a shape; encode  the teacher's input x of views
    mixture  second prompts, interpolated with the first; of "losses" the last three are drawn once more
    """
    if teacher.num_views == 1 and views.cameras.views > 1:
        index = (uniform() * views.cameras.views).long().clamp(max=views.cameras.views - 1)
        views = select_views(views, index[:, None])
    x = encode(views)

    def conditioned(texts: Sequence[str]) -> Condition:
        condition = teacher.condition(texts, views.cameras, guidance.negative_prompt)
        return teacher.condition_on(condition, views) if isinstance(teacher, ViewConditioned) else condition

    def judge(condition: Condition, other: tuple[Condition, Tensor] | None = None) -> AsdResult:
        last, t_plus = last_timestep(teacher), None
        t = sample_timesteps(uniform(), guidance.t_min, min(guidance.t_max, last + 1))
        if guidance.eta > 0:
            t_plus = shifted_timesteps(t, uniform(), guidance.eta, guidance.t_min, last=last)
        return asd_loss(
            teacher,
            x,
            condition,
            t=t,
            noise=normal(x.shape),
            t_plus=t_plus,
            guidance_scale=guidance.guidance_scale,
            weighting=guidance.weighting,
            delta=guidance.delta,
            x0_from=guidance.x0_from,
            average_over=guidance.average_over,
            reference=guidance.reference,
            grad_clip=guidance.grad_clip,
            other=other,
        )

    try:
        if mixture is None:
            return judge(conditioned(prompts))
        return _judge_mixture(mixture, teacher.num_views, conditioned(prompts), conditioned(mixture.prompts), judge)
    except NonFinitePrediction as error:
        raise error.of(prompts) from None


def _judge_mixture(
    mixture: Mixture, views: int, first: Condition, second: Condition, judge: Callable[..., AsdResult]
) -> AsdResult:
    """What lies between two conditions of n = B * views images, judged as the mixture says."""
    share = mixture.share.to(first.prompt_embeds.device).repeat_interleave(views)  # [n]
    if mixture.over == "guidance":
        return judge(first, (second, share))
    if mixture.over == "embeddings":
        rows = share.view(-1, 1, 1).to(first.prompt_embeds)
        return judge(replace(first, prompt_embeds=torch.lerp(first.prompt_embeds, second.prompt_embeds, rows)))
    one, two = judge(first), judge(second)
    of_prompt, of_image = mixture.share.to(one.loss), share.to(one.gradient).view(-1, 1, 1, 1)
    return AsdResult(
        torch.lerp(one.loss, two.loss, of_prompt),
        torch.lerp(one.gradient, two.gradient, of_image),
        torch.lerp(one.weight, two.weight, share.to(one.weight)),
    )


def _tensors(views: Views) -> dict[str, Tensor]:
    """The tensors of a rendering by name, without its cameras."""
    return {field.name: getattr(views, field.name) for field in fields(views) if field.name != "cameras"}


def select_views(views: Views, indices: Tensor) -> Views:
    """The views indices [B, n] of a rendering."""
    rows = torch.arange(len(indices), device=indices.device)[:, None]
    chosen = {name: tensor[rows, indices] for name, tensor in _tensors(views).items()}
    return Views(**chosen, cameras=views.cameras.select(indices))


def leaf_views(views: Views) -> Views:
    """The same renderings cut from their renderer, ready to receive gradients.

    Each teacher's gradient is taken here and its graph freed before the next teacher is asked; then
    `rendering_loss(views, total).backward()` goes through the renderer once.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in _tensors(views).items()}
    return Views(**leaves, cameras=views.cameras)


def rendering_gradient(loss: Tensor, leaves: Views) -> dict[str, Tensor]:
    """d loss / d rendering by name (rgb, normal, disparity, opacity), for the renderings the loss depends on."""
    tensors = _tensors(leaves)
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(tensors, found, strict=True) if gradient is not None}


def rendering_loss(views: Views, gradient: Mapping[str, Tensor]) -> Tensor:
    """A scalar whose gradient with respect to the renderings is `gradient`."""
    tensors = _tensors(views)
    return torch.stack([(tensors[name] * g.detach()).sum() for name, g in gradient.items()]).sum()


def gradient_cosine(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
    """Cosine of the angle between two teachers' gradients at the rendering, over the renderings both depend on.

    A scalar in [-1, 1]; NaN where they share none (an RGB teacher and a normal one do not pull on the same pixels).
    """
    shared = sorted(first.keys() & second.keys())
    if not shared:
        return torch.tensor(float("nan"))
    a, b = (torch.cat([gradient[name].flatten() for name in shared]) for gradient in (first, second))
    return F.cosine_similarity(a, b, dim=0)
