"""Teachers: what they see, that they are frozen, and that bad input is named."""

import json
from dataclasses import replace

import pytest
import torch

from prd.cameras import orbit_cameras
from prd.teachers import MVDreamTeacher, RichDreamerConfig, RichDreamerTeacher
from prd.teachers.base import epsilon_from, to_images
from prd.text.encoders import view_prompts
from tests.teachers.tiny import TEACHERS, random_views, save_teacher, tiny_teacher


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["mvdream", "richdreamer"])
def test_views_of_a_prompt_see_each_other_and_their_cameras_only(tmp_path, kind):
    teacher = tiny_teacher(tmp_path, kind)
    views = random_views(2, 4)
    x, t = draw(8, 4, 8, 8), torch.full((8,), 300)
    condition = teacher.condition(["a", "b"], views.cameras)
    before = teacher.predict_noise(x, t, condition)
    moved = x.clone()
    moved[1] += 1
    changed = (teacher.predict_noise(moved, t, condition) - before).abs().flatten(1).amax(1) > 1e-6
    assert changed.tolist() == [True] * 4 + [False] * 4
    turned = replace(condition, camera=condition.camera.roll(1, 0))
    assert not torch.allclose(teacher.predict_noise(x, t, turned), before, atol=1e-5)


def test_epsilon_from_every_parameterisation():
    x, noise, a = draw(2, 4, 3, 3), draw(2, 4, 3, 3, seed=1), torch.tensor([0.9, 0.2])
    b = a.view(-1, 1, 1, 1)
    x_t = b.sqrt() * x + (1 - b).sqrt() * noise
    v = b.sqrt() * noise - (1 - b).sqrt() * x
    for predicted, kind in ((noise, "epsilon"), (v, "v_prediction"), (x, "sample")):
        torch.testing.assert_close(epsilon_from(predicted, x_t, a, kind), noise)
    with pytest.raises(ValueError, match="prediction_type='flow'"):
        epsilon_from(noise, x_t, a, "flow")


def test_v_prediction_is_read_from_the_folder(tmp_path):
    as_epsilon = tiny_teacher(tmp_path / "e", "stable_diffusion")
    as_v = tiny_teacher(tmp_path / "v", "stable_diffusion", "v_prediction")
    condition = as_v.condition(["a"], random_views(1, 1).cameras)
    x, t = draw(1, 4, 8, 8), torch.tensor([700])
    a = as_v.alphas_cumprod[700]
    expected = a.sqrt() * as_epsilon.predict_noise(x, t, condition) + (1 - a).sqrt() * x
    torch.testing.assert_close(as_v.predict_noise(x, t, condition), expected)


def test_vae_posterior_mean_draw_and_injected_noise(tmp_path):
    teacher = tiny_teacher(tmp_path, "stable_diffusion")
    views = random_views(2, 1)
    mean = teacher.encode(views)
    noise = draw(*mean.shape, seed=3)
    drawn = teacher.encode(views, noise=noise)
    torch.testing.assert_close(2 * mean - drawn, teacher.encode(views, noise=-noise))
    assert not torch.allclose(drawn, mean)
    recomputed = tmp_path
    checkpointed = TEACHERS["stable_diffusion"].from_pretrained(recomputed, checkpoint_vae=True)
    gradients = []
    for each in (teacher, checkpointed):
        rgb = views.rgb.clone().requires_grad_()
        gradients += torch.autograd.grad(each.encode(replace(views, rgb=rgb), noise=noise).square().sum(), rgb)
    torch.testing.assert_close(*gradients)


def test_richdreamer_range_and_background(tmp_path):
    views = random_views(1, 4, size=8)
    empty = replace(views, normal=views.normal * 0, opacity=views.opacity * 0, disparity=views.disparity * 0)
    own = tiny_teacher(tmp_path, "richdreamer")
    x = own.encode(empty)
    torch.testing.assert_close(x[:, :, 0, 0], torch.tensor([0.0, 0.0, 1.0, -1.0]).expand(4, -1))
    published = RichDreamerTeacher.from_pretrained(
        tmp_path, config=RichDreamerConfig(image_range=(0.0, 1.0), resize="area")
    )
    torch.testing.assert_close(published.encode(empty), (x + 1) / 2)
    full = replace(views, opacity=torch.ones_like(views.opacity), normal=torch.zeros_like(views.normal))
    full.normal[..., :] = full.cameras.camera_to_world[0, :, :3, 0][None, :, None, None]  # the cameras' right
    torch.testing.assert_close(
        own.encode(full)[:, :3, 0, 0], torch.tensor([-1.0, 0.0, 0.0]).expand(4, -1), atol=1e-6, rtol=0
    )


def test_resizing_averages_or_interpolates():
    pixels = torch.rand(1, 1, 6, 6, 1)
    area = to_images(pixels, 2, "area")[0, 0]
    torch.testing.assert_close(area[0, 0], pixels[0, 0, :3, :3, 0].mean())
    bilinear = to_images(pixels, 2, "bilinear")[0, 0]
    torch.testing.assert_close(bilinear[0, 0], pixels[0, 0, 1, 1, 0])


def test_each_distinct_prompt_is_encoded_once(tmp_path, monkeypatch):
    teacher = tiny_teacher(tmp_path, "stable_diffusion")
    rows = []
    forward = teacher.text_encoder.forward
    monkeypatch.setattr(teacher.text_encoder, "forward", lambda ids, **k: rows.append(len(ids)) or forward(ids, **k))
    first = teacher.prompt_encoder(["a", "b", "a", ""])
    second = teacher.prompt_encoder(["b", "", "c"])
    assert rows == [3, 1]
    torch.testing.assert_close(first[[1, 3]], second[:2])
    torch.testing.assert_close(first[0], first[2])


def test_a_long_prompt_keeps_its_end_token(tmp_path):
    teacher = tiny_teacher(tmp_path, "stable_diffusion")
    seen = []
    teacher.text_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    teacher.prompt_encoder(["a b c d e a b c d e a b c d e"])
    assert seen[0].shape == (1, 8) and seen[0][0, -1] == teacher.prompt_encoder.tokenizer.eos_token_id


def test_text_encoder_shared_with_stable_diffusion(tmp_path):
    save_teacher(tmp_path / "sd", "stable_diffusion", seed=1)
    folder = save_teacher(tmp_path / "mv", "mvdream")
    for part in ("tokenizer", "text_encoder", "vae"):
        (folder / part).rename(folder / f"unused_{part}")
    (folder / "teacher_config.json").write_text(
        json.dumps({"camera_encoding": "fourier", "base": "../sd", "shares_vae": True}), encoding="utf-8"
    )
    teacher = MVDreamTeacher.from_pretrained(folder)
    sd = TEACHERS["stable_diffusion"].from_pretrained(tmp_path / "sd")
    torch.testing.assert_close(teacher.prompt_encoder(["a"]), sd.prompt_encoder(["a"]))


def test_sides_are_told_by_dreamfusions_thresholds():
    azimuth = torch.tensor([[0.0, 44.0, -46.0, 90.0, 136.0, 180.0, -134.0, 0.0, 180.0]])
    elevation = torch.tensor([[0.0, 59.9, 0.0, 59.0, 0.0, -20.0, 0.0, 61.0, 80.0]])
    sides = ["front", "front", "side", "side", "back", "back", "side", "overhead", "overhead"]
    cameras = orbit_cameras(elevation, azimuth, 2.4, 50.0)
    assert view_prompts(["a b"], cameras) == [f"a b, {side} view" for side in sides]
    both = view_prompts(["a", "b"], random_views(2, 2).cameras)
    assert both == ["a, front view", "a, side view", "b, front view", "b, side view"]


def test_view_dependent_prompts_reach_stable_diffusion(tmp_path):
    folder = save_teacher(tmp_path, "stable_diffusion")
    plain, sided = (
        TEACHERS["stable_diffusion"].from_pretrained(folder, view_dependent=on).condition for on in (False, True)
    )
    cameras = random_views(2, 4).cameras
    encode = TEACHERS["stable_diffusion"].from_pretrained(folder).prompt_encoder
    behind = cameras.select(torch.tensor([[2], [0]]))
    seen = sided(["a", "b"], behind, "c")
    torch.testing.assert_close(seen.prompt_embeds, encode(["a, back view", "b, front view"]))
    torch.testing.assert_close(seen.negative_prompt_embeds, encode(["c", "c"]))
    torch.testing.assert_close(plain(["a", "b"], behind).prompt_embeds, encode(["a", "b"]))


def test_bad_settings_and_noise_are_named(tmp_path):
    teacher = tiny_teacher(tmp_path, "mvdream")
    with pytest.raises(ValueError, match="noise="):
        teacher.encode(random_views(2, 4), noise=torch.zeros(1))
    (tmp_path / "teacher_config.json").write_text(json.dumps({"camera_encodng": "fourier"}), encoding="utf-8")
    with pytest.raises(ValueError, match="camera_encodng is no setting"):
        MVDreamTeacher.from_pretrained(tmp_path)
    (tmp_path / "teacher_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="teacher_config.json"):
        MVDreamTeacher.from_pretrained(tmp_path)
