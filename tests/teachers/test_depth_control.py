"""A depth ControlNet on tiny random instances: the depth is seen, stretched, and pulls nothing itself."""

from dataclasses import replace

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from prd.teachers import Condition, DepthControlTeacher, StableDiffusionTeacher
from prd.teachers.base import ViewConditioned
from tests.teachers.tiny import random_views, save_controlnet, save_teacher


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("control")
    save_teacher(folder / "sd", "stable_diffusion")
    save_controlnet(folder / "depth", folder / "sd" / "unet")
    return str(folder / "sd"), str(folder / "depth")


@pytest.fixture
def teacher(folders):
    return DepthControlTeacher.from_pretrained(folders[0], controlnet=folders[1])


def predict(teacher, views, condition):
    x = torch.randn(len(condition.prompt_embeds), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return teacher.predict_noise(x, torch.full((len(x),), 300), condition)


def test_the_control_image_is_the_disparity_stretched(teacher):
    views = random_views(2, 1, size=16)
    disparity = views.disparity.clone()
    disparity[0] = 0.3 + 0.2 * disparity[0]
    disparity[1] = 0.4  # flat: nothing to stretch
    views = replace(views, disparity=disparity)
    control = teacher.condition_on(teacher.condition(["a", "b"], views.cameras), views).control
    assert control.shape == (2, 3, 16, 16) and control[0].min() == 0 and control[0].max() == 1
    assert control[1].abs().max() == 0
    flat = disparity[0, 0, ..., 0]
    torch.testing.assert_close(control[0, 1], (flat - flat.min()) / (flat.max() - flat.min()))


def test_depth_moves_the_prediction_as_the_scale_says(teacher, folders):
    assert isinstance(teacher, ViewConditioned)
    plain = StableDiffusionTeacher.from_pretrained(folders[0])
    assert not isinstance(plain, ViewConditioned)
    views, other = random_views(1, 1), random_views(1, 1, seed=1)
    condition = teacher.condition(["a"], views.cameras)
    near, far = (predict(teacher, v, teacher.condition_on(condition, v)) for v in (views, other))
    assert (near - far).abs().max() > 1e-4
    weak = DepthControlTeacher.from_pretrained(folders[0], controlnet=folders[1], controlnet_scale=0.0)
    unmoved = predict(weak, views, weak.condition_on(condition, views))
    torch.testing.assert_close(unmoved, predict(plain, views, condition))


def test_all_passes_of_guidance_see_the_depth(teacher):
    views = random_views(2, 1)
    condition = teacher.condition_on(teacher.condition(["a", "b"], views.cameras, "c"), views)
    both = Condition.cat([condition, condition.negative()])
    torch.testing.assert_close(both.control, condition.control.repeat(2, 1, 1, 1))
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([300, 300])
    together = teacher.predict_noise(torch.cat([x, x]), torch.cat([t, t]), both)
    torch.testing.assert_close(together[:2], teacher.predict_noise(x, t, condition), atol=1e-6, rtol=1e-5)


def test_bad_input_is_named(teacher, folders, tmp_path):
    views = random_views(1, 1)
    with pytest.raises(ValueError, match="no control image"):
        predict(teacher, views, teacher.condition(["a"], views.cameras))
    unet = UNet2DConditionModel.from_pretrained(folders[0], subfolder="unet")
    config = dict(unet.config) | {"cross_attention_dim": 24}
    other = ControlNetModel.from_unet(UNet2DConditionModel.from_config(config), load_weights_from_unet=False)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="controlnet: its cross_attention_dim 24 is not the U-Net's 16"):
        DepthControlTeacher.from_pretrained(folders[0], controlnet=str(tmp_path))
