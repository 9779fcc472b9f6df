"""A fake score: what it shares with its teacher, what it learns, by which draws, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prd.adapters.lora import lora_copy
from prd.distillation.distill import condition_views
from prd.distillation.draws import sample_generator
from prd.distillation.fake_score import FakeReference, FakeScore, Seen
from prd.teachers import DepthControlTeacher, UNetTeacher
from prd.teachers.base import epsilon_from, target_of
from prd.teachers.offload import set_offload
from tests.compare import ROUNDING, relative_difference
from tests.teachers.tiny import random_views, save_controlnet, save_teacher, tiny_teacher

KINDS = [
    ("stable_diffusion", "epsilon"),
    ("stable_diffusion", "v_prediction"),
    ("stable_diffusion", "sample"),
    ("mvdream", "v_prediction"),
    ("richdreamer", "epsilon"),
]
PROMPTS = ["a b", "c"]


def made(folder: Path, kind: str, prediction: str = "epsilon", rank: int = 4, seed: int = 0) -> FakeScore:
    teacher = tiny_teacher(folder, kind, prediction)
    return FakeScore(teacher, lora_copy(teacher.unet, rank, seed))


def draws(*samples: int) -> list[torch.Generator]:
    return [sample_generator(0, 0, sample, 0) for sample in samples]


def seen_by(score: FakeScore, samples: tuple[int, ...] = (0, 1), flat: bool = False) -> Seen:
    """Renderings of two prompts, or of those of `samples`: random ones, or each of one grey."""
    teacher = score.teacher
    views = random_views(2, teacher.num_views)
    condition = condition_views(teacher, PROMPTS, views)
    x = teacher.encode(views).detach()
    if flat:
        x = x.mean(dim=(1, 2, 3), keepdim=True).expand_as(x)
    rows = [i * teacher.num_views + v for i in samples for v in range(teacher.num_views)]
    own: dict[str, Any] = {
        k: None if (tensor := getattr(condition, k)) is None else tensor[rows] for k in vars(condition)
    }
    return Seen(x[rows], type(condition)(**own), draws(*samples))


@pytest.mark.parametrize("kind, prediction", KINDS)
def test_it_begins_as_the_teacher_and_shares_its_weights(tmp_path: Path, kind: str, prediction: str) -> None:
    score = made(tmp_path, kind, prediction)
    own, frozen = score.named_parameters(), dict(score.teacher.unet.named_parameters())
    assert own and all(".lora_A." in name or ".lora_B." in name for name in own)
    assert all(p.dtype == torch.float32 and max(p.shape) > 4 and min(p.shape) == 4 for p in own.values())
    others = [p for name, p in score.unet.named_parameters() if name not in own]
    assert {p.data_ptr() for p in others} == {p.data_ptr() for p in frozen.values()} and len(others) == len(frozen)
    assert not any(p.requires_grad for p in score.teacher.parameters())

    seen = seen_by(score)
    t = torch.full((len(seen.x),), 300)
    reference = FakeReference(score, [])
    before = score.teacher.predict_noise(seen.x, t, seen.condition)
    assert relative_difference(reference.predict_noise(seen.x, t, seen.condition), before) <= ROUNDING
    with torch.no_grad():
        for name, parameter in own.items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    assert torch.equal(score.teacher.predict_noise(seen.x, t, seen.condition), before)
    predicted = reference.predict_noise(seen.x, t, seen.condition)
    assert relative_difference(predicted, before) > 1e-3 and not predicted.requires_grad


@pytest.mark.parametrize("kind, prediction", KINDS)
def test_it_learns_to_denoise_what_it_is_shown(tmp_path: Path, kind: str, prediction: str) -> None:
    score = made(tmp_path, kind, prediction, rank=8)
    optimizer = torch.optim.AdamW(score.named_parameters().values(), lr=2e-2, weight_decay=0.0)
    reference, seen = FakeReference(score, draws(0, 1)), seen_by(score, flat=True)

    @torch.no_grad()
    def error() -> float:
        """At timesteps and noises that are the same before and after."""
        drawn = (Seen(seen.x, seen.condition, draws(i, i + 1)) for i in range(10, 50, 2))
        return float(sum(score.squared_error(one).mean() for one in drawn))

    before = error()
    for _ in range(40):
        reference.observe(seen.x, seen.condition)
        score.accumulate()
        score.seen.clear()
        optimizer.step()
    assert error() < 0.9 * before


@pytest.mark.parametrize("kind, prediction", KINDS)
def test_its_gradient_is_that_of_the_mean_squared_error(tmp_path: Path, kind: str, prediction: str) -> None:
    """However the renderings are shared among calls; the formula is written out for epsilon, v and the sample."""
    score = made(tmp_path, kind, prediction)
    views = score.teacher.num_views
    with torch.no_grad():
        for parameter in score.named_parameters().values():
            parameter.add_(0.1)
    found = []
    for parts in (((0, 1),), ((0,), (1,))):
        score.seen = [seen_by(score, part) for part in parts]
        error = score.accumulate()
        gradients = [p.grad for p in score.named_parameters().values() if p.grad is not None]
        found.append((error, torch.cat([gradient.flatten() for gradient in gradients])))
    x, condition = seen_by(score).x, seen_by(score).condition
    t, noise = [], []
    for generator in draws(0, 1):
        t.append((torch.rand(1, generator=generator) * 1000).long())
        noise.append(torch.randn(views, *x.shape[1:], generator=generator))
    t_all, eps = torch.cat(t).repeat_interleave(views), torch.cat(noise)
    a = score.teacher.alphas_cumprod[t_all].view(-1, 1, 1, 1)
    x_t = a.sqrt() * x + (1 - a).sqrt() * eps
    text, camera = condition.prompt_embeds, condition.camera
    out = score.unet(x_t, t_all, encoder_hidden_states=text, class_labels=camera).sample
    v = a.sqrt() * eps - (1 - a).sqrt() * x
    target = {"epsilon": eps, "v_prediction": v, "sample": x}[prediction]
    loss = (out - target).square().mean()
    expected = torch.autograd.grad(loss, list(score.named_parameters().values()))
    for error, own in found:
        assert error == pytest.approx(float(loss.detach()), rel=1e-4)
        assert relative_difference(own, torch.cat([g.flatten() for g in expected])) <= 10 * ROUNDING


def test_what_is_predicted_and_what_is_trained_on_agree() -> None:
    g = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(3, 4, 2, 2, generator=g) for _ in range(2))
    alpha_bar = torch.tensor([0.9, 0.5, 0.1])
    a = alpha_bar.view(-1, 1, 1, 1)
    x_t = a.sqrt() * x + (1 - a).sqrt() * noise
    for prediction in ("epsilon", "v_prediction", "sample"):
        target = target_of(x, noise, alpha_bar, prediction)
        assert relative_difference(epsilon_from(target, x_t, alpha_bar, prediction), noise) <= ROUNDING


def test_passes_are_counted(tmp_path: Path) -> None:
    score = made(tmp_path, "mvdream")
    seen = seen_by(score)
    t = torch.full((8,), 300)
    assert score.teacher.passes == score.model.passes == 0
    score.teacher.predict_noise(seen.x, t, seen.condition)
    FakeReference(score, []).predict_noise(seen.x, t, seen.condition)
    assert (score.teacher.passes, score.model.passes) == (8, 8)
    score.seen = [seen, seen]
    score.accumulate()
    assert (score.teacher.passes, score.model.passes) == (8, 8 + 3 * 16)  # forward, and backward at twice its cost


def test_the_factors_are_those_of_the_seed_whatever_the_global_generator(tmp_path: Path) -> None:
    save_teacher(tmp_path, "stable_diffusion")
    found: list[torch.Tensor] = []
    for state, seed in ((1, 7), (2, 7), (1, 8)):
        teacher = tiny_teacher(tmp_path / str(len(found)), "stable_diffusion")
        torch.manual_seed(state)
        before = torch.get_rng_state()
        score = FakeScore(teacher, lora_copy(teacher.unet, 4, seed))
        assert torch.equal(torch.get_rng_state(), before)
        found.append(torch.cat([p.detach().flatten() for p in score.named_parameters().values()]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_a_teacher_has_a_fake_score_of_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    full = made(tmp_path, "stable_diffusion")
    half: Any = type(full.teacher).from_pretrained(str(tmp_path), dtype=dtype)
    score = FakeScore(half, lora_copy(half.unet, 4, 0))
    assert half.unet.dtype == score.model.unet.dtype == dtype
    gradients = []
    for one in (full, score):
        one.seen = [seen_by(full)]
        one.accumulate()
        parameters = one.named_parameters().values()
        assert {p.dtype for p in parameters} == {torch.float32}
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    assert relative_difference(gradients[1], gradients[0]) < 0.1


def test_an_offloaded_teacher_is_back_afterwards(tmp_path: Path) -> None:
    score = made(tmp_path, "stable_diffusion")
    score.seen = [seen_by(score)]
    expected = score.accumulate()
    set_offload(score.teacher)
    home = [p.data_ptr() for p in score.teacher.parameters()]
    score.seen = [seen_by(score)]
    assert score.accumulate() == expected
    assert [p.data_ptr() for p in score.teacher.parameters()] == home


def test_a_controlnet_holds_the_fake_score_too(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "sd", "stable_diffusion")
    control = save_controlnet(tmp_path / "control", folder / "unet")
    teacher: UNetTeacher = DepthControlTeacher.from_pretrained(str(folder), controlnet=str(control))
    score = FakeScore(teacher, lora_copy(teacher.unet, 4, 0))
    seen = seen_by(score)
    assert seen.condition.control is not None
    t = torch.full((2,), 300)
    expected = teacher.predict_noise(seen.x, t, seen.condition)
    assert relative_difference(score.model.predict_noise(seen.x, t, seen.condition), expected) <= ROUNDING
    score.seen = [seen]
    assert score.accumulate() > 0 and all(p.grad is not None for p in score.named_parameters().values())
