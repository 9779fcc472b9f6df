"""Several teachers: their weighted sum, one graph at a time, and what is logged of each."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from prd.distillation.asd import AsdResult
from prd.distillation.draws import sample_generator
from prd.distillation.multi_teacher import (
    MeanMetrics,
    WeightedTeacher,
    gradient_cosine,
    leaf_views,
    multi_teacher_loss,
    rendering_gradient,
)
from prd.distillation.protocol import DistillationLoss
from prd.rendering.views import Views
from prd.teachers import MVDreamTeacher, StableDiffusionTeacher
from tests.distillation.stub import THREE, StubTeacher, ask, config_of, views_of, weighted
from tests.teachers.tiny import random_views, tiny_teacher

PROMPTS = ["a red cube", "a mug"]


def loss_of(views, teachers, prompts, generator, metrics, **given) -> torch.Tensor:
    """`multi_teacher_loss` of a volume rendering; generator: an int seeds one for the batch."""
    if isinstance(generator, int):
        generator = torch.Generator().manual_seed(generator)
    given: dict[str, Any] = {"config": config_of(), "renderer": "volume"} | given
    return multi_teacher_loss(views, teachers, prompts, generator=generator, metrics=metrics, **given)


def pulled_by(teachers: list[WeightedTeacher]) -> tuple[torch.Tensor, dict[str, float]]:
    """The gradient at the colours of two prompts' renderings, and the logged means."""
    views, metrics = leaf_views(random_views(2, 4, size=8)), MeanMetrics()
    loss_of(views, teachers, PROMPTS, 5, metrics).backward()
    assert views.rgb.grad is not None
    return views.rgb.grad, metrics.means()


def test_a_teachers_weight_scales_its_gradient_and_its_guidance_is_its_own():
    teacher = StubTeacher(4)
    leaves = leaf_views(random_views(2, 4, size=8))
    result = ask(teacher, leaves, PROMPTS, 5)
    one = rendering_gradient(result.loss.mean(), leaves)["rgb"]
    found, logged = pulled_by([weighted(teacher, 2.5)])
    torch.testing.assert_close(found, 2.5 * one)
    assert logged["gradient_norm/stub/volume"] == pytest.approx(float((2.5 * one).norm()), rel=1e-5)
    assert logged["weight/stub/volume"] == pytest.approx(float(result.weight.mean()), rel=1e-5)
    other, _ = pulled_by([weighted(teacher, 2.5, guidance_scale=9.0)])
    assert not torch.allclose(other, found, rtol=1e-3)


def test_teachers_add_up():
    second = StubTeacher(1)
    second.name = "second"
    first = weighted(StubTeacher(4), 1.0)
    together, logged = pulled_by([first, weighted(second, 0.5)])
    generator = torch.Generator().manual_seed(5)
    expected = torch.zeros_like(together)
    for teacher, weight in ((first.teacher, 1.0), (second, 0.5)):
        leaves = leaf_views(random_views(2, 4, size=8))
        result = ask(teacher, leaves, PROMPTS, generator)
        expected += rendering_gradient(weight * result.loss.mean(), leaves)["rgb"]
    torch.testing.assert_close(together, expected)
    assert {"cosine/stub-second/volume", "gradient_norm/second/volume"} <= logged.keys()


def test_teachers_of_one_name_are_logged_apart():
    pulled, logged = pulled_by([weighted(StubTeacher(4), 1.0), weighted(StubTeacher(4), 2.0)])
    assert {"gradient_norm/stub/volume", "gradient_norm/stub_2/volume", "cosine/stub-stub_2/volume"} <= logged.keys()
    assert logged["gradient_norm/stub_2/volume"] != logged["gradient_norm/stub/volume"]


def test_no_teacher_is_an_error():
    with pytest.raises(ValueError, match="teachers: none given"):
        pulled_by([])


def test_a_teachers_graph_is_freed_before_the_next_is_asked(tmp_path):
    activations = []

    def watched(teacher):
        encode = teacher.encode

        def watching(views, **draws):
            assert not [ref for ref in activations if ref() is not None]  # those of earlier teachers
            kept = views.rgb.exp()  # which its backward pass needs
            activations.append(weakref.ref(kept))
            return encode(replace(views, rgb=kept.log()), **draws)

        teacher.encode = watching
        return weighted(teacher)

    kinds = ("stable_diffusion", "mvdream", "stable_diffusion")
    teachers = [watched(tiny_teacher(tmp_path / str(i), kind)) for i, kind in enumerate(kinds)]
    views = random_views(2, 4)
    views = replace(views, rgb=views.rgb.clamp(0.1).requires_grad_())
    metrics = MeanMetrics()
    loss_of(views, teachers, ["a", "b"], 0, metrics).backward()
    assert len(activations) == 3 and views.rgb.grad.abs().max() > 0
    logged = metrics.means()
    assert -1 <= logged["cosine/stable_diffusion-mvdream/volume"] <= 1
    for quantity in ("gradient_norm", "weight"):
        assert logged[f"{quantity}/mvdream/volume"] > 0 and logged[f"{quantity}/stable_diffusion/volume"] > 0


def test_a_metric_may_still_have_its_graph():
    metrics, value = MeanMetrics(), torch.tensor(2.0, requires_grad=True)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch warns once per process by default
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            metrics.add("opacity", value)
    finally:
        torch.set_warn_always(always)
    assert metrics.means() == {"opacity": 2.0}


def test_gradient_cosine():
    g = {"rgb": torch.tensor([1.0, 0.0]), "opacity": torch.tensor([1.0])}
    assert gradient_cosine(g, {"rgb": torch.tensor([2.0, 0.0])}).item() == pytest.approx(1)
    assert gradient_cosine(g, {"rgb": torch.tensor([0.0, 2.0])}).item() == pytest.approx(0)
    assert gradient_cosine(g, {"normal": torch.tensor([1.0])}).isnan()


def test_estimates_together_are_as_one_by_one(random_toybox):
    kinds = (StableDiffusionTeacher, MVDreamTeacher)
    teachers = [weighted(kind.from_pretrained(str(random_toybox / kind.name)), 0.5, eta=0.1) for kind in kinds]

    def pull(views: Views, estimates: range) -> tuple[torch.Tensor, MeanMetrics]:
        leaves, log = leaf_views(views), MeanMetrics()
        draws = [sample_generator(3, 7, sample, 4, k) for k in estimates for sample in range(2)]
        loss_of(leaves, teachers, THREE[:2] * len(estimates), draws, log, num_estimates=len(estimates)).backward()
        return leaves.rgb.grad, log

    whole = views_of(4)  # two prompts at two estimates
    one_by_one, logs = zip(*(pull(part_of(whole, k), range(k, k + 1)) for k in range(2)), strict=True)
    together, log = pull(whole, range(2))
    expected = torch.cat(one_by_one)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    first, second = (own.means() for own in logs)
    assert log.means() == pytest.approx({name: (first[name] + second[name]) / 2 for name in first}, rel=1e-4)
    assert "cosine/stable_diffusion-mvdream/volume" in first


def part_of(views: Views, k: int) -> Views:
    """Estimate k of views that hold two estimates of two prompts."""
    rows = slice(2 * k, 2 * k + 2)
    names = ("rgb", "normal", "depth", "disparity", "opacity")
    return Views(*(getattr(views, name)[rows] for name in names), cameras=views.cameras.chunk(2)[k])


@dataclass(frozen=True)
class PullConfig:
    """Settings of `Pull`."""

    strength: float = 1.0


class Pull:
    """A loss of one's own: pulls the colours to grey, and keeps what it was called with."""

    config_class = PullConfig

    def __init__(self) -> None:
        self.calls: list[dict] = []

    @classmethod
    def from_config(cls, config):
        return cls()

    def __call__(self, teacher, views, prompts, *, settings, config, generator, interpolation=None):
        self.calls.append({"prompts": prompts, "settings": settings, "generator": generator, "other": interpolation})
        x = views.rgb.flatten(1)
        loss = 0.5 * config.strength * (x - 0.5).square().sum(dim=1)
        return AsdResult(loss, config.strength * (x.detach() - 0.5), torch.ones(len(x)))


def test_a_loss_of_ones_own_takes_the_place_of_asd():
    views, teacher, loss = leaf_views(random_views(2, 4, size=8)), weighted(StubTeacher(4), 0.5, eta=0.2), Pull()
    assert isinstance(loss, DistillationLoss)
    generators = [torch.Generator(), torch.Generator()]
    given: dict[str, Any] = {"config": PullConfig(3.0), "loss": loss}
    loss_of(views, [teacher], PROMPTS, generators, MeanMetrics(), **given).backward()
    torch.testing.assert_close(views.rgb.grad, 0.5 * 3.0 * (views.rgb.detach() - 0.5) / 2)
    expected = {"prompts": PROMPTS, "settings": teacher.settings, "generator": generators, "other": None}
    assert loss.calls == [expected]
