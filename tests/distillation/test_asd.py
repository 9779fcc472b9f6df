"""Asynchronous score distillation: the gradient is the formula, and every setting of it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from prd.distillation.asd import AsdConfig, NonFinitePrediction, NoSignalError, asd_loss
from prd.distillation.multi_teacher import leaf_views, rendering_gradient, rendering_loss
from prd.distillation.timesteps import last_timestep, sample_timesteps, shifted_timesteps
from prd.teachers.base import Condition
from tests.distillation.stub import ask
from tests.teachers.tiny import random_views, tiny_teacher

B, V = 2, 4


class LinearTeacher:
    """Noise = x_t * text + t / 1000: every prediction can be written down. Counts its calls and rows."""

    name, num_views = "linear", V

    def __init__(self):
        self.alphas_cumprod = torch.linspace(0.999, 0.001, 1000)
        self.rows = []

    def predict_noise(self, x_t, t, condition):
        self.rows.append(len(x_t))
        return x_t * condition.prompt_embeds.view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 1000


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(B * V, 4, 3, 3, generator=g) for _ in range(2))
    text, negative = torch.rand(B * V, 1, 1, generator=g), torch.rand(B * V, 1, 1, generator=g)
    t, t_plus = torch.tensor([300, 700]), torch.tensor([340, 750])
    return SimpleNamespace(
        teacher=LinearTeacher(),
        x=x.requires_grad_(),
        noise=noise,
        t=t,
        t_plus=t_plus,
        condition=Condition(text, negative),
    )


ARGUMENTS = ("guidance_scale", "t_plus", "other")


def call(case, **settings):
    """`asd_loss` with arguments and settings in one; a reference by name is a setting, any other an argument."""
    settings: dict[str, Any] = {"guidance_scale": 7.5, "t_plus": case.t_plus, **settings}
    given = {k: settings.pop(k) for k in ARGUMENTS if k in settings}
    if not isinstance(settings.get("reference", ""), str):
        given["reference"] = settings.pop("reference")
    config = AsdConfig(**settings)
    result = asd_loss(case.teacher, case.x, case.condition, t=case.t, noise=case.noise, config=config, **given)
    (gradient,) = torch.autograd.grad(result.loss.sum(), case.x)
    return result, gradient


def predictions(case, scale=7.5):
    """x_t, x_{t+}, the guided and the shifted prediction, and the schedule at both, written out."""

    def at(t):
        a = case.teacher.alphas_cumprod[t.repeat_interleave(V)].view(-1, 1, 1, 1)
        return a, a.sqrt() * case.x.detach() + (1 - a).sqrt() * case.noise

    def epsilon(x_t, t, embeds):
        return x_t * embeds.view(-1, 1, 1, 1) + t.repeat_interleave(V).view(-1, 1, 1, 1) / 1000

    a, x_t = at(case.t)
    b, x_plus = at(case.t_plus)
    text = epsilon(x_t, case.t, case.condition.prompt_embeds)
    negative = epsilon(x_t, case.t, case.condition.negative_prompt_embeds)
    second = epsilon(x_plus, case.t_plus, case.condition.prompt_embeds)
    return a, x_t, b, x_plus, negative + scale * (text - negative), second, text


def test_gradient_is_the_papers_equation(case):
    a, x_t, b, x_plus, guided, second, _ = predictions(case)
    first_x0 = (x_t - (1 - a).sqrt() * guided) / a.sqrt()
    second_x0 = (x_plus - (1 - b).sqrt() * second) / b.sqrt()
    mean = (case.x.detach() - first_x0).abs().view(B, -1).mean(1)  # Eq. 2: over all views
    expected = (second_x0 - first_x0) / (mean.repeat_interleave(V).view(-1, 1, 1, 1) + 0.1)
    result, gradient = call(case)
    torch.testing.assert_close(gradient, expected / V)
    torch.testing.assert_close(gradient, result.gradient, atol=0, rtol=0)
    torch.testing.assert_close(result.weight, mean.repeat_interleave(V))
    torch.testing.assert_close(result.loss.detach(), 0.5 * expected.square().view(B, -1).sum(1) / V)
    torch.testing.assert_close(result.gradient_norm, gradient.view(B, -1).norm(dim=1))
    torch.testing.assert_close(call(case, mean_over_views=False)[1], expected)


def test_clean_latent_and_mean_over_each_image(case):
    a, _, _, _, guided, second, _ = predictions(case)
    clean = case.x.detach()
    first_x0, second_x0 = ((clean - (1 - a).sqrt() * e) / a.sqrt() for e in (guided, second))
    weight = (clean - first_x0).abs().mean(dim=(1, 2, 3), keepdim=True)
    _, gradient = call(case, x0_from="clean", average_over="image", delta=0.2)
    torch.testing.assert_close(gradient, (second_x0 - first_x0) / (weight + 0.2) / V)


@pytest.mark.parametrize("weighting, power", [("uniform", 0.0), ("sds", 1.0), ("sqrt", 0.5)])
def test_weights_on_the_difference_of_noises(case, weighting, power):
    a, _, _, _, guided, second, _ = predictions(case)
    _, gradient = call(case, weighting=weighting)
    torch.testing.assert_close(gradient, (1 - a) ** power * (guided - second) / V)


def test_sds_from_noisy_estimates_is_x_against_its_denoised_self(case):
    a, x_t, _, _, guided, _, _ = predictions(case)
    x0 = (x_t - (1 - a).sqrt() * guided) / a.sqrt()
    difference = case.x.detach() - x0
    weight = difference.abs().view(B, -1).mean(1).repeat_interleave(V).view(-1, 1, 1, 1)
    _, gradient = call(case, reference="noise", t_plus=None)
    torch.testing.assert_close(gradient, difference / (weight + 0.1) / V, atol=1e-5, rtol=1e-4)


def test_no_shift_is_the_direction_of_guidance_and_saves_a_pass(case):
    a, *_, guided, _, text = predictions(case)
    _, gradient = call(case, t_plus=None, weighting="uniform")
    torch.testing.assert_close(gradient, (guided - text) / V)
    _, same = call(case, t_plus=case.t, weighting="uniform")
    torch.testing.assert_close(gradient, same)
    assert case.teacher.rows == [2 * B * V, 3 * B * V]


def test_reference_of_another_model(case):
    *_, guided, _, _ = predictions(case)
    other = torch.full_like(guided, 0.3)
    result, gradient = call(case, reference=other, weighting="uniform")
    torch.testing.assert_close(gradient, (guided - 0.3) / V)
    assert case.teacher.rows == [2 * B * V]


def test_gradient_clip(case):
    _, free = call(case)
    _, clipped = call(case, grad_clip=0.05)
    torch.testing.assert_close(clipped, free.clamp(-0.05 / V, 0.05 / V))
    assert (clipped != free).any()


def test_bad_input_is_named(case):
    with pytest.raises(ValueError, match="t=.*0..999"):
        asd_loss(case.teacher, case.x, case.condition, t=torch.tensor([3, 1000]), noise=case.noise, guidance_scale=1.0)
    with pytest.raises(ValueError, match="t=\\(3,\\)"):
        asd_loss(case.teacher, case.x, case.condition, t=torch.ones(3).long(), noise=case.noise, guidance_scale=1.0)
    with pytest.raises(ValueError, match="noise="):
        asd_loss(case.teacher, case.x, case.condition, t=case.t, noise=case.noise[:1], guidance_scale=1.0)
    with pytest.raises(ValueError, match="multiple of its 4 views"):
        asd_loss(case.teacher, case.x[:3], case.condition, t=case.t, noise=case.noise[:3], guidance_scale=1.0)
    with pytest.raises(ValueError, match="reference=\\(1, 4, 3, 3\\)"):
        call(case, reference=case.noise[:1])
    for name in ("weighting", "reference", "x0_from", "average_over"):
        with pytest.raises(ValueError, match=f"{name}\n.*Input should be .*input_value='nothing'"):
            AsdConfig(**{name: "nothing"})
    case.condition.prompt_embeds[5] = float("nan")
    with pytest.raises(NonFinitePrediction, match="teacher=linear.*prompts \\[1\\]"):
        call(case)


def test_what_is_not_finite_is_named(case, tmp_path):
    case.x.data[0, 0, 0, 0] = float("inf")
    with pytest.raises(NonFinitePrediction, match=r"teacher=linear: non-finite input x for prompts \[0\] at t=\[300"):
        call(case)
    teacher = tiny_teacher(tmp_path, "richdreamer")
    predict = teacher.predict_noise

    def broken(x_t, t, condition):
        epsilon = predict(x_t, t, condition)
        epsilon[5] = float("nan")  # the second of two prompts, in the conditional pass
        return epsilon

    teacher.predict_noise = broken
    with pytest.raises(
        NonFinitePrediction, match=r"richdreamer: non-finite noise prediction .*\[1\] \('c d'\) at t=\["
    ):
        ask(teacher, random_views(B, V), ["a", "c d"], 5)


@pytest.mark.parametrize("settings", [{"t": [999, 5]}, {"t": [5, 6], "t_plus": [6, 999]}])
def test_a_timestep_without_signal_is_an_error_where_it_is_divided_by(case, settings):
    case.teacher.alphas_cumprod = torch.linspace(0.999, 0, 1000)
    case.t, case.t_plus = torch.tensor(settings["t"]), torch.tensor(settings.get("t_plus", settings["t"]))
    with pytest.raises(NoSignalError, match="schedule of linear has no signal.*up to 998"):
        call(case)
    _, gradient = call(case, weighting="uniform")  # divides by nothing
    assert gradient.isfinite().all()


def test_a_schedule_of_zero_terminal_snr_is_drawn_from_up_to_its_last_signal(tmp_path):
    teacher = tiny_teacher(tmp_path, "stable_diffusion", "v_prediction")
    betas = rescale_zero_terminal_snr(torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    teacher.alphas_cumprod = (1 - betas).cumprod(0)
    assert teacher.alphas_cumprod[-1] == 0 and last_timestep(teacher) == 998
    leaves = leaf_views(random_views(B, V))
    for seed in range(20):
        result = ask(teacher, leaves, ["a", "b"], seed, t_min=990, t_max=1000, eta=1.0)
        assert result.gradient.isfinite().all()


def test_as_many_prompts_as_shapes(tmp_path):
    teacher = tiny_teacher(tmp_path, "stable_diffusion")
    with pytest.raises(ValueError, match="prompts: 1 given for renderings of 2"):
        ask(teacher, random_views(B, V), ["a"], 5)
    with pytest.raises(TypeError, match="list of strings"):
        ask(teacher, random_views(B, V), "ab", 5)


def test_timesteps():
    u = torch.tensor([0.0, 0.5, 1 - 2**-24])
    assert sample_timesteps(u, 20, 980).tolist() == [20, 500, 979]
    t = torch.tensor([20, 500, 979])
    assert shifted_timesteps(t, torch.full((3,), 0.999), 0.1, 20).tolist() == [20, 547, 998]
    assert shifted_timesteps(t, torch.rand(3), 0.0, 20).equal(t)
    assert shifted_timesteps(torch.tensor([10]), torch.tensor([0.9]), 0.5, 20).item() == 10
    assert shifted_timesteps(torch.tensor([11, 999]), torch.ones(2), 4.0, 20, sqrt_bias=25.0).tolist() == [35, 999]
    with pytest.raises(ValueError, match="t_min=5, t_max=5"):
        sample_timesteps(u, 5, 5)
    with pytest.raises(ValueError, match="eta=-1"):
        shifted_timesteps(t, u, -1, 20)


def test_gradient_taken_at_the_rendering_is_that_through_it(tmp_path):
    teacher = tiny_teacher(tmp_path, "mvdream")
    colour = torch.full((3,), 0.5, requires_grad=True)
    views = random_views(1, V)
    object.__setattr__(views, "rgb", views.rgb * colour)
    through = ask(teacher, views, ["a"], 5).loss.sum()
    (expected,) = torch.autograd.grad(through, colour, retain_graph=True)
    leaves = leaf_views(views)
    gradient = rendering_gradient(ask(teacher, leaves, ["a"], 5).loss.sum(), leaves)
    rendering_loss(views, gradient).backward()
    torch.testing.assert_close(colour.grad, expected)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"t_plus": torch.tensor([299, 750])}, "t_plus=.*no less than t="),
        ({"t_plus": torch.tensor([299, 750]), "reference": "noise"}, "t_plus=.*no less than t="),
        ({"t_plus": torch.tensor([True, True])}, "t_plus=.*bool: must be integers"),
        ({"reference": torch.full((B * V, 4, 3, 3), float("nan"))}, "reference: holds NaN"),
        ({"reference": Condition(torch.rand(1, 1, 1), torch.rand(1, 1, 1))}, "reference: 1 rows for 8 images"),
    ],
)
def test_arguments_out_of_range_are_named(case, settings, message):
    with pytest.raises(ValueError, match=message):
        call(case, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"grad_clip": 0.0},
        {"grad_clip": float("nan")},
        {"delta": -0.1},
        {"delta": 0.0},
        {"delta": float("inf")},
        {"t_min": 980},
        {"t_min": (5, 980)},
        {"t_min": -1},
        {"t_max": 1001},
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        AsdConfig(**settings)


def test_timesteps_are_drawn_from_somewhere():
    with pytest.raises(ValueError, match="t_min=980.0: must be below t_max=980"):
        AsdConfig(t_min=980.0, t_max=980)


def test_rows_of_the_condition_are_those_of_the_images(case):
    case.condition = Condition(case.condition.prompt_embeds[:1], case.condition.negative_prompt_embeds[:1])
    with pytest.raises(ValueError, match="condition: 1 rows for 8 images"):
        call(case)


def test_reference_of_another_condition_and_of_another_model(case):
    """At t_plus if it is given, else at t: the first by the teacher itself in the same call, the second by itself."""
    *_, guided, _, _ = predictions(case)
    a = case.teacher.alphas_cumprod[case.t.repeat_interleave(V)].view(-1, 1, 1, 1)
    b = case.teacher.alphas_cumprod[case.t_plus.repeat_interleave(V)].view(-1, 1, 1, 1)
    x_t = a.sqrt() * case.x.detach() + (1 - a).sqrt() * case.noise
    x_plus = b.sqrt() * case.x.detach() + (1 - b).sqrt() * case.noise
    another = Condition(torch.full((B * V, 1, 1), 0.7), torch.zeros(B * V, 1, 1))
    for t, noisy, t_plus in ((case.t, x_t, None), (case.t_plus, x_plus, case.t_plus)):
        expected = guided - (noisy * 0.7 + t.repeat_interleave(V).view(-1, 1, 1, 1) / 1000)
        case.teacher.rows.clear()
        _, gradient = call(case, reference=another, t_plus=t_plus, weighting="uniform")
        torch.testing.assert_close(gradient, expected / V)
        assert case.teacher.rows == [3 * B * V]
        fake = LinearTeacher()
        fake.predict_noise = lambda x, t, condition: x * 0.7 + t.view(-1, 1, 1, 1) / 1000
        _, gradient = call(case, reference=fake, t_plus=t_plus, weighting="uniform")
        torch.testing.assert_close(gradient, expected / V)
    share = torch.full((B * V,), 0.25)  # interpolated guidance leaves the reference as it is
    _, gradient = call(case, reference=another, t_plus=None, weighting="uniform", other=(another, share))
    text = torch.lerp(case.condition.prompt_embeds, another.prompt_embeds, 0.25)
    negative = case.condition.negative_prompt_embeds
    difference = negative + 7.5 * (text - negative) - 0.7
    torch.testing.assert_close(gradient, x_t * difference.view(-1, 1, 1, 1) / V)
    fake.predict_noise = lambda x, t, condition: x * float("nan")
    with pytest.raises(NonFinitePrediction, match="prediction of the reference model"):
        call(case, reference=fake)
