"""The contract of `Teacher`, over every teacher: what distillation and training rely on."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prd.distillation.multi_teacher import MeanMetrics, leaf_views, multi_teacher_loss, rendering_gradient
from prd.rendering.views import Views
from prd.teachers import (
    Condition,
    StableDiffusion3Teacher,
    TeacherConfig,
    TeacherOptions,
    UNetTeacher,
)
from prd.teachers.offload import resident, set_offload
from tests.compare import ROUNDING, relative_difference
from tests.contracts.teachers import MEMBERS, PROMPTS, B, GreyTeacher, Made, T
from tests.distillation.stub import ask, config_of, weighted
from tests.teachers.tiny import random_views

RENDERINGS = ("rgb", "normal", "depth", "disparity", "opacity")


@pytest.fixture(scope="module", params=MEMBERS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    member = MEMBERS[request.param]
    config = member.kind.config_class(**member.save(tmp_path_factory.mktemp(request.param)))
    return Made(member, config, member.kind.from_config(config, options=TeacherOptions(), dtype=torch.float32))


def at(count: int, t: int = 300) -> Tensor:
    return torch.full((count,), t)


def test_it_says_what_it_is(made: Made) -> None:
    teacher = made.teacher
    assert isinstance(teacher.name, str) and isinstance(teacher.num_views, int) and teacher.num_views >= 1
    schedule = teacher.alphas_cumprod
    assert schedule.shape == (T,) and schedule.dtype == torch.float32
    assert bool((schedule.diff() < 0).all()) and 0 <= float(schedule.min()) and float(schedule.max()) <= 1
    assert issubclass(made.member.kind.config_class, TeacherConfig)


def test_encode_gives_one_image_per_view(made: Made) -> None:
    x = made.teacher.encode(made.views())
    assert x.shape == (B * made.teacher.num_views, *made.teacher.input_shape)
    assert x.dtype == torch.float32 and x.isfinite().all() and x.std() > 0
    if made.member.bounded:
        assert float(x.min()) >= -1 and float(x.max()) <= 1
    large = made.teacher.encode(made.views(size=40))  # of whatever size the renderings are
    assert large.shape == x.shape


def test_encode_keeps_the_order_of_prompts_and_views(made: Made) -> None:
    views = made.views(3)
    together = made.teacher.encode(views)
    for row in range(3):
        alone = made.teacher.encode(rows_of(views, [row]))
        torch.testing.assert_close(together[row * len(alone) : (row + 1) * len(alone)], alone, atol=1e-5, rtol=1e-4)


def rows_of(views: Views, rows: list[int]) -> Views:
    """Some prompts of a rendering."""
    seen = views.cameras
    cameras = replace(seen, camera_to_world=seen.camera_to_world[rows], fovy=seen.fovy[rows])
    return Views(**{name: getattr(views, name)[rows] for name in RENDERINGS}, cameras=cameras)


def test_encode_is_differentiable_in_what_it_looks_at(made: Made) -> None:
    """The derivative along a random direction of the renderings is that of finite differences."""
    views, generator = made.views(), torch.Generator().manual_seed(1)
    leaves = leaf_views(views)
    x = made.teacher.encode(leaves)
    weights = torch.randn(x.shape, generator=generator)
    gradient = rendering_gradient((x * weights).sum(), leaves)
    assert tuple(sorted(gradient)) == made.member.pulls
    for name, slope in gradient.items():
        direction = torch.randn(slope.shape, generator=generator) + slope / slope.norm()
        h = 1e-2 if made.member.bounded else 3e-3
        ends = [
            (made.teacher.encode(replace(views, **{name: getattr(views, name) + s * h * direction})) * weights)
            .double()
            .sum()
            for s in (1, -1)
        ]
        along = float((slope * direction).sum())
        assert abs(along) > 1e-3
        assert float(ends[0] - ends[1]) / (2 * h) == pytest.approx(along, rel=2e-2), name


def test_noise_moves_a_random_encoding_about_its_mean(made: Made) -> None:
    views, noise = made.views(), made.noisy(seed=3)
    mean = made.teacher.encode(views)
    torch.testing.assert_close(made.teacher.encode(views), mean, atol=0, rtol=0)
    one, two = (made.teacher.encode(views, noise=sign * noise) for sign in (1, -1))
    torch.testing.assert_close((one + two) / 2, mean, atol=1e-5, rtol=1e-5)
    assert torch.allclose(one, mean, atol=1e-5) == made.member.bounded


def test_a_condition_has_a_row_per_image(made: Made) -> None:
    views = made.views()
    condition, n = made.condition(views), B * made.teacher.num_views
    for field in fields(condition):
        rows = getattr(condition, field.name)
        assert rows is None or len(rows) == n, field.name
    single = made.condition(rows_of(views, [1]), PROMPTS[1:])
    torch.testing.assert_close(single.prompt_embeds, condition.prompt_embeds[n // 2 :], atol=1e-5, rtol=1e-4)
    both = Condition.cat([condition, condition.negative()])
    torch.testing.assert_close(both.prompt_embeds[n:], condition.negative_prompt_embeds)


def test_a_prediction_is_noise_without_gradient(made: Made) -> None:
    views, x_t = made.views(), made.noisy().requires_grad_()
    epsilon = made.teacher.predict_noise(x_t, at(len(x_t)), made.condition(views))
    assert epsilon.shape == x_t.shape and epsilon.dtype == torch.float32 and epsilon.isfinite().all()
    assert not epsilon.requires_grad and epsilon.std() > 0


def test_prompt_and_timestep_move_the_prediction(made: Made) -> None:
    views, x_t = made.views(), made.noisy()
    condition = made.condition(views)

    def predict(condition: Condition, t: int = 300) -> Tensor:
        return made.teacher.predict_noise(x_t, at(len(x_t), t), condition)

    expected = predict(condition)
    assert not torch.allclose(predict(condition.negative()), expected, atol=1e-6)
    assert not torch.allclose(predict(condition, 900), expected, atol=1e-6)
    other = predict(made.condition(views, negative="e"))  # the negative prompt is another pass's
    assert relative_difference(other, expected) <= ROUNDING


def test_cameras_move_the_prediction_of_those_that_take_them(made: Made) -> None:
    views, x_t = made.views(), made.noisy()
    cameras = views.cameras
    turn = torch.tensor([[-1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])  # half a turn about z
    lift = torch.tensor([[1.0, 0, 0, 0], [0, 0.8, -0.6, 0], [0, 0.6, 0.8, 0], [0, 0, 0, 1]])  # and a tilt about x
    other = replace(views, cameras=replace(cameras, camera_to_world=lift @ turn @ cameras.camera_to_world))
    prompts = ["red", "blue"]  # short, so that the side that some teachers write behind them is within the tokens
    one, two = (made.teacher.predict_noise(x_t, at(len(x_t)), made.condition(seen, prompts)) for seen in (views, other))
    assert torch.allclose(one, two, atol=1e-6) != made.member.cameras


def test_prompts_do_not_meet_in_a_prediction(made: Made) -> None:
    """One call for several prompts and passes gives what single calls give."""
    views, x_t = made.views(), made.noisy()
    condition, half = made.condition(views), len(x_t) // 2
    both = made.teacher.predict_noise(
        torch.cat([x_t, x_t]), at(2 * len(x_t)), Condition.cat([condition, condition.negative()])
    )
    alone = made.teacher.predict_noise(x_t[:half], at(half), made.condition(rows_of(views, [0]), PROMPTS[:1]))
    torch.testing.assert_close(both[:half], alone, atol=1e-5, rtol=1e-4)
    negative = made.teacher.predict_noise(x_t, at(len(x_t)), condition.negative())
    torch.testing.assert_close(both[len(x_t) :], negative, atol=1e-5, rtol=1e-4)


def test_other_numbers_of_views_are_refused(made: Made) -> None:
    views = random_views(B, made.teacher.num_views + 1)
    with pytest.raises(ValueError, match=f"views={made.teacher.num_views + 1}: .*{made.teacher.num_views}"):
        made.teacher.encode(views)


def test_a_loss_pulls_the_views_that_it_sees_and_repeats_itself(made: Made) -> None:
    leaves, found = leaf_views(made.rendered()), []
    for _ in range(2):
        result = ask(made.teacher, leaves, PROMPTS, 5, eta=0.1, negative_prompt="e")
        found.append(rendering_gradient(result.loss.sum(), leaves))
    assert tuple(sorted(found[0])) == made.member.pulls
    for name, gradient in found[0].items():
        assert relative_difference(gradient, found[1][name]) <= ROUNDING and gradient.isfinite().all()
        seen = (gradient.abs().flatten(2).amax(2) > 0).sum(1)  # views of each prompt that are pulled
        assert seen.tolist() == [made.teacher.num_views] * B


def test_it_joins_others_at_a_rendering(made: Made) -> None:
    leaves, metrics = leaf_views(made.rendered()), MeanMetrics()
    teachers = [weighted(GreyTeacher(0.2), 0.5), weighted(made.teacher, 2.0)]
    given: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "metrics": metrics, "renderer": "volume"}
    multi_teacher_loss(leaves, teachers, PROMPTS, config=config_of(), **given).backward()
    for name in ("rgb", *made.member.pulls):
        assert getattr(leaves, name).grad.abs().max() > 0
    second = "grey_2" if made.teacher.name == "grey" else made.teacher.name
    assert metrics.means()[f"gradient_norm/{second}/volume"] > 0


def test_offloading_changes_nothing(made: Made) -> None:
    views, x_t, teacher = made.views(), made.noisy(), made.again()
    expected = teacher.predict_noise(x_t, at(len(x_t)), made.condition(views))
    if isinstance(teacher, torch.nn.Module):
        set_offload(teacher)
    with resident(teacher, torch.device("cpu")):
        found = teacher.predict_noise(x_t, at(len(x_t)), made.condition(views))
    assert relative_difference(found, expected) <= ROUNDING


def test_recomputing_the_encoder_changes_nothing(made: Made) -> None:
    views = leaf_views(made.views())
    gradients = [
        rendering_gradient(teacher.encode(views).square().sum(), views)
        for teacher in (made.teacher, made.again(checkpoint_vae=True))
    ]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_half_precision_stays_inside(made: Made) -> None:
    teacher, views, x_t = made.again(torch.bfloat16), made.views(), made.noisy()
    half = replace(views, **{name: getattr(views, name).bfloat16() for name in RENDERINGS})
    x = teacher.encode(half)
    torch.testing.assert_close(x, made.teacher.encode(views), atol=0.2, rtol=0.1)
    epsilon = teacher.predict_noise(x_t, at(len(x_t)), made.condition(views))
    assert x.dtype == epsilon.dtype == teacher.alphas_cumprod.dtype == torch.float32 and epsilon.isfinite().all()
    if isinstance(teacher, torch.nn.Module):
        assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}


# What `UNetTeacher` promises to those that derive from it.


@pytest.fixture
def unet(made: Made) -> Made:
    if not isinstance(made.teacher, UNetTeacher):
        pytest.skip(f"{made.teacher.name} is no U-Net")
    return made


def test_frozen_and_always_in_evaluation_mode(unet: Made) -> None:
    torch.nn.ModuleList([unet.teacher]).train()
    assert not any(p.requires_grad for p in unet.teacher.parameters())
    assert not any(module.training for module in unet.teacher.modules())


def test_every_parameterisation_is_converted_to_noise(unet: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    views, x_t = unet.views(), unet.noisy()
    t = torch.arange(len(x_t)) * 80 + 99
    a = unet.teacher.alphas_cumprod[t].view(-1, 1, 1, 1)

    def predict(kind: str) -> Tensor:
        monkeypatch.setattr(unet.teacher, "prediction_type", kind)
        return unet.teacher.predict_noise(x_t, t, unet.condition(views))

    out = predict("epsilon")  # what the U-Net puts out
    torch.testing.assert_close(predict("v_prediction"), a.sqrt() * out + (1 - a).sqrt() * x_t)
    torch.testing.assert_close(predict("sample"), (x_t - a.sqrt() * out) / (1 - a).sqrt())


def test_what_it_predicts_is_read_from_its_folder(unet: Made) -> None:
    expected = {"stable_diffusion_v": "v_prediction", "stable_diffusion_sample": "sample"}
    if isinstance(unet.teacher, StableDiffusion3Teacher):
        assert unet.teacher.prediction_type == "flow_prediction"
        return
    folder = Path(unet.config.path).name.rstrip("0123456789")
    assert unet.teacher.prediction_type == expected.get(folder, "epsilon")


def test_bad_input_is_named(unet: Made) -> None:
    teacher, views, x_t = unet.teacher, unet.views(), unet.noisy()
    condition, n, (channels, size, _) = unet.condition(views), len(x_t), teacher.input_shape
    for t in (at(n, T), at(n, -1), torch.zeros(n), at(n).bool()):
        with pytest.raises(ValueError, match=r"t=.*must be integers in 0..999"):
            teacher.predict_noise(x_t, t, condition)
    for wrong in (torch.zeros(n, channels, 2 * size, size), torch.zeros(n, channels + 1, size, size)):
        with pytest.raises(ValueError, match=f"{channels} channels and {size} x {size}"):
            teacher.predict_noise(wrong, at(n), condition)
    for name in ("prompt_embeds", "negative_prompt_embeds", "camera", "control"):
        if (rows := getattr(condition, name)) is not None:
            with pytest.raises(ValueError, match=name):
                teacher.predict_noise(x_t, at(n), replace(condition, **{name: rows[:1]}))
    with pytest.raises(ValueError, match="square"):
        teacher.encode(replace(views, **{name: getattr(views, name)[:, :, :8] for name in RENDERINGS}))
    with pytest.raises(ValueError, match="prompts: 1 given for 2"):
        teacher.condition(["a"], views.cameras)
    for prompts in ("ab", ["a", 3]):
        with pytest.raises(TypeError, match="list of strings"):
            teacher.condition(prompts, views.cameras)


def test_torch_dtype_is_read_with_a_warning(unet: Made) -> None:
    if unet.config.path == "" or any(getattr(unet.config, name, None) for name in ("controlnet", "adapter")):
        pytest.skip("loaded with further arguments")
    with pytest.warns(FutureWarning, match="torch_dtype= .*dtype="):
        teacher = unet.member.kind.from_pretrained(unet.config.path, torch_dtype=torch.bfloat16)
    assert teacher.unet.dtype == torch.bfloat16
