"""The example of docs/teachers.md runs as it is printed there."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from prd.rendering.views import Views
from prd.teachers import TeacherOptions
from prd.training.parts import build_parts
from prd.training.recipes import load_config
from prd.training.trainer import Trainer
from tests.teachers.tiny import random_views, save_teacher
from tests.training.test_trainer import SMALL

PAGE = Path(__file__).parents[2] / "docs" / "teachers.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.fixture
def folder(tmp_path):
    """A tiny model of two channels."""
    save_teacher(tmp_path, "stable_diffusion")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    two = UNet2DConditionModel.from_config(dict(unet.config) | {"in_channels": 2, "out_channels": 2})
    two.save_pretrained(tmp_path / "unet")
    return str(tmp_path)


def test_the_page_runs_from_top_to_bottom(folder, capsys):
    views = random_views(1, 4)
    tensors = {k: getattr(views, k).requires_grad_() for k in ("rgb", "normal", "depth", "disparity", "opacity")}
    names = {"FOLDER": folder, "views": Views(**tensors, cameras=views.cameras)}
    code = blocks()
    assert len(code) == 3
    for block in code:
        exec(compile(block, str(PAGE), "exec"), names)
    assert sorted(names["gradient"]) == ["disparity", "opacity"]
    pulled = [k for k, tensor in tensors.items() if tensor.grad is not None and bool(tensor.grad.abs().max() > 0)]
    assert pulled == ["disparity", "opacity"]
    assert "gradient_norm/silhouette/volume" in capsys.readouterr().out
    teacher = names["teacher"]
    assert isinstance(teacher, torch.nn.Module) and teacher.encode.__doc__


def test_a_teacher_of_ones_own_is_made_from_a_recipes_settings(folder):
    names: dict = {}
    exec(compile(blocks()[0], str(PAGE), "exec"), names)
    kind = names["SilhouetteTeacher"]
    settings = kind.config_class(path=folder)
    teacher = kind.from_config(settings, options=TeacherOptions(), dtype=torch.bfloat16)
    assert teacher.unet.dtype == torch.bfloat16 and teacher.input_shape == (2, 8, 8)


def test_a_teacher_of_ones_own_joins_a_run(folder, toybox, tmp_path):
    """As the page says: among the parts of the run."""
    names: dict = {}
    exec(compile(blocks()[0], str(PAGE), "exec"), names)
    words = [*SMALL, "--renderer_schedule", "volume", "--output_dir", str(tmp_path / "run")]
    config = load_config("toybox", words)
    parts = build_parts(config)
    parts.teachers["silhouette"] = names["SilhouetteTeacher"].from_pretrained(folder)
    row = Trainer(config, parts).train_step(0)
    assert row["gradient_norm/silhouette/volume"] > 0
