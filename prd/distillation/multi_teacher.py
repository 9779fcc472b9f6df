"""Several teachers on one rendering: the weighted sum of their gradients, one backward pass through the renderer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prd.distillation.distill import AsdLoss, view_tensors
from prd.distillation.fake_score import FakeReference
from prd.distillation.interpolation import PromptInterpolation
from prd.distillation.protocol import DistillationLoss
from prd.rendering.views import Views
from prd.teachers.base import Teacher, TeacherConfig
from prd.teachers.offload import resident
from prd.utils.progress import at


@dataclass(frozen=True)
class WeightedTeacher:
    """A teacher with its settings at this step: weight in the loss, guidance scale, eta, negative prompt.

    fake  the fake score that the loss is given along with it; None: the loss is given none
    """

    teacher: Teacher
    settings: TeacherConfig
    fake: FakeReference | None = None


@dataclass
class MeanMetrics:
    """Means of named metrics over the renderings of one optimizer step; tensors are read when means are asked for."""

    added: list[tuple[str, Tensor | float, int]] = field(default_factory=list)

    def add(self, name: str, value: Tensor | float, count: int = 1) -> None:
        """Add a value, or the mean over the renderings of `count` estimates; NaN is left out.

        The cosine of two teachers that share no pixels is NaN and has no mean.
        """
        self.added.append((name, value.detach() if isinstance(value, Tensor) else float(value), count))

    def means(self) -> dict[str, float]:
        """Return the mean of each metric by its name."""
        sums, counts = dict[str, float](), dict[str, int]()
        for (name, _, count), value in zip(self.added, _read([value for _, value, _ in self.added]), strict=True):
            if value == value:
                sums[name] = sums.get(name, 0.0) + count * value
                counts[name] = counts.get(name, 0) + count
        return {name: total / counts[name] for name, total in sums.items()}


def _read(values: Sequence[Tensor | float]) -> list[float]:
    """Numbers of scalars, those on a device read at once."""
    away = [value for value in values if isinstance(value, Tensor) and value.device.type != "cpu"]
    read = iter(torch.stack([value.float() for value in away]).tolist() if away else ())
    return [next(read) if isinstance(v, Tensor) and v.device.type != "cpu" else float(v) for v in values]


def multi_teacher_loss(
    views: Views,
    teachers: Sequence[WeightedTeacher],
    prompts: Sequence[str],
    *,
    config: Any,
    generator: torch.Generator | Sequence[torch.Generator],
    metrics: MeanMetrics,
    renderer: str,
    num_estimates: int = 1,
    interpolation: PromptInterpolation | None = None,
    loss: DistillationLoss | None = None,
) -> Tensor:
    """A scalar whose gradient at the renderings is the teachers' weighted sum, a mean over prompts (line 15).

    config         of `loss` at this step, every schedule a number
    generator      source of the teachers' draws: one for the batch, or one per prompt
    metrics        receives gradient norm, weight and loss per teacher, and the cosine of each pair of teachers, named
                   "gradient_norm/TEACHER/RENDERER" and so on
    num_estimates  estimates in the batch one after the other, each of as many prompts: their means are added up
    interpolation  second prompts, one for each of `prompts`
    loss           default `AsdLoss()`

    Each teacher's gradient is taken at the renderings and its graph freed before the next teacher is called, so that
    the renderer's backward pass runs once and only one teacher's activations exist at a time.

    Raises ValueError without teachers, and as `loss` does.
    """
    if not teachers:
        raise ValueError("teachers: none given; a rendering needs at least one teacher")
    loss = loss or AsdLoss()
    leaves = leaf_views(views)
    total: dict[str, Tensor] = {}
    earlier: dict[str, list[dict[str, Tensor]]] = {}
    for weighted in teachers:
        teacher, settings = weighted.teacher, weighted.settings
        at(doing=f"teacher {teacher.name}, renderer {renderer}")
        extra: dict[str, Any] = {} if weighted.fake is None else {"fake": weighted.fake}
        with resident(teacher, views.rgb.device):
            result = loss(
                teacher,
                leaves,
                prompts,
                settings=settings,
                config=config,
                generator=generator,
                interpolation=interpolation,
                **extra,
            )
            mean = result.loss.view(num_estimates, -1).mean(dim=1).sum()
            gradient = rendering_gradient(settings.weight * mean, leaves)
        called = teacher.name
        if called in earlier:  # a second teacher of that name, as with and without a ControlNet
            called = f"{called}_{1 + sum(other.startswith(called) for other in earlier)}"
        per_estimate = _per_estimate(gradient, num_estimates)
        _record(metrics, f"{called}/{renderer}", result.weight, result.loss, per_estimate, earlier)
        earlier[called] = per_estimate
        for key, value in gradient.items():
            total[key] = total[key] + value if key in total else value
    return rendering_loss(views, total)


def _record(
    metrics: MeanMetrics,
    name: str,
    weight: Tensor,
    loss: Tensor,
    gradients: list[dict[str, Tensor]],
    earlier: Mapping[str, list[dict[str, Tensor]]],
) -> None:
    """Add the metrics of one teacher, `name` = TEACHER/RENDERER, whose gradients there are one per estimate."""
    for own in gradients:
        metrics.add(f"gradient_norm/{name}", torch.stack([g.square().sum() for g in own.values()]).sum().sqrt())
    metrics.add(f"weight/{name}", weight.mean(), len(gradients))
    metrics.add(f"distillation/{name}", loss.detach().mean(), len(gradients))
    for other, known in earlier.items():
        for first, second in zip(known, gradients, strict=True):
            metrics.add(f"cosine/{other}-{name}", gradient_cosine(first, second))


def _per_estimate(gradient: dict[str, Tensor], num_estimates: int) -> list[dict[str, Tensor]]:
    """Parts of a gradient of tensors [num_estimates * B, ...] that belong to each estimate."""
    parts = zip(*(tensor.chunk(num_estimates) for tensor in gradient.values()), strict=True)
    return [dict(zip(gradient, part, strict=True)) for part in parts]


def leaf_views(views: Views) -> Views:
    """Return the same renderings cut from their renderer, ready to receive gradients.

    Each teacher's gradient is taken here and its graph freed before the next teacher is called; then
    `rendering_loss(views, total).backward()` goes through the renderer once.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in view_tensors(views).items()}
    return Views(**leaves, cameras=views.cameras)


def rendering_gradient(loss: Tensor, leaves: Views) -> dict[str, Tensor]:
    """d loss / d rendering by name (rgb, normal, disparity, opacity), for the renderings the loss depends on."""
    tensors = view_tensors(leaves)
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(tensors, found, strict=True) if gradient is not None}


def rendering_loss(views: Views, gradient: Mapping[str, Tensor]) -> Tensor:
    """A scalar whose gradient with respect to the renderings is `gradient`."""
    tensors = view_tensors(views)
    return torch.stack([(tensors[name] * g.detach()).sum() for name, g in gradient.items()]).sum()


def gradient_cosine(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
    """Cosine of the angle between two teachers' gradients at the rendering, over the renderings both depend on.

    A scalar in [-1, 1]; NaN if they share none (an RGB teacher and a normal teacher do not move the same pixels).
    """
    shared = sorted(first.keys() & second.keys())
    if not shared:
        return torch.tensor(float("nan"), dtype=torch.float32, device="cpu")
    a, b = (torch.cat([gradient[name].flatten() for name in shared]) for gradient in (first, second))
    return F.cosine_similarity(a, b, dim=0)
