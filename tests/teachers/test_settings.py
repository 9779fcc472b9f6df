"""What a teacher's folder says is checked when it is loaded: settings, noise schedule, parts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from prd.teachers import CheckpointError, MVDreamConfig, MVDreamTeacher, RichDreamerConfig, StableDiffusionTeacher
from prd.teachers.base import to_images
from prd.teachers.loading import load_schedule, read_config
from prd.teachers.mvdream import NEGATIVE_PROMPT
from tests.teachers.tiny import save_teacher, tiny_teacher


@pytest.mark.parametrize(
    "setting",
    [
        {"num_views": 0},
        {"num_views": 4.0},
        {"num_views": True},
        {"num_views": "4"},
        {"camera_encoding": "mvdreams"},
        {"camera_encoding": ["mvdream"]},
        {"base": 3},
        {"base": ""},
    ],
)
@pytest.mark.parametrize("settings", [MVDreamConfig, RichDreamerConfig])
def test_a_setting_no_model_can_have(tmp_path, settings, setting):
    (tmp_path / "teacher_config.json").write_text(json.dumps(setting), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"teacher_config.json: {next(iter(setting))}="):
        read_config(str(tmp_path), settings)


@pytest.mark.parametrize(
    "setting",
    [
        {"resize": "nearest"},
        {"image_range": [1.0, 0.0]},
        {"image_range": [0.0]},
        {"image_range": 1.0},
        {"image_range": [0.0, "1"]},
        {"image_range": [0.0, float("inf")]},
        {"normal_background": [0.5, 0.5]},
        {"normal_background": [0.5, 0.5, 2.0]},
    ],
)
def test_richdreamers_own_settings(tmp_path, setting):
    (tmp_path / "teacher_config.json").write_text(json.dumps(setting), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"{next(iter(setting))}="):
        read_config(str(tmp_path), RichDreamerConfig)


def test_mvdreams_own_settings():
    for shares in (1, "yes", True):  # the last without a base to share with
        with pytest.raises(ValueError, match="shares_vae="):
            MVDreamConfig(shares_vae=shares)
    assert MVDreamConfig(shares_vae=True, base="../sd").shares_vae


@pytest.mark.parametrize("text", ["{", "[]", "3", '"mvdream"', '{"num_views": 4,}'])
def test_settings_that_are_no_json_object(tmp_path, text):
    (tmp_path / "teacher_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="teacher_config.json: (is no JSON|must hold an object)"):
        read_config(str(tmp_path), MVDreamConfig)


def test_a_resize_is_checked_whatever_the_size():
    with pytest.raises(ValueError, match="resize='nearest'"):
        to_images(torch.rand(1, 1, 8, 8, 3), 8, "nearest")  # type: ignore[arg-type]


def test_schedules_of_betas_are_taken_whatever_their_sampler(tmp_path):
    betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    found = []
    for i, kind in enumerate((PNDMScheduler, EulerDiscreteScheduler)):
        kind(**betas).save_pretrained(tmp_path / str(i) / "scheduler")
        found.append(load_schedule(str(tmp_path / str(i))).alphas_cumprod)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "change, message",
    [
        (None, "FlowMatchEulerDiscreteScheduler has no schedule of betas"),
        ({"use_flow_sigmas": True}, "has no schedule of betas"),
        ({"prediction_type": "flow_prediction"}, "has no schedule of betas"),
        ({"prediction_type": "noise"}, "prediction_type='noise'; must be one of epsilon"),
        ({"beta_schedule": "wavy"}, "betas cannot be made"),
        ({"beta_end": 2.0, "beta_schedule": "linear"}, "betas lie outside"),
    ],
)
def test_other_schedules_are_refused_at_load(tmp_path, change, message):
    folder = save_teacher(tmp_path, "stable_diffusion")
    if change is None:
        shutil.rmtree(folder / "scheduler")
        FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    else:
        path = folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        StableDiffusionTeacher.from_pretrained(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler", "text_encoder"])
def test_a_missing_part_is_named(tmp_path, part):
    folder = save_teacher(tmp_path, "stable_diffusion")
    shutil.rmtree(folder / part)
    with pytest.raises(CheckpointError, match=part):
        StableDiffusionTeacher.from_pretrained(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_truncated_file_is_named(tmp_path, part):
    folder = save_teacher(tmp_path, "stable_diffusion")
    (path,) = (folder / part).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=part):
        StableDiffusionTeacher.from_pretrained(folder)


def test_the_decoder_is_not_kept(tmp_path):
    for kind in ("stable_diffusion", "mvdream"):
        teacher = tiny_teacher(tmp_path / kind, kind)
        names = {name.split(".")[1] for name, _ in teacher.named_parameters() if name.startswith("vae.")}
        assert names == {"encoder", "quant_conv"}, kind
    assert isinstance(teacher, MVDreamTeacher)


def test_the_published_negative_prompt_is_the_recipes():
    teachers = yaml.safe_load(
        (Path(__file__).parents[2] / "configs" / "triplane_turbo_sd21.yaml").read_text(encoding="utf-8")
    )["teachers"]
    for name in ("mvdream", "richdreamer"):
        assert teachers[name]["negative_prompt"].strip() == NEGATIVE_PROMPT
