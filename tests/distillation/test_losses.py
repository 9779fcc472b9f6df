"""The score distillations of other names: each formula written out against what its settings give, draws included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prd.distillation.asd import AsdConfig, asd_loss
from prd.distillation.distill import distill
from prd.distillation.fake_score import FakeReference
from prd.distillation.interpolation import PromptInterpolation
from prd.distillation.inversion import ddim_inversion
from prd.teachers.base import Condition
from tests.compare import ROUNDING, relative_difference
from tests.distillation.stub import THREE, StubTeacher, config_of, settings_of, views_of

B, V, S, SEED = 3, 4, 3.0, 5
NEGATIVE, T_MIN = "bad", 20


class Fake:
    """A score whose predictions can be written down."""

    def predict_noise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return 0.3 * x_t - t.view(-1, 1, 1, 1) / 2000 + condition.prompt_embeds.view(-1, 1, 1, 1)


@dataclass(frozen=True)
class Case:
    """All that a formula may name, [n, C, h, w] or [n, 1, 1, 1]; of the stub teacher with four views."""

    x: Tensor
    t: Tensor
    t_plus: Tensor
    noise: Tensor

    def a(self, t: Tensor) -> Tensor:
        return torch.linspace(0.999, 0.001, 1000)[t].view(-1, 1, 1, 1)

    def at(self, t: Tensor) -> Tensor:
        return self.a(t).sqrt() * self.x + (1 - self.a(t)).sqrt() * self.noise

    def eps(self, texts: list[str], t: Tensor | None = None, x_t: Tensor | None = None) -> Tensor:
        """The teacher's prediction for texts, one per prompt."""
        t = self.t if t is None else t
        text = torch.tensor([len(text) / 20 for text in texts]).repeat_interleave(V).view(-1, 1, 1, 1)
        return (self.at(t) if x_t is None else x_t) * text + t.view(-1, 1, 1, 1) / 1000

    @property
    def text(self) -> Tensor:
        return self.eps(THREE)

    @property
    def negative(self) -> Tensor:
        return self.eps([NEGATIVE] * B)

    @property
    def cfg(self) -> Tensor:
        return self.negative + S * (self.text - self.negative)

    @property
    def fake(self) -> Tensor:
        texts = torch.tensor([len(text) / 20 for text in THREE]).repeat_interleave(V).view(-1, 1, 1, 1)
        return 0.3 * self.at(self.t) - self.t.view(-1, 1, 1, 1) / 2000 + texts

    def x0(self, eps: Tensor, t: Tensor | None = None) -> Tensor:
        t = self.t if t is None else t
        return (self.at(t) - (1 - self.a(t)).sqrt() * eps) / self.a(t).sqrt()

    def dmd(self, second: Tensor, delta: float = 0.1, each: str = "prompt") -> Tensor:
        """The difference of two estimates of x over the mean distance of the first."""
        distance = (self.x - self.x0(self.cfg)).abs()
        mean = distance.reshape(B, -1).mean(1).repeat_interleave(V) if each == "prompt" else distance.mean((1, 2, 3))
        return (second - self.x0(self.cfg)) / (mean.view(-1, 1, 1, 1) + delta)


def asd(case: Case) -> Tensor:
    return case.dmd(case.x0(case.eps(THREE, case.t_plus), case.t_plus))


LOSSES: dict[str, tuple[dict[str, Any], Callable[[Case], Tensor]]] = {
    "SDS": ({"reference": "noise", "weighting": "sds"}, lambda c: (1 - c.a(c.t)) * (c.cfg - c.noise)),
    "SDS by its estimate": ({"reference": "noise"}, lambda c: c.dmd(c.x)),
    "CSD": ({"weighting": "sds"}, lambda c: (1 - c.a(c.t)) * (S - 1) * (c.text - c.negative)),
    "ASD, eta 0": ({}, lambda c: c.dmd(c.x0(c.text))),
    "ASD, eta 0.1": ({"eta": 0.1}, asd),
    "ASD, eta 0.3": ({"eta": 0.3}, asd),
    "SDS-Bridge": (
        {"reference": "negative_prompt", "weighting": "sds"},
        lambda c: (1 - c.a(c.t)) * S * (c.text - c.negative),
    ),
    "SDS-Bridge, another text": (
        {"reference": "negative_prompt", "reference_prompt": "blurred", "weighting": "sqrt"},
        lambda c: (1 - c.a(c.t)).sqrt() * (c.cfg - c.eps(["blurred"] * B)),
    ),
    "SDS-Bridge, of the prompt": (
        {"reference": "negative_prompt", "reference_prompt": "{prompt}, blurred, {prompt}"},
        lambda c: c.dmd(c.x0(c.eps([f"{p}, blurred, {p}" for p in THREE]))),
    ),
    "VSD": ({"reference": "fake", "weighting": "sds"}, lambda c: (1 - c.a(c.t)) * (c.cfg - c.fake)),
    "DMD": (
        {"reference": "fake", "delta": 1e-3, "average_over": "image"},
        lambda c: c.dmd(c.x0(c.fake), 1e-3, "image"),
    ),
}


def asked(settings: dict[str, Any], seed: int = SEED, fake: Any = None, **others: Any) -> Any:
    """`distill` of the stub teacher with four views."""
    return distill(
        StubTeacher(V),
        views_of(B),
        THREE,
        settings=settings_of(negative_prompt=NEGATIVE, guidance_scale=S, **settings),
        config=config_of(t_min=T_MIN, **settings),
        generator=torch.Generator().manual_seed(seed),
        fake=fake,
        **others,
    )


def drawn(eta: float = 0.0, inverted: bool = False) -> Case:
    """Return what a loss is to draw, in its order: the encoder's noise, timestep, shift, noise."""
    g = torch.Generator().manual_seed(SEED)
    x = StubTeacher(V).encode(views_of(B), noise=torch.randn(B * V, 3, 4, 4, generator=g))
    t = (T_MIN + (torch.rand(B, generator=g) * (980 - T_MIN)).floor()).long()
    t_plus = t
    if eta:
        t_plus = t + (torch.rand(B, generator=g) * (eta * (t - T_MIN)).clamp(max=999 - t)).floor().long()
    noise = torch.zeros_like(x) if inverted else torch.randn(B * V, 3, 4, 4, generator=g)
    return Case(x, t.repeat_interleave(V), t_plus.repeat_interleave(V), noise)


def reference() -> Any:
    score: Any = SimpleNamespace(model=Fake(), seen=[])
    return FakeReference(score, [torch.Generator()])


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_formula(name: str) -> None:
    settings, formula = LOSSES[name]
    case = drawn(settings.get("eta", 0.0))
    result = asked(settings, fake=reference() if settings.get("reference") == "fake" else None)
    assert relative_difference(result.gradient, formula(case) / V) <= ROUNDING


@pytest.mark.parametrize("scale", [1.0, 0.0, -7.5])
@pytest.mark.parametrize("weighting", ["sds", "dmd"])
def test_sdi_is_its_formula(weighting: str, scale: float) -> None:
    """The noise of SDI is DDIM's, whose step is linear in sqrt((1 - a) / a) (Song et al. 2021, Eq. 13)."""
    settings = {"reference": "noise", "noise": "inversion", "inversion_steps": 5, "weighting": weighting}
    case = drawn(inverted=True)
    y, now = case.x, torch.zeros(B * V, 1, 1, 1)  # x_s / sqrt(a_s), sqrt((1 - a_s) / a_s)
    for step in range(5):
        s = case.t * step // 5
        x_s = y / (1 + now**2).sqrt()
        negative = case.eps([NEGATIVE] * B, s, x_s)
        eps = negative + scale * (case.eps(THREE, s, x_s) - negative)
        a = case.a(case.t * (step + 1) // 5)
        y, now = y + (((1 - a) / a).sqrt() - now) * eps, ((1 - a) / a).sqrt()
    case = Case(case.x, case.t, case.t_plus, (y - case.x) / now)
    expected = (1 - case.a(case.t)) * (case.cfg - case.noise) if weighting == "sds" else case.dmd(case.x)
    result = asked({**settings, "inversion_guidance_scale": scale})
    assert relative_difference(result.gradient, expected / V) <= 10 * ROUNDING


def test_inversion_finds_a_noise_that_the_teacher_is_sure_of_and_says_its_cost() -> None:
    class Sure(StubTeacher):
        def predict_noise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            rows.append(len(x_t))
            return noise[:1].expand_as(x_t)

    g = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(4, 3, 4, 4, generator=g) for _ in range(2))
    condition = Condition(torch.ones(4, 1, 1), torch.zeros(4, 1, 1))
    for scale, each in ((1.0, 4), (0.0, 4), (3.0, 8)):
        rows: list[int] = []
        t = torch.tensor([1, 3, 500, 999])  # also where the steps are fewer than the timesteps
        found = ddim_inversion(Sure(1), x, condition, t, steps=7, guidance_scale=scale)
        assert relative_difference(found, noise[:1].expand_as(x)) <= 10 * ROUNDING
        assert rows == [each] * 7


def test_what_a_fake_score_is_shown_is_what_the_teacher_was() -> None:
    fake, case = reference(), drawn()
    asked({"reference": "fake"}, fake=fake)
    (seen,) = fake.score.seen
    assert torch.equal(seen.x, case.x) and not seen.x.requires_grad and seen.draws is fake.draws
    assert torch.equal(seen.condition.prompt_embeds[::V, 0, 0], torch.tensor([len(p) / 20 for p in THREE]))


def test_a_teacher_without_a_fake_score_is_asked_for_asd() -> None:
    for eta in (0.0, 0.3):
        one, two = asked({"reference": "fake", "eta": eta}), asked({"reference": "shifted", "eta": eta})
        assert torch.equal(one.gradient, two.gradient)
    teacher, case = StubTeacher(V), drawn()
    condition = teacher.condition(THREE, views_of(B).cameras)
    with pytest.raises(ValueError, match="reference='fake' takes a model"):
        config = AsdConfig(reference="fake")
        asd_loss(teacher, case.x, condition, t=case.t, noise=case.noise, guidance_scale=S, config=config)


def test_a_reference_of_the_guidances_own_text_costs_no_pass() -> None:
    class Counted(StubTeacher):
        def predict_noise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            rows.append(len(x_t))
            return super().predict_noise(x_t, t, condition)

    teacher, case = Counted(V), drawn()
    condition = teacher.condition(THREE, views_of(B).cameras, NEGATIVE)
    rows: list[int] = []
    given: dict[str, Any] = {
        "t": case.t,
        "noise": case.noise,
        "guidance_scale": S,
        "config": AsdConfig(reference="negative_prompt"),
    }
    own = asd_loss(teacher, case.x, condition, **given)
    another = asd_loss(teacher, case.x, condition, **given, reference=condition.negative())
    assert relative_difference(another.gradient, own.gradient) <= ROUNDING
    assert rows == [2 * B * V, 3 * B * V]


@pytest.mark.parametrize(
    "settings, over, message",
    [
        ({"reference": "fake"}, "guidance", "over='guidance': must be 'embeddings' or 'losses' .*reference=fake"),
        ({"noise": "inversion"}, "guidance", "must be 'embeddings' or 'losses' with distillation.noise=inversion"),
        ({"reference": "negative_prompt", "reference_prompt": "{prompt}"}, "losses", "reference_prompt='{prompt}'"),
    ],
)
def test_interpolations_that_a_loss_cannot_do_are_refused(settings: dict[str, Any], over: Any, message: str) -> None:
    between = PromptInterpolation(THREE[::-1], torch.full((B,), 0.5), over)
    with pytest.raises(ValueError, match=message):
        asked(settings, fake=reference() if settings.get("reference") == "fake" else None, interpolation=between)


@pytest.mark.parametrize("settings", [{"reference": "fake"}, {"noise": "inversion"}, {"reference": "negative_prompt"}])
@pytest.mark.parametrize("over", ["embeddings", "losses"])
def test_interpolation_ends_at_each_prompt(settings: dict[str, Any], over: Any) -> None:
    def at(share: float) -> Tensor:
        between = PromptInterpolation(THREE[::-1], torch.full((B,), share), over)
        fake = reference() if settings.get("reference") == "fake" else None
        return asked(settings, fake=fake, interpolation=between).gradient

    plain = asked(settings, fake=reference() if settings.get("reference") == "fake" else None)
    assert relative_difference(at(0.0), plain.gradient) <= ROUNDING
    assert relative_difference(at(1.0), plain.gradient) > 1e-3
