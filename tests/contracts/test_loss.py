"""The contract of `DistillationLoss`, over every loss, with a teacher of one view and one of four."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.custom_loss import RegressionLoss
from prd.adapters.lora import lora_copy
from prd.distillation.asd import AsdResult
from prd.distillation.distill import AsdLoss
from prd.distillation.fake_score import FakeReference, FakeScore
from prd.distillation.multi_teacher import leaf_views, rendering_gradient
from prd.rendering.views import Views
from prd.utils.checked_types import resolved
from tests.compare import ROUNDING, relative_difference
from tests.distillation.stub import sample_generators, settings_of
from tests.teachers.tiny import random_views, tiny_teacher

B, V = 2, 4
PROMPTS = ["a b", "c d e"]
TEACHERS = {
    "stable_diffusion": ("stable_diffusion", "epsilon"),
    "mvdream_v": ("mvdream", "v_prediction"),
}


@dataclass(frozen=True)
class Member:
    """One loss: its class, its settings, and those of the teacher."""

    kind: type[Any]
    config: dict[str, Any] = field(default_factory=dict)
    eta: float = 0.0

    @property
    def fake(self) -> bool:
        return self.config.get("reference") == "fake"


MEMBERS: dict[str, Member] = {
    "sds": Member(AsdLoss, {"reference": "noise", "weighting": "sds"}),
    "sds_dmd": Member(AsdLoss, {"reference": "noise"}),
    "csd": Member(AsdLoss),
    "asd": Member(AsdLoss, eta=0.3),
    "published": Member(AsdLoss, {"x0_from": "clean", "average_over": "image", "grad_clip": 1.0}, eta=0.1),
    "bridge": Member(AsdLoss, {"reference": "negative_prompt", "reference_prompt": "{prompt}, e"}),
    "bridge_own": Member(AsdLoss, {"reference": "negative_prompt", "weighting": "uniform"}),
    "vsd": Member(AsdLoss, {"reference": "fake", "weighting": "sds"}),
    "dmd": Member(AsdLoss, {"reference": "fake", "delta": 1e-3}),
    "sdi": Member(AsdLoss, {"reference": "noise", "noise": "inversion", "inversion_steps": 3}),
    "sdi_guided": Member(AsdLoss, {"reference": "noise", "noise": "inversion", "inversion_guidance_scale": -7.5}),
    "custom": Member(RegressionLoss),
}


@dataclass(frozen=True)
class Made:
    """A loss with a teacher, and the fake score that the loss asks for."""

    member: Member
    teacher: Any
    fake: FakeScore | None

    def __call__(self, views: Views, rows: tuple[int, ...] = (0, 1), seed: int = 0) -> AsdResult:
        """The loss at renderings of some of the prompts, by the draws of those samples."""
        config = resolved(self.member.kind.config_class(**self.member.config), 0, 1)
        generators = sample_generators(*(row + 10 * seed for row in rows))
        extra = {} if self.fake is None else {"fake": FakeReference(self.fake, generators)}
        return self.member.kind.from_config(config)(
            self.teacher,
            views,
            [PROMPTS[row] for row in rows],
            settings=settings_of(eta=self.member.eta, negative_prompt="d"),
            config=config,
            generator=generators,
            **extra,
        )


@pytest.fixture(scope="module", params=TEACHERS)
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_teacher(tmp_path_factory.mktemp(request.param), *TEACHERS[request.param])


@pytest.fixture(params=MEMBERS)
def made(request: pytest.FixtureRequest, teacher: Any) -> Made:
    member, fake = MEMBERS[request.param], None
    if member.fake:
        fake = FakeScore(teacher, lora_copy(teacher.unet, 4, 0))
        for name, parameter in fake.named_parameters().items():
            if "lora_B" in name:  # as after some training
                parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    return Made(member, teacher, fake)


def test_it_has_settings(made: Made) -> None:
    config = made.member.kind.config_class()
    assert made.member.kind.from_config(config) is not None


def test_its_gradient_is_that_at_the_teachers_input(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []
    encode = made.teacher.encode

    def watched(*args: Any, **options: Any) -> Tensor:
        kept.append(encode(*args, **options))
        kept[-1].retain_grad()
        return kept[-1]

    monkeypatch.setattr(made.teacher, "encode", watched)
    leaves = leaf_views(random_views(B, V))
    result = made(leaves)
    n = B * made.teacher.num_views
    assert result.loss.shape == (B,) and result.weight.shape == (n,)
    assert result.gradient.shape == (n, *made.teacher.input_shape)
    assert all(bool(tensor.isfinite().all()) for tensor in (result.loss, result.gradient, result.weight))
    result.loss.sum().backward()
    (x,) = kept
    assert x.grad is not None
    assert relative_difference(x.grad, result.gradient) <= ROUNDING


def test_a_gradient_arrives_at_the_renderings(made: Made) -> None:
    leaves = leaf_views(random_views(B, V))
    gradient = rendering_gradient(made(leaves).loss.sum(), leaves)
    assert gradient and all(bool(g.isfinite().all()) and float(g.abs().max()) > 0 for g in gradient.values())
    assert not any(p.grad is not None for p in made.teacher.parameters())


def test_a_prompt_does_not_depend_on_the_others(made: Made) -> None:
    views = random_views(B, V)
    together = made(views)
    for row in range(B):
        tensors = {k: getattr(views, k)[row : row + 1] for k in ("rgb", "normal", "depth", "disparity", "opacity")}
        cameras = type(views.cameras)(views.cameras.camera_to_world[row : row + 1], views.cameras.fovy[row : row + 1])
        alone = made(Views(**tensors, cameras=cameras), (row,))
        images = slice(row * made.teacher.num_views, (row + 1) * made.teacher.num_views)
        assert relative_difference(alone.gradient, together.gradient[images]) <= 100 * ROUNDING


def test_its_draws_are_the_generators_alone(made: Made) -> None:
    views, state = random_views(B, V), torch.get_rng_state()
    one, two, other = made(views), made(views), made(views, seed=1)
    assert torch.equal(one.gradient, two.gradient) and not torch.equal(one.gradient, other.gradient)
    assert torch.equal(torch.get_rng_state(), state)
